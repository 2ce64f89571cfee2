"""
Find a file of a public data set: a local copy, or a download, which is checked and kept in the Hugging Face cache.

A recipe names a local copy as `data.file` or `data.folder`. Without these, a file of the public name, with or without
`.gz`, is searched for in the folder that the environment variable RTRANSFORMER_DATA names and in the folders below it.
"""

import gzip
import os
import sys
import zlib
from pathlib import Path

import torch
from huggingface_hub import constants


def local_or_downloaded(copy: str | None, *, url: str, sha256: str, field: str = "data.file") -> Path:
    """
    The path of a data file.

    Args:
        copy: a local copy. Its checksum is not compared, so it may be another file of the same format.
        field: the setting that names the copy: `data.file`, or `data.folder`, where the file has the name of `url`,
            with or without `.gz`.
        url: the address of the public file, at a revision that does not change.
        sha256: of the public file's content; a download that differs is deleted.

    Raises:
        FileNotFoundError: `copy` does not exist.
        ConnectionError: the file is not in the cache and cannot be fetched.
        ValueError: the download has another checksum.
    """
    name = url.rsplit("/", 1)[-1]
    if copy is not None and field == "data.file":
        found = Path(copy).expanduser()
        found = found if found.is_file() else None
    else:
        found = _copy(copy or os.environ.get("RTRANSFORMER_DATA"), name)
    if copy is not None and found is None:
        problem = "which is not a file" if field == "data.file" else f"which has no file {name}"
        raise FileNotFoundError(f"`{field}` names {copy!r}, {problem} (looked in {Path.cwd()})")
    if found is None:
        found = Path(constants.HF_HOME) / "rtransformer" / sha256[:16] / name
        if not found.is_file():
            _download(url, sha256, found, field)
    return found


def _copy(folder: str | None, name: str) -> Path | None:
    """The file with this name, with or without `.gz`, in the folder or below it."""
    names = (name, f"{name}.gz", name.removesuffix(".gz"))
    found = [path for name in names for path in sorted(Path(folder).expanduser().rglob(name))] if folder else []
    return next((path for path in found if path.is_file()), None)


def read_bytes(path: Path) -> bytes:
    """
    The content of a file, decompressed if its name ends in `.gz`.

    Raises:
        ValueError: the gzip file is damaged.
    """
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"`data.folder`: {path.name} cannot be read as a gzip file ({error})") from error


def _download(url: str, sha256: str, path: Path, field: str) -> None:
    """Fetch `url` to `path`, which exists only when it is complete and has the checksum."""
    remedy = f"name a copy of yours as `{field}`"
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError(f"{url} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it; {remedy}")
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading {url}", file=sys.stderr)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=sys.stderr.isatty())
    except OSError as error:
        raise ConnectionError(f"{url} cannot be fetched ({error}); {remedy}") from error
    except RuntimeError as error:  # another checksum
        raise ValueError(f"{url} has changed: {error}; {remedy}") from error
