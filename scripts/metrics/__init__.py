"""Metrics as evaluate modules: `evaluate.load("scripts/metrics/accuracy")` from the checkout, without the network."""

from functools import cache
from pathlib import Path

import evaluate


@cache
def load_metric(name: str) -> evaluate.EvaluationModule:
    """The evaluate module of this folder with the given name; nothing is written to the metrics cache."""
    return evaluate.load(str(Path(__file__).parent / name), keep_in_memory=True)
