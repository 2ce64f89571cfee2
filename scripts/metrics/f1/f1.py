"""F1: the harmonic mean of precision and recall; with several classes, the mean over them (`macro`) by default."""

import datasets
import evaluate
from sklearn.metrics import f1_score


DESCRIPTION = __doc__
INPUTS = """
Args:
    predictions (list of `int`): predicted classes.
    references (list of `int`): true classes.
    average (`str`): as in scikit-learn.
"""


class F1(evaluate.Metric):
    """scikit-learn's `f1_score` as an evaluate module."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references, average="macro"):
        return {"f1": float(f1_score(references, predictions, average=average, zero_division=0))}
