"""Plots of a run: its training curve, and the gates and eigenvalues of its REM heads."""

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


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
    """Plot the training loss and the validation metric by step."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    loss_axes = figure.subplots()
    loss_axes.plot([row["step"] for row in rows["training"]], [row["loss"] for row in rows["training"]], color="0.6")
    loss_axes.set(xlabel="step", ylabel="training loss (grey)")
    metric_axes = loss_axes.twinx()
    points = [(row["step"], row[metric]) for row in rows["evaluation"]]
    metric_axes.plot([step for step, _ in points], [value for _, value in points], "o-")
    metric_axes.set_ylabel(f"{metric.replace('_', ' ')}, validation")
    figure.savefig(path, dpi=150)


def plot_curves(curves: dict[str, dict[str, list]], metric: str, path: Path) -> None:
    """Plot the validation metric of several runs by seconds of training."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    values = []
    for index, (name, rows) in enumerate(curves.items()):
        points = [(row["seconds"], row[metric]) for row in rows["evaluation"] if row["seconds"] is not None]
        values += [value for _, value in points]
        style = {"color": f"C{index % 10}", "linestyle": "-" if index < 10 else "--"}
        axes.plot([seconds for seconds, _ in points], [value for _, value in points], marker=".", label=name, **style)
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    axes.set(xlabel="seconds of training", ylabel=f"{metric.replace('_', ' ')}, validation")
    figure.legend(loc="outside right upper", fontsize="small")  # outside, where it hides no curve
    figure.savefig(path, dpi=120)


def plot_gates(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the gate of each layer and REM head, and the eigenvalues in the unit circle."""
    layers, heads = (sorted({row[name] for row in rows}) for name in ("layer", "head"))
    figure = Figure(figsize=(9, 4), layout="constrained")
    gate_axes, plane = figure.subplots(1, 2)
    gates = [[math.nan] * len(heads) for _ in layers]
    for row in rows:
        place = layers.index(row["layer"]), heads.index(row["head"])
        gates[place[0]][place[1]] = row["gate"]
        colour = "white" if row["gate"] < 0.5 else "black"
        gate_axes.text(place[1], place[0], f"{row['gate']:.2f}", ha="center", va="center", color=colour)
        sides = (1, -1) if row["angle"] else (1,)  # a cyclical head has a complex pair of eigenvalues
        plane.plot(
            [row["decay"] * math.cos(row["angle"])] * len(sides),
            [side * row["decay"] * math.sin(row["angle"]) for side in sides],
            "o", color=f"C{layers.index(row['layer']) % 10}", alpha=0.7,
        )  # fmt: skip
    gate_axes.imshow(gates, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    gate_axes.set(xlabel="head", ylabel="layer", title="gate: share of the REM")
    gate_axes.set_xticks(range(len(heads)), heads)
    gate_axes.set_yticks(range(len(layers)), layers)
    circle = [2 * math.pi * step / 200 for step in range(201)]
    plane.plot([math.cos(angle) for angle in circle], [math.sin(angle) for angle in circle], color="0.8", lw=1)
    for layer in layers:
        plane.plot([], [], "o", color=f"C{layers.index(layer) % 10}", label=f"layer {layer}")
    plane.set(aspect="equal", xlabel="real part", ylabel="imaginary part", title="eigenvalues")
    if len(layers) <= 10:
        plane.legend(loc="lower left", fontsize="small")
    figure.savefig(path, dpi=150)
