"""A dataset of the Hugging Face Hub by name. Needs the network the first time."""

import dataclasses

from datasets import DatasetDict, load_dataset

from modeling_rtransformer.configuration_rtransformer import nearest
from scripts.data.sources.columns import (
    TableOptions,
    hold_out,
    require_rows,
    select_columns,
    select_stream_columns,
)


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
    for split in ("train", "validation", "test"):
        name = getattr(options, split)
        if name and name not in found:
            raise ValueError(
                f"`data.{split}` is {name!r}, but {options.dataset} has the splits {', '.join(found)}"
                f"{nearest(name, found)}"
            )
        if name:
            splits[split] = found[name]
    if options.streaming:
        stream = select_stream_columns(splits.pop("train"), text=options.text_column)
        splits = DatasetDict({split: load_dataset(**source, split=getattr(options, split)) for split in splits})
        require_rows(splits)
        return DatasetDict({"train": stream, **select_columns(splits, text=options.text_column, label=None)})
    held = hold_out(splits, options.held_out, options.seed)
    require_rows(held)
    return select_columns(held, text=options.text_column, label=options.label_column)
