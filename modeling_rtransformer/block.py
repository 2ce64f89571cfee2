# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
One pre-norm block of R-Transformer, RSA or both:

    for each LocalRNN n of the block:   x = x + dropout(LocalRNN_n(norm(x)))
                                        x = x + dropout(Attention(norm(x)))
                                        x = x + dropout(FeedForward(norm(x)))

Source: Wang et al. 2019, "R-Transformer" (arXiv 1907.05572), section 3 and the published code.
"""

# B batch, T positions of this call, L positions with the past, D hidden size, K window, H heads, d head size

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_rtransformer import RTransformerConfig
from .head_shard import HeadShard
from .library_versions import accepts_both_cache_names
from .local_rnn import LocalRNN
from .recurrence_encoding import RecurrenceEncoding


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(Q K' scaling + mask) V `(B, T, H, d)` and the softmax itself `(B, H, T, L)`, from `(B, H, ., d)`."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class OriginalLayerNorm(nn.LayerNorm):
    """
    weight * (x - mean) / (unbiased standard deviation + eps) + bias over the last dimension, the LayerNorm of the
    published R-Transformer code. It is `nn.LayerNorm` with a weight sqrt((D - 1) / D) times as large, up to eps, which
    shows where the standard deviation is small: at the embeddings.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        std, mean = torch.std_mean(hidden, dim=-1, keepdim=True)
        return (self.weight * ((hidden - mean) / (std + self.eps)) + self.bias).to(hidden_states.dtype)


def make_layer_norm(config: RTransformerConfig) -> nn.LayerNorm:
    """The LayerNorm that the config asks for, over the hidden size."""
    layer_norm = OriginalLayerNorm if config.layer_norm_type == "original" else nn.LayerNorm
    return layer_norm(config.hidden_size, eps=config.layer_norm_eps)


def wait_for_offloaded(cache: Cache | None, layer_idx: int, device: torch.device) -> None:
    """
    Have what an offloading cache keeps for a block back on its device before the block reads it.

    The cache brings it back on a stream of its own and waits for that stream when keys and values are added, which is
    after the windows were read; in a model of one block it does not wait at all.
    """
    if cache is not None and cache.offloading and layer_idx < len(cache.layers):
        torch.cuda.current_stream(device).wait_stream(cache.prefetch_stream)
        cache.layers[layer_idx].prefetch()


