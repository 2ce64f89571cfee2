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

Where a position sees no memory, the attention sublayer is left out.

Source: Fan et al. 2020, "Addressing Some Limitations of Transformers with Feedback Memory" (arXiv 2002.09402), section
3.
"""

# B batch, T queries, S memories, D hidden size, H heads, d head size, L layers, M memories that are seen

from collections.abc import Sequence

import torch
from torch import nn
from transformers import initialization as init

from .block import make_layer_norm
from .configuration_feedback import FeedbackTransformerConfig
from .scheduled_layer import ScheduledAttention, ScheduledLayer, Visible


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


class FeedbackLayer(ScheduledLayer):
    """A layer that attends to memories, whose keys and values it makes, or the [`FeedbackMemory`] for all layers."""

    @staticmethod
    def make_attention(config: FeedbackTransformerConfig, layer_idx: int) -> ScheduledAttention:
        scores = DistanceScores(config) if config.feedback_positions == "layer" else None
        return ScheduledAttention(config, layer_idx, has_keys=not config.feedback_shared_kv, scores=scores)

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
            before, present, segment_ids: of the LocalRNNs, as in [`ScheduledLayer.run_local_rnns`].
            kwargs: `positions` and `rem` of [`ScheduledAttention`].

        Returns:
            The output `(B, T, D)`, the attention weights or None, and for each LocalRNN its inputs `(B, T, D + 1)`.
        """
        hidden_states, inputs = self.run_local_rnns(hidden_states, before, present, segment_ids)
        weights = None
        if keys is not None:
            update, weights = self.self_attn(self.self_attn_norm(hidden_states), keys, values, visible, **kwargs)
            hidden_states = hidden_states + self.dropout(update)
        return self.feed_forward(hidden_states), weights, inputs


class FeedbackMemory(nn.Module):
    """What all layers remember of a position: the weighted sum of the layers, and the keys and values made of it."""

    def __init__(self, config: FeedbackTransformerConfig):
        super().__init__()
        self.layer_weights = nn.Parameter(torch.empty(config.num_hidden_layers + 1))
        self.head_dim = config.head_dim
        if config.feedback_shared_kv:
            self.norm = make_layer_norm(config) if config.feedback_norm else nn.Identity()
            self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
            self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def init_parameters(self) -> None:
        """0: the mean of the embedding and all layers."""
        init.zeros_(self.layer_weights)

    def keys_and_values(self, memories: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, H, T, d)` each, for all layers, from memories `(B, T, D)`."""
        normal = self.norm(memories)
        shape = (*memories.shape[:2], -1, self.head_dim)
        return self.k_proj(normal).view(shape).transpose(1, 2), self.v_proj(normal).view(shape).transpose(1, 2)

    def forward(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """The memories `(B, T, D)`, from the embedding and the output of each layer that ran, each `(B, T, D)`."""
        weights = self.layer_weights[: len(states)].softmax(0, dtype=torch.promote_types(states[0].dtype, torch.float))
        return torch.stack(list(states), dim=-1) @ weights.to(states[0].dtype)
