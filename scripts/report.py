"""
Make the tables of docs/RESULTS.md.

    python -m scripts.report                                  # write them from the existing results
    python -m scripts.report --run cpu                        # first run what the suite has no result of
    python -m scripts.report --run cpu --only etth1 nottingham/lstm

configuration/tables.toml lists the runs. A run is trained in runs/report/; after an interruption the same command
resumes it. Its outcome is added to docs/results/TABLE.jsonl as soon as it has finished, one line a run: its name, the
result, the learning curve and, for RSA heads, the gates and eigenvalues. Baselines get as many parameters as the
recipe's model and the same budget.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig

from modeling_rtransformer import CONFIGS
from scripts import train
from scripts.results.parameter_matching import count_parameters, match, read_baselines
from scripts.results.plots import plot_curves, plot_gates
from scripts.results.tables import Run, Table, markdown, read_tables, slug
from scripts.sharing.card import gate_rows, head_of
from scripts.training.checkpoints import load_model
from scripts.training.recipe import parse_file, read_recipe


ROOT = Path(__file__).resolve().parent.parent
LOSSES = 200
HEADER = """# Results

Made by `python -m scripts.report` from `docs/results/`, where the file of each table has a line for each run with its
settings, its curve and the gates that were learned; `make reproduce-cpu` repeats the runs that a CPU can make, `make
reproduce-gpu` the others. The model of each run was chosen on the validation split and scored once on the test split.
Baselines have the parameters of the recipe's own model, within 2 %, and its budget of time. Rows in plain type are what
others report.
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", metavar="SUITE", help="train the runs of this suite that have no result yet")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", default=[], help="runs whose name begins so: table/row/..."
    )
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results", help="where results are kept")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "report", help="where trainings go")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "RESULTS.md", help="the file to write")
    return parser.parse_args(arguments)


def overrides_of(run: Run) -> list[str]:
    """The `--set` overrides of a run; a baseline gets the width that matches the parameters of the recipe's model."""
    if run.row.baseline is None:
        return [*run.shared, *run.own]
    baselines = read_baselines(run.row.recipe)
    if run.row.baseline not in baselines:
        raise ValueError(
            f"recipe {run.row.recipe!r} has no baseline {run.row.baseline!r}; it has {', '.join(baselines)}"
        )
    recipe = read_recipe(run.row.recipe, run.shared)
    prepared = recipe.prepare(None, ("train",))
    parameters = count_parameters(recipe, prepared)
    overrides = (*run.shared, *baselines[run.row.baseline], *run.own)
    found, _ = match(run.row.recipe, overrides, parameters, prepared)
    return list(found)


def make(run: Run, folder: Path, results: Path) -> None:
    """Train the run in `folder`, or resume it, and add its outcome to the file of its table in `results`."""
    if not (folder / "final" / "results.json").is_file():
        settings = [part for override in overrides_of(run) for part in ("--set", override)]
        train.main([run.row.recipe, "--output-dir", str(folder), "--resume", *settings])
    line = json.dumps({"name": run.name, **kept_of(folder / "final")}) + "\n"
    path = results / f"{run.table}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text((path.read_text(encoding="utf-8") if path.is_file() else "") + line, encoding="utf-8")
    partial.replace(path)


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """By [`Run.name`], what is kept of each run: `result`, `curve` and `gates`."""
    files = [parse_file(path, lambda text: [*map(json.loads, text.splitlines())]) for path in folder.glob("*.jsonl")]
    return {kept.pop("name"): kept for lines in files for kept in lines}


def kept_of(final: Path) -> dict[str, Any]:
    """The result, curve and gates of a finished run; of the training losses at most `LOSSES`, evenly spread."""
    curve = json.loads((final / "curve.json").read_text(encoding="utf-8"))
    curve["training"] = curve["training"][:: -(-len(curve["training"]) // LOSSES) or 1]
    result = json.loads((final / "results.json").read_text(encoding="utf-8"))
    return {"result": result, "curve": curve, "gates": gates_of(final)}


def gates_of(final: Path) -> list[dict[str, Any]]:
    """Gates and eigenvalues of the REM heads of a saved model; empty for a model without REM heads."""
    config = AutoConfig.from_pretrained(final)
    if type(config) not in CONFIGS or config.rem_kinds is None:
        return []
    return gate_rows(load_model(getattr(transformers, head_of(config).auto_class), final))


def draw(table: Table, found: Mapping[str, Mapping[str, Any]], folder: Path) -> list[tuple[str, str]]:
    """Plot a table: learning curves of one column and the first seed, and the gates of the first RSA model."""
    pictures = []
    runs = [run for run in table.runs() if run.name in found and run.seed == run.row.seeds[0]]
    column = table.curves or next(iter(table.columns))
    curves = {run.row.name: found[run.name]["curve"] for run in runs if run.column == column}
    stem = slug(table.name)
    if curves:
        plot_curves(curves, table.metrics[0], folder / f"{stem}.png")
        pictures.append((f"{table.title}: validation while training{', ' + column if column else ''}", f"{stem}.png"))
    gated = next((run for run in runs if found[run.name]["gates"]), None)
    if gated is not None:
        plot_gates(found[gated.name]["gates"], folder / f"{stem}-gates.png")
        pictures.append((f"{gated.row.name}: gates and eigenvalues that were learned", f"{stem}-gates.png"))
    return [(caption, f"{folder.name}/{name}") for caption, name in pictures]


def write(tables: Mapping[str, Table], results: Path, output: Path) -> None:
    """Write the report from the existing results."""
    found = read_results(results)
    sections = []
    for table in tables.values():
        if any(run.name in found for run in table.runs()):
            sections.append(markdown(table, found, draw(table, found, results)))
    output.write_text("\n".join([HEADER, *sections]), encoding="utf-8")


def main(arguments: list[str] | None = None) -> Path:
    """Train the missing runs of a suite, if one is named, and write the report; its path."""
    options = parse_arguments(arguments)
    try:
        tables = read_tables()
        if options.run is not None:
            suites = sorted({table.suite for table in tables.values()})
            if options.run not in suites:
                raise ValueError(f"--run names the suite {options.run!r}; there are {', '.join(suites)}")
            runs = [run for table in tables.values() if table.suite == options.run for run in table.runs()]
            runs = [run for run in runs if not options.only or run.name.startswith(tuple(options.only))]
            done = read_results(options.results)
            for place, run in enumerate(runs, 1):
                state = " has a result" if run.name in done else ""
                print(f"{place} of {len(runs)}: {run.name}{state}", file=sys.stderr)
                if run.name not in done:
                    make(run, options.runs / run.name, options.results)
                    write(tables, options.results, options.output)
        write(tables, options.results, options.output)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    return options.output


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        written = main()
    print(written)
