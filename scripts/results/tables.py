"""
The tables of docs/RESULTS.md: the runs that `configuration/tables.toml` lists, and the Markdown made of their results.

A table has rows (models), columns (settings of the task) and seeds; each row, column and seed is one run of a recipe.
"""

import dataclasses
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.training.recipe import CONFIGURATION, parse_file, read, refuse_unknown, tomllib


@dataclasses.dataclass(frozen=True)
class Row:
    """
    One model.

    Args:
        recipe: the recipe to train; the table's if left out.
        seeds: one run each; the table's if left out, 1 if it has none.
        baseline: a model of the recipe's `baselines.toml`, at equal parameters; the recipe's own model if left out.
        set: overrides of the recipe, and of the baseline's.
        columns: further overrides for single columns, by the column's name.
    """

    name: str
    recipe: str
    seeds: list[int] = dataclasses.field(default_factory=lambda: [1])
    baseline: str | None = None
    set: list[str] = dataclasses.field(default_factory=list)
    columns: dict[str, list[str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Run:
    """
    One training.

    Args:
        shared: the overrides of the table, the column and the seed, the same in all rows.
    """

    table: str
    row: Row
    column: str
    seed: int
    shared: tuple[str, ...]

    @property
    def own(self) -> tuple[str, ...]:
        """The overrides of the row, which come last."""
        return (*self.row.set, *self.row.columns.get(self.column, ()))

    @property
    def name(self) -> str:
        """`table/row/column/seed-N`, usable as a path."""
        parts = (slug(part) for part in (self.table, self.row.name, self.column))
        return "/".join([*(part for part in parts if part), f"seed-{self.seed}"])


@dataclasses.dataclass(frozen=True)
class Table:
    """
    One table.

    Args:
        title, about: heading, and a sentence or two on what is measured.
        suite: the group of tables that one `report --run` makes, such as `cpu`.
        metrics: the figures of a cell on the test split, in this order; curves show the first.
        rows: [`Row`] by name.
        digits: decimal places of the figures.
        scale: factor of the figures, 100 for percent.
        set: overrides of every run.
        columns: overrides by the column's name; one column without a name if left out.
        curves: the column whose learning curves are drawn; the first if left out.
        paper: figures that others report, one for each column, by the name of the row.

    Raises:
        ValueError: `curves` or a row names no column, or `paper` has not one figure for each column.
    """

    name: str
    title: str
    about: str
    suite: str
    metrics: list[str]
    rows: dict[str, Row]
    digits: int = 3
    scale: float = 1.0
    set: list[str] = dataclasses.field(default_factory=list)
    columns: dict[str, list[str]] = dataclasses.field(default_factory=lambda: {"": []})
    curves: str | None = None
    paper: dict[str, list] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        known = list(self.columns)
        if self.curves is not None:
            refuse_unknown([self.curves], known, f"`curves` of [{self.name}] must be a column, got {{!r}}")
        for row in self.rows.values():
            refuse_unknown(row.columns, known, f"`columns` of [{self.name}.rows] {row.name!r} has an unknown {{!r}}")
        for other, figures in self.paper.items():
            if len(figures) != len(known):
                raise ValueError(
                    f"`paper` of [{self.name}] must have a figure for each of the {len(known)} columns; "
                    f"{other!r} has {len(figures)}"
                )

    def runs(self) -> list[Run]:
        """All runs, the first seed of every row before the second of any."""
        runs = []
        for row in self.rows.values():
            for column, settings in self.columns.items():
                shared = (*self.set, *settings)
                runs += [Run(self.name, row, column, seed, (*shared, f"training.seed={seed}")) for seed in row.seeds]
        return sorted(runs, key=lambda run: run.row.seeds.index(run.seed))


def slug(name: str) -> str:
    """A name usable in a path: lower case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read_tables(path: Path = CONFIGURATION / "tables.toml") -> dict[str, Table]:
    """
    The tables by name.

    Raises:
        ValueError: a key is missing or unknown, or a value is not valid.
    """
    return {name: _table(name, dict(entry), path) for name, entry in parse_file(path, tomllib.loads).items()}


def _table(name: str, entry: dict[str, Any], path: Path) -> Table:
    shared = {key: entry.pop(key) for key in ("recipe", "seeds") if key in entry}
    rows = {
        row: read(Row, {"name": row, **shared, **settings}, after=f" in [{name}.rows] {row!r} of {path.name}")
        for row, settings in entry.pop("rows", {}).items()
    }
    return read(Table, {"name": name, "rows": rows, **entry}, after=f" in [{name}] of {path.name}")


def cell(table: Table, results: Sequence[Mapping[str, Any]]) -> str:
    """`mean ± standard deviation` over the seeds for each metric, one figure if all are equal, `-` without results."""
    if not results:
        return "-"
    texts = []
    for metric in table.metrics:
        values = [table.scale * result["metrics"]["test"][metric] for result in results]
        spread = f" ± {statistics.stdev(values):.{table.digits}f}" if len(set(values)) > 1 else ""
        texts.append(f"{statistics.mean(values):.{table.digits}f}{spread}")
    return " / ".join(texts)


def markdown(table: Table, found: Mapping[str, Mapping[str, Any]], pictures: Sequence[tuple[str, str]] = ()) -> str:
    """
    The section of one table as Markdown; rows without results are left out.

    Args:
        found: the kept results by [`Run.name`], each with the key `result`.
        pictures: pairs of caption and path, shown below the table.
    """
    columns = list(table.columns)
    lines = [f"## {table.title}", "", table.about, ""]
    headings = [column or table.metrics[0].replace("_", " ") for column in columns]
    lines += [f"| | {' | '.join(headings)} | parameters | seeds | seconds a run |", "|---" * (len(columns) + 4) + "|"]
    lines += [f"| {name} | {' | '.join(map(str, figures))} | | | |" for name, figures in table.paper.items()]
    ended: list[Mapping[str, Any]] = []
    for row in table.rows.values():
        by_column = {column: [] for column in columns}
        for run in table.runs():
            if run.row is row and run.name in found:
                by_column[run.column].append(found[run.name]["result"])
        results = [result for results in by_column.values() for result in results]
        ended += results
        if not results:
            continue
        cells = " | ".join(cell(table, by_column[column]) for column in columns)
        parameters = _span([result["parameters"] for result in results], ",")
        seeds = _span([len(results) for results in by_column.values()], "d")
        lines.append(f"| **{row.name}** | {cells} | {parameters} | {seeds} | {_seconds(results)} |")
    if ended:
        lines += ["", _measured(ended), "", *_commands(table, found)]
    for caption, path in pictures:
        lines += ["", f"![{caption}]({path})"]
    return "\n".join(lines) + "\n"


def _span(values: Sequence[float], form: str) -> str:
    """`least to largest`, or one figure if both are written alike."""
    return " to ".join(dict.fromkeys(format(value, form) for value in (min(values), max(values))))


def _seconds(results: Sequence[Mapping[str, Any]]) -> str:
    """Seconds of training by the clock of each run's budget."""
    clocks = ["processor" if "budget.clock=processor" in result["overrides"] else "wall" for result in results]
    values = [result[f"{clock}_seconds"]["training"] for result, clock in zip(results, clocks, strict=True)]
    return _span(values, ".0f")


def _measured(results: Sequence[Mapping[str, Any]]) -> str:
    """The machines, versions and commits that the results come from."""
    places = {}
    for result in results:
        machine, versions = result["machine"], result["versions"]
        place = machine["accelerator"] or f"{machine['threads']} CPU thread{'s' * (machine['threads'] > 1)}"
        place += f", torch {versions['torch']}, Transformers {versions['transformers']}"
        places.setdefault(place, set()).add((result["commit"] or "unknown")[:12] + result["commit"][40:])
    return "Measured on " + "; ".join(
        f"{place} (at {', '.join(sorted(commits))})" for place, commits in sorted(places.items())
    )


def _commands(table: Table, found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One command for each row: training with the first seed or, with several columns, `make` for all its runs."""
    lines = []
    for run in table.runs():
        if run.name not in found or run.seed != run.row.seeds[0]:
            continue
        if len(table.columns) > 1:
            lines.append(f"    make reproduce-{table.suite} ONLY={table.name}/{slug(run.row.name)}/")
        else:
            settings = " ".join(f"--set {shlex.quote(override)}" for override in found[run.name]["result"]["overrides"])
            lines.append(f"    python -m scripts.train {run.row.recipe} {settings}")
    return list(dict.fromkeys(lines))
