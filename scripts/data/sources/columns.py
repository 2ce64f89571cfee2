"""Settings and checks that all sources of a user's own data share, and what is held out of them."""

import dataclasses
from typing import Annotated

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict
from pydantic import Field, PositiveInt

from scripts.data.sources.reader import say


SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableOptions:
    """
    Args:
        held_out: the share of the training data for each split without data of its own.
        seed: draws the held-out rows of a table; each class keeps its share of them.
        text_column, label_column: names of the columns; a text file has only `text`.
        streaming: read `train` during training, which allows any size; `validation` and `test` need data of their own.
        shuffle_documents: documents of a stream that are held in memory, tokenised and shuffled together.
    """

    held_out: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    seed: int = 0
    text_column: str = "text"
    label_column: str | None = None
    streaming: bool = False
    shuffle_documents: PositiveInt = 256

    def __post_init__(self) -> None:
        for split in ("validation", "test"):
            if self.streaming and not getattr(self, split):
                raise ValueError(
                    f"`data.{split}` is missing; nothing can be held out from a stream, so name data for it, or leave "
                    "out `data.streaming`"
                )

    @property
    def columns(self) -> dict[str, str]:
        """Our name of each column that is read, by its own."""
        return {self.text_column: "text"} | ({} if self.label_column is None else {self.label_column: "label"})


def require_rows(splits: DatasetDict) -> None:
    """Refuse a split without rows."""
    for split, dataset in splits.items():
        if len(dataset) == 0:
            sizes = ", ".join(f"{name} {len(rows)}" for name, rows in splits.items())
            raise ValueError(
                f"the {split} split of `data` is empty (rows: {sizes}); name a file for it as `data.{split}`, "
                "give more rows, or hold out more of them with `data.held_out`"
            )


def hold_out(splits: dict[str, Dataset], share: float, seed: int) -> DatasetDict:
    """
    Fill each missing split with `share` of the training rows, drawn at random with `seed`.

    Each class of the column `label` keeps its share: of the rows in the order of their classes, evenly spaced ones are
    held out. One row of each class stays in training. Classes that a split lacks are said.
    """
    missing = [split for split in SPLITS if split not in splits]
    train = splits["train"]
    size = round(share * len(train))
    labels = np.zeros(len(train))
    if "label" in train.column_names:
        labels = pd.Series(train["label"][:]).map(str).to_numpy()
    order = np.random.default_rng(seed).permutation(len(train))
    by_class = order[np.argsort(pd.factorize(labels[order])[0], kind="stable")]
    free = by_class[pd.Series(labels[by_class]).duplicated().to_numpy()]
    are_classes = len(free) >= size * len(missing)
    free = free if are_classes else by_class
    parts = {}
    for split in missing:
        drawn = ((np.arange(size) + 0.5) * len(free) / max(1, size)).astype(int)
        parts[split], free = np.sort(free[drawn]), np.delete(free, drawn)
    if missing:
        parts["train"] = np.setdiff1d(order, np.concatenate([parts[split] for split in missing]))
    if are_classes and size:
        counts = pd.Series(labels).value_counts()
        for split in missing:
            rare = [f"{name} ({counts[name]} rows)" for name in counts.index.difference(labels[parts[split]])]
            if rare:
                say(f"too rare to be in the held-out {split} split: {', '.join(rare[:20])}")
    return DatasetDict({split: train.select(parts[split]) if split in parts else splits[split] for split in SPLITS})
