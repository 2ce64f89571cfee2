"""
Multivariate time series from a table with one row a time step and one column a channel, or in long format.

ETT (Zhou et al. 2021, github.com/zhouhaoyi/ETDataset): load and oil temperature of electricity transformers, seven
channels, hourly (ETTh1, ETTh2) or every 15 minutes (ETTm1, ETTm2); the first 12 months of 30 days are for training, the
next 4 for validation, 4 more for test, and the rest is left out, as in the Informer's code. WTH, hourly weather, and
other tables are split 70, 10 and 20 %, as there.

A column of times is no channel: dates, numbers named as a time or in the first column that rise in even steps, and an
index that pandas saved. Times must rise without a repeat; uneven steps are said. A table in long format (series, time,
value) becomes one channel a series.
"""

import contextlib
import dataclasses
import datetime
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict

from modeling_rtransformer.configuration_rtransformer import nearest
from scripts.data.sources.download import local_or_downloaded
from scripts.data.sources.reader import ReaderOptions, kind_of, numbers, rows, say


ADDRESS = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/1d16c8f4f943005d613b5bc962e9eeb06058cf07/ETT-small"
SHA256 = {
    "ETTh1": "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
    "ETTh2": "a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b",
    "ETTm1": "6ce1759b1a18e3328421d5d75fadcb316c449fcd7cec32820c8dafda71986c9e",
    "ETTm2": "db973ca252c6410a30d0469b13d696cf919648d0f3fd588c60f03fdbdbadd1fd",
}
STEPS_A_MONTH = {"ETTh1": 30 * 24, "ETTh2": 30 * 24, "ETTm1": 30 * 24 * 4, "ETTm2": 30 * 24 * 4}
TIME_NAMES = {"", "index", "unnamed: 0", "__index_level_0__", "date", "datetime", "time", "timestamp", "ds", "epoch"}
EPOCHS = 3e8  # seconds since 1970, or smaller units; a rising column of such numbers has times
MONTHS = {"train": 12, "validation": 4, "test": 4}


@dataclasses.dataclass(frozen=True)
class Options(ReaderOptions):
    """
    Further settings are those of [`ReaderOptions`].

    Args:
        dataset: one of ETT, which is downloaded once; `WTH`, the Informer's weather, which has no permanent address; or
            `table` for any other. The last two require `file`.
        file: a CSV, JSON or Parquet file to read instead of the download; it may be compressed.
        columns: names of the channels; all columns of numbers that are no times by default. In long format, the column
            of the values.
        time_column: the column of times; recognised if left out.
        id_column: the column that names the series of a table in long format; recognised if left out.
    """

    source: str
    dataset: Literal["ETTh1", "ETTh2", "ETTm1", "ETTm2", "WTH", "table"] = "ETTh1"
    file: str | None = None
    columns: list[str] | None = None
    time_column: str | None = None
    id_column: str | None = None

    def __post_init__(self) -> None:
        if self.file is None and self.dataset not in SHA256:
            raise ValueError(f"`data.file` is missing: {self.dataset} is not downloaded; name a table")


def split_sizes(dataset: str, rows: int) -> dict[str, int]:
    """Time steps of each part, in chronological order."""
    if dataset in STEPS_A_MONTH:
        return {split: months * STEPS_A_MONTH[dataset] for split, months in MONTHS.items()}
    train, test = int(rows * 0.7), int(rows * 0.2)
    return {"train": train, "validation": rows - train - test, "test": test}


def load(options: Options) -> DatasetDict:
    """Read the table and cut it into its three parts."""
    table = read_series(options)
    sizes = split_sizes(options.dataset, len(table))
    if len(table) < sum(sizes.values()) or min(sizes.values()) < 1:
        needed = ", ".join(f"{split} {size}" for split, size in sizes.items())
        raise ValueError(
            f"`data.file` {options.file!r} has {len(table)} rows, too few for {options.dataset} ({needed})"
        )
    parts, start = {}, 0
    for split, size in sizes.items():
        parts[split] = Dataset.from_pandas(table.iloc[start : start + size], preserve_index=False)
        start += size
    return DatasetDict(parts)


