"""
Metrics by name, each a function that returns a number.

`METRIC_FUNCTIONS` has scikit-learn's accuracy, macro-averaged F1 (the mean over the classes), mean squared and absolute
error and R2 (the share of the variance that is explained), and the functions of the `evaluate` modules in the folders
beside this file. They are called directly: loading a module by `evaluate.load` writes to the home folder.
`evaluate.load("scripts/metrics/perplexity")` works from a checkout without the network; docs/SHARING.md says how to
share such a module.
"""

from functools import partial

from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, mean_squared_error, r2_score

from scripts.metrics.bits_per_character.bits_per_character import bits_per_character
from scripts.metrics.nats_per_frame.nats_per_frame import nats_per_frame
from scripts.metrics.perplexity.perplexity import perplexity
from scripts.metrics.string_accuracy.string_accuracy import string_accuracy


SHARED = {
    "bits_per_character": bits_per_character,
    "nats_per_frame": nats_per_frame,
    "perplexity": perplexity,
    "string_accuracy": string_accuracy,
}
METRIC_FUNCTIONS = {
    "accuracy": accuracy_score,  # (true classes, predicted classes)
    "f1": partial(f1_score, average="macro", zero_division=0),
    "mse": mean_squared_error,  # (true values, predicted values)
    "mae": mean_absolute_error,
    "r2": r2_score,
    **SHARED,
}
