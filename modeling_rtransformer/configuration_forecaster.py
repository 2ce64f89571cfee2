# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the models that forecast time series with R-Transformer, RSA or both."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_rtransformer import RTransformerConfig


# As in configuration_rtransformer.py: what Transformers saves beside a checkpoint of this config.
SAVED_BESIDE_A_CHECKPOINT = """
from .modeling_forecaster import RTransformerForTimeSeriesPrediction
"""

INSTANCE_NORMS = ("none", "reversible", "last")
FORECAST_HEADS = ("pooled", "flattened")
FORECAST_LOSSES = ("mse", "huber")

AUTO_MAP = {
    "AutoConfig": "configuration_forecaster.RTransformerForecasterConfig",
    "AutoModel": "modeling_forecaster.RTransformerForecasterModel",
    "AutoModelForTimeSeriesPrediction": "modeling_forecaster.RTransformerForTimeSeriesPrediction",
}


@strict
class RTransformerForecasterConfig(RTransformerConfig):
    r"""
    The blocks of [`RTransformerConfig`], whose fields are here too, and how a series is read and forecast.

    Args:
        num_input_features (`int`, defaults to 1): channels C of the series; 1 with `channel_independent`.
        prediction_length (`int`, defaults to 24): steps P of the horizon, forecast at once.
        instance_norm (`str`, defaults to `"none"`):
            `"reversible"` brings each channel of a series that is to be forecast to mean 0 and variance 1, and the
            forecast back (Kim et al. 2022, without affine parameters); `"last"` takes its last value away, and adds it.
        channel_independent (`bool`, defaults to `False`):
            True: each channel of a series is read and forecast alone, with the same weights; `num_input_features` is 1.
        context_length (`int`, *optional*): steps of the past that a model which forecasts sees; any number if None.
        patch_length (`int`, defaults to 1):
            Consecutive steps of a past that are read as one position, of `patch_length * num_input_features` numbers;
            the first steps of a past that do not fill one are left out.
        forecast_head (`str`, defaults to `"pooled"`):
            The forecast is a linear layer of the last position (`"pooled"`; of the mean if not causal), or of all
            positions side by side (`"flattened"`, which needs `context_length`).
        linear_shortcut (`bool`, defaults to `False`):
            Add a linear map over time, one for all channels, from the past to the horizon, with which the model begins
            (NLinear of Zeng et al. 2023 with `instance_norm` `"last"`); needs `context_length`.
        forecast_loss (`str`, defaults to `"mse"`): `"mse"`, or `"huber"` with its corner at 1.
        channel_names, channel_means, channel_deviations (`list`, *optional*):
            Of each channel of the table that the model was trained on: its name, and the mean and standard deviation of
            its training part. The model reads and gives `(value - mean) / deviation`; it does not apply them itself.

    Raises:
        ValueError: a value out of range or an unknown name, with the field, the value and what would be right.

    Sources: Kim et al. 2022, "Reversible Instance Normalization" (ICLR 2022), section 2; Nie et al. 2023, "A Time
    Series is Worth 64 Words" (ICLR 2023), section 3.1; Zeng et al. 2023, "Are Transformers Effective for Time Series
    Forecasting?" (AAAI 2023), section 4.

    Example:

    ```python
    >>> from modeling_rtransformer import RTransformerForecasterConfig, RTransformerForTimeSeriesPrediction

    >>> config = RTransformerForecasterConfig(num_input_features=7, prediction_length=24, hidden_size=64)
    >>> model = RTransformerForTimeSeriesPrediction(config)
    ```
    """

    model_type = "rtransformer_forecaster"
    code: ClassVar[dict[str, str]] = AUTO_MAP

    num_input_features: int = 1
    prediction_length: int = 24
    instance_norm: str = "none"
    channel_independent: bool = False
    context_length: int | None = None
    patch_length: int = 1
    forecast_head: str = "pooled"
    linear_shortcut: bool = False
    forecast_loss: str = "mse"
    channel_names: list[str] | None = None
    channel_means: list[float] | None = None
    channel_deviations: list[float] | None = None

    def validate_architecture(self) -> None:
        """Check every field against the others. Called by the strict dataclass; raises ValueError."""
        super().validate_architecture()
        self._require(self.prediction_length >= 1, "prediction_length", "at least 1")
        self._require_name("instance_norm", INSTANCE_NORMS)
        if self.channel_independent:
            self._require(self.num_input_features == 1, "num_input_features", "1 with `channel_independent`")
        self._require_name("forecast_head", FORECAST_HEADS)
        self._require_name("forecast_loss", FORECAST_LOSSES)
        self._require(self.patch_length >= 1, "patch_length", "at least 1")
        if self.context_length is not None:
            self._require(
                self.context_length >= self.patch_length,
                "context_length",
                f"at least `patch_length` ({self.patch_length}), or None for any",
            )
        elif self.forecast_head == "flattened" or self.linear_shortcut:
            raise ValueError(
                "`context_length` must be the steps of every past with `forecast_head` 'flattened' or "
                "`linear_shortcut`, got None"
            )

    @property
    def input_size(self) -> int:
        """Numbers of one position: those of a patch."""
        return self.num_input_features * self.patch_length


__all__ = ["RTransformerForecasterConfig"]
