"""A file of a public data set: a copy of the user's, or downloaded once, checked and kept in the Hugging Face cache."""

import hashlib
import os
import shutil
import sys
import tempfile
import urllib.request
from pathlib import Path

from huggingface_hub import constants


def local_or_downloaded(file: str | None, *, url: str, sha256: str) -> Path:
    """
    The path of a data file.

    Args:
        file: a copy that lies here; it is taken as it is, so it may be another file of the same format.
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
            raise FileNotFoundError(f"`data.file` names {file!r}, which is not a file (looked in {Path.cwd()})")
        return path
    folder = Path(constants.HF_HOME) / "rtransformer" / sha256[:16]
    path = folder / url.rsplit("/", 1)[-1]
    if not path.is_file():
        _download(url, sha256, path)
    return path


def _download(url: str, sha256: str, path: Path) -> None:
    """Fetch to a name of its own first: a file under its final name is whole and checked."""
    instead = "name a copy of yours as `data.file`"
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
