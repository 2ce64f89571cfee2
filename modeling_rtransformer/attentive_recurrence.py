# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
The Attentive Recurrent Network (ARN): an RNN of few steps, each of which chooses its input by attention.

    h_0[t] = x[t] or 0
    h_k[t] = f(h_{k-1}[t], c_k[t]),   c_k[t] = Attention(query h_{k-1}[t], keys and values of x)     for k = 1..S
    R[t]   = h_S[t]

The steps of all positions t run side by side, as those of a LocalRNN do: a LocalRNN reads inputs by their place, an ARN
by their content. A causal model has keys up to t alone. Keys and values are those of the first block's attention, with
its mask, so that padding, packed sequences and the cache need nothing of their own: decoding keeps no state.

Few blocks read R, by default the last alone (the paper's short-cut). Beside its attention's output a, a block has
b = W R + bias, and adds to the residual stream

    gated_sum   g a + (1 - g) b,   g = sigmoid(W_g [a; b] + bias_g)
    add         a + b

In a bidirectional model `attentive_form` "slots" is the form of an encoder: two such networks, each with one state for
the whole sequence, take S steps from 0. The S slots are the states of both side by side,

    slot_k = W [ahead_k; back_(S+1-k)] + bias,   and b[t] = Attention(query x[t], keys and values of the slots)

Source: Hao et al. 2019, "Modeling Recurrence for Transformer" (NAACL 2019, arXiv 1904.03092), an encoder of translation
without published code; a state for each position, `attentive_form` "positions", is our causal form of it.
"""

# B batch, T positions of this call, D hidden size, H heads, d head size, S steps, G gates

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .configuration_rtransformer import RTransformerConfig
from .local_rnn import GateProjection
from .local_rnn_steps import NUM_GATES, gru_step, lstm_step


class AttentiveRecurrence(nn.Module):
    """
    The S steps. The cell f has the parameters of `torch.nn`'s GRU, LSTM or tanh RNN cell: `input_proj` (W_x, b_x) and
    `recurrent_proj` (W_h, b_h), D -> G D. An LSTM's cell state starts at zero.
    """

    def __init__(self, config: RTransformerConfig):
        super().__init__()
        size = config.hidden_size
        self.num_steps = config.attentive_steps
        self.rnn_type = config.attentive_rnn_type
        self.starts_at_input = config.attentive_start == "input"
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(size, size)
        self.o_proj = nn.Linear(size, size)
        self.input_proj = GateProjection(size, NUM_GATES[self.rnn_type] * size)
        self.recurrent_proj = GateProjection(size, NUM_GATES[self.rnn_type] * size)

    @staticmethod
    def mask(attention_mask: Any) -> Any:
        """The mask with which `attend` runs, from that of the first block's attention."""
        return attention_mask

    def forward(self, inputs: torch.Tensor, attend: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """
        Args:
            inputs (`(B, T, D)`): x, which the keys and values are made of.
            attend: `(B, H, T, d)` -> `(B, T, H, d)`, the attention of queries to the keys and values of x.

        Returns:
            R `(B, T, D)`.
        """
        start = inputs if self.starts_at_input else torch.zeros_like(inputs)
        *_, last = self.states(start, attend)
        return last

    def states(self, start: torch.Tensor, attend: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[torch.Tensor]:
        """h_1 to h_S, each `(B, T, D)`, from h_0."""
        hidden, cell = start, None
        for _ in range(self.num_steps):
            query = self.q_proj(hidden).view(*hidden.shape[:-1], -1, self.head_dim).transpose(1, 2)  # (B, H, T, d)
            projected = self.input_proj(self.o_proj(attend(query).flatten(-2)))  # (B, T, G D)
            recurrent = self.recurrent_proj(hidden)
            if self.rnn_type == "gru":
                hidden = gru_step(projected, recurrent, hidden.to(projected.dtype))
            elif self.rnn_type == "lstm":
                hidden, cell = lstm_step(projected, recurrent, cell)
            else:
                hidden = torch.tanh(projected + recurrent)
            yield hidden


class AttentiveSlots(nn.Module):
    """The slots `(B, S, D)` of a whole sequence, from two recurrences."""

    def __init__(self, config: RTransformerConfig):
        super().__init__()
        self.ahead = AttentiveRecurrence(config)
        self.back = AttentiveRecurrence(config)
        self.merge = nn.Linear(2 * config.hidden_size, config.hidden_size)

    @staticmethod
    def mask(attention_mask: Any) -> Any:
        """One row of the mask: those of all queries are the same, since only padding is masked."""
        if attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2):
            return attention_mask
        if not isinstance(attention_mask, torch.Tensor):
            raise ValueError(
                "`attentive_form` 'slots' needs the attention implementation eager or sdpa, since it has one query for "
                f"a row, got a mask of type {type(attention_mask).__name__}"
            )
        return attention_mask[:, :, :1]

    def forward(self, inputs: torch.Tensor, attend: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Arguments as of [`AttentiveRecurrence`], with T = 1 query a row."""
        start = torch.zeros_like(inputs[:, :1])
        ahead, back = (torch.cat(list(each.states(start, attend)), dim=1) for each in (self.ahead, self.back))
        return self.merge(torch.cat([ahead, back.flip(1)], dim=-1))


def refuse_parts_of_rows(attention_mask: Any, segment_ids: torch.Tensor | None) -> None:
    """Raise a ValueError where a row is more than one padded sequence, since slots are those of a whole row."""
    if segment_ids is not None:
        raise ValueError("`attentive_form` 'slots' needs a sequence a row, got packed sequences; take 'positions'")
    if attention_mask is not None and not (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2):
        raise ValueError(
            "`attention_mask` must be 2D, 0 where padded, with `attentive_form` 'slots', got a prepared mask; take "
            "'positions'"
        )


class SlotAttention(nn.Module):
    """Attention of all positions x `(B, T, D)` to the slots `(B, S, D)`."""

    def __init__(self, config: RTransformerConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.attention_dropout = config.attention_dropout
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(config.hidden_size, config.hidden_size))

    def forward(self, inputs: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            proj(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T or S, d)
            for proj, states in ((self.q_proj, inputs), (self.k_proj, slots), (self.v_proj, slots))
        )
        dropout = self.attention_dropout if self.training else 0.0
        output = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.o_proj(output.transpose(1, 2).flatten(-2))


class FusionGate(nn.Linear):
    """The gate of a gated sum, W_g and bias_g: of a class of its own because its bias starts at 1."""

    def init_parameters(self) -> None:
        init.ones_(self.bias)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """g a + (1 - g) b, g = sigmoid(W_g [a; b] + bias_g)"""
        gate = torch.sigmoid(super().forward(torch.cat([first, second], dim=-1)))
        return torch.lerp(second, first, gate)


class AttentiveFusion(nn.Module):
    """What a block that reads R, or the slots, adds to its residual stream in place of its attention's output a."""

    def __init__(self, config: RTransformerConfig):
        super().__init__()
        self.reads_slots = config.attentive_form == "slots"
        if self.reads_slots:
            self.slot_attention = SlotAttention(config)
        else:
            self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.gate = None
        if config.attentive_fusion == "gated_sum":
            self.gate = FusionGate(2 * config.hidden_size, config.hidden_size)

    def forward(self, attended: torch.Tensor, states: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """`(B, T, D)` from a `(B, T, D)`, R `(B, T, D)` or the slots `(B, S, D)`, and x of this block `(B, T, D)`."""
        read = self.slot_attention(inputs, states) if self.reads_slots else self.proj(states)
        return attended + read if self.gate is None else self.gate(attended, read)
