"""
Local files: text, CSV, JSON, JSON lines or Parquet, as [`scripts.data.sources.reader`] reads them.

A text file is one document; all line ends are read as line feeds. If no file is named for validation or test, a share
of the training data is held out: the end of each text, cut at a line end, or random rows of a table.

With `streaming` the training files are read during training, in every pass anew, and are not cached. A text file is
then cut at line ends into documents of at least 64 Ki characters.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value
from datasets.exceptions import DatasetGenerationError

from scripts.data.sources import reader
from scripts.data.sources.columns import SPLITS, TableOptions, hold_out, require_rows
from scripts.data.sources.reader import ReaderOptions, find_files, kind_of, rows
from scripts.data.streaming import StreamError


@dataclasses.dataclass(frozen=True)
class Options(ReaderOptions, TableOptions):
    """
    Further settings are those of [`TableOptions`] and of [`ReaderOptions`].

    Args:
        train, validation, test: a file, a folder, a wildcard, or a list of them, relative to the working directory.
    """

    source: str
    train: str | list[str]
    validation: str | list[str] | None = None
    test: str | list[str] | None = None


def load(options: Options) -> DatasetDict:
    """Read the files, hold out missing splits and keep the columns that the recipe names."""
    paths = {split: find_files(getattr(options, split), f"data.{split}", options) for split in SPLITS}
    if not paths["train"]:
        raise ValueError("`data.train` names no file; name one, or a list of them")
    given = {"columns": options.columns, "options": options.reading()}
    first = {split: next(examples(names, **given, pieces=True), None) for split, names in paths.items() if names}
    for split, example in first.items():
        if example is None:
            raise ValueError(f"the {split} split of `data` has no row ({', '.join(paths[split])})")
    kinds = {
        name: List(Value("string")) if isinstance(cell, list) else Value("string")
        for name, cell in first["train"].items()
    }
    settings = {"features": Features(kinds)}
    splits = {
        split: _dataset({"paths": paths[split], **given}, settings)
        for split in first
        if split != "train" or not options.streaming
    }
    if options.streaming:
        given = {"paths": paths["train"], **given}
        return DatasetDict({"train": IterableDataset.from_generator(streamed, gen_kwargs=given, **settings), **splits})
    if all(kind_of(path, options) == "text" for path in paths["train"]):
        splits = _hold_out_ends(splits, options.held_out)
    else:
        splits = hold_out(splits, options.held_out, options.seed)
    require_rows(splits)
    return splits


def _dataset(given: dict[str, Any], settings: dict[str, Any]) -> Dataset:
    """The rows of files in the Arrow cache, whose key has the files' sizes and times and the code that reads them."""
    code = hashlib.sha256(b"".join(Path(module).read_bytes() for module in (__file__, reader.__file__))).hexdigest()
    state = (code, *((os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in given["paths"]))
    try:
        return Dataset.from_generator(examples, gen_kwargs={**given, "state": state}, **settings)
    except DatasetGenerationError as error:
        if not isinstance(error.__cause__, (ValueError, OSError)):
            raise
        raise error.__cause__ from None


def examples(
    paths: list[str], columns: dict[str, str], options: ReaderOptions, state: tuple = (), pieces: bool = False
) -> Iterator[dict[str, str | list[str]]]:
    """
    The columns `text` and `label` of all rows of some files, checked. A label is text, or a list of texts.

    Args:
        columns: our name of each column that is read, by its own.
        state: of the files, for the key of a cache.
        pieces: give a text file in pieces.
    """
    named = {name: f"data.{ours}_column" for name, ours in columns.items()}
    several = None
    for path in paths:
        for place, row in rows(path, options, named, pieces):
            example = {}
            for name, ours in columns.items():
                cell = row.get(name)
                valid = isinstance(cell, str) if ours == "text" else not isinstance(cell, dict) and cell is not None
                if not valid:
                    problem = "is empty" if cell is None else f"holds {type(cell).__name__}, not {ours}"
                    raise ValueError(
                        f"`data.{ours}_column` {name!r} {problem}, in {place} of {path}; correct or remove the row, or "
                        f"name another column of {', '.join(map(str, row))}"
                    )
                example[ours] = [str(one) for one in cell] if isinstance(cell, list) else str(cell)
            if "label" in example and several is not None and isinstance(example["label"], list) is not several:
                raise ValueError(
                    "`data.label_column` holds one label in some rows and a list in others, "
                    f"first in {place} of {path}; let all rows have a list"
                )
            several = isinstance(example.get("label"), list)
            yield example


def streamed(paths: list[str], columns: dict[str, str], options: ReaderOptions) -> Iterator[dict[str, str]]:
    """As [`examples`], with text files in pieces."""
    try:
        yield from examples(paths, columns, options, pieces=True)
    except (ValueError, OSError) as error:
        raise StreamError(str(error)) from error


def _hold_out_ends(splits: dict[str, Dataset], share: float) -> DatasetDict:
    missing = [split for split in ("validation", "test") if split not in splits]
    cuts = [0.0, *(1 - share * left for left in range(len(missing), -1, -1))]
    held = {
        split: splits["train"].map(_part, batched=True, fn_kwargs={"start": start, "end": end}, desc="holding out")
        for split, start, end in zip(("train", *missing) if missing else (), cuts, cuts[1:])
    }
    return DatasetDict({split: {**splits, **held}[split] for split in SPLITS})


def _part(batch: dict[str, list[str]], start: float, end: float) -> dict[str, list[str]]:
    """The lines of each text from the share `start` to the share `end`; texts without such lines are left out."""
    parts = []
    for text in batch["text"]:
        lines = text.splitlines(keepends=True)
        parts.append("".join(lines[round(len(lines) * start) : round(len(lines) * end)]))
    return {"text": [part for part in parts if part]}
