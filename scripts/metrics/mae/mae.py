"""Mean absolute error: the absolute error averaged over all values of all forecasts."""

import datasets
import evaluate


DESCRIPTION = __doc__
INPUTS = """
Args:
    error (list of `float`): summed absolute errors of any parts of the data.
    count (list of `int`): the number of values of each part.
"""


class Mae(evaluate.Metric):
    """From sums, not from means of batches, so it is exact however the data were cut."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"error": datasets.Value("float64"), "count": datasets.Value("int64")}),
        )

    def _compute(self, error, count):
        return {"mae": sum(error) / sum(count)}
