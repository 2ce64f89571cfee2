# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""The normalisation layers that a config may ask for."""

import torch
from torch import nn

from .configuration_rtransformer import RTransformerConfig


class OriginalLayerNorm(nn.LayerNorm):
    """
    weight * (x - mean) / (unbiased standard deviation + eps) + bias over the last dimension: the LayerNorm of the
    published R-Transformer code. Apart from eps it equals `nn.LayerNorm` with the weight times sqrt((D - 1) / D). The
    eps makes a difference where the standard deviation is small, as at the embeddings.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        std, mean = torch.std_mean(hidden, dim=-1, keepdim=True)
        return (self.weight * ((hidden - mean) / (std + self.eps)) + self.bias).to(hidden_states.dtype)


LAYER_NORMS = {"standard": nn.LayerNorm, "original": OriginalLayerNorm, "rms": nn.RMSNorm}


def make_layer_norm(config: RTransformerConfig) -> nn.Module:
    """The LayerNorm that the config asks for, over the hidden size."""
    return LAYER_NORMS[config.layer_norm_type](config.hidden_size, eps=config.layer_norm_eps)
