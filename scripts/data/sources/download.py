"""
A file of a public data set: a copy of the user's, or downloaded once, checked and kept in the Hugging Face cache.

A copy is named in the recipe (`data.file`, `data.folder`), or lies anywhere in the folder that the environment variable
RTRANSFORMER_DATA names, by its public name, packed (`.gz`) or not.
"""

import gzip
import hashlib
import os
import shutil
import sys
import tempfile
import urllib.request
import zlib
from pathlib import Path

from huggingface_hub import constants


def local_or_downloaded(file: str | None, *, url: str, sha256: str, field: str = "data.file") -> Path:
    """
    The path of a data file.

    Args:
        file: a copy that lies here; it is taken as it is, so it may be another file of the same format.
        field: the setting that names the copy, for errors.
        url: where the public file is, at a revision that does not change.
        sha256: of the public file's content; a download that differs is deleted.

    Raises:
        FileNotFoundError: `file` is not there.
        ConnectionError: the file is not in the cache and cannot be fetched.
        ValueError: what was fetched is not the file that is expected.
    """
    if file is not None:
        path = Path(file).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"`{field}` names {file!r}, which is not a file (looked in {Path.cwd()})")
        return path
    copy = _copy(os.environ.get("RTRANSFORMER_DATA"), url.rsplit("/", 1)[-1])
    if copy is not None:
        return copy
    folder = Path(constants.HF_HOME) / "rtransformer" / sha256[:16]
    path = folder / url.rsplit("/", 1)[-1]
    if not path.is_file():
        _download(url, sha256, path, field)
    return path


def in_folder_or_downloaded(folder: str | None, *, url: str, sha256: str) -> Path:
    """
    The same for one of several files: a copy is looked for in `folder` (`data.folder`) by its name at `url`,
    with or without `.gz` at its end.
    """
    if folder is None:
        return local_or_downloaded(None, url=url, sha256=sha256, field="data.folder")
    name = url.rsplit("/", 1)[-1]
    copy = _copy(folder, name)
    if copy is None:
        raise FileNotFoundError(f"`data.folder` {folder!r} has no file {name} (looked in {Path.cwd()})")
    return copy


def _copy(folder: str | None, name: str) -> Path | None:
    """The file of that name in the folder or below, with or without `.gz` at its end."""
    names = (name, f"{name}.gz", name.removesuffix(".gz"))
    found = [path for name in names for path in sorted(Path(folder).expanduser().rglob(name))] if folder else []
    return next((path for path in found if path.is_file()), None)


def read_bytes(path: Path) -> bytes:
    """
    What a file holds, unpacked if its name ends in `.gz`.

    Raises:
        ValueError: it is no whole gzip file.
    """
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"`data.folder`: {path.name} cannot be read as a gzip file ({error})") from error


def _download(url: str, sha256: str, path: Path, field: str) -> None:
    """Fetch to a name of its own first: a file under its final name is whole and checked."""
    instead = f"name a copy of yours as `{field}`"
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError(f"{url} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it; {instead}")
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading {url}", file=sys.stderr)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as partial:
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                shutil.copyfileobj(response, partial)
            partial.close()
            found = hashlib.sha256(Path(partial.name).read_bytes()).hexdigest()
            if found != sha256:
                raise ValueError(f"{url} has changed: its SHA-256 is {found}, not {sha256}; {instead}")
            os.replace(partial.name, path)
        except OSError as error:
            raise ConnectionError(f"{url} cannot be fetched ({error}); {instead}") from error
        finally:
            Path(partial.name).unlink(missing_ok=True)
