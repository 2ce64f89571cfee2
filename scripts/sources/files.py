"""
Local files: text, CSV, JSON lines or Parquet.

A text file is one document in UTF-8, read whole; any line end is read as a line feed. Where no file is named for
validation or test, a share of the training data is held out: the end of each text, cut at a line end, or random rows of
a table.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

from modeling_rtransformer.configuration_rtransformer import nearest
from scripts.sources.columns import hold_out, require_rows, select_columns


FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".py": "text",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """
    Args:
        train, validation, test: a file or a list of files, relative to the working directory.
        format: `text`, `csv`, `json` (lines) or `parquet`; by the suffix of the first training file if left out.
        held_out: the share of the training data for each split without files of its own.
        seed: draws the held-out rows of a table.
        text_column, label_column: names of the columns; a text file has only `text`.
    """

    source: str
    train: str | list[str]
    validation: str | list[str] | None = None
    test: str | list[str] | None = None
    format: Literal["text", "csv", "json", "parquet"] | None = None
    held_out: float = 0.1
    seed: int = 0
    text_column: str = "text"
    label_column: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 0.5:
            raise ValueError(f"`data.held_out` must be above 0 and below 0.5, got {self.held_out}")


def load(options: Options) -> DatasetDict:
    """Read the files, hold out what is missing and keep the columns that the recipe names."""
    paths = {split: _paths(options, split) for split in ("train", "validation", "test")}
    paths = {split: names for split, names in paths.items() if names}
    kind = options.format or _format(paths["train"][0])
    settings = {"sample_by": "document", "encoding": "utf-8"} if kind == "text" else {}
    if paths["train"][0].endswith(".tsv"):
        settings = {"sep": "\t"}
    try:
        splits = dict(load_dataset(kind, data_files=paths, **settings))
    except (DatasetGenerationError, ValueError) as error:
        names = ", ".join(sum(paths.values(), []))
        raise ValueError(
            f"`data`: {names} cannot be read as {kind} ({error.__cause__ or error}); mend the file, or "
            "name its kind as `data.format`"
        ) from error
    if kind == "text":
        splits = _hold_out_ends(splits, options.held_out)
    else:
        splits = hold_out(splits, options.held_out, options.seed)
    require_rows(splits)
    return select_columns(splits, text=options.text_column, label=options.label_column)


def _paths(options: Options, split: str) -> list[str]:
    names = getattr(options, split)
    names = [names] if isinstance(names, str) else names or []
    if split == "train" and not names:
        raise ValueError("`data.train` names no file; name one, or a list of them")
    for name in names:
        path = Path(name).expanduser()
        if not path.is_file():
            beside = (
                [str(path.with_name(other.name)) for other in path.parent.glob("*")] if path.parent.is_dir() else []
            )
            raise FileNotFoundError(
                f"`data.{split}` names {name!r}, which is not a file (looked in {Path.cwd()})"
                f"{nearest(str(path), beside)}"
            )
        if path.stat().st_size == 0:
            raise ValueError(f"`data.{split}` names {name!r}, which is empty; give it text or leave it out")
    return [str(Path(name).expanduser()) for name in names]


def _format(path: str) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(
            f"`data.format` is missing, and the suffix of {path!r} does not tell; it is one of {', '.join(FORMATS)}"
        )
    return FORMATS[suffix]


def _hold_out_ends(splits: dict[str, Dataset], share: float) -> DatasetDict:
    missing = [split for split in ("validation", "test") if split not in splits]
    parts: dict[str, list[str]] = {split: [] for split in ("train", *missing)}
    for text in splits["train"]["text"]:
        lines = text.splitlines(keepends=True)
        cuts = [round(len(lines) * (1 - share * left)) for left in range(len(missing), 0, -1)]
        for split, start, end in zip(parts, [0, *cuts], [*cuts, len(lines)], strict=True):
            parts[split].append("".join(lines[start:end]))
    held = {split: Dataset.from_dict({"text": [text for text in texts if text]}) for split, texts in parts.items()}
    return DatasetDict({split: {**splits, **held}[split] for split in ("train", "validation", "test")})
