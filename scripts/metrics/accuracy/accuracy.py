"""Accuracy: the share of the predictions that are right."""

import datasets
import evaluate
from sklearn.metrics import accuracy_score


DESCRIPTION = __doc__
INPUTS = """
Args:
    predictions (list of `int`): predicted classes.
    references (list of `int`): true classes.

"""


class Accuracy(evaluate.Metric):
    """scikit-learn's `accuracy_score` as an evaluate module."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references):
        return {"accuracy": float(accuracy_score(references, predictions))}
