"""What a run reports: its result, where it was obtained, and its training curve."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

import modeling_rtransformer


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "modeling_rtransformer": modeling_rtransformer.__version__,
    }


def commit() -> str | None:
    """The commit of the checkout, with `-dirty` behind it if files were changed; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        root = Path(__file__).resolve().parent.parent
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict[str, Any]:
    """The kind of machine, without its name."""
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def curve(log_history: list[dict[str, float]], metric: str) -> dict[str, list]:
    """The training loss and the monitored metric, by step and by second."""
    rows: dict[str, list] = {"training": [], "evaluation": []}
    for entry in log_history:
        moment = {"step": entry["step"], "seconds": entry.get("seconds")}
        if "loss" in entry:
            rows["training"].append({**moment, "loss": entry["loss"], "learning_rate": entry.get("learning_rate")})
        if f"eval_{metric}" in entry:
            rows["evaluation"].append({**moment, metric: entry[f"eval_{metric}"]})
    return rows


def plot_curve(rows: dict[str, list], metric: str, path: Path) -> None:
    """Draw the curve, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    loss_axes = figure.subplots()
    loss_axes.plot([row["step"] for row in rows["training"]], [row["loss"] for row in rows["training"]], color="0.6")
    loss_axes.set(xlabel="step", ylabel="training loss (grey)")
    metric_axes = loss_axes.twinx()
    points = [(row["step"], row[metric]) for row in rows["evaluation"]]
    metric_axes.plot([step for step, _ in points], [value for _, value in points], "o-")
    metric_axes.set_ylabel(f"{metric.replace('_', ' ')}, validation")
    figure.savefig(path, dpi=150)
