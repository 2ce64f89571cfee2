# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
A layer whose keys, values and LocalRNN inputs are handed in: for a system that visits positions in an order of its own,
and keeps what it needs of the past itself.

    x = x + LocalRNN(norm(x))                       for each LocalRNN
    x = x + Attention(norm(x); keys, values)
    x = x + FeedForward(norm(x))

A head may be an RSA head. With the distance s from the query to a key, and P_s the entry of the REM, it is

    [(1 - gate) softmax(q k' / sqrt(d)) + gate P_s] v

over the keys that the query sees. Where a query sees none, the attention sublayer is left out.

Source: Huang et al. 2023, "Encoding Recurrence into Transformers" (ICLR 2023), section 3.
"""

# B batch, T queries, S keys, D hidden size, H heads, d head size, K window of a LocalRNN

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention import RTransformerAttention, eager_attention_forward
from .block import RTransformerMLP, make_layer_norm
from .configuration_rtransformer import RTransformerConfig
from .local_rnn import LocalRNN
from .recurrence_encoding import RemHeads


class Visible(NamedTuple):
    """
    Which keys the queries see, the same in all layers.

    Args:
        distance (`(T, S)`): positions from a query back to a key.
        mask (`(B or 1, 1, T, S)`, bool, *optional*): which keys a query sees; all of them if None.
    """

    distance: torch.Tensor
    mask: torch.Tensor | None = None


class ScheduledAttention(nn.Module):
    """
    Multi-head attention to keys that are handed in; heads are plain or RSA heads.

    Args:
        has_keys: whether it has the projections of keys and values too.
        has_rem: whether its heads may be RSA heads, as the config says.
        scores: a module that gives scores of the distance, `(query, distance) -> (B, H, T, S)`.
    """

    def __init__(
        self,
        config: RTransformerConfig,
        layer_idx: int,
        has_keys: bool = True,
        has_rem: bool = True,
        scores: nn.Module | None = None,
    ):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False  # what is seen is always said by a mask
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        if has_keys:
            self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
            self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.recurrence = RTransformerAttention.make_recurrence(config, layer_idx) if has_rem else None
        self.positions = scores

    def keys_and_values(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, H, S, d)` each, from `(B, S, D)`."""
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        keys, values = self.k_proj(hidden_states), self.v_proj(hidden_states)
        return keys.view(shape).transpose(1, 2), values.view(shape).transpose(1, 2)

    def rem_by_distance(self, length: int) -> torch.Tensor | None:
        """gate P_s of each head for the distances s from 0 to `length` - 1, `(H, length)`; None without RSA heads."""
        if self.recurrence is None:
            return None
        learned = self.recurrence.learned()
        heads, selected = self.recurrence.heads(learned), self.recurrence.selection()
        distance = torch.arange(length, device=heads.decay.device)
        curves = [
            RemHeads(*(field[group] for field in heads)).entries(
                torch.where(distance % dilation == 0, distance // dilation, 0)
            )
            for dilation, group in selected.groups
        ]
        curve = heads.decay.new_zeros(self.config.num_attention_heads, length)
        return curve.index_copy(0, selected.index, torch.cat(curves)) * self.recurrence.gates(learned)[:, None]

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, T, D)
        keys: torch.Tensor,  # (B, H, S, d)
        values: torch.Tensor,
        visible: Visible | None = None,
        positions: nn.Module | None = None,
        rem: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            positions: scores of the distance that all layers share; `visible` must then be given.
            rem: [`rem_by_distance`], for at least the largest distance.

        Returns:
            The output `(B, T, D)` and, from an implementation that has them, the weights `(B, H, T, S)` that multiply
            the values.
        """
        batch, length = hidden_states.shape[:2]
        query = self.q_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)  # (B, H, T, d)
        mask, sees_any = None, None
        if visible is not None and visible.mask is not None:
            sees_any = visible.mask.any(-1, keepdim=True)  # (B, 1, T, 1)
            # a row that sees nothing is left without a mask, since a softmax over nothing is not a number
            mask = torch.zeros_like(visible.mask, dtype=query.dtype).masked_fill(~visible.mask & sees_any, -torch.inf)
        positions = self.positions or positions
        if positions is not None:
            scores = positions(query, visible.distance).to(query.dtype) * self.scaling
            mask = scores if mask is None else mask + scores
            if positions.query_bias is not None:
                query = query + positions.query_bias[:, None].to(query.dtype)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            keys,
            values,
            mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )  # (B, T, H, d), (B, H, T, S) or None
        if rem is not None:
            matrix = rem[:, visible.distance.clamp(0, rem.shape[1] - 1)]  # (H, T, S)
            matrix = matrix.to(values.dtype) if visible.mask is None else matrix.to(values.dtype) * visible.mask
            complement = 1 - self.recurrence.gates()
            output = output * complement[:, None].to(output.dtype) + (matrix @ values).transpose(1, 2)
            weights = None if weights is None else weights * complement[:, None, None].to(weights.dtype) + matrix
        output = self.o_proj(output.reshape(batch, length, -1))
        if sees_any is not None:
            output = output * sees_any[:, 0]
            weights = None if weights is None else weights * sees_any
        return output, weights


class ScheduledLocalRNN(nn.Module):
    """A LocalRNN over the inputs of one layer; what it has read is handed in, as `(B, K - 1, D + 1)`."""

    def __init__(self, config: RTransformerConfig):
        super().__init__()
        self.padded_with_zeros = config.local_padding == "zeros"
        self.rnn = LocalRNN(config.hidden_size, config.local_window, config.local_rnn_type)

    @staticmethod
    def inputs(hidden_states: torch.Tensor, present: torch.Tensor | None) -> torch.Tensor:
        """What a window holds, `(B, T, D + 1)`: the inputs, zero where padded, and 1 where they are of a sequence."""
        present = torch.ones_like(hidden_states[..., :1]) if present is None else present[..., None].to(hidden_states)
        return torch.cat([hidden_states * present, present], dim=-1)

    def forward(
        self, before: torch.Tensor, inputs: torch.Tensor, segment_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            before (`(B, K - 1, D + 1)`): the inputs before the first of `inputs` `(B, T, D + 1)`.
            segment_ids (`(B, T)`, *optional*): packed sequences; nothing of `before` then belongs to them.

        Returns:
            `(B, T, D)`.
        """
        windows = torch.cat([before, inputs], dim=1)
        in_sequence = None if self.padded_with_zeros else (windows[..., -1] != 0).cumsum(1) > 0
        return self.rnn(windows[..., :-1], segment_ids, in_sequence)


class ScheduledLayer(nn.Module):
    """
    The sublayers, each behind a LayerNorm and beside a residual connection. A subclass says in `forward` what the
    attention sees.
    """

    def __init__(self, config: RTransformerConfig, layer_idx: int):
        super().__init__()
        self.local_rnns = nn.ModuleList(ScheduledLocalRNN(config) for _ in range(config.num_local_rnns))
        self.local_rnn_norms = nn.ModuleList(make_layer_norm(config) for _ in range(config.num_local_rnns))
        self.self_attn = self.make_attention(config, layer_idx)
        self.self_attn_norm = make_layer_norm(config)
        self.mlp = RTransformerMLP(config)
        self.mlp_norm = make_layer_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    @staticmethod
    def make_attention(config: RTransformerConfig, layer_idx: int) -> ScheduledAttention:
        return ScheduledAttention(config, layer_idx)

    def run_local_rnns(
        self,
        hidden_states: torch.Tensor,  # (B, T, D)
        before: Sequence[torch.Tensor],
        present: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """
        Args:
            before: for each LocalRNN what it read before.
            present (`(B, T)`, *optional*): 0 where padded.
            segment_ids (`(B, T)`, *optional*): packed sequences.

        Returns:
            The sum `(B, T, D)`, and for each LocalRNN its inputs `(B, T, D + 1)`.
        """
        inputs = []
        for norm, local_rnn, window in zip(self.local_rnn_norms, self.local_rnns, before):
            inputs.append(local_rnn.inputs(norm(hidden_states), present))
            hidden_states = hidden_states + self.dropout(local_rnn(window, inputs[-1], segment_ids))
        return hidden_states, inputs

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))
