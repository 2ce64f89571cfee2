"""
Local files: text, CSV, JSON lines or Parquet.

A text file is one document in UTF-8; all line ends are read as line feeds. If no file is named for validation or test,
a share of the training data is held out: the end of each text, cut at a line end, or random rows of a table.

With `streaming` the training files are read during training, in every pass anew, and are not cached. A text file is
then cut at line ends into documents of at least 64 Ki characters.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from datasets import Dataset, DatasetDict, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from modeling_rtransformer.configuration_rtransformer import nearest
from scripts.data.sources.columns import (
    TableOptions,
    hold_out,
    require_rows,
    select_columns,
    select_stream_columns,
)


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
PIECE = 1 << 16  # characters of a text file in one document of a stream


@dataclasses.dataclass(frozen=True)
class Options(TableOptions):
    """
    Further settings are those of [`TableOptions`].

    Args:
        train, validation, test: a file or a list of files, relative to the working directory.
        format: `text`, `csv`, `json` (lines) or `parquet`; by the suffix of the first training file if left out.
    """

    source: str
    train: str | list[str]
    validation: str | list[str] | None = None
    test: str | list[str] | None = None
    format: Literal["text", "csv", "json", "parquet"] | None = None


def load(options: Options) -> DatasetDict:
    """Read the files, hold out missing splits and keep the columns that the recipe names."""
    paths = {split: _paths(options, split) for split in ("train", "validation", "test")}
    paths = {split: names for split, names in paths.items() if names}
    kind = options.format or _format(paths["train"][0])
    settings = {"sample_by": "document", "encoding": "utf-8"} if kind == "text" else {}
    if paths["train"][0].endswith(".tsv"):
        settings = {"sep": "\t"}
    read_now = {split: names for split, names in paths.items() if split != "train" or not options.streaming}
    try:
        splits = dict(load_dataset(kind, data_files=read_now, **settings))
    except (DatasetGenerationError, ValueError) as error:
        names = ", ".join(sum(read_now.values(), []))
        raise ValueError(
            f"`data`: {names} cannot be read as {kind} ({error.__cause__ or error}); correct the file, "
            "or name its format as `data.format`"
        ) from error
    if options.streaming:
        require_rows(splits)
        splits = select_columns(DatasetDict(splits), text=options.text_column, label=options.label_column)
        return DatasetDict({"train": _stream(kind, paths["train"], settings, options.text_column), **splits})
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
            raise ValueError(f"`data.{split}` names {name!r}, which is empty; add text to the file or leave it out")
    return [str(Path(name).expanduser()) for name in names]


def _format(path: str) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(
            f"`data.format` is missing, and the suffix of {path!r} is unknown; known suffixes are {', '.join(FORMATS)}"
        )
    return FORMATS[suffix]


def _stream(kind: str, paths: list[str], settings: dict[str, str], text_column: str) -> IterableDataset:
    """The stream of training rows; each file is a shard."""
    if kind == "text":
        return IterableDataset.from_generator(
            read_pieces, gen_kwargs={"paths": paths}, features=Features({"text": Value("string")})
        )
    stream = load_dataset(kind, data_files={"train": paths}, split="train", streaming=True, **settings)
    return select_stream_columns(stream, text=text_column)


def read_pieces(paths: list[str]) -> Iterator[dict[str, str]]:
    """Text files in pieces of 64 to 128 Ki characters that end at a line end if there is one."""
    for path in paths:
        with open(path, encoding="utf-8") as file:
            while piece := file.read(PIECE):
                if not piece.endswith("\n"):
                    piece += file.readline(PIECE)
                yield {"text": piece}


def _hold_out_ends(splits: dict[str, Dataset], share: float) -> DatasetDict:
    missing = [split for split in ("validation", "test") if split not in splits]
    cuts = [0.0, *(1 - share * left for left in range(len(missing), -1, -1))]
    held = {
        split: splits["train"].map(_part, batched=True, fn_kwargs={"start": start, "end": end}, desc="holding out")
        for split, start, end in zip(("train", *missing) if missing else (), cuts, cuts[1:])
    }
    return DatasetDict({split: {**splits, **held}[split] for split in ("train", "validation", "test")})


def _part(batch: dict[str, list[str]], start: float, end: float) -> dict[str, list[str]]:
    """The lines of each text from the share `start` to the share `end`; texts without such lines are left out."""
    parts = []
    for text in batch["text"]:
        lines = text.splitlines(keepends=True)
        parts.append("".join(lines[round(len(lines) * start) : round(len(lines) * end)]))
    return {"text": [part for part in parts if part]}
