"""String accuracy: the share of the strings that are right at every position."""

from collections.abc import Sequence

import datasets
import evaluate


def string_accuracy(right: Sequence[bool]) -> float:
    """
    Args:
        right (list of `bool`): for each string, whether all its positions are right.
    """
    return sum(right) / len(right)


class StringAccuracy(evaluate.Metric):
    """A mean over strings, however long each is."""

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=string_accuracy.__doc__,
            features=datasets.Features({"right": datasets.Value("bool")}),
        )

    def _compute(self, right):
        return {"string_accuracy": string_accuracy(right)}
