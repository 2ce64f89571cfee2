"""
Train a language model for some minutes, score it beside others, and show text that it writes: `make demo`.

    python -m scripts.demo --seconds 240
    python -m scripts.demo stdlib-code --seconds 60 --output-dir runs/short

Training takes `--seconds`, the whole at most 1.5 times as long on any machine, start-up, scoring and generation
included. It runs on one thread where that is faster at the start than on all. If there is no time to score all rows of
the test split, an evenly spread part of them is scored, and its size is printed. The same command resumes an
interrupted demo.
"""

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from scripts import generate, train
from scripts.report import ROOT, read_results
from scripts.sharing.card import own_metrics
from scripts.training.budget import CLOCKS
from scripts.training.recipe import add_overrides


WHOLE = 1.5  # times the seconds of training, for everything
WRITING = 0.1  # times the seconds of training, kept for the text
# At a low temperature a small model of source code never ends a run of spaces; few lines are indented by 24.
SAMPLING = ["--temperature", "0.5", "--no-repeat", "24"]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="stdlib-code", help="a recipe of a language model")
    parser.add_argument("--seconds", type=float, default=240, help="of training; all takes at most 1.5 times as long")
    parser.add_argument("--output-dir", type=Path, default=Path("runs") / "demo", help="where the run goes")
    parser.add_argument(
        "--prompt", default="class Reader:\n    def __init__(self", help="the beginning of the text that is written"
    )
    parser.add_argument("--max-new-tokens", type=int, default=400, help="of the text")
    add_overrides(parser)
    return parser.parse_args(arguments)


def faster_threads() -> int:
    """
    One thread or all of torch's, whichever trains a small LSTM faster now.

    Beside other programs the threads of a step wait for each other: on two busy cores the recipe stdlib-code made 7.5
    steps per second on one thread and 1.6 on two.
    """
    lstm, rows, seconds = torch.nn.LSTM(192, 192, batch_first=True), torch.zeros(4, 256, 192), {}
    for threads in (1, torch.get_num_threads()):
        torch.set_num_threads(threads)
        lstm(rows)[0].sum().backward()  # warm-up
        started = time.monotonic()
        for _ in range(5):
            lstm(rows)[0].sum().backward()
        seconds[threads] = time.monotonic() - started
    return min(seconds, key=seconds.get)


def scores(result: Mapping[str, Any], kept: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """
    The lines that compare the model with an LSTM of as many parameters and with compressors, on the test split.

    Args:
        result: of `train.py`.
        kept: results by name, as `read_results` gives them; without any of an LSTM it has no line.
    """
    own = own_metrics(result["metrics"]["test"])
    name, value = next(iter(own.items()))
    scored, of = result["rows_scored"]["test"]
    extent = "the whole" if scored == of else f"{scored:,} of {of:,} rows, evenly spread, of the"
    lines = [f"{name.replace('_', ' ')}, lower is better", f"  this model  {value:.3f}  {extent} test split"]
    lstm = [run["result"] for run_name, run in kept.items() if run_name.startswith(f"{result['recipe']}/lstm/")]
    if lstm:
        figure = statistics.mean(run["metrics"]["test"][name] for run in lstm)
        training = statistics.mean(run["wall_seconds"]["training"] for run in lstm)
        lines.append(
            f"  LSTM        {figure:.3f}  {lstm[0]['parameters']:,} parameters, mean of {len(lstm)} runs of "
            f"{training:.0f} s with Python {lstm[0]['versions']['python']} (docs/RESULTS.md)"
        )
    return lines + [
        f"  {other:10}  {figure:.3f}  at its highest setting, the whole test split"
        for other, figure in result["metrics"]["test"].items()
        if other not in own
    ]


def main(
    arguments: list[str] | None = None, spent: float = 0.0, results: Path = ROOT / "docs" / "results"
) -> dict | None:
    """
    Train, score and write; the result of `train.py` with the `text`, None on all processes but the first.

    Args:
        spent: seconds since the program began, which count.
        results: the folder of kept results.
    """
    options, started = parse_arguments(arguments), CLOCKS["wall"]() - spent
    torch.set_num_threads(faster_threads())
    whole = WHOLE * options.seconds
    total = max(1.0, started + whole - CLOCKS["wall"]() - WRITING * options.seconds)
    settings = [f"budget.max_seconds={options.seconds:g}", f"budget.total_seconds={total:.1f}", *options.overrides]
    settings = [part for setting in settings for part in ("--set", setting)]
    with contextlib.redirect_stdout(sys.stderr):
        result = train.main([options.recipe, "--output-dir", str(options.output_dir), "--resume", *settings])
    if result is None:
        return None
    final = options.output_dir / "final"
    print(
        "\n".join([*scores(result, read_results(results)), f"curve: {final / 'curve.png'}", "", "It writes:", ""]),
        flush=True,
    )
    left = max(1.0, started + whole - CLOCKS["wall"]())
    writer = [str(final), "--prompt", options.prompt, "--max-new-tokens", str(options.max_new_tokens)]
    written = generate.main([*writer, *SAMPLING, "--max-seconds", str(0.8 * left)])
    return {**result, "text": written["prompt"] + written["completion"]}


if __name__ == "__main__":
    main(spent=time.time() - psutil.Process().create_time())
