# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
What a distance i - j between a query and a key adds to the attention scores.

    Transformer-XL   score_ij = [(q_i + u) . k_j + (q_i + v) . (W_r R_{i-j})] / sqrt(d)
    T5               score_ij = q_i . k_j / sqrt(d) + table[bucket(i - j)]

R_n is a sinusoid of the distance n. u and v belong to all layers, W_r and the table to one layer. A distance is counted
when a query meets a key, so that keys can be cached without a position.

Sources: Dai et al. 2019, "Transformer-XL" (arXiv 1901.02860), section 3.3 and the published code; Raffel et al. 2020,
"Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (arXiv 1910.10683), section 2.1.
"""

# B batch, H heads, T queries, L keys, N distances, D hidden size, d head size

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .configuration_rtransformer import RTransformerConfig


T5_BUCKETS = 32
T5_LARGEST_DISTANCE = 128


class RelativePositions(NamedTuple):
    """What the layers share: R of the distances 0 to N - 1, `(N, D)`, after dropout, and u and v, both `(H, d)`."""

    embeddings: torch.Tensor
    content_bias: torch.Tensor
    position_bias: torch.Tensor


def relative_sinusoids(distances: torch.Tensor, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
    """R `(N, D)` of distances `(N,)`: sin(n w_m) for m = 0 .. D / 2 - 1, then cos(n w_m), w_m = 10000^(-2 m / D)."""
    exact = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, hidden_size, 2, device=distances.device, dtype=exact) / hidden_size
    angles = distances[:, None].to(exact) * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype)


class RelativeEmbedding(nn.Module):
    """u and v of a model, and R for a call."""

    def __init__(self, config: RTransformerConfig):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.clamp_length = config.clamp_length
        self.initializer_range = config.initializer_range
        self.content_bias = nn.Parameter(torch.empty(config.num_attention_heads, config.head_dim))
        self.position_bias = nn.Parameter(torch.empty(config.num_attention_heads, config.head_dim))
        self.dropout = nn.Dropout(config.embedding_dropout)

    def init_parameters(self) -> None:
        """normal(0, `initializer_range`)"""
        init.normal_(self.content_bias, 0.0, self.initializer_range)
        init.normal_(self.position_bias, 0.0, self.initializer_range)

    def forward(self, length: int) -> RelativePositions:
        """R of the distances 0 to `length` - 1; those above `clamp_length` have that of `clamp_length`."""
        distances = torch.arange(length, device=self.content_bias.device)
        if self.clamp_length is not None:
            distances = distances.clamp(max=self.clamp_length)
        embeddings = relative_sinusoids(distances, self.hidden_size, self.content_bias.dtype)
        return RelativePositions(self.dropout(embeddings), self.content_bias, self.position_bias)


def by_distance(scores: torch.Tensor, rows: torch.Tensor, length: int) -> torch.Tensor:
    """
    The definition: scores `(..., T, N)` of the distances 0 to N - 1 to `(..., T, length)`, where the keys stand at 0 to
    `length` - 1 and the queries at `rows` `(T,)`. A distance that is not among the N has one of the others: it must be
    hidden by the mask.
    """
    distances = rows[:, None] - torch.arange(length, device=rows.device)
    index = distances.clamp(0, scores.shape[-1] - 1)
    return scores.gather(-1, index.expand(*scores.shape[:-1], length))


def by_distance_at_the_end(scores: torch.Tensor, length: int) -> torch.Tensor:
    """
    [`by_distance`] for queries that stand at the last T of `length` keys, without an index. In a matrix whose rows are
    one longer than the result's, flattened, each row of distances lies one further to the right than the row before.
    """
    queries, distances = scores.shape[-2:]
    width = distances - 1 + queries
    shifted = F.pad(scores.flip(-1), (0, queries)).flatten(-2)[..., : queries * width]
    first = length - width  # the key at which the first query's band begins; below 0 where it begins before the keys
    return F.pad(shifted.unflatten(-1, (queries, width)), (first, 0))


def t5_buckets(length: int, device: torch.device) -> torch.Tensor:
    """The buckets of the distances 0 to `length` - 1: exact below 16, then logarithmic, the last from 128 on."""
    exact = T5_BUCKETS // 2
    distances = torch.arange(length, device=device)
    steps = torch.log(distances.clamp(min=exact).double() / exact) / math.log(T5_LARGEST_DISTANCE / exact)
    coarse = (exact + (steps * (T5_BUCKETS - exact)).long()).clamp(max=T5_BUCKETS - 1)
    return torch.where(distances < exact, distances, coarse)


class RelativeBias(nn.Module):
    """W_r of a layer: what the distances add to its scores as in Transformer-XL, before the division by sqrt(d)."""

    def __init__(self, config: RTransformerConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, query: torch.Tensor, shared: RelativePositions, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            query (`(B, H, T, d)`): q.
            length: N, the distances that are asked for, at most those of `shared`.

        Returns:
            q + u `(B, H, T, d)`, and (q + v) . (W_r R_n) `(B, H, T, N)`.
        """
        embeddings = shared.embeddings[:length].to(query.dtype)
        content, position = (bias[:, None].to(query.dtype) for bias in (shared.content_bias, shared.position_bias))
        if query.shape[0] * query.shape[2] * query.shape[1] < self.proj.in_features:  # few queries: W_r goes to them
            weight = self.proj.weight.view(-1, self.head_dim, self.proj.in_features)  # (H, d, D)
            return query + content, ((query + position) @ weight) @ embeddings.T
        keys = self.proj(embeddings).view(embeddings.shape[0], -1, self.head_dim).permute(1, 2, 0)  # (H, d, N)
        return query + content, (query + position) @ keys


class T5Bias(nn.Module):
    """The table of a layer, `(32, H)`: what the buckets of distances add to its scores as in T5."""

    def __init__(self, config: RTransformerConfig):
        super().__init__()
        self.table = nn.Embedding(T5_BUCKETS, config.num_attention_heads)

    def forward(self, query: torch.Tensor, shared: None, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """q as it is, and the table's numbers of the distances 0 to `length` - 1, `(1, H, T, length)`."""
        numbers = self.table(t5_buckets(length, query.device)).T.to(query.dtype)  # (H, N)
        return query, numbers[None, :, None].expand(1, -1, query.shape[2], -1)


POSITION_BIASES = {"relative": RelativeBias, "t5": T5Bias}
