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

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attentive_recurrence import AttentiveFusion, AttentiveRecurrence, AttentiveSlots
from .configuration_rtransformer import RTransformerConfig
from .engines import PagedAttentionCache, paged_distances, paged_update
from .head_shard import HeadShard
from .positions import SequenceInfo
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


class RTransformerAttention(nn.Module):
    """The attention mixer of a block: multi-head attention whose heads are plain or RSA heads."""

    def __init__(self, config: RTransformerConfig, layer_idx: int, index: int = 0):
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
        self.recurrence = self.make_recurrence(config, layer_idx)
        self.attentive_recurrence = self.attentive_fusion = None
        if config.attentive_steps and layer_idx == 0:
            made_by = AttentiveSlots if config.attentive_form == "slots" else AttentiveRecurrence
            self.attentive_recurrence = made_by(config)
        if layer_idx in config.layers_with_attentive_states:
            self.attentive_fusion = AttentiveFusion(config)

    @staticmethod
    def make_recurrence(config: RTransformerConfig, layer_idx: int) -> nn.Module | None:
        """The REMs of a block with their gate, or None for plain heads alone. A variant of RSA overrides this."""
        rem_heads = config.layer_rem_heads(layer_idx)
        if not rem_heads:
            return None
        return RecurrenceEncoding(
            rem_heads, config.num_attention_heads, gate=config.rem_gate, is_causal=config.is_causal
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
        input_shape = hidden_states.shape[:-1]
        query, key, value = (
            proj(hidden_states).view(*input_shape, -1, self.head_dim).transpose(1, 2)  # (B, H, T, d)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.recurrence is not None and sequence.padding_mask is not None:
            value = value * sequence.padding_mask[:, None, :, None].to(value.dtype)
        positions = None
        if isinstance(cache, PagedAttentionCache):  # the requests of continuous batching, in one row
            key, value_states = paged_update(cache, key, value, self.layer_idx, kwargs)
            if self.recurrence is not None:
                positions = paged_distances(kwargs, sequence.position_ids, value_states.shape[2])
        elif cache is not None:
            # Read before `update`, which may increase this length in place.
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
        attend = partial(
            attention_interface,
            self,
            key=key,
            value=value_states,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            position_ids=sequence.position_ids,
            **kwargs,
        )
        output, weights = attend(query, attention_mask=sequence.attention_mask)  # (B, T, H, d), (B, H, T, L) or None
        if self.recurrence is not None:
            shard = HeadShard.of(self.v_proj.weight, value.shape[1], self.config.num_attention_heads)
            if weights is not None:  # the definition, from the matrix
                weights = self.recurrence.mixing_matrix(weights, positions, sequence.segment_ids, shard)
                output = (weights @ value_states).transpose(1, 2)
            else:  # without a past the queries are all keys, although a static cache returns room for more
                values = value if positions is None else value_states
                output = self.recurrence(output, values, positions, sequence.segment_ids, shard)
        output = self.o_proj(output.reshape(*input_shape, -1))
        states = sequence.attentive_states
        if self.attentive_recurrence is not None:
            mask = self.attentive_recurrence.mask(sequence.attention_mask)
            states = self.attentive_recurrence(hidden_states, lambda query: attend(query, attention_mask=mask)[0])
        if self.attentive_fusion is not None:
            output = self.attentive_fusion(output, states, hidden_states)
        return (output, weights) if self.attentive_recurrence is None else (output, weights, states)
