"""A dataset of the Hugging Face Hub, by its name. Needs the network the first time."""

import dataclasses

from datasets import DatasetDict, load_dataset

from modeling_rtransformer.configuration_rtransformer import nearest
from scripts.sources.columns import hold_out, require_rows, select_columns


@dataclasses.dataclass(frozen=True)
class Options:
    """
    Args:
        dataset: the name on the Hub, such as `ag_news`, or a local dataset folder.
        config: the dataset's configuration, if it has several.
        revision: a tag or commit, so that the run can be repeated.
        train, validation, test: names of its splits; one left empty is held out from train.
        held_out, seed, text_column, label_column: as for files.
    """

    source: str
    dataset: str
    config: str | None = None
    revision: str | None = None
    train: str = "train"
    validation: str = ""
    test: str = ""
    held_out: float = 0.1
    seed: int = 0
    text_column: str = "text"
    label_column: str | None = None


def load(options: Options) -> DatasetDict:
    """Fetch the dataset, or find it in the cache."""
    found = load_dataset(options.dataset, options.config, revision=options.revision)
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
    held = hold_out(splits, options.held_out, options.seed)
    require_rows(held)
    return select_columns(held, text=options.text_column, label=options.label_column)
