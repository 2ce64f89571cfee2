"""Language modelling: predict each token of a stream of documents from those before it."""

import bz2
import dataclasses
import gzip
import lzma
import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Literal

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from pydantic import PositiveInt
from transformers import AutoModelForCausalLM, EvalPrediction, PreTrainedTokenizerBase, TrainingArguments

from scripts.data.streaming import StreamedWindows
from scripts.data.streams import Streams
from scripts.data.tokenization import build_tokenizer, characters_per_token, token_ids
from scripts.data.windows import IGNORED, TokenStream, Windows
from scripts.metrics import METRIC_FUNCTIONS
from scripts.tasks.prepared import Prepared, check, vocabulary


METRICS = ("bits_per_character", "perplexity")
COMPRESSORS = {
    "gzip": partial(gzip.compress, compresslevel=9),
    "bzip2": partial(bz2.compress, compresslevel=9),
    "xz": partial(lzma.compress, preset=9),
}
# A character outside the vocabulary has to be spelled out after its `<unk>`: one of all code points, all alike.
ESCAPE_NATS = math.log(0x110000)


@dataclasses.dataclass(frozen=True)
class Options:
    """
    Args:
        window: tokens of a training row; a row predicts all of them but its first.
        stride: tokens between the beginnings of two training rows; `window - 1` if left out: each is predicted once.
        train_once: predict each token only in the first row that holds it, also with a smaller stride.
        eval_window, eval_stride: the same for scoring, where a token is scored only in the first row that predicts it;
            a smaller stride gives more context to each. `window` and half of it if left out.
        max_eval_rows: rows scored at an evaluation during training, spread over the split; all if left out.
        documents: `joined`: a row continues into the next document; `separate`: the rows are the same, but attention
            and recurrences stop at the end of a document.
        rows: `windows`: each row is read alone; `streams`: a model with `memory_length` reads the text in order, row
            s of a stream after row s - 1, and remembers. `window` and `eval_window` are then the tokens that a row
            predicts.
    """

    name: str
    window: int = 256
    stride: int | None = None
    train_once: bool = False
    eval_window: int | None = None
    eval_stride: int | None = None
    max_eval_rows: PositiveInt | None = None
    documents: Literal["joined", "separate"] = "joined"
    rows: Literal["windows", "streams"] = "windows"

    def __post_init__(self) -> None:
        if self.rows == "streams":
            for name in ("stride", "eval_stride", "train_once"):
                if getattr(self, name):
                    raise ValueError(f"`task.{name}` is not for `task.rows` 'streams', whose rows follow each other")
        for stride, window in (("stride", "window"), ("eval_stride", "eval_window")):
            width, step = getattr(self, window) or self.window, getattr(self, stride)
            if width < 2:
                raise ValueError(f"`task.{window}` must be at least 2, got {width}")
            if step is not None and not 1 <= step < width:
                raise ValueError(f"`task.{stride}` must be from 1 to `{window}` - 1 ({width - 1}), got {step}")

    def dataset(self, stream: TokenStream, *, training: bool) -> Windows | Streams:
        """The rows of one split."""
        window = self.window if training else self.eval_window or self.window
        if self.rows == "streams":
            return Streams(stream, segment=window, separate=self.documents == "separate")
        stride = (self.stride or window - 1) if training else (self.eval_stride or window // 2)
        score_once = self.train_once or not training
        separate = self.documents == "separate"
        return Windows(stream, window=window, stride=stride, score_once=score_once, separate=separate)


def prepare(recipe, tokenizer: PreTrainedTokenizerBase | None, splits: Sequence[str]) -> Prepared:
    """Tokenise the documents, join them into one stream a split and cut it into rows."""
    check(recipe, METRICS, compressors=COMPRESSORS, text=True, tokenizer=tokenizer)
    if recipe.task.rows == "streams":
        check_streams(recipe)
    options, documents = recipe.task, recipe.load_data()
    for split in splits:
        if isinstance(documents[split], Dataset) and not any(row["text"] for row in documents[split]):
            raise ValueError(f"the {split} split of `data` has no text; name files that hold some")
    if tokenizer is None:
        texts = islice((row["text"] for row in documents["train"]), recipe.tokenizer.max_texts)
        tokenizer = build_tokenizer(recipe.tokenizer, texts)
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end of a text (`eos_token`), which divides documents; use another one")
    characters = characters_per_token(tokenizer)
    if "bits_per_character" in recipe.report.metrics and characters is None:
        raise ValueError(
            "`report.metrics` has bits_per_character, which this tokenizer cannot give, as one of words; use perplexity"
        )
    datasets = {
        split: options.dataset(token_stream(documents[split], tokenizer), training=split == "train")
        if isinstance(documents[split], Dataset)
        else stream_of_rows(recipe, documents[split], tokenizer)
        for split in splits
    }
    in_streams = options.rows == "streams"
    return Prepared(
        auto_class=AutoModelForCausalLM,
        config_values=vocabulary(tokenizer),
        datasets=datasets,
        tokenizer=tokenizer,
        max_eval_rows=options.max_eval_rows,
        reduce_logits=partial(row_nll, shifted=in_streams),
        compute_metrics=partial(
            language_metrics,
            metrics=recipe.report.metrics,
            characters=characters,
            unknown_id=tokenizer.unk_token_id,
            shifted=in_streams,
        ),
        compare=lambda split: {
            name: compressed_bits_per_character(documents[split]["text"], name) for name in recipe.report.compressors
        },
    )


def check_streams(recipe) -> None:
    """Refuse what does not go with a memory that is carried from row to row."""
    config, options = recipe.config(), recipe.task
    if getattr(config, "memory_length", None) is None:
        raise ValueError("`model.memory_length` must be a number with `task.rows` 'streams', got None")
    for section, name in (
        ("data", "streaming"),
        ("budget", "total_seconds"),
        ("training", "gradient_checkpointing"),
        ("training", "auto_find_batch_size"),
        ("training", "fsdp"),
    ):
        settings = getattr(recipe, section)
        value = settings.get(name) if isinstance(settings, Mapping) else getattr(settings, name, None)
        if value:
            raise ValueError(f"`{section}.{name}` is not for `task.rows` 'streams'; leave one of them out")
    if not config.recurrent_layers:
        return
    block, window = config.block_length, options.window
    if window % block or window < 2 * block:
        raise ValueError(
            f"`task.window` must be whole blocks of `model.block_length` ({block}), at least two, with `task.rows` "
            f"'streams', got {window}: gradients reach the states' update only from a later block of the same row"
        )
    if options.documents == "separate":
        raise ValueError("`task.documents` must be 'joined' with `model.recurrent_layers`: blocks cross documents")


def token_stream(documents: Dataset, tokenizer: PreTrainedTokenizerBase) -> TokenStream:
    """
    All documents as one stream of ids: `<eos>`, then each document followed by `<eos>`.

    The first `<eos>` is never predicted, so every token of every document is, the first one included. The tokens are
    written to the Arrow cache once and read from there, a row at a time.
    """
    tokenized = documents.map(
        _tokenize,
        batched=True,
        remove_columns=documents.column_names,
        features=Features({"input_ids": List(Value("int32"))}),
        fn_kwargs={"tokenizer": tokenizer},
        desc="tokenising",
    )
    return TokenStream(tokenized.with_format("arrow")[:]["input_ids"].chunks, tokenizer.eos_token_id)


def stream_of_rows(recipe, documents: IterableDataset, tokenizer: PreTrainedTokenizerBase) -> StreamedWindows:
    """The training rows of documents that are tokenised as they come."""
    options, training = recipe.task, recipe.training
    seed = training.get("data_seed")
    return StreamedWindows(
        documents,
        tokenizer,
        window=options.window,
        stride=options.stride or options.window - 1,
        block=recipe.data.shuffle_documents,
        seed=training.get("seed", TrainingArguments.seed) if seed is None else seed,
        separate=options.documents == "separate",
    )


def _tokenize(batch: dict[str, list], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    return {"input_ids": [np.append(ids, tokenizer.eos_token_id) for ids in token_ids(tokenizer, batch["text"])]}


def row_nll(logits: torch.Tensor, labels: torch.Tensor, shifted: bool = False) -> torch.Tensor:
    """
    Summed negative log likelihood, in nats, of the scored positions of each row: (B, L, V), (B, L) -> (B,). Labels that
    are `shifted` already are the tokens that follow.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    if not shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    targets = labels.contiguous()
    nll = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return nll.view_as(targets).double().sum(dim=1)


def language_metrics(
    prediction: EvalPrediction,
    *,
    metrics: Sequence[str],
    characters: Sequence[int] | None,
    unknown_id: int | None,
    shifted: bool = False,
) -> dict[str, float]:
    """
    Metrics from the summed likelihoods and the labels they belong to: exact, whatever the batches were.

    Bits per character counts what a reader would need to restore the text: `<eos>` costs bits but is no character; a
    character outside the vocabulary costs its `<unk>` and the naming of one of all 1,114,112 code points.
    """
    labels = prediction.label_ids if shifted else prediction.label_ids[:, 1:]
    scored = labels[labels != IGNORED]
    nll = np.asarray(prediction.predictions, dtype=np.float64)
    result = {}
    if "perplexity" in metrics:
        result["perplexity"] = METRIC_FUNCTIONS["perplexity"](nll=[nll.sum()], count=[len(scored)])
    if "bits_per_character" in metrics:
        escapes = ESCAPE_NATS * int((scored == unknown_id).sum()) if unknown_id is not None else 0.0
        count = int(np.asarray(characters)[scored].sum())
        nll = [nll.sum() + escapes]
        result["bits_per_character"] = METRIC_FUNCTIONS["bits_per_character"](nll=nll, count=[count])
    return result


def compressed_bits_per_character(texts: Sequence[str], compressor: str) -> float:
    """What a general compressor at its highest setting makes of the same text."""
    text = "".join(texts)
    return 8 * len(COMPRESSORS[compressor](text.encode("utf-8"))) / len(text)
