# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""A model that forecasts time series: all steps of the horizon at once, from what the blocks made of the past."""

# B batch, L steps of the past, P steps of the horizon, C channels, N positions (patches of the past), D hidden size

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.import_utils import is_tracing

from .classification import pool
from .configuration_forecaster import RTransformerForecasterConfig
from .library_versions import BaseModelOutputWithPast
from .modeling_rtransformer import RTransformerModel, RTransformerPreTrainedModel


INSTANCE_NORM_EPS = 1e-5  # added to the variance of a channel, which may not change at all


@dataclass
class RTransformerTimeSeriesPredictionOutput(ModelOutput):
    """
    Args:
        loss: the mean of the squared error (or of Huber's), where `future_values` are given.
        prediction_outputs (`(B, P, C)`): the forecast.
        hidden_states, attentions: of each block, if they were asked for.
        loc, scale (`(B, 1, C)`): what was taken from the past of each channel, and what it was divided by.
    """

    loss: torch.FloatTensor | None = None
    prediction_outputs: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    loc: torch.FloatTensor | None = None
    scale: torch.FloatTensor | None = None


class RTransformerForecasterModel(RTransformerModel):
    """The blocks alone: the base model of a forecaster, which reads patches as `input_values`."""

    config: RTransformerForecasterConfig
    config_class = RTransformerForecasterConfig


