"""
Multivariate time series from a table with one row a time step and one column a channel.

ETT (Zhou et al. 2021, github.com/zhouhaoyi/ETDataset): load and oil temperature of electricity transformers, seven
channels, hourly (ETTh1, ETTh2) or every 15 minutes (ETTm1, ETTm2); the first 12 months of 30 days are for training, the
next 4 for validation, 4 more for test, and the rest is left out, as in the Informer's code. WTH, hourly weather, and
other tables are split 70, 10 and 20 %, as there. The column `date` is left out.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict

from modeling_rtransformer.configuration_rtransformer import nearest
from scripts.data.sources.download import local_or_downloaded


ADDRESS = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/1d16c8f4f943005d613b5bc962e9eeb06058cf07/ETT-small"
SHA256 = {
    "ETTh1": "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
    "ETTh2": "a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b",
    "ETTm1": "6ce1759b1a18e3328421d5d75fadcb316c449fcd7cec32820c8dafda71986c9e",
    "ETTm2": "db973ca252c6410a30d0469b13d696cf919648d0f3fd588c60f03fdbdbadd1fd",
}
STEPS_A_MONTH = {"ETTh1": 30 * 24, "ETTh2": 30 * 24, "ETTm1": 30 * 24 * 4, "ETTm2": 30 * 24 * 4}
MONTHS = {"train": 12, "validation": 4, "test": 4}


@dataclasses.dataclass(frozen=True)
class Options:
    """
    Args:
        dataset: one of ETT, which is downloaded once; `WTH`, the Informer's weather, which has no permanent address; or
            `table` for any other. The last two require `file`.
        file: a CSV file to read instead of the download; it may be compressed (`.gz`).
        columns: names of the channels; all columns but `date` by default.
    """

    source: str
    dataset: Literal["ETTh1", "ETTh2", "ETTm1", "ETTm2", "WTH", "table"] = "ETTh1"
    file: str | None = None
    columns: list[str] | None = None

    def __post_init__(self) -> None:
        if self.file is None and self.dataset not in SHA256:
            raise ValueError(f"`data.file` is missing: {self.dataset} is not downloaded; name a CSV file")


def split_sizes(dataset: str, rows: int) -> dict[str, int]:
    """Time steps of each part, in chronological order."""
    if dataset in STEPS_A_MONTH:
        return {split: months * STEPS_A_MONTH[dataset] for split, months in MONTHS.items()}
    train, test = int(rows * 0.7), int(rows * 0.2)
    return {"train": train, "validation": rows - train - test, "test": test}


def load(options: Options) -> DatasetDict:
    """Read the table and cut it into its three parts."""
    url, sha256 = f"{ADDRESS}/{options.dataset}.csv", SHA256.get(options.dataset, "")
    path = local_or_downloaded(options.file, url=url, sha256=sha256)
    table = _read(path, options.columns)
    sizes = split_sizes(options.dataset, len(table))
    if len(table) < sum(sizes.values()) or min(sizes.values()) < 1:
        needed = ", ".join(f"{split} {size}" for split, size in sizes.items())
        raise ValueError(f"`data.file` {path.name!r} has {len(table)} rows, too few for {options.dataset} ({needed})")
    parts, start = {}, 0
    for split, size in sizes.items():
        parts[split] = Dataset.from_pandas(table.iloc[start : start + size], preserve_index=False)
        start += size
    return DatasetDict(parts)


def _read(path: Path, columns: list[str] | None) -> pd.DataFrame:
    """The channels of the table; refused unless every cell is a finite number."""
    try:
        table = pd.read_csv(path)
    except (ValueError, OSError) as error:  # pandas' ParserError and EmptyDataError are ValueErrors
        raise ValueError(f"`data.file` {path.name!r} cannot be read as CSV ({error})") from error
    known = [name for name in table.columns if name != "date"]
    for name in columns or []:
        if name not in known:
            raise ValueError(
                f"`data.columns` names {name!r}, but {path.name!r} has the columns {', '.join(known)}"
                f"{nearest(name, known)}"
            )
    table = table[columns or known]
    for name in table.columns:
        if not pd.api.types.is_numeric_dtype(table[name]):
            raise ValueError(f"column {name!r} of {path.name!r} holds text, not numbers; name others as `data.columns`")
        bad = np.flatnonzero(~np.isfinite(table[name].to_numpy(dtype=float)))
        if len(bad):
            raise ValueError(
                f"column {name!r} of {path.name!r} has {len(bad)} cells that are empty or not finite, the first in row "
                f"{bad[0] + 2} of the file; fill them, or name other columns as `data.columns`"
            )
    if not len(table.columns):
        raise ValueError(f"`data.file` {path.name!r} has no column but `date`")
    return table.astype(float)
