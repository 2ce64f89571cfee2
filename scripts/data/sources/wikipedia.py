"""
enwik8 and text8: the first 10^8 bytes of the English Wikipedia of March 2006, unchanged (XML) and as words of a-z.

By convention the last 5,000,000 bytes are the test split and the 5,000,000 before them the validation split. Each byte
is one character of `text` (Latin-1), so bits per character are bits per byte. A document has 100,000 bytes; the `<eos>`
after each document costs bits but is not counted as a character, which increases a score by about 0.0001.

Source: Mahoney 2006, "Large Text Compression Benchmark", mattmahoney.net/dc/textdata.html.
"""

import dataclasses
import zipfile
from pathlib import Path
from typing import Literal

from datasets import Dataset, DatasetDict
from pydantic import PositiveInt

from scripts.data.sources.download import local_or_downloaded, read_bytes


ADDRESS = "https://mattmahoney.net/dc"
SHA256 = {
    "enwik8": "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
    "text8": "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
}
DOCUMENT = 100_000  # bytes


@dataclasses.dataclass(frozen=True)
class Options:
    """
    Args:
        dataset: `enwik8` or `text8`, downloaded once.
        file: a local copy of the zip archive or of its content; any other text is accepted too.
        max_train_bytes: only the first bytes of the training split, for a test.
    """

    source: str
    dataset: Literal["enwik8", "text8"]
    file: str | None = None
    max_train_bytes: PositiveInt | None = None


def load(options: Options) -> DatasetDict:
    """Read the bytes and cut them 90 : 5 : 5."""
    url = f"{ADDRESS}/{options.dataset}.zip"
    content = _content(local_or_downloaded(options.file, url=url, sha256=SHA256[options.dataset]))
    twentieth = len(content) // 20
    if twentieth < 1:
        raise ValueError(f"`data.file` {options.file!r} must hold at least 20 bytes, got {len(content)}")
    ends = {"train": len(content) - 2 * twentieth, "validation": len(content) - twentieth, "test": len(content)}
    splits, start = {}, 0
    for split, end in ends.items():
        stop = min(end, start + (options.max_train_bytes or end)) if split == "train" else end
        pieces = [content[at : min(at + DOCUMENT, stop)].decode("latin-1") for at in range(start, stop, DOCUMENT)]
        splits[split] = Dataset.from_dict({"text": pieces})
        start = end
    return DatasetDict(splits)


def _content(path: Path) -> bytes:
    if not zipfile.is_zipfile(path):
        return read_bytes(path)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(names) != 1:
            raise ValueError(f"`data.file` {path.name!r} must hold one file, got {', '.join(names) or 'none'}")
        return archive.read(names[0])
