"""
NLinear and DLinear: one linear map over time from the past to the horizon, the same for every channel.

    NLinear:  x[L] + W (x - x[L]) + b                 x[L] the last value of the past
    DLinear:  W1 trend(x) + b1 + W2 (x - trend(x)) + b2       trend(x) a moving average

Weights begin as 1 / L, so that the first forecast is a mean of the past, as in the authors' code.

Source: Zeng et al. 2023, "Are Transformers Effective for Time Series Forecasting?" (AAAI 2023), section 4.
"""

# B batch, L steps of the past, P steps of the horizon, C channels

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForTimeSeriesPrediction, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from modeling_rtransformer.configuration_rtransformer import nearest
from modeling_rtransformer.library_versions import refuse_unknown_arguments
from modeling_rtransformer.modeling_forecaster import RTransformerTimeSeriesPredictionOutput


KINDS = ("nlinear", "dlinear")


@strict
class LinearForecasterConfig(PreTrainedConfig):
    """
    Args:
        kind: `nlinear` or `dlinear`.
        context_length, prediction_length: steps that are read and forecast; a recipe's task sets both.
        trend_window: steps of DLinear's moving average, an odd number.
        channel_names, channel_means, channel_deviations: as of `RTransformerForecasterConfig`.
    """

    model_type = "linear_forecaster"

    kind: str = "nlinear"
    context_length: int = 96
    prediction_length: int = 24
    trend_window: int = 25
    channel_names: list[str] | None = None
    channel_means: list[float] | None = None
    channel_deviations: list[float] | None = None

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        if self.kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {self.kind!r}{nearest(self.kind, KINDS)}")
        for name in ("context_length", "prediction_length", "trend_window"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if self.trend_window % 2 == 0:
            raise ValueError(f"`trend_window` must be odd, got {self.trend_window}")


class LinearForecaster(PreTrainedModel):
    """NLinear or DLinear, by the config."""

    config: LinearForecasterConfig
    config_class = LinearForecasterConfig
    main_input_name = "past_values"

    def __init__(self, config: LinearForecasterConfig):
        super().__init__(config)
        self.remainder = nn.Linear(config.context_length, config.prediction_length)
        self.trend = nn.Linear(config.context_length, config.prediction_length) if config.kind == "dlinear" else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Weights 1 / L, biases 0."""
        if isinstance(module, nn.Linear):
            init.constant_(module.weight, 1 / module.in_features)
            init.zeros_(module.bias)

    def forward(
        self, past_values: torch.FloatTensor, future_values: torch.FloatTensor | None = None, **kwargs
    ) -> RTransformerTimeSeriesPredictionOutput:
        """`past_values` `(B, L, C)` to `prediction_outputs` `(B, P, C)`; `future_values` `(B, P, C)` for the loss."""
        refuse_unknown_arguments(kwargs, ("past_values", "future_values"))
        length = self.config.context_length
        if past_values.dim() != 3 or past_values.shape[1] != length:
            raise ValueError(
                f"`past_values` must have the shape (batch, `context_length` = {length}, channels), "
                f"got {tuple(past_values.shape)}"
            )
        values = past_values.transpose(1, 2)  # (B, C, L)
        if self.trend is None:
            last = values[..., -1:]
            steps = self.remainder(values - last) + last
        else:
            reach = self.config.trend_window // 2
            padded = F.pad(values, (reach, reach), mode="replicate")
            trend = F.avg_pool1d(padded, self.config.trend_window, stride=1)
            steps = self.trend(trend) + self.remainder(values - trend)
        prediction = steps.transpose(1, 2)
        loss = None if future_values is None else F.mse_loss(prediction, future_values)
        return RTransformerTimeSeriesPredictionOutput(loss=loss, prediction_outputs=prediction)


AutoConfig.register(LinearForecasterConfig.model_type, LinearForecasterConfig)
AutoModelForTimeSeriesPrediction.register(LinearForecasterConfig, LinearForecaster)
