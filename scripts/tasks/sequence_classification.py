"""Sequence classification: one label for each text, or for each sequence of numbers."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import torch
from datasets import ClassLabel, Dataset, Value
from pydantic import PositiveInt
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from modeling_rtransformer.configuration_rtransformer import nearest
from scripts.data.tokenization import build_tokenizer
from scripts.metrics import METRIC_FUNCTIONS
from scripts.tasks.prepared import Prepared, check, classes, vocabulary


METRICS = ("accuracy", "f1")


@dataclasses.dataclass(frozen=True)
class Options:
    """
    Args:
        labels: names of the classes in order; those of the training data, sorted, if left out. An integer label is an
            index into this list.
        max_length: cut longer texts to their first so many tokens; no limit if left out.
        max_eval_rows: rows scored at an evaluation during training, spread over the split; all if left out.
    """

    name: str
    labels: list[str] | None = None
    max_length: PositiveInt | None = None
    max_eval_rows: PositiveInt | None = None


def prepare(recipe, tokenizer: PreTrainedTokenizerBase | None, splits: Sequence[str]) -> Prepared:
    """Number the labels and tokenise the texts, if the input is text."""
    examples = recipe.load_data()
    columns = examples["train"].column_names
    check(recipe, METRICS, text="text" in columns, tokenizer=tokenizer)
    if "label" not in columns:
        raise ValueError("`data.label_column` is missing; sequence_classification needs the name of the label's column")
    names = class_names(examples["train"], recipe.task.labels)
    datasets = {split: number_labels(examples[split], names, split) for split in splits}
    if "text" in columns:
        tokenizer = tokenizer or build_tokenizer(recipe.tokenizer, (row["text"] for row in examples["train"]))
        datasets = {
            split: dataset.map(
                _tokenize,
                batched=True,
                remove_columns=["text"],
                fn_kwargs={"tokenizer": tokenizer, "max_length": recipe.task.max_length},
                desc="tokenising",
            )
            for split, dataset in datasets.items()
        }
    else:  # rows of numbers as tensors: as lists they would take longer to read than to learn from
        datasets = {split: dataset.with_format("torch") for split, dataset in datasets.items()}
    return Prepared(
        auto_class=AutoModelForSequenceClassification,
        config_values={**classes(names), **vocabulary(tokenizer)},
        datasets=datasets,
        max_eval_rows=recipe.task.max_eval_rows,
        tokenizer=tokenizer,
        collator=default_data_collator if tokenizer is None else DataCollatorWithPadding(tokenizer),
        reduce_logits=predicted_class,
        compute_metrics=partial(classification_metrics, metrics=recipe.report.metrics),
    )


def class_names(train: Dataset, given: list[str] | None) -> list[str]:
    """Names of the classes: those the recipe lists, those the data come with, or those found in the training data."""
    feature = train.features["label"]
    if given is not None:
        return given
    if isinstance(feature, ClassLabel):
        return feature.names
    found = sorted(set(train["label"]) - {None})
    if found and isinstance(found[0], int):
        return [str(index) for index in range(max(found) + 1)]
    return [str(name) for name in found]


def number_labels(dataset: Dataset, names: list[str], split: str) -> Dataset:
    """The labels as integers from 0, each checked."""
    numbers = {name: index for index, name in enumerate(names)}
    labels = []
    for row, label in enumerate(dataset["label"]):
        known = isinstance(label, int) and 0 <= label < len(names)
        if not known and label not in numbers:
            hint = "" if isinstance(label, int) else nearest(label, names)
            raise ValueError(
                f"label {label!r} in row {row} of the {split} split is outside the {len(names)} classes "
                f"({', '.join(names[:20])}){hint}; mend the row, or list every class in `task.labels`"
            )
        labels.append(label if known else numbers[label])
    return dataset.remove_columns("label").add_column("label", labels).cast_column("label", Value("int64"))


def _tokenize(batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> dict[str, list]:
    return dict(tokenizer(batch["text"], truncation=max_length is not None, max_length=max_length, verbose=False))


def predicted_class(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(B, classes) -> (B,)"""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def classification_metrics(prediction: EvalPrediction, *, metrics: Sequence[str]) -> dict[str, float]:
    """The named metrics of the predicted classes."""
    return {name: float(METRIC_FUNCTIONS[name](prediction.label_ids, prediction.predictions)) for name in metrics}
