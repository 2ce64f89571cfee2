"""
The source files of the running interpreter's standard library. Needs no download.

Every `.py` file of the library is one document; test suites and installed packages are left out. A hash of a file's
path decides its split, so the split is the same on every machine and stays the same when files are added: 90 % train,
5 % validation, 5 % test.
"""

import dataclasses
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path, PurePath

from datasets import Dataset, DatasetDict, Features, Value
from pydantic import PositiveInt


LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Options:
    """
    Args:
        max_files: keep only this many files of each split, for a quick test; all by default.
    """

    source: str
    max_files: PositiveInt | None = None


def split_of(path: PurePath) -> str:
    """The split of a file, by the SHA-256 of its path relative to the library."""
    share = int.from_bytes(hashlib.sha256(path.as_posix().encode()).digest()[:8], "big") / 2**64
    return "train" if share < 0.9 else "validation" if share < 0.95 else "test"


def is_source(path: PurePath) -> bool:
    """Whether a file, by its path relative to the library, is source: no test, installed package or generated file."""
    generated = path.name.startswith("_sysconfigdata")  # build settings with paths of the build machine
    return path.suffix == ".py" and not generated and not LEFT_OUT.intersection(path.parts)


def read(root: str, files: tuple) -> Iterator[dict[str, str]]:
    """The UTF-8 files, one document each; other files are skipped."""
    for name, *_ in files:
        try:
            text = (Path(root) / name).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        yield {"text": text}


def load(options: Options) -> DatasetDict:
    """Read the library. The files' names, sizes and times are the key of the Arrow cache."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files: dict[str, list] = {"train": [], "validation": [], "test": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if is_source(name) and path.stat().st_size > 0:
            files[split_of(name)].append((name.as_posix(), path.stat().st_size, path.stat().st_mtime_ns))
    if not all(files.values()):
        raise ValueError(
            f"`data.source` is stdlib_code, but this Python has no source files in {root}; use another Python"
        )
    features = Features({"text": Value("string")})
    return DatasetDict(
        {
            split: Dataset.from_generator(
                read, features=features, gen_kwargs={"root": str(root), "files": tuple(names[: options.max_files])}
            )
            for split, names in files.items()
        }
    )
