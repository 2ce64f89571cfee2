"""
Sequence classification: a class, several classes or a number for each text, or for each sequence of numbers.

A class is named by the text of its label: 1 to 5 are the classes "1" to "5", True and False keep their names. Classes
of numbers are in the order of the numbers, others in that of the alphabet.
"""

import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np
import pandas as pd
import torch
from datasets import ClassLabel, Dataset, List, Value
from pydantic import PositiveInt
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from modeling_rtransformer.configuration_rtransformer import nearest
from scripts.data.sources.reader import numbers, say
from scripts.data.tokenization import build_tokenizer
from scripts.metrics import METRIC_FUNCTIONS
from scripts.tasks.prepared import Prepared, check, classes, vocabulary


SINGLE, SEVERAL, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
METRICS = {SINGLE: ("accuracy", "f1"), SEVERAL: ("accuracy", "f1"), REGRESSION: ("mse", "mae", "r2")}


@dataclasses.dataclass(frozen=True)
class Options:
    """
    Args:
        labels: names of the classes in order; those of the training data if left out. The data have these names, or the
            numbers of the classes from 0, or as many other numbers in the same order.
        problem_type: `single_label_classification`, `multi_label_classification` or `regression`; if left out, lists of
            labels are several classes a row, numbers of which one has a fraction are a regression.
        label_delimiter: between the labels of a row in a cell of text, such as `|`; they are several classes a row.
        class_weights: `balanced` weights a class in the loss by the inverse of its frequency in training.
        max_length: cut longer texts to their first so many tokens; no limit if left out.
        max_eval_rows: rows scored at an evaluation during training, spread over the split; all if left out.
    """

    name: str
    labels: list[str] | None = None
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    label_delimiter: str | None = None
    class_weights: Literal["balanced"] | None = None
    max_length: PositiveInt | None = None
    max_eval_rows: PositiveInt | None = None


def prepare(recipe, tokenizer: PreTrainedTokenizerBase | None, splits: Sequence[str]) -> Prepared:
    """Number the labels and tokenise the texts, if the input is text."""
    task, examples = recipe.task, recipe.load_data()
    columns = examples["train"].column_names
    if "label" not in columns:
        raise ValueError("`data.label_column` is missing; sequence_classification needs the name of the label's column")
    decimal = getattr(recipe.data, "decimal", None)
    labels = {split: label_texts(examples[split], split, task.label_delimiter) for split in {"train", *splits}}
    given = class_names(examples["train"], task.labels)
    if width := multi_hot(labels["train"]):
        labels = {split: [set_places(cell, width, split) for cell in cells] for split, cells in labels.items()}
        given = given or [str(place) for place in range(width)]
    problem = problem_type(labels["train"], task, recipe.report.metrics, decimal)
    check(recipe, METRICS[problem], text="text" in columns, tokenizer=tokenizer)
    if task.class_weights is not None and problem != SINGLE:
        raise ValueError(f"`task.class_weights` is for one class a row, not for {problem}; leave it out")
    if problem == REGRESSION:
        names = [getattr(recipe.data, "label_column", None) or "value"]
        targets = {split: targets_of_regression(labels[split], decimal, split) for split in splits}
    else:
        names, index = class_index(labels["train"], given)
        targets = {split: number_labels(labels[split], index, split, several=problem == SEVERAL) for split in splits}
    datasets = {split: examples[split].remove_columns("label") for split in splits}
    if "text" in columns:
        tokenizer = tokenizer or build_tokenizer(recipe.tokenizer, (row["text"] for row in examples["train"]))
        datasets = {split: tokenized(rows, tokenizer, task.max_length, split) for split, rows in datasets.items()}
    else:  # rows of numbers as tensors: as lists they would take longer to read than to learn from
        datasets = {split: dataset.with_format("torch") for split, dataset in datasets.items()}
    kind = {SINGLE: Value("int64"), SEVERAL: List(Value("float32")), REGRESSION: Value("float32")}[problem]
    weights = None
    if task.class_weights is not None:
        weights = balanced_weights(number_labels(labels["train"], index, "train"), len(names))
    return Prepared(
        auto_class=AutoModelForSequenceClassification,
        config_values={"problem_type": problem, **classes(names), **vocabulary(tokenizer)},
        datasets={
            split: rows.add_column("label", list(targets[split]), feature=kind) for split, rows in datasets.items()
        },
        max_eval_rows=recipe.task.max_eval_rows,
        tokenizer=tokenizer,
        collator=default_data_collator if tokenizer is None else DataCollatorWithPadding(tokenizer),
        reduce_logits=partial(predictions, problem=problem),
        compute_metrics=partial(classification_metrics, metrics=recipe.report.metrics),
        details=partial(class_details, names=names, problem=problem),
        compute_loss=None if weights is None else partial(weighted_loss, weights=weights),
    )


