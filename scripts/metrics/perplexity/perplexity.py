"""Perplexity: exp of the mean negative log likelihood of a token."""

import math

import datasets
import evaluate


DESCRIPTION = __doc__
INPUTS = """
Args:
    nll (list of `float`): summed negative log likelihoods, in nats, of any parts of the text.
    count (list of `int`): the number of tokens of each part.
"""


class Perplexity(evaluate.Metric):
    """From sums, not from means of batches, so it is exact however the text was cut."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"nll": datasets.Value("float64"), "count": datasets.Value("int64")}),
        )

    def _compute(self, nll, count):
        return {"perplexity": math.exp(sum(nll) / sum(count))}
