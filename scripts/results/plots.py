"""Plots of a run: its training curve, and the gates and eigenvalues of its REM heads."""

from pathlib import Path
from typing import Any

import numpy
import pandas
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


def _points(rows: list[dict[str, float]], x: str, y: str) -> tuple[list, list]:
    return [row[x] for row in rows], [row[y] for row in rows]


def plot_curve(rows: dict[str, list], metric: str, path: Path) -> None:
    """Plot the training loss and the validation metric by step."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    loss_axes = figure.subplots()
    loss_axes.plot(*_points(rows["training"], "step", "loss"), color="0.6")
    loss_axes.set(xlabel="step", ylabel="training loss (grey)")
    metric_axes = loss_axes.twinx()
    metric_axes.plot(*_points(rows["evaluation"], "step", metric), "o-")
    metric_axes.set_ylabel(f"{metric.replace('_', ' ')}, validation")
    figure.savefig(path, dpi=150)


def plot_confusion(counts: list[list[int]], names: list[str], path: Path) -> None:
    """Plot how many rows of each class (down) were given each class (across)."""
    size = 2 + 0.5 * min(len(names), 30)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    shares = numpy.array(counts) / numpy.maximum(1, numpy.sum(counts, axis=1, keepdims=True))
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    for (row, column), count in numpy.ndenumerate(counts) if len(names) <= 30 else ():
        axes.text(column, row, count, ha="center", va="center", color="white" if shares[row, column] > 0.5 else "black")
    axes.set(xlabel="predicted class", ylabel="class")
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    figure.savefig(path, dpi=150)


def plot_curves(curves: dict[str, dict[str, list]], metric: str, path: Path) -> None:
    """Plot the validation metric of several runs by seconds of training."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    all_values = []
    for index, (name, rows) in enumerate(curves.items()):
        seconds, values = _points(rows["evaluation"], "seconds", metric)
        axes.plot(seconds, values, f"C{index % 10}.{'-' if index < 10 else '--'}", label=name)
        all_values += values
    if all_values and min(all_values) > 0 and max(all_values) > 20 * min(all_values):
        axes.set_yscale("log")
    axes.set(xlabel="seconds of training", ylabel=f"{metric.replace('_', ' ')}, validation")
    figure.legend(loc="outside right upper", fontsize="small")  # outside, where it hides no curve
    figure.savefig(path, dpi=120)


def plot_gates(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the gate of each layer and REM head, and the eigenvalues in the unit circle."""
    frame = pandas.DataFrame(rows)
    figure = Figure(figsize=(9, 4), layout="constrained")
    gate_axes, plane = figure.subplots(1, 2)
    gates = frame.pivot(index="layer", columns="head", values="gate")
    gate_axes.imshow(gates, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (row, column), gate in numpy.ndenumerate(gates):
        gate_axes.text(column, row, f"{gate:.2f}", ha="center", va="center", color="white" if gate < 0.5 else "black")
    gate_axes.set(xlabel="head", ylabel="layer", title="gate: share of the REM")
    gate_axes.set_xticks(range(len(gates.columns)), gates.columns)
    gate_axes.set_yticks(range(len(gates.index)), gates.index)
    circle = numpy.exp(2j * numpy.pi * numpy.linspace(0, 1, 201))
    plane.plot(circle.real, circle.imag, color="0.8", lw=1)
    for index, (layer, heads) in enumerate(frame.groupby("layer")):
        values = (heads["decay"] * numpy.exp(1j * heads["angle"])).to_numpy()
        values = numpy.append(values, values[heads["angle"] != 0].conj())  # a cyclical head has a complex pair of them
        plane.plot(values.real, values.imag, "o", color=f"C{index % 10}", alpha=0.7, label=f"layer {layer}")
    plane.set(aspect="equal", xlabel="real part", ylabel="imaginary part", title="eigenvalues")
    if len(gates.index) <= 10:
        plane.legend(loc="lower left", fontsize="small")
    figure.savefig(path, dpi=150)