def label_texts(dataset: Dataset, split: str, delimiter: str | None = None) -> list[str] | list[list[str]]:
    """The label of each row as text; a list of texts where a row has several."""
    feature, cells = dataset.features["label"], dataset["label"][:]
    if isinstance(feature, ClassLabel):
        for row, cell in enumerate(cells):
            if cell is None or cell < 0:
                raise ValueError(
                    f"row {row} of the {split} split has no label; name another split, or remove such rows"
                )
        return [feature.names[cell] for cell in cells]
    if any(isinstance(cell, list) for cell in cells):
        return [[str(label) for label in cell] for cell in cells]
    texts = [str(cell) for cell in cells]
    if delimiter is None:
        return texts
    return [[label.strip() for label in text.split(delimiter) if label.strip()] for text in texts]


def class_names(train: Dataset, given: Sequence[str] | None) -> list[str] | None:
    """The names of the classes that the recipe lists or that the data come with, if any."""
    feature = train.features["label"]
    if given is not None:
        return list(given)
    return feature.names if isinstance(feature, ClassLabel) else None


def multi_hot(labels: Sequence) -> int | None:
    """The width of labels that are rows of 0 and 1, one for each class; None if they are not."""
    widths = {len(cell) if isinstance(cell, list) else 0 for cell in labels}
    if len(widths) != 1 or min(widths) < 2 or {label for cell in labels for label in cell} - {"0", "1"}:
        return None
    return widths.pop()


def set_places(cell: Sequence[str], width: int, split: str) -> list[str]:
    """The places of the ones in a row of 0 and 1."""
    if len(cell) != width or set(cell) - {"0", "1"}:
        raise ValueError(f"a label of the {split} split must be {width} times 0 or 1 as in training, got {cell}")
    return [str(place) for place, one in enumerate(cell) if one == "1"]


def problem_type(labels: Sequence, task: Options, metrics: Sequence[str], decimal: str | None = None) -> str:
    """What kind of problem the labels of the training data are, if the recipe does not say it."""
    several = any(isinstance(label, list) for label in labels)
    if task.problem_type == SEVERAL and not several:
        raise ValueError(
            "`task.problem_type` is multi_label_classification, but each row has one label; name the "
            "`task.label_delimiter` between several, or use lists"
        )
    if several and task.problem_type not in (None, SEVERAL):
        raise ValueError(f"`task.problem_type` is {task.problem_type}, but the label of a row is a list")
    if several or task.problem_type is not None or task.labels is not None:
        return SEVERAL if several else task.problem_type or SINGLE
    fraction = next((label for label, value in zip(labels, as_numbers(labels, decimal)) if value % 1), None)
    if fraction is None:
        return SINGLE
    if set(metrics) - set(METRICS[REGRESSION]):
        raise ValueError(
            f"`data.label_column` holds numbers with a fraction, such as {fraction}, so this is a regression, whose "
            f"`report.metrics` are of {', '.join(METRICS[REGRESSION])}, got {', '.join(metrics)}; if they are classes, "
            "set `task.problem_type` to single_label_classification"
        )
    return REGRESSION


def as_numbers(labels: Sequence[str], decimal: str | None = None) -> list[float]:
    """The labels as numbers; none if one of them is no finite number."""
    try:
        found = numbers(pd.Series(list(labels), dtype=object), decimal, "label")
    except ValueError:
        return []
    return found.tolist() if np.isfinite(found).all() else []


def class_index(train: Sequence, given: Sequence[str] | None) -> tuple[list[str], dict[str, int]]:
    """The names of the classes in order, and the number of each text of a label."""
    texts = {label for cell in train for label in (cell if isinstance(cell, list) else [cell])}
    values = dict(zip(texts, as_numbers(list(texts))))
    found = sorted(texts, key=lambda text: (values.get(text, 0), text))
    names = found if given is None else list(given)
    if len(set(names)) < len(names):
        raise ValueError(f"`task.labels` must name each class once, got {', '.join(names)}")
    places = {str(place): place for place in range(len(names))}
    if texts <= set(names):
        return names, {name: place for place, name in enumerate(names)}
    if texts <= set(places):
        return names, places
    if values and len(found) == len(names):
        say(f"`task.labels`: {', '.join(f'{text} is {name}' for text, name in zip(found, names))}")
        return names, {text: place for place, text in enumerate(found)}
    return names, {name: place for place, name in enumerate(names)}  # `number_labels` names the first that is none


