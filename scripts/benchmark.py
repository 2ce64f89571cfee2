"""
Measure the speed and memory of the LocalRNN, the REM, structured weights, whole models and RNMT+'s LSTM, each as a
ratio to a reference in the same run.

    python -m scripts.benchmark                             # everything, on the GPU if there is one
    python -m scripts.benchmark --only "LocalRNN gru"       # the rows whose name contains this text
    python -m scripts.benchmark --resume                    # continue an interrupted run

Times are medians of alternating calls; peak memory is what one call allocates in a fresh process. Each finished row is
added to results.jsonl in the output folder (runs/benchmark-<device>), with machine and versions. Progress goes to
stderr, the table of all rows to stdout.
"""

import argparse
import sys
from pathlib import Path

import torch

from scripts.benchmarks import (
    adapters,
    attention,
    layer_norm_lstm,
    local_rnn,
    memory,
    models,
    structured_linear,
)
from scripts.benchmarks.measuring import Case, measure
from scripts.results.json_lines import append_line, read_lines
from scripts.results.provenance import provenance


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", metavar="WORDS", default="", help="only the rows whose name contains this text")
    parser.add_argument("--output-dir", type=Path, help="where the results go; runs/benchmark-<device> if left out")
    parser.add_argument("--resume", action="store_true", help="keep the rows of results.jsonl")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to test the script")
    parsed = parser.parse_args(arguments)
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here")
    parsed.output_dir = parsed.output_dir or Path("runs") / f"benchmark-{parsed.device}"
    return parsed


def all_cases(device_type: str, only: str = "") -> list[Case]:
    modules = local_rnn, attention, models, memory, adapters, structured_linear, layer_norm_lstm
    found = [case for module in modules for case in module.cases(device_type)]
    chosen = [case for case in found if only in case.key]
    if not chosen:
        names = "\n  ".join(case.key for case in found)
        raise SystemExit(f"--only {only!r}: no row contains this text. The rows are\n  {names}")
    return chosen


def run(arguments: argparse.Namespace) -> list[dict]:
    """Measure the rows that results.jsonl does not have yet; all rows."""
    cases = all_cases(arguments.device, arguments.only)
    path = arguments.output_dir / "results.jsonl"
    if path.exists() and not arguments.resume:
        raise SystemExit(f"{path} exists: add --resume to continue that run, or name another --output-dir")
    rows = read_lines(path) if path.exists() else []
    for number, case in enumerate(cases, 1):
        if case.key not in [row["key"] for row in rows]:
            print(f"{number}/{len(cases)} {case.key}", end="", file=sys.stderr, flush=True)
            row = measure(case, torch.device(arguments.device), arguments.small)
            print(f": {row['ratio']:.2f}", file=sys.stderr, flush=True)
            append_line(path, {**row, **provenance()})
            rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = ["| what | against | ours | theirs | ratio | spread | target |", "|---" * 7 + "|"]
    words = {"speed-up": "{:.2f} x faster", "time": "{:.2f} x the time", "memory": "{:.2f} x the memory"}
    for row in rows:
        unit, digits, scale = ("MiB", 0, 2**-20) if row["quantity"] == "memory" else ("ms", 1, 1e3)
        figures = [f"{row[side] * scale:,.{digits}f} {unit}" for side in ("ours", "theirs")]
        spread = f"{row['lowest']:.2f} to {row['highest']:.2f}" if "lowest" in row else ""
        sign = "≥" if row["quantity"] == "speed-up" else "≤"
        target = "" if row["target"] is None else f"{sign} {row['target']:.2f}{'' if row['reached'] else ', missed'}"
        cells = row["name"], row["against"], *figures, words[row["quantity"]].format(row["ratio"]), spread, target
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    print(table(run(parse_arguments(arguments))))


if __name__ == "__main__":
    main()
