"""
The tables of docs/RESULTS.md: the runs that `configuration/tables.toml` lists, and the Markdown made of their results.

A table has rows (models), columns (settings of the task) and seeds; each row, column and seed is one run of a recipe.
"""

import dataclasses
import re
import shlex
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scripts.training.recipe import CONFIGURATION, parse_file, read, refuse_unknown, tomllib


@dataclasses.dataclass(frozen=True)
class Row:
    """
    One model.

    Args:
        recipe: the recipe to train; the table's if left out.
        baseline: a model of the recipe's `baselines.toml`, at equal parameters; the recipe's own model if left out.
        set: overrides of the recipe, and of the baseline's.
        columns: further overrides for single columns, by the column's name.
    """

    name: str
    recipe: str
    baseline: str | None = None
    set: list[str] = dataclasses.field(default_factory=list)
    columns: dict[str, list[str]] = dataclasses.field(default_factory=dict)


class Run(NamedTuple):
    """
    One training.

    Args:
        name: `table/row/column/seed-N`, usable as a path.
        shared: the overrides of the table, the column and the seed, the same in all rows.
        own: the overrides of the row, which come last.
    """

    name: str
    table: str
    row: Row
    column: str
    seed: int
    shared: tuple[str, ...]
    own: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """
    One table.

    Args:
        title, about: heading, and a sentence or two on what is measured.
        suite: the group of tables that one `report --run` makes, such as `cpu`.
        metrics: the figures of a cell on the test split, in this order; curves show the first.
        rows: [`Row`] by name.
        seeds: one run each of every row and column.
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
    seeds: list[int] = dataclasses.field(default_factory=lambda: [1])
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
        for seed in self.seeds:
            for row in self.rows.values():
                for column, settings in self.columns.items():
                    path = [part for part in map(slug, (self.name, row.name, column)) if part]
                    shared = (*self.set, *settings, f"training.seed={seed}")
                    own = (*row.set, *row.columns.get(column, ()))
                    name = "/".join([*path, f"seed-{seed}"])
                    runs.append(Run(name, self.name, row, column, seed, shared, own))
        return runs


def slug(name: str) -> str:
    """A name usable in a path: lower case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read_tables(path: Path = CONFIGURATION / "tables.toml") -> dict[str, Table]:
    """
    The tables by name.

    Raises:
        ValueError: a key is missing or unknown, or a value is not valid.
    """
    tables = {}
    for name, entry in parse_file(path, tomllib.loads).items():
        shared = {"recipe": entry.pop("recipe")} if "recipe" in entry else {}
        rows = {
            row: read(Row, {"name": row, **shared, **settings}, after=f" in [{name}.rows] {row!r} of {path.name}")
            for row, settings in entry.pop("rows", {}).items()
        }
        tables[name] = read(Table, {"name": name, "rows": rows, **entry}, after=f" in [{name}] of {path.name}")
    return tables


def markdown(table: Table, found: Mapping[str, Mapping[str, Any]], pictures: Sequence[tuple[str, str]] = ()) -> str:
    """
    The section of one table as Markdown; rows without results are left out.

    Args:
        found: the kept results by [`Run.name`], each with the key `result`.
        pictures: pairs of caption and path, shown below the table.
    """
    columns = list(table.columns)
    headings = [column or table.metrics[0].replace("_", " ") for column in columns]
    lines = [f"## {table.title}", "", table.about, ""]
    lines += [f"| | {' | '.join(headings)} | parameters | seeds | seconds a run |", "|---" * (len(columns) + 4) + "|"]
    lines += [f"| {name} | {' | '.join(map(str, figures))} | | | |" for name, figures in table.paper.items()]
    all_results, commands = [], []
    for row in table.rows.values():
        by_column = {column: [] for column in columns}
        for run in table.runs():
            if run.row is row and run.name in found:
                by_column[run.column].append(found[run.name]["result"])
        results = [result for column in columns for result in by_column[column]]
        if not results:
            continue
        all_results += results
        parameters = _span([result["parameters"] for result in results], ",")
        seeds = _span([len(by_column[column]) for column in columns], "d")
        cells = [cell(table, by_column[column]) for column in columns]
        seconds = _span([_seconds(result) for result in results], ".0f")
        lines.append(f"| {' | '.join([f'**{row.name}**', *cells, parameters, seeds, seconds])} |")
        if len(columns) > 1:
            commands.append(f"    make reproduce-{table.suite} ONLY={table.name}/{slug(row.name)}/")
        else:
            settings = " ".join(f"--set {shlex.quote(override)}" for override in results[0]["overrides"])
            commands.append(f"    python -m scripts.train {row.recipe} {settings}")
    if all_results:
        lines += ["", _measured(all_results), "", *commands]
    for caption, path in pictures:
        lines += ["", f"![{caption}]({path})"]
    return "\n".join(lines) + "\n"


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


def _span(values: Sequence[float], form: str) -> str:
    """`least to largest`, or one figure if both are written alike."""
    return " to ".join(dict.fromkeys(format(value, form) for value in (min(values), max(values))))


def _seconds(result: Mapping[str, Any]) -> float:
    """Seconds of training by the clock of the run's budget."""
    clock = "processor" if "budget.clock=processor" in result["overrides"] else "wall"
    return result[f"{clock}_seconds"]["training"]


def _measured(results: Sequence[Mapping[str, Any]]) -> str:
    """The machines, versions and commits that the results come from."""
    commits = defaultdict(set)
    for result in results:
        machine, versions = result["machine"], result["versions"]
        place = machine["accelerator"] or f"{machine['threads']} CPU thread{'s' * (machine['threads'] > 1)}"
        place += f", torch {versions['torch']}, Transformers {versions['transformers']}"
        commits[place].add((result["commit"] or "unknown")[:12] + (result["commit"] or "")[40:])
    return "Measured on " + "; ".join(f"{place} (at {', '.join(sorted(commits[place]))})" for place in sorted(commits))
