"""Simple models that a recipe can train in place of ours, by the same `Trainer` on the same data, to compare with."""

from scripts.baselines.linear_forecaster import LinearForecaster, LinearForecasterConfig


__all__ = ["LinearForecaster", "LinearForecasterConfig"]