def read_series(options: Options) -> pd.DataFrame:
    """
    The channels as columns of finite numbers; the index has the times, or the rows' places in the file.

    Raises:
        ValueError: a cell is no finite number, times fall or are repeated, a column is missing or not understood.
    """
    url, sha256 = f"{ADDRESS}/{options.dataset}.csv", SHA256.get(options.dataset, "")
    path = local_or_downloaded(options.file, url=url, sha256=sha256)
    if options.format == "text" or kind_of(str(path), options) == "text":
        raise ValueError(f"`data.file` {path.name!r} must be a table, got a text; name its `data.format`")
    read = list(rows(str(path), options))
    table = pd.DataFrame([row for _, row in read], index=[place for place, _ in read], dtype=object)
    if not len(table):
        raise ValueError(f"`data.file` {path.name!r} has no row")
    table = table.drop(columns=[name for name in table if not str(name).strip() and table[name].isna().all()])
    settings = {"columns": options.columns or (), "time_column": options.time_column, "id_column": options.id_column}
    for setting, names in settings.items():
        for name in [names] if isinstance(names, str) else names or ():
            if name not in table.columns:
                known = ", ".join(map(str, table.columns))
                raise ValueError(
                    f"`data.{setting}` names {name!r}, but {path.name!r} has the columns {known}"
                    f"{nearest(name, table.columns)}"
                )
    time, times = None, None
    if options.dataset != "table":
        table = table.drop(columns="date", errors="ignore")
    else:
        _require_header(table, path)
        time, times = find_times(table, options)
    series = find_series(table, time, times, options)
    if series is None and times is not None:
        require_rising(times, table.index, time, path)
    names = [name for name in table.columns if name not in (time, series)]
    if options.columns:
        names = list(options.columns)
    elif options.dataset == "table":
        names = [name for name in names if not is_counter(table[name], name, path)]
    channels = pd.DataFrame({name: _channel(table[name], options, path) for name in names}, index=table.index)
    if not names:
        raise ValueError(f"`data.file` {path.name!r} has no column but {time or 'date'!r}")
    if times is None:
        return channels
    if series is not None:
        channels, times = to_channels(channels, table[series], times, path)
        require_rising(times, channels.index, time, path)
    return channels.set_axis(times.rename(time))


def _require_header(table: pd.DataFrame, path: Path) -> None:
    """Refuse a table whose first line has numbers in the place of names."""
    names = pd.to_numeric(pd.Series(table.columns, dtype=object), errors="coerce")
    if names.notna().all() and names.tolist() != list(range(len(names))):
        raise ValueError(
            f"`data.file` {path.name!r} has no header: its first line is {', '.join(map(str, table.columns))}; write "
            "the names of the columns there"
        )


def find_times(table: pd.DataFrame, options: Options) -> tuple[str | None, pd.Index | None]:
    """The column of times and its dates or numbers, dates before numbers; none if there is no such column."""
    names = [options.time_column] if options.time_column else [n for n in table if n not in (options.columns or ())]
    values = {name: _numeric(table[name]) for name in names}
    for name in names:
        dates = _dates(table[name]) if values[name] is None else None
        if dates is not None:
            return name, dates
    for name in names:
        if values[name] is None:
            continue
        named = options.time_column is not None or str(name).lower() in TIME_NAMES
        likely = name == table.columns[0] or any(
            part in str(name).lower() for part in ("time", "date", "epoch", "unix")
        )
        epochs = bool((values[name] > EPOCHS).all()) and values[name].is_monotonic_increasing
        if named or likely and (epochs or _rises_evenly(values[name])):
            return name, pd.Index(values[name])
    if options.time_column:
        cell = table[options.time_column].iloc[0]
        raise ValueError(f"`data.time_column` {options.time_column!r} holds {cell!r}, neither a date nor a number")
    return None, None


def _numeric(cells: pd.Series) -> pd.Series | None:
    """The cells as numbers; None if one of them is no number."""
    if cells.map(lambda cell: isinstance(cell, datetime.date)).any():
        return None
    values = pd.to_numeric(cells, errors="coerce")
    return None if values.isna().any() else values


def _rises_evenly(values: pd.Series) -> bool:
    steps = np.diff(values.to_numpy(dtype=float))
    return len(steps) > 1 and steps[0] > 0 and bool((steps == steps[0]).all()) and bool((values % 1 == 0).all())


def _dates(cells: pd.Series) -> pd.DatetimeIndex | None:
    """The cells as dates, with the day first if they rise only then; None if they are no dates."""
    if not cells.map(lambda cell: any(map(str.isdigit, str(cell)))).all():
        return None
    found = []
    for settings in ({"format": "ISO8601"}, {"format": "ISO8601", "utc": True}, {}, {"dayfirst": True}):
        with warnings.catch_warnings(), contextlib.suppress(ValueError, TypeError, UserWarning):
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message="Could not infer format")  # pandas would guess each cell's
            found.append(pd.DatetimeIndex(pd.to_datetime(cells, **settings)))
    rising = [dates for dates in found if dates.is_monotonic_increasing]
    return next(iter(rising or found), None)


