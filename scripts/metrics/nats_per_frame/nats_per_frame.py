"""Nats per frame: the negative log likelihood of a frame, summed over its labels and averaged over all frames."""

import datasets
import evaluate


DESCRIPTION = __doc__
INPUTS = """
Args:
    nll (list of `float`): summed negative log likelihoods, in nats, of any parts of the data.
    count (list of `int`): the number of frames of each part.
"""


class NatsPerFrame(evaluate.Metric):
    """From sums, not from means of pieces, so every frame counts alike however long its piece is."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"nll": datasets.Value("float64"), "count": datasets.Value("int64")}),
        )

    def _compute(self, nll, count):
        return {"nats_per_frame": sum(nll) / sum(count)}