class RTransformerForTimeSeriesPrediction(RTransformerPreTrainedModel):
    """
    Direct forecasting of `prediction_length` steps: one linear layer from what the model made of the past to all steps
    of all channels. It takes the model's last position (of a bidirectional model: the mean over the positions), or with
    `forecast_head="flattened"` all positions.

    | choice | what it does |
    |---|---|
    | `instance_norm="reversible"` | each channel to mean 0 and variance 1, the forecast back: no levels are seen |
    | `instance_norm="last"` | the last value of each channel is taken away, and added to the forecast |
    | `channel_independent` | each channel is read and forecast alone, with the same weights: any number of them |
    | `patch_length` | so many steps are one position |
    | `linear_shortcut` | the blocks learn what a linear map over time, which is learned with them, leaves over |

    Sources: Kim et al. 2022, "Reversible Instance Normalization" (ICLR 2022), section 2; Nie et al. 2023, "A Time
    Series is Worth 64 Words" (ICLR 2023), section 3.1: patches, independent channels, the flattened head; Zeng et al.
    2023, "Are Transformers Effective for Time Series Forecasting?" (AAAI 2023), section 4: NLinear.
    """

    config: RTransformerForecasterConfig
    config_class = RTransformerForecasterConfig
    main_input_name = "past_values"

    def __init__(self, config: RTransformerForecasterConfig):
        super().__init__(config)
        self.main_input_name = "past_values"
        self.model = RTransformerForecasterModel(config)
        positions = config.context_length // config.patch_length if config.forecast_head == "flattened" else 1
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.head = nn.Linear(positions * config.hidden_size, config.prediction_length * config.num_input_features)
        self.shortcut = nn.Linear(config.context_length, config.prediction_length) if config.linear_shortcut else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As everywhere, but a shortcut begins as the mean of the past, and the head beside it with nothing."""
        super()._init_weights(module)
        if self.shortcut is not None and module is self.shortcut:
            init.constant_(module.weight, 1 / module.in_features)
        elif self.shortcut is not None and module is self.head:
            init.zeros_(module.weight)

    @can_return_tuple
    def forward(
        self,
        past_values: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        future_values: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RTransformerTimeSeriesPredictionOutput:
        """
        Args:
            past_values (`(B, L, C)`): the past of each channel.
            attention_mask (`(B, L)`, *optional*):
                0 where a shorter past is padded, on either side; not with `context_length`, which is that of every
                past, and not with `patch_length` above 1.
            future_values (`(B, P, C)`, *optional*): what came then.

        Returns:
            `prediction_outputs` `(B, P, C)`, with `future_values` also the `loss`.

        Raises:
            ValueError: values of another shape than the config asks for, or past values on a CPU that are not finite.
            TypeError: an argument that the model does not use, such as Transformers' `past_observed_mask`.
        """
        self._check(past_values, attention_mask, future_values)
        batch, length, channels = past_values.shape
        loc, scale = self._instance_statistics(past_values, attention_mask)
        normal = (past_values - loc) / scale
        values, mask = self._positions(normal, attention_mask)
        outputs: BaseModelOutputWithPast = self.model(
            input_values=values, attention_mask=mask, use_cache=False, **kwargs
        )
        if self.config.forecast_head == "flattened":
            features = outputs.last_hidden_state.flatten(1)  # (B, N D)
        else:
            features = pool(outputs.last_hidden_state, mask, self.config.is_causal)  # (B, D)
        steps = self.head(self.dropout(features))
        if self.config.channel_independent:
            steps = steps.view(batch, channels, -1).transpose(1, 2)
        steps = steps.reshape(batch, self.config.prediction_length, channels)
        if self.shortcut is not None:
            steps = steps + self.shortcut(normal.transpose(1, 2)).transpose(1, 2)
        prediction = steps * scale + loc
        loss = None
        if future_values is not None:
            criterion = F.huber_loss if self.config.forecast_loss == "huber" else F.mse_loss
            loss = criterion(prediction.float(), future_values.to(prediction.device).float())
        return RTransformerTimeSeriesPredictionOutput(
            loss=loss,
            prediction_outputs=prediction,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            loc=loc,
            scale=scale,
        )

    def _positions(
        self, values: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the model reads, `(B, N, patch_length C)`, of single channels `(B C, N, patch_length)`; its mask."""
        patch, channels = self.config.patch_length, values.shape[2]
        if self.config.channel_independent:
            values = values.transpose(1, 2).flatten(0, 1)[..., None]  # (B C, L, 1)
            if attention_mask is not None:
                attention_mask = attention_mask.repeat_interleave(channels, dim=0)
        if patch > 1:
            values = values[:, values.shape[1] % patch :].unflatten(1, (-1, patch)).flatten(2)
            attention_mask = None  # checked: all ones
        return values, attention_mask

    def _instance_statistics(
        self, values: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is taken from each channel and what it is divided by, both `(B, 1, C)`; 0 and 1 without a norm."""
        if self.config.instance_norm == "none":
            return torch.zeros_like(values[:, :1]), torch.ones_like(values[:, :1])
        if self.config.instance_norm == "last":
            last = pool(values.detach(), attention_mask, is_causal=True)[:, None]
            return last, torch.ones_like(last)
        exact = values.detach().to(torch.promote_types(values.dtype, torch.float32))
        real = torch.ones_like(exact[..., :1]) if attention_mask is None else attention_mask[..., None].to(exact)
        count = real.sum(1, keepdim=True).clamp(min=1)
        loc = (exact * real).sum(1, keepdim=True) / count
        variance = ((exact - loc).square() * real).sum(1, keepdim=True) / count
        return loc.to(values.dtype), (variance + INSTANCE_NORM_EPS).sqrt().to(values.dtype)

    def _check(self, past: torch.Tensor, attention_mask: torch.Tensor | None, future: torch.Tensor | None) -> None:
        features = None if self.config.channel_independent else self.config.num_input_features
        if past.dim() != 3 or past.shape[1] < 1 or (features is not None and past.shape[2] != features):
            channels = "channels" if features is None else f"`num_input_features` = {features}"
            raise ValueError(f"`past_values` must have the shape (batch, length, {channels}), got {tuple(past.shape)}")
        if past.device.type == "cpu" and not is_tracing(past) and not past.isfinite().all():
            raise ValueError("`past_values` must be finite, got NaN or infinity; fill what was not observed")
        if attention_mask is not None and attention_mask.shape != past.shape[:2]:
            raise ValueError(
                f"`attention_mask` must have the shape (batch, length) = {tuple(past.shape[:2])}, "
                f"got {tuple(attention_mask.shape)}"
            )
        length, patch = self.config.context_length, self.config.patch_length
        if past.shape[1] != length and length is not None or past.shape[1] < patch:
            name, steps = ("context_length", length) if length is not None else ("patch_length", f"{patch} or more")
            raise ValueError(f"`past_values` must have `{name}` = {steps} steps, got {past.shape[1]}")
        if attention_mask is not None and (length is not None or patch > 1) and not attention_mask.all():
            raise ValueError(
                "`attention_mask` must be all ones with `context_length` or `patch_length` above 1, got zeros"
            )
        wanted = (past.shape[0], self.config.prediction_length, past.shape[2])
        if future is not None and tuple(future.shape) != wanted:
            raise ValueError(
                f"`future_values` must have the shape (batch, `prediction_length`, channels) = {wanted}, "
                f"got {tuple(future.shape)}"
            )


__all__ = [
    "RTransformerForTimeSeriesPrediction",
    "RTransformerForecasterModel",
    "RTransformerTimeSeriesPredictionOutput",
]
