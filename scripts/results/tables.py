"""
The tables of docs/RESULTS.md: what `configuration/tables.toml` asks for, and their text from what the runs gave.

A table has rows (models), columns (settings of the task) and seeds; each row, column and seed is one run of a recipe.
"""

import dataclasses
import json
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modeling_rtransformer.configuration_rtransformer import nearest
from scripts.training.recipe import CONFIGURATION, parse_file, tomllib


RESULTS = CONFIGURATION.parent / "docs" / "results"


@dataclasses.dataclass(frozen=True)
class Row:
    """
    One model.

    Args:
        recipe: a recipe of its own; the table's if left out.
        baseline: a model of the recipe's `baselines.toml`, at equal parameters; the recipe's own model if left out.
        set: overrides of the recipe, and of the baseline's.
        columns: by the name of a column, more overrides for it alone.
        seeds: the table's if left out.
    """

    name: str
    recipe: str
    seeds: list[int]
    baseline: str | None = None
    set: list[str] = dataclasses.field(default_factory=list)
    columns: dict[str, list[str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Run:
    """
    One training.

    Args:
        shared: the overrides of the table, the column and the seed, which all rows have.
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
        """`table/row/column/seed-N`, fit for a path."""
        parts = (slug(part) for part in (self.table, self.row.name, self.column))
        return "/".join([*(part for part in parts if part), f"seed-{self.seed}"])


@dataclasses.dataclass(frozen=True)
class Table:
    """
    One table.

    Args:
        title, about: heading, and a sentence or two on what is measured.
        suite: the runs that are made together, such as `cpu`.
        recipe: trained for every row.
        metrics: the figures of a cell on the test split, one behind the other; curves show the first.
        scale: what the figures are multiplied by, 100 for shares in percent.
        set: overrides of every run.
        columns: by name, overrides; one column without a name if left out.
        curves: the column whose learning curves are drawn; the first if left out.
        paper: by name, the figures that others report, one a column, as text.
        rows: [`Row`] by name.
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

    def runs(self) -> list[Run]:
        """All runs, the first seed of every row before the second of any."""
        runs = []
        for row in self.rows.values():
            for column, settings in self.columns.items():
                shared = (*self.set, *settings)
                runs += [Run(self.name, row, column, seed, (*shared, f"training.seed={seed}")) for seed in row.seeds]
        return sorted(runs, key=lambda run: run.row.seeds.index(run.seed))


def slug(name: str) -> str:
    """A name fit for a path."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read_tables(path: Path = CONFIGURATION / "tables.toml") -> dict[str, Table]:
    """
    The tables by name.

    Raises:
        ValueError: a key is missing or not known.
    """
    return {name: _table(name, dict(entry), path) for name, entry in parse_file(path, tomllib.loads).items()}


def _table(name: str, entry: dict[str, Any], path: Path) -> Table:
    recipe, seeds = entry.pop("recipe", None), entry.pop("seeds", [1])
    rows = {
        row: _make(Row, {"name": row, "recipe": recipe, "seeds": seeds, **settings}, f"[{name}.rows] {row!r}", path)
        for row, settings in entry.pop("rows", {}).items()
    }
    table = _make(Table, {"name": name, "rows": rows, **entry}, f"[{name}]", path)
    if table.curves not in (None, *table.columns):
        raise ValueError(
            f"`curves` of [{name}] in {path.name} must be one of {', '.join(table.columns)}, got {table.curves!r}"
            f"{nearest(table.curves, table.columns)}"
        )
    for row in table.rows.values():
        for column in row.columns:
            if column not in table.columns:
                raise ValueError(
                    f"`columns` of [{name}.rows] {row.name!r} in {path.name} are of {', '.join(table.columns)}, got "
                    f"{column!r}{nearest(column, table.columns)}"
                )
    for other, figures in table.paper.items():
        if len(figures) != len(table.columns):
            raise ValueError(
                f"`paper` of [{name}] in {path.name} must have a figure for each of the {len(table.columns)} columns; "
                f"{other!r} has {len(figures)}"
            )
    return table


def _make(kind: type, values: Mapping[str, Any], place: str, path: Path):
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise ValueError(f"`{key}` in {place} of {path.name} is not known{nearest(key, fields)}")
    for key, field in fields.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and values.get(key) is None:
            raise ValueError(f"`{key}` is missing in {place} of {path.name}")
    return kind(**values)


def read_results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """What the runs left that were kept in a folder: by [`Run.name`], `result`, `curve` and `gates`."""
    return {
        path.relative_to(folder).with_suffix("").as_posix(): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.json"))
    }


def cell(table: Table, results: Sequence[Mapping[str, Any]]) -> str:
    """`mean ± standard deviation` of the seeds for each metric, or what all gave; a dash where no run has ended."""
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
    The section of one table; rows of which nothing was run are left out.

    Args:
        found: by [`Run.name`], what a run left: its `result`.
        pictures: pairs of a caption and a path, to show below.
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
    """From the least to the largest, or one of them where they look alike."""
    return " to ".join(dict.fromkeys(format(value, form) for value in (min(values), max(values))))


def _seconds(results: Sequence[Mapping[str, Any]]) -> str:
    """By the clock of each run's budget."""
    clocks = ["processor" if "budget.clock=processor" in result["overrides"] else "wall" for result in results]
    values = [result[f"{clock}_seconds"]["training"] for result, clock in zip(results, clocks, strict=True)]
    return _span(values, ".0f")


def _measured(results: Sequence[Mapping[str, Any]]) -> str:
    """Where the figures are from."""
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
    """One command a row: `train.py` with the first seed or, of several columns, what makes the row with all seeds."""
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
