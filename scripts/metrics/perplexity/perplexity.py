"""Perplexity: exp of the mean negative log likelihood of a token."""

import math
from collections.abc import Sequence

import datasets
import evaluate


def perplexity(nll: Sequence[float], count: Sequence[int]) -> float:
    """
    Args:
        nll (list of `float`): summed negative log likelihoods, in nats, of any parts of the text.
        count (list of `int`): the number of tokens of each part.
    """
    return math.exp(sum(nll) / sum(count))


class Perplexity(evaluate.Metric):
    """From sums, not from means of batches, so it is exact however the text was cut."""

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=perplexity.__doc__,
            features=datasets.Features({"nll": datasets.Value("float64"), "count": datasets.Value("int64")}),
        )

    def _compute(self, nll, count):
        return {"perplexity": perplexity(nll, count)}
