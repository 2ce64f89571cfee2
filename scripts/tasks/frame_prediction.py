"""Frame prediction: the labels of each frame from the frames before it, such as the notes of a piece of music."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt
from scipy.ndimage import shift
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import AutoModelForAudioFrameClassification, EvalPrediction

from scripts.data.sources.piano_roll import key_names
from scripts.metrics import METRIC_FUNCTIONS
from scripts.tasks.prepared import Prepared, check, classes


METRICS = ("nats_per_frame",)
IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Options:
    """
    Args:
        window: predicted frames of a training row; whole pieces if left out. Scored pieces are not cut.
        transpose: shift each training row by a random number of keys up or down, at most this many, drawn anew in each
            epoch; scored pieces are not shifted.
        loss: `mean` over all labels of a batch, or their `sum`, which weights a batch by its length. The two need
            different learning rates.
    """

    name: str
    window: PositiveInt | None = None
    transpose: NonNegativeInt = 0
    loss: Literal["mean", "sum"] = "mean"


class Frames(Dataset):
    """
    Rows of frames, each with the frame that follows as its label: a row of N frames predicts N - 1.

    With `transpose`, by how many keys a row is moved follows from the epoch and the row's place, so that a resumed run
    sees what it would have seen.
    """

    def __init__(self, pieces: Sequence[np.ndarray], window: int | None = None, transpose: int = 0):
        self.pieces, self.transpose, self.epoch = pieces, transpose, 0
        self.rows = [  # (piece, first frame, frame after the last)
            (index, start, min(start + (window or len(piece)), len(piece) - 1) + 1)
            for index, piece in enumerate(pieces)
            for start in range(0, len(piece) - 1, window or len(piece))
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        piece, start, end = self.rows[index]
        frames = self.pieces[piece][start:end]  # (frames, keys)
        if self.transpose:
            chance = np.random.default_rng((self.epoch, index))
            frames = transposed(frames, chance.integers(-self.transpose, self.transpose, endpoint=True))
        return frames

    def set_epoch(self, epoch: int) -> None:
        """Accelerate's data loaders say when an epoch begins."""
        self.epoch = epoch


def transposed(frames: np.ndarray, keys: int) -> np.ndarray:
    """The frames `keys` higher, or lower if negative; notes beyond the ends of the keyboard are lost."""
    return shift(frames, (0, keys), order=0)


def prepare(recipe, tokenizer, splits: Sequence[str]) -> Prepared:
    """Cut the pieces into rows."""
    check(recipe, METRICS, causal=True)
    pieces = recipe.load_data().with_format("numpy")
    names = key_names()
    training = {"window": recipe.task.window, "transpose": recipe.task.transpose}
    datasets = {
        split: Frames([row["values"] for row in pieces[split]], **(training if split == "train" else {}))
        for split in splits
    }
    return Prepared(
        auto_class=AutoModelForAudioFrameClassification,
        config_values={
            "num_input_features": len(names),
            "problem_type": "multi_label_classification",
            **classes(names),
        },
        datasets=datasets,
        collator=pad_frames,
        reduce_logits=row_nll,
        compute_metrics=partial(frame_metrics, metrics=recipe.report.metrics),
        compute_loss=summed_loss if recipe.task.loss == "sum" else None,
    )


def pad_frames(rows: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """A batch of rows: all frames but the last as input, all but the first as labels, padded at the end."""
    frames = [torch.from_numpy(np.ascontiguousarray(row)) for row in rows]
    values = pad_sequence([row[:-1].float() for row in frames], batch_first=True)
    labels = [row[1:].to(torch.int8) for row in frames]  # a whole split's are kept at once
    labels = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    return {"input_values": values, "attention_mask": (labels[..., 0] != IGNORED).long(), "labels": labels}


def row_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed negative log likelihood, in nats, of the scored frames of each row.  (B, T, keys) twice -> (B,)"""
    logits = logits[0] if isinstance(logits, tuple) else logits
    scored = labels != IGNORED
    nll = F.binary_cross_entropy_with_logits(logits.float(), torch.where(scored, labels, 0).float(), reduction="none")
    return (nll * scored).double().sum(dim=(1, 2))


def summed_loss(outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """The loss for `Trainer` whose learning rate belongs to the sum over all frames and labels."""
    return row_nll(outputs.logits, labels).float().sum()


def frame_metrics(prediction: EvalPrediction, *, metrics: Sequence[str]) -> dict[str, float]:
    """Metrics from the summed likelihoods of the rows and the labels they belong to."""
    frames = int((prediction.label_ids[..., 0] != IGNORED).sum())
    nll = np.asarray(prediction.predictions, dtype=np.float64).sum()
    return {name: METRIC_FUNCTIONS[name](nll=[nll], count=[frames]) for name in metrics}
