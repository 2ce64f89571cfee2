"""
Measure the speed and memory of the LocalRNN, the REM and whole models, each as a ratio to a reference in the same run.

    python -m scripts.benchmark                             # everything, on the GPU if there is one
    python -m scripts.benchmark --only "LocalRNN gru"       # the rows whose name contains this text
    python -m scripts.benchmark --resume                    # continue an interrupted run
    python -m scripts.benchmark --compare HEAD~3            # also with the package of that commit

Times are medians of alternating calls; peak memory is what one call allocates in a fresh process. Each finished row is
written to results.json in the output folder (runs/benchmark-<device>), with machine and versions. At the end table.md
and length.png (time and memory by sequence length) are written. Progress goes to stderr, the table to stdout.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure

from scripts.benchmarks import attention, local_rnn, models
from scripts.benchmarks.measuring import Case, measure, roofline
from scripts.results.provenance import commit, machine, versions


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", metavar="WORDS", help="only the rows whose name contains this text")
    parser.add_argument("--repeats", type=int, default=5, help="calls of each function, 5 by default")
    parser.add_argument("--output-dir", type=Path, help="where the results go; runs/benchmark-<device> if left out")
    parser.add_argument("--resume", action="store_true", help="keep the rows of results.json")
    parser.add_argument("--compare", metavar="REV", help="also measure the package of another commit")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to test the script")
    parsed = parser.parse_args(arguments)
    if parsed.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {parsed.repeats}")
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here")
    parsed.output_dir = parsed.output_dir or Path("runs") / f"benchmark-{parsed.device}"
    return parsed


def all_cases(device_type: str, only: str | None) -> list[Case]:
    found = [case for module in (local_rnn, attention, models) for case in module.cases(device_type)]
    chosen = [case for case in found if only is None or only in case.key]
    if not chosen:
        names = "\n  ".join(case.key for case in found)
        raise SystemExit(f"--only {only!r}: no row contains this text. The rows are\n  {names}")
    return chosen


def load_rows(path: Path, resume: bool) -> dict[str, dict]:
    """The rows of an interrupted run by name; empty without `resume`."""
    if not path.exists():
        return {}
    if not resume:
        raise SystemExit(f"{path} exists: add --resume to continue that run, or name another --output-dir")
    return {row["key"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}


def write_json(path: Path, content: dict) -> None:
    """Write the file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def figure(row: dict, side: str) -> str:
    if row["quantity"] == "memory":
        return f"{row[side + '_bytes'] / 2**20:,.0f} MiB"
    return f"{row[side + '_seconds'] * 1e3:,.1f} ms"


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = [
        "| what | against | ours | theirs | ratio | spread | target | roofline | tokens a second |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    words = {"speed-up": "{:.2f} x faster", "time": "{:.2f} x the time", "memory": "{:.2f} x the memory"}
    for row in rows:
        sign = "≥" if row["quantity"] == "speed-up" else "≤"
        target = "" if row["target"] is None else f"{sign} {row['target']:.2f}{'' if row['reached'] else ', missed'}"
        spread = f"{row['lowest']:.2f} to {row['highest']:.2f}" if "lowest" in row else ""
        share = f"{row['share_of_roofline']:.0%}" if "share_of_roofline" in row else ""
        tokens = f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else ""
        ratio = words[row["quantity"]].format(row["ratio"])
        cells = row["name"], row["against"], figure(row, "ours"), figure(row, "theirs"), ratio, spread, target
        lines.append("| " + " | ".join((*cells, share, tokens)) + " |")
    return "\n".join(lines)


def plot_lengths(rows: list[dict], path: Path) -> None:
    """Plot time and memory of RSA, fused attention and the dense form against the length."""
    lines: dict[str, dict] = {}
    for row in rows:
        if set(row["sizes"]) != {"L"}:
            continue
        quantity = "memory" if row["quantity"] == "memory" else "time"
        unit = "bytes" if quantity == "memory" else "seconds"
        for name, side in (("RSA", "ours"), (row["against"], "theirs")):
            lines.setdefault(quantity, {}).setdefault(name, {})[row["sizes"]["L"]] = row[f"{side}_{unit}"]
    if len(lines) < 2:
        return
    picture = Figure(figsize=(9, 4), layout="constrained")
    for axes, (quantity, scale, label) in zip(
        picture.subplots(1, 2), (("time", 1, "seconds, forward and backward"), ("memory", 2**20, "peak, MiB"))
    ):
        for name, points in lines[quantity].items():
            axes.loglog(*zip(*sorted((length, value / scale) for length, value in points.items())), "o-", label=name)
        axes.set(xlabel="length", ylabel=label)
        axes.legend()
    picture.savefig(path, dpi=120)


def run(arguments: argparse.Namespace) -> list[dict]:
    device = torch.device(arguments.device)
    cases = all_cases(device.type, arguments.only)
    path = arguments.output_dir / "results.json"
    done = load_rows(path, arguments.resume)
    limits = roofline(device, arguments.small)
    head = {"machine": machine(), "versions": versions(), "commit": commit(), "repeats": arguments.repeats}
    head |= {"roofline": limits}
    for number, case in enumerate(cases, 1):
        if case.key not in done:
            print(f"{number}/{len(cases)} {case.key}", end="", file=sys.stderr, flush=True)
            row = {"key": case.key, **measure(case, device, arguments.repeats, arguments.small, limits)}
            done[case.key] = row
            print(f": {row['ratio']:.2f}", file=sys.stderr, flush=True)
            write_json(path, {**head, "rows": list(done.values())})
    return list(done.values())


def run_with_package_of(revision: str, arguments: argparse.Namespace) -> list[dict]:
    """The same rows, measured by these scripts with `modeling_rtransformer/` of another commit."""
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", revision, "modeling_rtransformer"], cwd=root, capture_output=True, check=False
        )
        if archive.returncode:
            raise SystemExit(f"--compare {revision}: {archive.stderr.decode().strip()}")
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        (Path(folder) / "scripts").symlink_to(root / "scripts")
        command = [sys.executable, "-m", "scripts.benchmark", "--device", arguments.device]
        command += ["--repeats", str(arguments.repeats), "--output-dir", str(Path(folder) / "results")]
        command += ["--only", arguments.only] if arguments.only else []
        command += ["--small"] if arguments.small else []
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        return json.loads((Path(folder) / "results" / "results.json").read_text(encoding="utf-8"))["rows"]


def comparison(rows: list[dict], earlier: list[dict], revision: str) -> str:
    """The ratios of both commits, row by row."""
    then = {row["key"]: row["ratio"] for row in earlier}
    lines = [f"| what | against | now | {revision} |", "|---|---|---|---|"]
    for row in rows:
        if row["key"] in then:
            lines.append(f"| {row['name']} | {row['against']} | {row['ratio']:.2f} | {then[row['key']]:.2f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parsed = parse_arguments(arguments)
    rows = run(parsed)
    text = table(rows)
    if parsed.compare:
        text += "\n\n" + comparison(rows, run_with_package_of(parsed.compare, parsed), parsed.compare)
    (parsed.output_dir / "table.md").write_text(text + "\n", encoding="utf-8")
    plot_lengths(rows, parsed.output_dir / "length.png")
    print(text)


if __name__ == "__main__":
    main()
