"""
The reader of people's own files: the rows of CSV, TSV, JSON, JSON lines and Parquet, and texts, plain or compressed.

The csv, json and pyarrow libraries parse; every cell stays what it is. Of a CSV file all cells are text: "NA", "01" and
"True" are words, and no column becomes an index. `csv` reads it because pandas fills short rows without a word, and
pyarrow counts rows where a person needs the line. Numbers are made of text by [`numbers`] where numbers are needed.

A file is read by its own suffix, its compression (gzip, bzip2, xz, a zip archive with one file) by its first bytes, a
byte-order mark decides the encoding, and the delimiter is the one with which the rows agree. What was recognised, if it
is not the default, is said on stderr once.
"""

import bz2
import codecs
import contextlib
import csv
import dataclasses
import functools
import glob
import gzip
import io
import json
import lzma
import re
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, BinaryIO, Literal, TextIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from modeling_rtransformer.configuration_rtransformer import nearest


FORMATS = {
    **dict.fromkeys((".txt", ".text", ".md", ".py"), "text"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    ".parquet": "parquet",
}
COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}  # by the first bytes
BYTE_ORDER_MARKS = {  # UTF-32 first, whose mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
DELIMITERS = (",", ";", "\t", "|")
HEAD = 1 << 16  # characters from which a dialect is recognised
PIECE = 1 << 16  # characters of a text file in one document of a stream
DAMAGED = (
    csv.Error, json.JSONDecodeError, pa.ArrowException, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
    EOFError, OSError, RecursionError, RuntimeError,
)  # fmt: skip

csv.field_size_limit(1 << 31 - 1)  # a text may be long


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReaderOptions:
    """
    Args:
        format: `text`, `csv`, `json` (also JSON lines) or `parquet` for all files; each by its own suffix if left out.
        delimiter: between the cells of a CSV file; recognised among `,`, `;`, tab and `|` if left out.
        decimal: of numbers in text, `.` or `,`; recognised if left out and not in doubt.
        encoding: of text, CSV and JSON, such as `latin-1`; UTF-8 if left out and no byte-order mark says otherwise.
        na_values: texts of cells that count as empty, besides the empty text of a CSV file; the texts of a cell are
            words otherwise.
    """

    format: Literal["text", "csv", "json", "parquet"] | None = None
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    decimal: Literal[".", ","] | None = None
    encoding: str | None = None
    na_values: list[str] = dataclasses.field(default_factory=list)

    def reading(self) -> "ReaderOptions":
        """These settings alone, of a class that can be pickled as a part of a cache's key."""
        return ReaderOptions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(ReaderOptions)})


@functools.cache
def say(message: str) -> None:
    """Print a message on stderr, once."""
    print(message, file=sys.stderr)


def suffixes(path: str | Path) -> str:
    """The suffix that says what a file holds; that of a compression is left out."""
    name = Path(path).name.lower()
    for compression in (".gz", ".bz2", ".xz", ".zip"):
        name = name.removesuffix(compression)
    return Path(name).suffix


def kind_of(path: str, options: ReaderOptions) -> str:
    """The format of a file."""
    if options.format is None and suffixes(path) not in FORMATS:
        raise ValueError(
            f"`data.format` is missing, and the suffix of {path!r} is unknown; it is one of text, csv, json and "
            f"parquet, and known suffixes are {', '.join(FORMATS)}, also with .gz, .bz2, .xz or .zip"
        )
    return options.format or FORMATS[suffixes(path)]


def find_files(names: str | Sequence[str] | None, setting: str, options: ReaderOptions) -> list[str]:
    """
    The paths that a setting names, in order: files, folders with files of known formats, and wildcards. A name is
    literal wherever such a file is there.
    """
    found: list[Path] = []
    for name in [names] if isinstance(names, str) else names or []:
        path = Path(name).expanduser()
        if path.is_file():
            found.append(path)
            continue
        inside = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
        files = sorted(file for file in inside if file.is_file() and not file.name.startswith("."))
        if path.is_dir() and options.format is None:
            files = [file for file in files if suffixes(file) in FORMATS]
        if not files:
            beside = [str(other) for other in path.parent.glob("*")] if path.parent.is_dir() else []
            problem = "a folder without a file of a known format" if path.is_dir() else "which is not a file"
            hint = "" if path.is_dir() else nearest(str(path), beside)
            raise FileNotFoundError(f"`{setting}` names {name!r}, {problem} (looked in {Path.cwd()}){hint}")
        say(f"`{setting}` {name}: {len(files)} files, {', '.join(file.name for file in files[:10])}")
        found += files
    for path in found:
        if path.stat().st_size == 0:
            raise ValueError(f"`{setting}` names {str(path)!r}, which is empty; add text to the file or leave it out")
    return [str(path) for path in found]


