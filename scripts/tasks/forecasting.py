"""Forecasting: all channels of a time series, a number of steps ahead at once, from the steps before."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
from datasets import DatasetDict
from pydantic import PositiveInt
from torch.utils.data import Dataset
from transformers import AutoModelForTimeSeriesPrediction, EvalPrediction

import scripts.baselines  # noqa: F401  registers the models that a recipe can name
from scripts.tasks.prepared import Prepared, check


METRICS = ("mse", "mae")
ROUNDING = 1e-9  # a channel that changes by less of its size does not change


@dataclasses.dataclass(frozen=True)
class Options:
    """
    Args:
        prediction_length: the horizon, in steps.
        context_length: steps before it that the model sees.
        units: of the metrics: `standardised` by the training part, or those of the `table`. Training is standardised.
        max_eval_rows: forecasts scored at an evaluation during training, spread over the split; all if left out.
    """

    name: str
    prediction_length: PositiveInt = 24
    context_length: PositiveInt = 96
    units: Literal["standardised", "table"] = "standardised"
    max_eval_rows: PositiveInt | None = None


class Forecasts(Dataset):
    """Every stretch of `context_length` and then `prediction_length` steps in a series of shape (steps, channels)."""

    def __init__(self, series: np.ndarray, *, context_length: int, prediction_length: int):
        self.series = torch.from_numpy(np.ascontiguousarray(series, dtype=np.float32))
        self.context, self.horizon = context_length, prediction_length

    def __len__(self) -> int:
        return len(self.series) - self.context - self.horizon + 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        cut = index + self.context
        return {"past_values": self.series[index:cut], "future_values": self.series[cut : cut + self.horizon]}


def prepare(recipe, tokenizer, splits: Sequence[str]) -> Prepared:
    """Standardise the series by its training part and cut it into pasts and futures."""
    options = recipe.task
    check(recipe, METRICS)
    parts = recipe.load_data()
    series, means, deviations = standardised(parts, options)
    lengths = {"context_length": options.context_length, "prediction_length": options.prediction_length}
    datasets = {split: Forecasts(series[split], **lengths) for split in splits}
    config = recipe.config()
    channels = series["train"].shape[1]
    found = {
        **lengths,
        "channel_names": parts["train"].column_names,
        "channel_means": means.tolist(),
        "channel_deviations": deviations.tolist(),
        "num_input_features": 1 if getattr(config, "channel_independent", False) else channels,
    }
    if getattr(config, "context_length", None) is None:  # a model that takes pasts of any length
        del found["context_length"]
    return Prepared(
        auto_class=AutoModelForTimeSeriesPrediction,
        config_values={name: value for name, value in found.items() if hasattr(config, name)},
        datasets=datasets,
        reduce_logits=partial(row_errors, scale=deviations if options.units == "table" else np.ones(channels)),
        compute_metrics=partial(forecast_metrics, metrics=recipe.report.metrics),
        max_eval_rows=options.max_eval_rows,
        label_names=("future_values",),
    )


def standardised(parts: DatasetDict, options: Options) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """
    Each part as (steps, channels), of mean 0 and standard deviation 1 in the training part, and these means and
    deviations of the table. The parts after training begin with the `context_length` steps before them, so that all of
    their own are forecast.
    """
    names = parts["train"].column_names
    values = {split: np.stack([np.asarray(rows[name]) for name in names], axis=1) for split, rows in parts.items()}
    sizes = {split: len(rows) for split, rows in values.items()}
    context, horizon = options.context_length, options.prediction_length
    if context + horizon > sizes["train"]:
        raise ValueError(
            f"`task.context_length` and `task.prediction_length` must fit into the {sizes['train']} steps of the "
            f"training part together, got {context} + {horizon}"
        )
    for split in ("validation", "test"):
        if horizon > sizes[split]:
            raise ValueError(
                f"`task.prediction_length` must be at most the {sizes[split]} steps of the {split} part, got {horizon}"
            )
    mean, std = values["train"].mean(axis=0), values["train"].std(axis=0)
    for name, column in zip(names, values["train"].T, strict=True):
        if not np.ptp(column) > ROUNDING * np.abs(column).max():
            raise ValueError(f"column {name!r} never changes in the training part; leave it out by `data.columns`")
    whole = (np.concatenate([values[split] for split in ("train", "validation", "test")]) - mean) / std
    series, end = {}, 0
    for split in ("train", "validation", "test"):
        start, end = end, end + sizes[split]
        series[split] = whole[max(0, start - context) : end]
    return series, mean, std


def row_errors(logits, labels: torch.Tensor, scale: np.ndarray | float = 1.0) -> torch.Tensor:
    """
    The summed squared and absolute error of each forecast.  (B, P, C) twice -> (B, 2)

    Args:
        scale: of each channel, which the errors are multiplied by.  (C,)
    """
    prediction = logits[0] if isinstance(logits, tuple) else logits
    error = (prediction.double() - labels.double()) * torch.as_tensor(scale, device=prediction.device)
    return torch.stack([error.square().sum(dim=(1, 2)), error.abs().sum(dim=(1, 2))], dim=1)


def forecast_metrics(prediction: EvalPrediction, *, metrics: Sequence[str]) -> dict[str, float]:
    """The named metrics of all forecasts, over all steps and channels alike."""
    sums = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    count = int(np.prod(np.shape(prediction.label_ids)))
    return {name: float(sums[METRICS.index(name)] / count) for name in metrics}
