"""
Simple models that a recipe can train in place of ours, by the same `Trainer` on the same data, to compare with.

| `model_type` | what it is |
|---|---|
| `recurrent` | RNN, GRU or LSTM, stacked |
| `tcn` | a temporal convolutional network |
| `rnmt_plus` | RNMT+, layer-normalised LSTMs with attention over the past |
| `toeplitz` | our block with a learned Toeplitz matrix where a REM would be |
| `linear_forecaster` | NLinear or DLinear, for forecasts |

A plain Transformer, R-Transformer and RSA are settings of `rtransformer` itself.
"""

from scripts.baselines import recurrent, rnmt, tcn, toeplitz
from scripts.baselines.linear_forecaster import LinearForecaster, LinearForecasterConfig


__all__ = ["LinearForecaster", "LinearForecasterConfig", "recurrent", "rnmt", "tcn", "toeplitz"]
