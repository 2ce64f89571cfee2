"""What a task hands to the training and the scoring."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset, Subset
from transformers import EvalPrediction, PreTrainedTokenizerBase, default_data_collator

from modeling_rtransformer.configuration_rtransformer import nearest
from scripts.data.streams import Streams


def check(
    recipe,
    metrics: Sequence[str],
    *,
    compressors: Collection[str] = (),
    text: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    causal: bool = False,
) -> None:
    """
    Refuse what does not go with the recipe's task.

    Args:
        metrics, compressors: those that `report` may name.
        text: whether the input is text, which needs a tokenizer, or numbers, which have none.
        tokenizer: a saved model's, which replaces the recipe's.
        causal: whether the task needs a model that sees no later position.
    """
    task = recipe.task.name
    for key, valid in (("metrics", metrics), ("compressors", compressors)):
        for value in getattr(recipe.report, key):
            if not valid:
                raise ValueError(f"`report.{key}` is for language_modeling; leave it out")
            if value not in valid:
                raise ValueError(
                    f"`report.{key}` of {task} are of {', '.join(valid)}, got {value!r}{nearest(value, valid)}"
                )
    if text and recipe.tokenizer is None and tokenizer is None:
        raise ValueError(f'section `[tokenizer]` is missing; {task} needs it for text, such as kind = "character"')
    if not text and recipe.tokenizer is not None:
        raise ValueError(f"section `[tokenizer]` is for text; the input of {task} is numbers, leave it out")
    if causal and not recipe.config().is_causal:
        raise ValueError(f"`is_causal` must be True for {task}: otherwise the model sees what it has to predict")


def _nothing(found: Any) -> dict[str, Any]:
    return {}


def spread(dataset: Dataset | None, rows: int | None) -> Dataset | None:
    """
    So many rows, at even distances from the first to the last; all of them for None or where there are no more. Rows of
    streams follow each other, so that they are the first ones.
    """
    if isinstance(dataset, Streams) and rows is not None:
        return dataset.beginning(rows)
    if dataset is None or rows is None or rows >= len(dataset):
        return dataset
    places = np.linspace(0, len(dataset) - 1, rows).round().astype(int).tolist()
    return dataset.select(places) if isinstance(dataset, datasets.Dataset) else Subset(dataset, places)


def classes(names: Sequence[str]) -> dict[str, dict]:
    """The fields of a model's config that name its classes."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def vocabulary(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, int]:
    """The fields of a model's config that follow from its tokenizer; none for numbers."""
    if tokenizer is None:
        return {}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    return {"vocab_size": len(tokenizer), **special}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """
    A task with its data.

    Args:
        auto_class: the Auto class of the model, such as `AutoModelForCausalLM`.
        config_values: what the data say about the model's config, such as `vocab_size`.
        datasets: `train`, `validation` and `test`, as far as they were asked for.
        reduce_logits: `(logits, labels)` to what the metrics need of them, so that no logits are kept.
        compute_metrics: metrics of all reduced predictions.
        collator: makes a batch of rows.
        tokenizer: None where the input is numbers.
        max_eval_rows: rows scored at an evaluation during training, spread over the validation data; all if None.
        compare: other methods' results on a split, by name.
        details: further facts of all reduced predictions for the result, such as figures of each class.
        compute_loss: `(outputs, labels, num_items_in_batch)` to the loss; None for the model's own.
        label_names: what of a batch `reduce_logits` and `compute_metrics` get as labels; None for `labels`.
    """

    auto_class: Any
    config_values: Mapping[str, Any]
    datasets: Mapping[str, Dataset]
    reduce_logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    compute_metrics: Callable[[EvalPrediction], dict[str, float]]
    collator: Callable = default_data_collator
    tokenizer: PreTrainedTokenizerBase | None = None
    max_eval_rows: int | None = None
    compare: Callable[[str], dict[str, float]] = _nothing
    details: Callable[[EvalPrediction], dict[str, Any]] = _nothing
    compute_loss: Callable | None = None
    label_names: tuple[str, ...] | None = None

    @property
    def monitor(self) -> Dataset | None:
        """What is scored during training."""
        return spread(self.datasets.get("validation"), self.max_eval_rows)
