"""
Next symbols: after each symbol of a string of a formal language, the set of those that may follow.

The model reads the string and gives each symbol, and the end of the string, a yes or no at every position (a logit
above zero is a yes). A string is right if all of them are, at all its positions.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForAudioFrameClassification, EvalPrediction

from scripts.data.sources.regular_languages import AUTOMATA, BINS, END, Automaton
from scripts.metrics import METRIC_FUNCTIONS
from scripts.tasks.frame_prediction import row_nll
from scripts.tasks.prepared import Prepared, check, classes


METRICS = ("string_accuracy", "string_accuracy_long", "nats_per_frame")
IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Options:
    """No settings."""

    name: str


def prepare(recipe, tokenizer, splits: Sequence[str]) -> Prepared:
    """Number the symbols of the strings."""
    check(recipe, METRICS, causal=True)
    if recipe.data.source != "regular_languages":
        raise ValueError(f"`data.source` must be regular_languages for next_symbols, got {recipe.data.source!r}")
    strings = recipe.load_data()
    automaton = AUTOMATA[recipe.data.language]
    padding = len(automaton.alphabet)  # the end is never read, so its number is free among the inputs
    datasets = {split: [number_symbols(text, automaton) for text in strings[split]["text"]] for split in splits}
    return Prepared(
        auto_class=AutoModelForAudioFrameClassification,
        config_values={
            "vocab_size": padding + 1,
            "pad_token_id": padding,
            "problem_type": "multi_label_classification",
            **classes([*automaton.alphabet, END]),
        },
        datasets=datasets,
        collator=partial(pad_strings, padding=padding),
        reduce_logits=row_scores,
        compute_metrics=partial(string_metrics, metrics=recipe.report.metrics),
    )


def number_symbols(text: str, automaton: Automaton) -> dict[str, torch.Tensor]:
    """A string as the numbers of its symbols (T,), and what may follow each (T, S + 1)."""
    ids = torch.tensor([automaton.alphabet.index(symbol) for symbol in text])
    return {"input_ids": ids, "labels": torch.from_numpy(automaton.next_symbols(text)).to(torch.int8)}


def pad_strings(rows: Sequence[dict[str, torch.Tensor]], *, padding: int) -> dict[str, torch.Tensor]:
    """A batch of strings, padded at the end."""
    ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True, padding_value=padding)
    labels = pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=IGNORED)
    return {"input_ids": ids, "attention_mask": (ids != padding).long(), "labels": labels}


def row_scores(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of each string: whether it is right, its length, its nats over all positions.  (B, T, S + 1) twice -> (B, 3)"""
    logits = logits[0] if isinstance(logits, tuple) else logits
    scored = labels != IGNORED
    right = ((logits > 0) == (labels == 1)) | ~scored
    lengths = scored[..., 0].sum(dim=1)
    return torch.stack([right.all(dim=2).all(dim=1), lengths, row_nll(logits, labels)], dim=1).double()


def string_metrics(prediction: EvalPrediction, *, metrics: Sequence[str]) -> dict[str, float]:
    """
    The named metrics: `string_accuracy` and `nats_per_frame`, a position being a frame, of the strings as long as those
    of training, `string_accuracy_long` of the longer ones.
    """
    right, lengths, nats = np.asarray(prediction.predictions, dtype=np.float64).T
    short = lengths <= BINS[0][1]
    inputs = {
        "string_accuracy": {"right": right[short]},
        "string_accuracy_long": {"right": right[~short]},
        "nats_per_frame": {"nll": nats[short], "count": lengths[short]},
    }
    return {name: METRIC_FUNCTIONS[name.removesuffix("_long")](**inputs[name]) for name in metrics}