def rows(
    path: str, options: ReaderOptions, columns: Mapping[str, str] = MappingProxyType({}), pieces: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    The rows of a file, each with its place, such as `line 7`. A text file has one row with the column `text`.

    Args:
        columns: the setting that names each needed column, by its name; all columns if empty.
        pieces: give a text file in pieces, each a row.

    Raises:
        ValueError, OSError: the file is damaged or of another kind, a row has more or fewer cells than the header, or
            a column is missing; the message names the file.
    """
    kind = kind_of(path, options)
    try:
        with open_binary(path) as file:
            read = _pieces if pieces and kind == "text" else READERS[kind]
            yield from read(file, path, options, columns)
    except UnicodeError as error:
        raise ValueError(
            f"`data`: {path} cannot be read as {kind}: {_line(error)}; name its encoding as `data.encoding`, such as "
            '"latin-1", or its format as `data.format`'
        ) from error
    except DAMAGED as error:
        raise ValueError(
            f"`data`: {path} cannot be read as {kind} ({_line(error)}); correct the file, or name its format as "
            "`data.format`"
        ) from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


@contextlib.contextmanager
def open_binary(path: str | Path) -> Iterator[BinaryIO]:
    """A file as bytes, decompressed if its first bytes say that it is compressed."""
    with open(path, "rb") as file:
        start = file.read(6)
        file.seek(0)
        if start.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(file) as archive:
                names = [name for name in archive.namelist() if not name.endswith("/") and "__MACOSX" not in name]
                if len(names) != 1:
                    raise ValueError(f"`data`: {path} must hold one file, got {', '.join(names[:9]) or 'none'}")
                with archive.open(names[0]) as inside:
                    yield inside
        else:
            opener = next((opener for magic, opener in COMPRESSED.items() if start.startswith(magic)), None)
            yield file if opener is None else opener(file)


def open_text(file: BinaryIO, path: str, options: ReaderOptions, newline: str | None = None) -> TextIO:
    """The text of a file in the encoding of its byte-order mark, in `data.encoding` or in UTF-8."""
    start = file.read(4)
    file.seek(0)
    marked = next((name for mark, name in BYTE_ORDER_MARKS.items() if start.startswith(mark)), None)
    try:
        text = io.TextIOWrapper(file, encoding=marked or options.encoding or "utf-8", newline=newline)
    except LookupError:
        raise ValueError(f"`data.encoding` must be an encoding of Python, got {options.encoding!r}") from None
    if marked:
        say(f"{path}: byte-order mark, {marked}")
    if "\0" in text.read(HEAD):
        raise ValueError(
            f"`data`: {path} holds zero characters, so it is no {text.encoding} text; name its encoding as "
            '`data.encoding`, such as "utf-16-le", or its format as `data.format`'
        )
    text.seek(0)
    return text


def _text(file: BinaryIO, path: str, options: ReaderOptions, columns: Mapping[str, str]) -> Iterator:
    _require(columns, ["text"], path)
    yield "line 1", {"text": open_text(file, path, options).read()}


def _pieces(file: BinaryIO, path: str, options: ReaderOptions, columns: Mapping[str, str]) -> Iterator:
    """A text file in pieces of 64 to 128 Ki characters that end at a line end if there is one."""
    _require(columns, ["text"], path)
    text, number = open_text(file, path, options), 0
    while piece := text.read(PIECE):
        if not piece.endswith("\n"):
            piece += text.readline(PIECE)
        number += 1
        yield f"piece {number}", {"text": piece}


def _csv(file: BinaryIO, path: str, options: ReaderOptions, columns: Mapping[str, str]) -> Iterator:
    text = open_text(file, path, options, newline="")
    head = text.read(HEAD)
    text.seek(0)
    usual = "\t" if suffixes(path) == ".tsv" else ","
    named = re.match(r"sep=(.)\r?\n", head)  # a first line that spreadsheets write
    if named:
        usual = named[1]
        text.readline()
    delimiter = options.delimiter or named and named[1] or delimiter_of(head, len(head) < HEAD, usual)
    if delimiter != usual and options.delimiter is None:
        say(f"{path}: delimiter {delimiter!r}")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(filter(None, reader), [])
        _require(columns, header, path)
        empty, skipped = {"", *options.na_values}, int(named is not None)
        line = reader.line_num + skipped + 1  # the first one of the next row
        for row in reader:
            if row and len(row) != len(header):
                raise ValueError(
                    f"`data`: line {line} of {path} has {len(row)} cells, and the header has {len(header)}; put "
                    f"texts that hold {delimiter!r} into quotation marks, or name another `data.delimiter`"
                )
            if row:
                cells = (None if cell in empty else cell for cell in row)
                yield f"line {line}", dict(zip(header, cells, strict=True))
            line = reader.line_num + skipped + 1
    except csv.Error as error:
        raise csv.Error(f"line {reader.line_num + bool(named)}: {error}") from error


def delimiter_of(head: str, complete: bool, usual: str) -> str:
    """The delimiter with which most rows of a file's head have as many cells as the first one, and at least two."""

    def merit(delimiter: str) -> tuple:
        found = [row for row in csv.reader(io.StringIO(head, newline=""), delimiter=delimiter) if row]
        found = found if complete else found[:-1]  # the last one is cut
        width = len(found[0]) if found else 0
        agree = sum(len(row) == width for row in found)
        marks = sum('"' in cell for row in found for cell in row)  # of quotation that the delimiter breaks
        return width > 1, agree, -marks, width, delimiter == usual

    return max((usual, *DELIMITERS), key=merit)


def _json(file: BinaryIO, path: str, options: ReaderOptions, columns: Mapping[str, str]) -> Iterator:
    """Lines of objects; or one list of objects; or an object that holds one such list, as in SQuAD's files."""
    text = open_text(file, path, options)
    lines = (line for line in text if line.strip())
    try:
        first, single = json.loads(next(lines, "")), next(lines, None) is None
    except json.JSONDecodeError:
        first, single = None, True
    text.seek(0)
    if isinstance(first, dict) and not (single and _lists(first)):
        records = ((f"line {n}", _loaded(line, n)) for n, line in enumerate(text, 1) if line.strip())
    else:
        whole = json.load(text)
        lists = _lists(whole) if isinstance(whole, dict) else {}
        if len(lists) == 1:
            say(f"{path}: the rows are the list {next(iter(lists))!r}")
        elif not isinstance(whole, list):
            keys = f" with the keys {', '.join(map(str, whole))}" if isinstance(whole, dict) else ""
            raise ValueError(
                f"`data`: {path} holds one {type(whole).__name__}{keys}; its rows must be a list of objects, or one "
                "object a line"
            )
        records = ((f"row {n}", row) for n, row in enumerate(next(iter(lists.values()), whole)))
    required = False
    for place, row in records:
        if not isinstance(row, dict):
            raise ValueError(f"`data`: {place} of {path} must be an object with named values, got {str(row)[:60]!r}")
        if not required:
            _require(columns, list(row), path)
            required = True
        yield place, {name: None if value in options.na_values else value for name, value in row.items()}


def _loaded(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise json.JSONDecodeError(f"line {number}: {error.msg}", line[error.pos : error.pos + 1], 0) from error


def _lists(value: dict[str, Any]) -> dict[str, list]:
    """The lists of objects in an object."""
    return {
        key: inside
        for key, inside in value.items()
        if isinstance(inside, list) and inside and all(isinstance(row, dict) for row in inside)
    }


def _parquet(file: BinaryIO, path: str, options: ReaderOptions, columns: Mapping[str, str]) -> Iterator:
    table = pq.ParquetFile(file if file.seekable() else io.BytesIO(file.read()))
    names = table.schema_arrow.names
    _require(columns, names, path)
    number = 0
    for batch in table.iter_batches(columns=list(columns) or None):
        for row in batch.to_pylist():
            yield f"row {number}", {key: None if value in options.na_values else value for key, value in row.items()}
            number += 1


READERS = {"text": _text, "csv": _csv, "json": _json, "parquet": _parquet}


def _require(columns: Mapping[str, str], header: Sequence[str], path: str) -> None:
    """Refuse a file without a needed column, or with two of its name."""
    for name in columns or header:
        if name not in header:
            raise ValueError(
                f"`{columns[name]}` is {name!r}, but {path} has the columns {', '.join(map(str, header))}"
                f"{nearest(name, header)}"
            )
        if name and header.count(name) > 1:
            raise ValueError(f"`data`: {path} has {header.count(name)} columns {name!r}; rename one of them")


def numbers(cells: pd.Series, decimal: str | None, where: str, remedy: str = "") -> pd.Series:
    """
    The numbers of a column, NaN where it is empty.

    Args:
        cells: numbers, or their texts; the index has their places.
        decimal: `.` or `,`; if None, `,` where no text has a point and one has a comma that separates no thousands.
        where, remedy: what the column is called in errors, and a further remedy.

    Raises:
        ValueError: a cell is no number, with its place.
    """
    texts = cells.map(str, na_action="ignore").str.strip()
    comma, point = texts.str.contains(",", na=False), texts.str.contains(".", regex=False, na=False)
    if decimal is None and comma.any() and not point.any():
        if not texts[comma].str.fullmatch(r"[+-]?[1-9]\d{0,2}(,\d{3})+").all():
            decimal = ","
            say(f"{where}: decimal comma")
    if decimal == ",":
        texts = texts.str.replace(",", ".", regex=False).mask(point, "x")
    found = pd.to_numeric(texts, errors="coerce")
    bad = np.flatnonzero(found.isna() & texts.notna() & (texts.str.lower() != "nan"))
    if len(bad):
        setting = "`data.decimal`" if comma.iloc[bad[0]] and not point.iloc[bad[0]] else "the cell in `data.na_values`"
        raise ValueError(
            f"{where} holds {cells.iloc[bad[0]]!r}, not a number, in {cells.index[bad[0]]}; correct it, name {setting}"
            f"{',' + remedy if remedy else ''}"
        )
    return found.astype(float)