def is_counter(cells: pd.Series, name: str, path: Path) -> bool:
    """Whether a column only counts the rows; says so."""
    values = _numeric(cells)
    counts = values is not None and _rises_evenly(values)
    if counts:
        say(f"{path.name}: column {name!r} counts the rows and is no channel; name it as `data.columns` if it is one")
    return counts


def _are_times(cells: pd.Series) -> bool:
    """Whether texts are dates, or times of a day."""
    return cells.str.fullmatch(r"\s*\d{1,2}:\d{2}(:\d{2}(\.\d+)?)?\s*").all() or _dates(cells) is not None


def find_series(table: pd.DataFrame, time: str | None, times: pd.Index | None, options: Options) -> str | None:
    """The column that names the series of a table in long format: texts that, with the times, differ in all rows."""
    if options.id_column is not None and times is None:
        raise ValueError("`data.id_column` needs a column of times; name it as `data.time_column`")
    if options.id_column is not None or times is None or times.is_unique:
        return options.id_column
    for name in table.columns:
        texts = table[name].map(lambda cell: isinstance(cell, str)).all()
        texts = texts and pd.to_numeric(table[name], errors="coerce").isna().all() and not _are_times(table[name])
        if name != time and texts and not pd.MultiIndex.from_arrays([table[name], times]).has_duplicates:
            say(f"{name!r} names the series, one channel each")
            return name
    return None


def to_channels(values: pd.DataFrame, series: pd.Series, times: pd.Index, path: Path) -> tuple[pd.DataFrame, pd.Index]:
    """The single column of `values` as one column a series, and their common times in order."""
    if len(values.columns) != 1:
        raise ValueError(
            f"`data.columns` must name the one column of values in long format, got {', '.join(values.columns)}"
        )
    pairs = pd.MultiIndex.from_arrays([times, series.map(str)])
    if pairs.has_duplicates:
        place = values.index[np.flatnonzero(pairs.duplicated())[0]]
        raise ValueError(f"`data.file` {path.name!r} repeats the time of a series in {place}; remove the row")
    wide = values.iloc[:, 0].set_axis(pairs).unstack().sort_index()
    for name in wide.columns:
        if wide[name].isna().any():
            raise ValueError(
                f"series {name!r} of {path.name!r} has no value at {wide.index[wide[name].isna()][0]}, where another "
                "one has; fill it, or remove the times that not all series have"
            )
    return wide, wide.index


def require_rising(times: pd.Index, places: pd.Index, name: str, path: Path) -> None:
    """Refuse times that fall or are repeated; say whether their steps are uneven."""
    if pd.isna(times).any():
        raise ValueError(f"column {name!r} of {path.name!r} has no time in {places[pd.isna(times)][0]}; fill it")
    steps = np.diff(times.to_numpy())
    zero = steps[:1] - steps[:1]
    bad = np.flatnonzero(steps <= zero)
    if len(bad):
        problem = "repeats the time" if steps[bad[0]] == zero[0] else "is before the time"
        raise ValueError(
            f"column {name!r} of {path.name!r}: {places[bad[0] + 1]} {problem} of the row before it; sort the rows by "
            "time and give each time once, or name the column of the series as `data.id_column`"
        )
    if len(set(steps.tolist())) > 1 and frequency_of(times) is None:
        say(f"{path.name}: the steps of {name!r} are uneven, from {steps.min()} to {steps.max()}; a row is one step")


def frequency_of(times: pd.Index) -> pd.DateOffset | None:
    """The step of dates that may have unlike lengths, such as months; None if there is no such step."""
    if not isinstance(times, pd.DatetimeIndex) or len(times) < 3:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pandas will return the offset itself
        return pd.tseries.frequencies.to_offset(pd.infer_freq(times))


def _channel(cells: pd.Series, options: Options, path: Path) -> pd.Series:
    """The finite numbers of a column."""
    where = f"column {cells.name!r} of {path.name!r}"
    values = numbers(cells, options.decimal, where, " or leave the column out by `data.columns`")
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise ValueError(
            f"{where} has {len(bad)} cells that are empty or not finite, the first in {values.index[bad[0]]}; fill "
            "them, or name other columns as `data.columns`"
        )
    return values