class RTransformerLocalRNN(nn.Module):
    """
    LocalRNN sublayer: padding and the cached window before the LocalRNN; in a bidirectional model the sum of two, the
    second of which runs from right to left over x[t..t+K-1].

    Without `local_padding` a further channel goes through the window and the cache: 1 for the inputs of the sequence.
    """

    def __init__(self, config: RTransformerConfig, layer_idx: int, rnn_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.rnn_idx = rnn_idx
        self.window = config.local_window
        self.padded_with_zeros = config.local_padding == "zeros"
        self.rnn = LocalRNN(config.hidden_size, config.local_window, config.local_rnn_type)
        self.reverse_rnn = None
        if not config.is_causal:
            self.reverse_rnn = LocalRNN(config.hidden_size, config.local_window, config.local_rnn_type)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, T, D)
        padding_mask: torch.Tensor | None = None,  # (B, T), 0 where padded
        segment_ids: torch.Tensor | None = None,  # (B, T)
        cache: Cache | None = None,
    ) -> torch.Tensor:
        if padding_mask is not None:
            hidden_states = hidden_states * padding_mask[..., None].to(hidden_states.dtype)
        outputs = self._run(self.rnn, hidden_states, padding_mask, segment_ids, cache)
        if self.reverse_rnn is not None:
            turned = (None if tensor is None else tensor.flip(1) for tensor in (padding_mask, segment_ids))
            outputs = outputs + self._run(self.reverse_rnn, hidden_states.flip(1), *turned).flip(1)
        return outputs

    def _run(
        self,
        rnn: LocalRNN,
        hidden_states: torch.Tensor,
        padding_mask: torch.Tensor | None,
        segment_ids: torch.Tensor | None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """`(B, T, D)`: the LocalRNN from left to right, after what the cache has of the inputs before."""
        if self.padded_with_zeros or self.window == 1:
            return rnn(self._with_window_before(hidden_states, cache), segment_ids)
        is_first = cache is None or not cache.has_previous_state(self.layer_idx, self.rnn_idx)
        runs_over = is_first and segment_ids is None and rnn.can_run_over(hidden_states)
        if runs_over and cache is None:  # nothing reads the windows
            return rnn.over_sequence(hidden_states, padding_mask)
        present = torch.ones_like(hidden_states[..., :1])
        if padding_mask is not None:
            present = present * padding_mask[..., None].to(present.dtype)
        windows = self._with_window_before(torch.cat([hidden_states, present], dim=-1), cache)
        if runs_over:
            return rnn.over_sequence(hidden_states, padding_mask)
        return rnn(windows[..., :-1], segment_ids, in_sequence=(windows[..., -1] != 0).cumsum(1) > 0)

    def _with_window_before(self, hidden_states: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """`(B, K - 1 + T, D)`: the K - 1 inputs before, which are zeros at the beginning, then the T inputs."""
        if cache is None or self.window == 1:
            return F.pad(hidden_states, (0, 0, self.window - 1, 0))
        needed = self.window - 1 + hidden_states.shape[1]
        inputs = hidden_states.transpose(1, 2)
        if not cache.has_previous_state(self.layer_idx, self.rnn_idx):
            inputs = F.pad(inputs, (self.window - 1, 0))  # here, where the cache would make short inputs a special case
        states = cache.update_conv_state(inputs, self.layer_idx, state_idx=self.rnn_idx, conv_kernel_size=self.window)
        return states[..., -needed:].transpose(1, 2)


class RTransformerAttention(nn.Module):
    """Multi-head attention whose heads are plain or, with a REM gated in, RSA heads."""

    def __init__(self, config: RTransformerConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = config.is_causal
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        rem_heads = config.layer_rem_heads(layer_idx)
        self.recurrence = None
        if rem_heads:
            self.recurrence = RecurrenceEncoding(
                rem_heads, config.num_attention_heads, gate=config.rem_gate, is_causal=config.is_causal
            )

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, T, D)
        attention_mask: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,  # (B, T), 0 where padded
        segment_ids: torch.Tensor | None = None,  # (B, T)
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Returns the output `(B, T, D)` and, from an implementation that has them, the weights `(B, H, T, L)` that
        multiply the values: for an RSA head gate, softmax and REM together.
        """
        input_shape = hidden_states.shape[:-1]
        query, key, value = (
            proj(hidden_states).view(*input_shape, -1, self.head_dim).transpose(1, 2)  # (B, H, T, d)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.recurrence is not None and padding_mask is not None:
            value = value * padding_mask[:, None, :, None].to(value.dtype)
        positions = None
        if cache is not None:
            # Read before `update`, which counts on in place.
            past_length = cache.get_seq_length(self.layer_idx)
            positions = past_length + torch.arange(input_shape[1], device=hidden_states.device)
            if isinstance(past_length, int) and past_length == 0:
                positions = None
            key, value_states = cache.update(key, value, self.layer_idx)
        else:
            value_states = value

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value_states,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )  # (B, T, H, d), (B, H, T, L) or None
        if self.recurrence is not None:
            shard = HeadShard.of(self.v_proj.weight, value.shape[1], self.config.num_attention_heads)
            if weights is not None:  # the definition, from the matrix
                weights = self.recurrence.mixing_matrix(weights, positions, segment_ids, shard)
                output = (weights @ value_states).transpose(1, 2)
            else:  # without a past the queries are all positions there are, also in a cache with room for more
                values = value if positions is None else value_states
                output = self.recurrence(output, values, positions, segment_ids, shard)
        return self.o_proj(output.reshape(*input_shape, -1)), weights


class RTransformerMLP(nn.Module):
    """Feed-forward sublayer: D -> intermediate size -> D, with dropout between."""

    def __init__(self, config: RTransformerConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.dropout(self.act_fn(self.up_proj(hidden_states))))


class RTransformerBlock(GradientCheckpointingLayer):
    """LocalRNNs, attention and feed-forward, each behind a LayerNorm and beside a residual connection."""

    def __init__(self, config: RTransformerConfig, layer_idx: int):
        super().__init__()
        self.local_rnns = nn.ModuleList(
            RTransformerLocalRNN(config, layer_idx, rnn_idx) for rnn_idx in range(config.num_local_rnns)
        )
        self.local_rnn_norms = nn.ModuleList(make_layer_norm(config) for _ in range(config.num_local_rnns))
        self.self_attn = RTransformerAttention(config, layer_idx)
        self.self_attn_norm = make_layer_norm(config)
        self.mlp = RTransformerMLP(config)
        self.mlp_norm = make_layer_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    @accepts_both_cache_names
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        wait_for_offloaded(cache, self.self_attn.layer_idx, hidden_states.device)
        for norm, local_rnn in zip(self.local_rnn_norms, self.local_rnns):
            update = local_rnn(norm(hidden_states), padding_mask, segment_ids, cache)
            hidden_states = hidden_states + self.dropout(update)
        update, _ = self.self_attn(
            self.self_attn_norm(hidden_states), attention_mask, padding_mask, segment_ids, cache, **kwargs
        )
        hidden_states = hidden_states + self.dropout(update)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))
