# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
Multi-head attention whose heads are plain or, with a Recurrence Encoding Matrix (REM) P gated in, RSA heads:

    plain head   softmax(Q K' / sqrt(d) + mask) V
    RSA head     [(1 - gate) * softmax(Q K' / sqrt(d) + mask) + gate * P] V

With `attentive_steps` the keys and values of the first block also feed the steps of attentive_recurrence.py.

Sources: Vaswani et al. 2017, "Attention Is All You Need", section 3.2; Huang et al. 2023, "Encoding Recurrence into
Transformers" (ICLR 2023), section 3.
"""

# B batch, T positions of this call, L positions with the past, D hidden size, H heads, d head size

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attentive_recurrence import AttentiveFusion, AttentiveRecurrence, AttentiveSlots
from .configuration_rtransformer import RTransformerConfig
from .engines import PagedAttentionCache, paged_distances, paged_update
from .head_shard import HeadShard
from .memory import keys_at_hand, segment_ids_of_keys
from .positions import SequenceInfo
from .recurrence_encoding import RecurrenceEncoding
from .relative_positions import POSITION_BIASES, by_distance, by_distance_at_the_end
from .structured_linear import make_linear


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
    weights = F.softmax(weights, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Heads(NamedTuple):
    """
    What the heads made of T new positions.

    Args:
        output (`(B, T, H, d)`): of all heads.
        weights (`(B, H, T, L)`, *optional*): what multiplied the values.
        keys, values (`(B, H, L, d)`): those at hand, of the past and of the new positions.
        first_row: the row of the first new position among them.
        attend: `attend(query, attention_mask=mask)`: the output and weights of further queries to these keys.
    """

    output: torch.Tensor
    weights: torch.Tensor | None
    keys: torch.Tensor
    values: torch.Tensor
    first_row: int | torch.Tensor
    attend: Callable


def unit_length(vectors: torch.Tensor) -> torch.Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dimension."""
    return (vectors * torch.rsqrt(vectors.square().sum(-1, keepdim=True) + 1e-6)).to(vectors.dtype)


class RTransformerAttention(nn.Module):
    """The attention mixer of a block: multi-head attention whose heads are plain or RSA heads."""

    def __init__(self, config: RTransformerConfig, layer_idx: int, index: int = 0):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = 1.0 if config.normalize_keys else config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = config.is_causal
        size, bias = config.hidden_size, config.attention_bias
        self.q_proj = make_linear(config, "attention", size, size, bias)
        self.k_proj = make_linear(config, "attention", size, size, bias)
        self.v_proj = make_linear(config, "attention", size, size, bias)
        self.o_proj = self.make_output(config)
        self.recurrence = self.make_recurrence(config, layer_idx)
        position_bias = POSITION_BIASES.get(config.position_embedding)
        self.position_bias = None if position_bias is None else position_bias(config)
        self.scale = HeadScale(config) if config.normalize_keys else None
        self.attentive_recurrence = self.attentive_fusion = None
        if config.attentive_steps and layer_idx == 0:
            made_by = AttentiveSlots if config.attentive_form == "slots" else AttentiveRecurrence
            self.attentive_recurrence = made_by(config)
        if layer_idx in config.layers_with_attentive_states:
            self.attentive_fusion = AttentiveFusion(config)

    @staticmethod
    def make_output(config: RTransformerConfig) -> nn.Module:
        """The projection of the heads to the hidden size."""
        return make_linear(config, "attention", config.hidden_size, config.hidden_size, config.attention_bias)

    @staticmethod
    def make_recurrence(config: RTransformerConfig, layer_idx: int) -> nn.Module | None:
        """The REMs of a block with their gate, or None for plain heads alone. A variant of RSA overrides this."""
        rem_heads = config.layer_rem_heads(layer_idx)
        if not rem_heads:
            return None
        window = config.memory_length if config.memory_mask == "window" else None
        return RecurrenceEncoding(
            rem_heads, config.num_attention_heads, gate=config.rem_gate, is_causal=config.is_causal, window=window
        )

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, T, D)
        sequence: SequenceInfo,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, ...]:
        """
        Returns the output `(B, T, D)` and, from an implementation that has them, the weights `(B, H, T, L)` that
        multiply the values: for an RSA head gate, softmax and REM together. The first block returns a third item, the
        attentive states `(B, T or S, D)`, in a model that has them.
        """
        heads = self.attend(hidden_states, sequence, cache, **kwargs)
        output, states = self.o_proj(heads.output.flatten(2)), sequence.attentive_states
        if self.attentive_recurrence is not None:
            mask = self.attentive_recurrence.mask(sequence.attention_mask)
            states = self.attentive_recurrence(hidden_states, lambda query: heads.attend(query, attention_mask=mask)[0])
        if self.attentive_fusion is not None:
            output = self.attentive_fusion(output, states, hidden_states)
        return (output, heads.weights) if self.attentive_recurrence is None else (output, heads.weights, states)

    def attend(
        self,
        hidden_states: torch.Tensor,  # (B, T, D)
        sequence: SequenceInfo,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Heads:
        """The heads before the output projection."""
        input_shape = hidden_states.shape[:-1]
        query, key, value = (
            proj(hidden_states).view(*input_shape, -1, self.head_dim).transpose(1, 2)  # (B, H, T, d)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.scale is not None:
            query, key = self.scale(unit_length(query)), unit_length(key)
        if self.recurrence is not None and sequence.padding_mask is not None:
            value = value * sequence.padding_mask[:, None, :, None].to(value.dtype)
        positions, implementation = None, self.config._attn_implementation
        first_row = 0
        keys, values = key, value
        if isinstance(cache, PagedAttentionCache):  # the requests of continuous batching, in one row
            implementation = implementation.removeprefix("paged|")  # that one would want the cache itself in 5.23
            keys, values = paged_update(cache, key, value, self.layer_idx, kwargs)
            if self.recurrence is not None:
                positions = paged_distances(kwargs, sequence.position_ids, values.shape[2])
        elif cache is not None:
            # Read before `update`, which may increase the length in place.
            length, first_row = keys_at_hand(cache, self.layer_idx, input_shape[1])
            if not isinstance(first_row, int) or first_row > 0:
                positions = first_row + torch.arange(input_shape[1], device=hidden_states.device)
            keys, values = cache.update(key, value, self.layer_idx)
            if keys.shape[2] > length:  # Transformers 5.17 returns more where tokens may be taken back
                keys, values = keys[:, :, -length:], values[:, :, -length:]
        attention_mask = sequence.attention_mask
        if self.position_bias is not None:
            query, attention_mask = self._add_distances(query, sequence, first_row, keys.shape[2])

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        attend = partial(
            attention_interface,
            self,
            key=keys,
            value=values,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            position_ids=sequence.position_ids,
            **kwargs,
        )
        output, weights = attend(query, attention_mask=attention_mask)  # (B, T, H, d), (B, H, T, L) or None
        if not self.config.see_own_position:
            output, weights = without_empty_rows(output, weights, sequence.attention_mask)
        if self.recurrence is not None:
            shard = HeadShard.of(next(self.v_proj.parameters()), value.shape[1], self.config.num_attention_heads)
            # without a past the queries are all keys, although a static cache returns room for more
            rem_values = value if positions is None and weights is None else values
            ids = segment_ids_of_keys(sequence.segment_ids, first_row, input_shape[1], rem_values.shape[2])
            if weights is not None:  # the definition, from the matrix
                weights = self.recurrence.mixing_matrix(weights, positions, ids, shard)
                output = (weights @ values).transpose(1, 2)
            else:
                output = self.recurrence(output, rem_values, positions, ids, shard)
        return Heads(output, weights, keys, values, first_row, attend)

    def _add_distances(
        self, query: torch.Tensor, sequence: SequenceInfo, first_row: int | torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The queries that meet the keys, and the mask `(B, H, T, length)` with the scores of the distances in it."""
        queries = query.shape[2]
        distances = length
        if self.config.memory_length is not None and self.config.memory_mask == "window":
            distances = min(length, self.config.memory_length + 1)
        query, scores = self.position_bias(query, sequence.relative, distances)
        if isinstance(first_row, int) and first_row + queries == length:
            scores = by_distance_at_the_end(scores, length)
        else:
            scores = by_distance(scores, first_row + torch.arange(queries, device=query.device), length)
        if self.config.position_embedding == "relative":
            scores = scores * self.scaling
        elif self.scale is not None:
            scores = self.scale(scores)
        mask = sequence.attention_mask
        if mask.dtype == torch.bool:
            return query, scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return query, scores + mask


class HeadScale(nn.Module):
    """|s_h|, one learned factor per head, 1 at the start: what the scores of vectors of unit length are times."""

    def __init__(self, config: RTransformerConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_attention_heads))

    def init_parameters(self) -> None:
        """1"""
        init.ones_(self.weight)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """`(B, H, ., .)` times the factor of each head."""
        return vectors * self.weight.abs()[:, None, None].to(vectors.dtype)


def without_empty_rows(
    output: torch.Tensor, weights: torch.Tensor | None, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Zeros `(B, T, H, d)` for queries that see no key: a softmax over hidden keys alone would see all of them."""
    seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask > torch.finfo(output.dtype).min / 2
    sees_any = seen.any(-1, keepdim=True).to(output.dtype)  # (B, 1, T, 1)
    return output * sees_any.transpose(1, 2), None if weights is None else weights * sees_any
