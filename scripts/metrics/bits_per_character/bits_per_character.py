"""Bits per character: the negative log likelihood of a text in bits, for each of its characters."""

import math

import datasets
import evaluate


DESCRIPTION = __doc__
INPUTS = """
Args:
    nll (list of `float`): summed negative log likelihoods, in nats, of any parts of the text.
    count (list of `int`): the number of characters of each part.
"""


class BitsPerCharacter(evaluate.Metric):
    """From sums, not from means of batches, so it is exact however the text was cut."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"nll": datasets.Value("float64"), "count": datasets.Value("int64")}),
        )

    def _compute(self, nll, count):
        return {"bits_per_character": sum(nll) / math.log(2) / sum(count)}
