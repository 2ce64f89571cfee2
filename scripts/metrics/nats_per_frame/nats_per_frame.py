"""Nats per frame: the negative log likelihood of a frame, summed over its labels and averaged over all frames."""

from collections.abc import Sequence

import datasets
import evaluate


def nats_per_frame(nll: Sequence[float], count: Sequence[int]) -> float:
    """
    Args:
        nll (list of `float`): summed negative log likelihoods, in nats, of any parts of the data.
        count (list of `int`): the number of frames of each part.
    """
    return sum(nll) / sum(count)


class NatsPerFrame(evaluate.Metric):
    """From sums, not from means of pieces, so every frame counts alike however long its piece is."""

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=nats_per_frame.__doc__,
            features=datasets.Features({"nll": datasets.Value("float64"), "count": datasets.Value("int64")}),
        )

    def _compute(self, nll, count):
        return {"nats_per_frame": nats_per_frame(nll, count)}
