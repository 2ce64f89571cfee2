"""Settings and checks that all sources of a user's own data share."""

import dataclasses
from typing import Annotated

from datasets import Dataset, DatasetDict, IterableDataset
from pydantic import Field, PositiveInt

from modeling_rtransformer.configuration_rtransformer import nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableOptions:
    """
    Args:
        held_out: the share of the training data for each split without data of its own.
        seed: draws the held-out rows of a table.
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


def require_rows(splits: DatasetDict) -> None:
    """Refuse a split without rows."""
    for split, dataset in splits.items():
        if len(dataset) == 0:
            sizes = ", ".join(f"{name} {len(rows)}" for name, rows in splits.items())
            raise ValueError(
                f"the {split} split of `data` is empty (rows: {sizes}); name a file for it as `data.{split}`, "
                "give more rows, or hold out more of them with `data.held_out`"
            )


def require_column(kind: str, column: str, split: str, columns: list[str]) -> None:
    """Refuse a `data.text_column` or `data.label_column` that a split does not have."""
    if column not in columns:
        raise ValueError(
            f"`data.{kind}_column` is {column!r}, but the {split} split has the columns {', '.join(columns)}"
            f"{nearest(column, columns)}"
        )


def select_stream_columns(stream: IterableDataset, *, text: str) -> IterableDataset:
    """Keep the column `data.text_column`, as `text`; its cells are checked when they are read."""
    require_column("text", text, "train", stream.column_names or list(next(iter(stream), {text: None})))
    stream = stream.select_columns([text])
    return stream if text == "text" else stream.rename_column(text, "text")


def select_columns(splits: DatasetDict, *, text: str, label: str | None) -> DatasetDict:
    """Keep the columns `data.text_column` and `data.label_column`, as `text` and `label`."""
    wanted = {"text": text} if label is None else {"text": text, "label": label}
    for split, dataset in splits.items():
        for ours, theirs in wanted.items():
            require_column(ours, theirs, split, dataset.column_names)
            empty = dataset.data.column(theirs).null_count
            if empty:
                raise ValueError(
                    f"`data.{ours}_column` {theirs!r} has {empty} empty cells in the {split} split; fill them or "
                    "remove these rows"
                )
        kind = dataset.features[text].dtype
        if kind not in ("string", "large_string"):
            raise ValueError(
                f"`data.text_column` {text!r} holds {kind}, not text, in the {split} split; name another column of "
                f"{', '.join(dataset.column_names)}"
            )
    splits = splits.select_columns(list(wanted.values()))
    return splits.rename_columns({theirs: ours for ours, theirs in wanted.items() if ours != theirs})


def hold_out(splits: dict[str, Dataset], share: float, seed: int) -> DatasetDict:
    """Fill each missing split with `share` of the training rows, drawn at random with `seed`."""
    missing = [split for split in ("validation", "test") if split not in splits]
    size = round(share * len(splits["train"]))
    for split in missing:
        shuffled = splits["train"].shuffle(seed=seed)
        splits = {**splits, split: shuffled.select(range(size)), "train": shuffled.select(range(size, len(shuffled)))}
    return DatasetDict({split: splits[split] for split in ("train", "validation", "test")})
