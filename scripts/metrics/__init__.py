"""
Metrics by name, each a function that returns a number.

`METRIC_FUNCTIONS` has scikit-learn's accuracy and macro-averaged F1, the mean of summed errors over all forecasts (MSE
and MAE), and the `evaluate` modules in the folders beside this file. `evaluate.load("scripts/metrics/perplexity")`
loads such a module from a checkout without the network, and `scripts/push_to_hub.py` shares it.
"""

import operator
from functools import cache, partial
from pathlib import Path

import evaluate
from sklearn.metrics import accuracy_score, f1_score


SHARED = ("bits_per_character", "nats_per_frame", "perplexity", "string_accuracy")


@cache
def load_module(name: str) -> evaluate.EvaluationModule:
    """The `evaluate` module of this folder with the given name; nothing is written to the metrics cache."""
    return evaluate.load(str(Path(__file__).parent / name), keep_in_memory=True)


def compute_shared(name: str, **inputs) -> float:
    return load_module(name).compute(**inputs)[name]


METRIC_FUNCTIONS = {
    "accuracy": accuracy_score,  # (true classes, predicted classes)
    "f1": partial(f1_score, average="macro", zero_division=0),
    "mse": operator.truediv,  # (summed squared errors, number of values)
    "mae": operator.truediv,
    **{name: partial(compute_shared, name) for name in SHARED},
}
