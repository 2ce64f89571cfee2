"""String accuracy: the share of the strings that are right at every position."""

import datasets
import evaluate


DESCRIPTION = __doc__
INPUTS = """
Args:
    right (list of `bool`): for each string, whether all its positions are right.
"""


class StringAccuracy(evaluate.Metric):
    """A mean over strings, however long each is."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"right": datasets.Value("bool")}),
        )

    def _compute(self, right):
        return {"string_accuracy": sum(right) / len(right)}