def number_labels(labels: Sequence, index: dict[str, int], split: str, several: bool = False) -> np.ndarray:
    """Each row's class as an integer from 0, or all classes as 0 and 1; each label is checked."""
    numbered = np.zeros((len(labels), len(index)), dtype=np.float32)
    for row, cell in enumerate(labels):
        for label in cell if several else [cell]:
            if label not in index:
                raise ValueError(
                    f"label {label!r} in row {row} of the {split} split is outside the {len(index)} classes "
                    f"({', '.join(list(index)[:20])}){nearest(label, index)}; mend the row, or list every class in "
                    "`task.labels`"
                )
            numbered[row, index[label]] = 1
    return numbered if several else numbered.argmax(axis=1)


def targets_of_regression(labels: Sequence[str], decimal: str | None, split: str) -> np.ndarray:
    """The label of each row as a finite number."""
    places = [f"row {row} of the {split} split" for row in range(len(labels))]
    values = numbers(pd.Series(list(labels), index=places, dtype=object), decimal, "`data.label_column`")
    bad = values.index[~np.isfinite(values)]
    if len(bad):
        raise ValueError(f"`data.label_column` is not finite in {bad[0]}; mend the row or remove it")
    return values.to_numpy(np.float32)


def tokenized(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None, split: str) -> Dataset:
    """The ids of each text; says which rows were cut, and refuses a text without any token."""
    options = {"tokenizer": tokenizer, "max_length": max_length}
    rows = rows.map(_tokenize, batched=True, remove_columns=["text"], fn_kwargs=options, desc="tokenising")
    empty = [row for row, count in enumerate(rows["tokens"][:]) if not count]
    if empty:
        raise ValueError(
            f"{len(empty)} texts of the {split} split have no token, first in rows {', '.join(map(str, empty[:9]))}; "
            "fill or remove them"
        )
    cut = [row for row, count in enumerate(rows["tokens"][:]) if max_length is not None and count > max_length]
    if cut:
        shown = ", ".join(map(str, cut[:20])) + (", ..." if len(cut) > 20 else "")
        say(f"{len(cut)} texts of the {split} split are cut to `task.max_length` = {max_length} tokens: rows {shown}")
    return rows.remove_columns("tokens")


def _tokenize(batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> dict[str, list]:
    encoded = tokenizer(batch["text"], truncation=max_length is not None, max_length=max_length, verbose=False)
    beyond = [sum(map(len, encoding.overflowing)) for encoding in encoded.encodings]
    ids = encoded["input_ids"]
    return {**encoded, "tokens": [len(row) + more for row, more in zip(ids, beyond, strict=True)]}


def balanced_weights(labels: np.ndarray, count: int) -> torch.Tensor:
    """rows / (classes x rows of a class), as of scikit-learn; a class without rows counts as one."""
    rows = np.bincount(labels, minlength=count)
    return torch.from_numpy(len(labels) / (count * rows.clip(min=1))).float()


def weighted_loss(outputs, labels: torch.Tensor, num_items_in_batch=None, *, weights: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of each row times the weight of its class, over the sum of these weights."""
    return F.cross_entropy(outputs.logits.float(), labels, weight=weights.to(outputs.logits.device))


def predictions(logits: torch.Tensor, labels: torch.Tensor, problem: str = SINGLE) -> torch.Tensor:
    """(B, classes) to the class (B,), to a yes or no for each class (B, classes), or to the number (B,)."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    if problem == SINGLE:
        return logits.argmax(dim=-1)
    return (logits > 0).int() if problem == SEVERAL else logits.squeeze(-1)


def classification_metrics(prediction: EvalPrediction, *, metrics: Sequence[str]) -> dict[str, float]:
    """The named metrics of the predictions."""
    return {name: float(METRIC_FUNCTIONS[name](prediction.label_ids, prediction.predictions)) for name in metrics}


def class_details(prediction: EvalPrediction, *, names: Sequence[str], problem: str) -> dict[str, list]:
    """Of each class precision, recall, F1 and rows; where a row has one class, also how many of each got which."""
    if problem == REGRESSION:
        return {}
    places, (labels, found) = list(range(len(names))), (prediction.label_ids, prediction.predictions)
    figures = precision_recall_fscore_support(labels, found, labels=places, zero_division=0)
    kinds = ("precision", "recall", "f1", "rows")
    table = [
        {"class": name, **{kind: value.item() for kind, value in zip(kinds, row, strict=True)}}
        for name, row in zip(names, zip(*figures, strict=True), strict=True)
    ]
    print(pd.DataFrame(table).round(3).to_string(index=False), file=sys.stderr)
    matrix = {"confusion": confusion_matrix(labels, found, labels=places).tolist()} if problem == SINGLE else {}
    return {"classes": table, **matrix}
