# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""The head that forecasts: all steps of the horizon at once, from what the model made of the past."""

# B batch, L steps of the past, P steps of the horizon, C channels, D hidden size

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .classification import pool
from .configuration_rtransformer import RTransformerConfig
from .modeling_rtransformer import RTransformerModel, RTransformerPreTrainedModel


INSTANCE_NORM_EPS = 1e-5  # added to the variance of a channel, which may not change at all


@dataclass
class RTransformerTimeSeriesPredictionOutput(ModelOutput):
    """
    Args:
        loss: the mean squared error, where `future_values` are given.
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


class RTransformerForTimeSeriesPrediction(RTransformerPreTrainedModel):
    """
    Direct forecasting of `prediction_length` steps: one linear layer from the model's last position (of a bidirectional
    model: from the mean over the positions) to all steps of all channels.

    With `instance_norm="reversible"` each channel of each past is brought to mean 0 and variance 1, and the forecast
    back to where it was: the model sees shapes, not levels. Without parameters of its own.

    With `channel_independent` the model reads and forecasts each channel alone, with the same weights, so it takes any
    number of them; otherwise it reads and forecasts the `num_input_features` channels together.

    Source of the reversible norm: Kim et al. 2022, "Reversible Instance Normalization" (ICLR 2022), section 2.
    """

    main_input_name = "past_values"

    def __init__(self, config: RTransformerConfig):
        super().__init__(config)
        self.main_input_name = "past_values"
        for name in ("prediction_length", "num_input_features"):
            if getattr(config, name) is None:
                raise ValueError(f"`{name}` must be at least 1 for a model that forecasts, got None")
        self.model = RTransformerModel(config)
        self.head = nn.Linear(config.hidden_size, config.prediction_length * config.num_input_features)
        self.post_init()

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
            attention_mask (`(B, L)`, *optional*): 0 where a shorter past is padded, on either side.
            future_values (`(B, P, C)`, *optional*): what came then.

        Returns:
            `prediction_outputs` `(B, P, C)`, with `future_values` also the `loss`, their mean squared error.

        Raises:
            ValueError: values of another shape than the config asks for.
        """
        self._check(past_values, attention_mask, future_values)
        batch, length, channels = past_values.shape
        loc, scale = self._instance_statistics(past_values, attention_mask)
        values = (past_values - loc) / scale
        if self.config.channel_independent:
            values = values.transpose(1, 2).reshape(batch * channels, length, 1)
            if attention_mask is not None:
                attention_mask = attention_mask.repeat_interleave(channels, dim=0)
        outputs: BaseModelOutputWithPast = self.model(
            input_values=values, attention_mask=attention_mask, use_cache=False, **kwargs
        )
        steps = self.head(pool(outputs.last_hidden_state, attention_mask, self.config.is_causal))
        if self.config.channel_independent:
            steps = steps.view(batch, channels, -1).transpose(1, 2)
        prediction = steps.reshape(batch, self.config.prediction_length, channels) * scale + loc
        loss = None
        if future_values is not None:
            loss = F.mse_loss(prediction.float(), future_values.to(prediction.device).float())
        return RTransformerTimeSeriesPredictionOutput(
            loss=loss,
            prediction_outputs=prediction,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            loc=loc,
            scale=scale,
        )

    def _instance_statistics(
        self, values: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each channel over its real steps, both `(B, 1, C)`; 0 and 1 without a norm."""
        if self.config.instance_norm == "none":
            return torch.zeros_like(values[:, :1]), torch.ones_like(values[:, :1])
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
        if attention_mask is not None and attention_mask.shape != past.shape[:2]:
            raise ValueError(
                f"`attention_mask` must have the shape (batch, length) = {tuple(past.shape[:2])}, "
                f"got {tuple(attention_mask.shape)}"
            )
        wanted = (past.shape[0], self.config.prediction_length, past.shape[2])
        if future is not None and tuple(future.shape) != wanted:
            raise ValueError(
                f"`future_values` must have the shape (batch, `prediction_length`, channels) = {wanted}, "
                f"got {tuple(future.shape)}"
            )


__all__ = ["RTransformerForTimeSeriesPrediction", "RTransformerTimeSeriesPredictionOutput"]
