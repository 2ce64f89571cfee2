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
from scripts.results.json_lines import append_line, read_lines
from scripts.results.parameter_matching import baseline_overrides
from scripts.results.plots import plot_curves, plot_gates
from scripts.results.tables import Run, Table, markdown, read_tables, slug
from scripts.sharing.card import gate_rows, head_of
from scripts.training.checkpoints import load_model
from scripts.training.recipe import parse_file, refuse_unknown


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
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[""], help="runs whose name begins so: table/row")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "report", help="where trainings go")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "docs", help="folder of RESULTS.md and results/")
    return parser.parse_args(arguments)


def overrides_of(run: Run) -> list[str]:
    """The `--set` overrides of a run; a baseline gets the width that matches the parameters of the recipe's model."""
    if run.row.baseline is None:
        return [*run.shared, *run.own]
    return baseline_overrides(run.row.recipe, run.row.baseline, run.shared, run.own)


def make(run: Run, folder: Path) -> dict[str, Any]:
    """Train the run in `folder`, or resume it; what is kept of it, of the training losses at most `LOSSES`."""
    final = folder / "final"
    if not (final / "results.json").is_file():
        settings = [part for override in overrides_of(run) for part in ("--set", override)]
        train.main([run.row.recipe, "--output-dir", str(folder), "--resume", *settings])
    result, curve = (parse_file(final / name, json.loads) for name in ("results.json", "curve.json"))
    curve["training"] = curve["training"][:: -(-len(curve["training"]) // LOSSES) or 1]  # evenly spread
    config, gates = AutoConfig.from_pretrained(final), []
    if type(config) in CONFIGS and config.rem_kinds is not None:
        gates = gate_rows(load_model(getattr(transformers, head_of(config).auto_class), final))
    return {"name": run.name, "result": result, "curve": curve, "gates": gates}


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """By [`Run.name`], what is kept of each run: `result`, `curve` and `gates`."""
    return {kept["name"]: kept for path in folder.glob("*.jsonl") for kept in read_lines(path)}


def draw(table: Table, found: Mapping[str, Mapping[str, Any]], folder: Path) -> list[tuple[str, str]]:
    """Plot a table: learning curves of one column and the first seed, and the gates of the first RSA model."""
    pictures = []
    runs = [run for run in table.runs() if run.name in found and run.seed == table.seeds[0]]
    column = table.curves or next(iter(table.columns))
    curves = {run.row.name: found[run.name]["curve"] for run in runs if run.column == column}
    stem = slug(table.name)
    if curves:
        plot_curves(curves, table.metrics[0], folder / f"{stem}.png")
        caption = f"{table.title}: validation while training{', ' + column if column else ''}"
        pictures.append((caption, f"{folder.name}/{stem}.png"))
    gated = next((run for run in runs if found[run.name]["gates"]), None)
    if gated is not None:
        plot_gates(found[gated.name]["gates"], folder / f"{stem}-gates.png")
        caption = f"{gated.row.name}: gates and eigenvalues that were learned"
        pictures.append((caption, f"{folder.name}/{stem}-gates.png"))
    return pictures


def write(tables: Mapping[str, Table], folder: Path) -> Path:
    """Write the report from the existing results; its path."""
    found = read_results(folder / "results")
    sections = [
        markdown(table, found, draw(table, found, folder / "results"))
        for table in tables.values()
        if any(run.name in found for run in table.runs())
    ]
    report = folder / "RESULTS.md"
    report.write_text("\n".join([HEADER, *sections]), encoding="utf-8")
    return report


def main(arguments: list[str] | None = None) -> Path:
    """Train the missing runs of a suite, if one is named, and write the report; its path."""
    options = parse_arguments(arguments)
    folder = options.output_dir
    try:
        tables = read_tables()
        if options.run is not None:
            suites = sorted({table.suite for table in tables.values()})
            refuse_unknown([options.run], suites, "--run names the suite {!r}")
            done = read_results(folder / "results")
            runs = [run for table in tables.values() if table.suite == options.run for run in table.runs()]
            runs = [run for run in runs if run.name.startswith(tuple(options.only))]
            for place, run in enumerate(runs, 1):
                state = " has a result" if run.name in done else ""
                print(f"{place} of {len(runs)}: {run.name}{state}", file=sys.stderr)
                if run.name not in done:
                    kept = make(run, options.runs / run.name)
                    append_line(folder / "results" / f"{run.table}.jsonl", kept)
                    write(tables, folder)
        return write(tables, folder)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        written = main()
    print(written)
