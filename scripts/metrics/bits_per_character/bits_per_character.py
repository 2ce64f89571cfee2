"""Bits per character: the negative log likelihood of a text in bits, for each of its characters."""

import math
from collections.abc import Sequence

import datasets
import evaluate


def bits_per_character(nll: Sequence[float], count: Sequence[int]) -> float:
    """
    Args:
        nll (list of `float`): summed negative log likelihoods, in nats, of any parts of the text.
        count (list of `int`): the number of characters of each part.
    """
    return sum(nll) / math.log(2) / sum(count)


class BitsPerCharacter(evaluate.Metric):
    """From sums, not from means of batches, so it is exact however the text was cut."""

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=bits_per_character.__doc__,
            features=datasets.Features({"nll": datasets.Value("float64"), "count": datasets.Value("int64")}),
        )

    def _compute(self, nll, count):
        return {"bits_per_character": bits_per_character(nll, count)}
