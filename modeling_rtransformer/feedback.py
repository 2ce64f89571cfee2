# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
The layers of a Feedback Transformer and its memory.

At each position t the layers run one after the other, and attend to the memories of the positions before t alone:

    h = embedding of t
    for l = 1..L:   h = h + LocalRNN_l(norm(h))                     for each LocalRNN
                    h = h + Attention_l(norm(h); k_<t, v_<t)        queries from h
                    h = h + FeedForward_l(norm(h)),   h_t^l = h
    m_t = sum over l = 0..L of softmax(w)_l h_t^l                   h_t^0 is the embedding
    k_t, v_t = W_k norm(m_t), W_v norm(m_t)                         for all layers, or for each layer

A head may be an RSA head. With the distance s >= 1 from the query to a memory it is

    [(1 - gate) softmax(q k' / sqrt(d)) + gate P_s] v

where P is cut to the memories that the position sees. Where a position sees none, the attention sublayer is left out.

Sources: Fan et al. 2020, "Addressing Some Limitations of Transformers with Feedback Memory" (arXiv 2002.09402), section
3; Huang et al. 2023, "Encoding Recurrence into Transformers" (ICLR 2023), section 3.
"""

# B batch, T queries, S memories, D hidden size, H heads, d head size, L layers, M memories that are seen, K window

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention import RTransformerAttention, eager_attention_forward
from .block import RTransformerMLP, make_layer_norm
from .configuration_feedback import FeedbackTransformerConfig
from .local_rnn import LocalRNN
from .recurrence_encoding import RemHeads


class Visible(NamedTuple):
    """
    Which memories the queries see, the same in all layers.

    Args:
        distance (`(T, S)`): positions from a query back to a memory.
        mask (`(B or 1, 1, T, S)`, bool, *optional*): which memories a query sees; all of them if None.
    """

    distance: torch.Tensor
    mask: torch.Tensor | None = None


class DistanceScores(nn.Module):
    """
    A learned score of the distance s between query and memory, beside q k':

        shared   q r_s                                  r (d, M), one for all layers and heads
        layer    q r_s + b_s,  and q + u in place of q in q k'         r (H, d, M), b (H, M) and u (H, d), of one layer

    Sources: the authors' code (facebookresearch/transformer-sequential) and labml's, in this order.
    """

    def __init__(self, config: FeedbackTransformerConfig):
        super().__init__()
        heads, window = config.num_attention_heads, config.feedback_window
        self.initializer_range = config.initializer_range
        if config.feedback_positions == "shared":
            self.keys = nn.Parameter(torch.empty(config.head_dim, window))
            self.query_bias = self.bias = None
        else:
            self.keys = nn.Parameter(torch.empty(heads, config.head_dim, window))
            self.query_bias = nn.Parameter(torch.empty(heads, config.head_dim))
            self.bias = nn.Parameter(torch.empty(heads, window))

    def init_parameters(self) -> None:
        """Vectors normal(0, `initializer_range`), biases 0."""
        init.normal_(self.keys, std=self.initializer_range)
        if self.bias is not None:
            init.zeros_(self.query_bias)
            init.zeros_(self.bias)

    def forward(self, query: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
        """`(B, H, T, S)` from the queries `(B, H, T, d)` and the distances `(T, S)`; any number beyond 1 to M."""
        scores = query @ self.keys  # (B, H, T, M)
        if self.bias is not None:
            scores = scores + self.bias[:, None]
        index = (distance - 1).clamp(0, scores.shape[-1] - 1)
        return scores.gather(-1, index.expand(*scores.shape[:2], *index.shape))


class FeedbackAttention(nn.Module):
    """Multi-head attention of positions to memories; heads are plain or RSA heads."""

    def __init__(self, config: FeedbackTransformerConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False  # what is seen is always said by a mask
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        if not config.feedback_shared_kv:
            self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
            self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.recurrence = RTransformerAttention.make_recurrence(config, layer_idx)
        self.positions = DistanceScores(config) if config.feedback_positions == "layer" else None

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
        visible: Visible,
        positions: DistanceScores | None = None,
        rem: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            positions: scores of the distance that all layers share.
            rem: [`rem_by_distance`], for at least the largest distance.

        Returns:
            The output `(B, T, D)` and, from an implementation that has them, the weights `(B, H, T, S)` that multiply
            the values.
        """
        batch, length = hidden_states.shape[:2]
        query = self.q_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)  # (B, H, T, d)
        mask, sees_any = None, None
        if visible.mask is not None:
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


class FeedbackLocalRNN(nn.Module):
    """A LocalRNN over the inputs of one layer; what it has read is handed in, as `(B, K - 1, D + 1)`."""

    def __init__(self, config: FeedbackTransformerConfig):
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


class FeedbackLayer(nn.Module):
    """The LocalRNNs, the attention to memories and the feed-forward sublayer, each behind a LayerNorm."""

    def __init__(self, config: FeedbackTransformerConfig, layer_idx: int):
        super().__init__()
        self.local_rnns = nn.ModuleList(FeedbackLocalRNN(config) for _ in range(config.num_local_rnns))
        self.local_rnn_norms = nn.ModuleList(make_layer_norm(config) for _ in range(config.num_local_rnns))
        self.self_attn = FeedbackAttention(config, layer_idx)
        self.self_attn_norm = make_layer_norm(config)
        self.mlp = RTransformerMLP(config)
        self.mlp_norm = make_layer_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, T, D)
        keys: torch.Tensor | None,  # (B, H, S, d); None where there is no memory
        values: torch.Tensor | None,
        visible: Visible,
        before: Sequence[torch.Tensor] = (),
        present: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
        """
        Args:
            before: for each LocalRNN what it read before.
            present (`(B, T)`, *optional*): 0 where padded.
            segment_ids (`(B, T)`, *optional*): packed sequences, for the LocalRNNs.

        Returns:
            The output `(B, T, D)`, the attention weights or None, and for each LocalRNN its inputs `(B, T, D + 1)`.
        """
        inputs = []
        for norm, local_rnn, window in zip(self.local_rnn_norms, self.local_rnns, before):
            inputs.append(local_rnn.inputs(norm(hidden_states), present))
            hidden_states = hidden_states + self.dropout(local_rnn(window, inputs[-1], segment_ids))
        weights = None
        if keys is not None:
            update, weights = self.self_attn(self.self_attn_norm(hidden_states), keys, values, visible, **kwargs)
            hidden_states = hidden_states + self.dropout(update)
        hidden_states = hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))
        return hidden_states, weights, inputs


class FeedbackMemory(nn.Module):
    """What all layers remember of a position: the weighted sum of the layers, and the keys and values made of it."""

    def __init__(self, config: FeedbackTransformerConfig):
        super().__init__()
        self.layer_weights = nn.Parameter(torch.empty(config.num_hidden_layers + 1))
        if config.feedback_shared_kv:
            self.norm = make_layer_norm(config) if config.feedback_norm else nn.Identity()
            self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
            self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def init_parameters(self) -> None:
        """0: the mean of the embedding and all layers."""
        init.zeros_(self.layer_weights)

    def forward(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """The memories `(B, T, D)`, from the embedding and the output of each layer that ran, each `(B, T, D)`."""
        weights = self.layer_weights[: len(states)].softmax(0, dtype=torch.promote_types(states[0].dtype, torch.float))
        return torch.stack(list(states), dim=-1) @ weights.to(states[0].dtype)
