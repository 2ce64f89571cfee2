"""A dataset of the Hugging Face Hub by name. Needs the network the first time."""

import dataclasses

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset

from modeling_rtransformer.configuration_rtransformer import nearest
from scripts.data.sources.columns import SPLITS, TableOptions, hold_out, require_rows


@dataclasses.dataclass(frozen=True)
class Options(TableOptions):
    """
    Further settings are those of [`TableOptions`]; of a streamed dataset only `validation` and `test` are downloaded.

    Args:
        dataset: the name on the Hub, such as `ag_news`, or a local dataset folder.
        config: the dataset's configuration, if there are several.
        revision: a tag or commit, for reproducible runs.
        train, validation, test: names of the dataset's splits; an empty one is held out from `train`.
    """

    source: str
    dataset: str
    config: str | None = None
    revision: str | None = None
    train: str = "train"
    validation: str = ""
    test: str = ""


def load(options: Options) -> DatasetDict:
    """Download the dataset, or read it from the cache."""
    source = {"path": options.dataset, "name": options.config, "revision": options.revision}
    found = load_dataset(**source, streaming=options.streaming)
    splits = {}
    for split in SPLITS:
        name = getattr(options, split)
        if name and name not in found:
            raise ValueError(
                f"`data.{split}` is {name!r}, but {options.dataset} has the splits {', '.join(found)}"
                f"{nearest(name, found)}"
            )
        if name:
            splits[split] = found[name]
    if options.streaming:
        train = splits["train"]
        own = {split: load_dataset(**source, split=getattr(options, split)) for split in ("validation", "test")}
        require_rows(own)
        own = {split: select_columns(dataset, options, split) for split, dataset in own.items()}
        return DatasetDict({"train": select_columns(train, options, "train"), **own})
    require_rows(splits)
    splits = {split: select_columns(dataset, options, split) for split, dataset in splits.items()}
    held = hold_out(splits, options.held_out, options.seed)
    require_rows(held)
    return held


def select_columns(rows: Dataset | IterableDataset, options: Options, split: str) -> Dataset | IterableDataset:
    """Keep the named columns as `text` and `label`; the cells of a stream are checked when they are read."""
    columns = options.columns
    names = rows.column_names or list(next(iter(rows), columns))
    for name, ours in columns.items():
        if name not in names:
            raise ValueError(
                f"`data.{ours}_column` is {name!r}, but the {split} split has the columns {', '.join(names)}"
                f"{nearest(name, names)}"
            )
        empty = rows.data.column(name).null_count if isinstance(rows, Dataset) else 0
        if empty:
            raise ValueError(
                f"`data.{ours}_column` {name!r} has {empty} empty cells in the {split} split; fill them or remove "
                "these rows"
            )
    kind = rows.features[options.text_column].dtype if isinstance(rows, Dataset) else "string"
    if kind not in ("string", "large_string"):
        raise ValueError(
            f"`data.text_column` {options.text_column!r} holds {kind}, not text, in the {split} split; name another "
            f"column of {', '.join(names)}"
        )
    renamed = {name: ours for name, ours in columns.items() if name != ours}
    rows = rows.select_columns(list(columns))
    return rows.rename_columns(renamed) if renamed else rows
