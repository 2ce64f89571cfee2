# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
The layers of a Temporal Latent Bottleneck, and the places of tokens in chunks.

The positions of a sequence are read in chunks of K. N latents S carry what is needed from one chunk c to the next:

    blocks:   R times   x = x + SelfAttention(norm(x)),                x = x + FeedForward(norm(x))     in the chunk
              once      x = x + CrossAttention(norm(x); norm(S_c)),    x = x + FeedForward(norm(x))
    then                S' = S_c + CrossAttention(norm(S_c); norm(x)), S_{c+1} = S' + FeedForward(norm(S'))

A chunk that is not full changes no latents. Self-attention sees the chunk alone, so that all of the past comes through
the latents.

Source: Didolkar et al. 2022, "Temporal Latent Bottleneck" (arXiv 2205.14794), section 2; google-research/
long-range-arena, `lra_benchmarks/models/transformer_tlb`.
"""

# B batch, T positions of this call, C chunks, Q places for the tokens of a chunk, K chunk length, N latents, D hidden
# size, H heads, d head size, S keys

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .block import RTransformerMLP, make_layer_norm
from .configuration_latent_bottleneck import TemporalLatentBottleneckConfig
from .scheduled_layer import ScheduledAttention, ScheduledLayer, Visible


class ChunkPast(NamedTuple):
    """What a layer has of the chunk that goes on: keys, values `(B, H, S, d)`, LocalRNN inputs `(B, W - 1, D + 1)`."""

    keys: torch.Tensor | None
    values: torch.Tensor | None
    before: Sequence[torch.Tensor]

    def for_chunks(self, num_chunks: int) -> "ChunkPast":
        """For the rows of `(B C, Q, D)`: keys and values for each chunk, LocalRNN inputs for the first alone."""
        keys, values = (
            None if part is None else part.repeat_interleave(num_chunks, dim=0) for part in (self.keys, self.values)
        )
        before = [F.pad(window[:, None], (0, 0, 0, 0, 0, num_chunks - 1)).flatten(0, 1) for window in self.before]
        return ChunkPast(keys, values, before)

    def emptied(self) -> "ChunkPast":
        """That of a chunk that begins in this call."""
        return ChunkPast(None, None, [torch.zeros_like(window) for window in self.before])


class ChunkRead(NamedTuple):
    """What a layer adds to it: keys and values `(B, H, Q, d)`, LocalRNN inputs `(B, Q, D + 1)`."""

    keys: torch.Tensor
    values: torch.Tensor
    inputs: list[torch.Tensor]


class ChunkLayer(ScheduledLayer):
    """A self-attention layer over the tokens of a chunk."""

    def forward(
        self, hidden_states: torch.Tensor, visible: Visible, present: torch.Tensor, past: ChunkPast
    ) -> tuple[torch.Tensor, ChunkRead]:
        """
        Args:
            hidden_states (`(B, Q, D)`): the tokens, those of every chunk in a row of its own.
            visible: which of the keys, those of the past and the Q, each token sees.
            present (`(B, Q)`): where there is a token.
        """
        hidden_states, inputs = self.run_local_rnns(hidden_states, past.before, present)
        normal = self.self_attn_norm(hidden_states)
        new_keys, new_values = self.self_attn.keys_and_values(normal)
        keys, values = new_keys, new_values
        if past.keys is not None:
            keys, values = torch.cat([past.keys, keys], dim=2), torch.cat([past.values, values], dim=2)
        rem = self.self_attn.rem_by_distance(keys.shape[2])
        update, _ = self.self_attn(normal, keys, values, visible, rem=rem)
        hidden_states = self.feed_forward(hidden_states + self.dropout(update))
        return hidden_states, ChunkRead(new_keys, new_values, inputs)


class CrossLayer(nn.Module):
    """x = x + CrossAttention(norm(x); norm(context)), then x = x + FeedForward(norm(x))."""

    def __init__(self, config: TemporalLatentBottleneckConfig):
        super().__init__()
        self.query_norm = make_layer_norm(config)
        self.key_norm = make_layer_norm(config)
        self.cross_attn = ScheduledAttention(config, 0, has_rem=False)
        self.mlp = RTransformerMLP(config)
        self.mlp_norm = make_layer_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self, hidden_states: torch.Tensor, context: torch.Tensor, present: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`(B, T, D)` from `(B, T, D)` and a context `(B, S, D)`; `present` `(B, S)` is False where that is empty."""
        keys, values = self.cross_attn.keys_and_values(self.key_norm(context))
        visible = None
        if present is not None:
            visible = Visible(None, present[:, None, None].expand(-1, -1, hidden_states.shape[1], -1))
        update, _ = self.cross_attn(self.query_norm(hidden_states), keys, values, visible)
        hidden_states = hidden_states + self.dropout(update)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class ChunkPlaces(NamedTuple):
    """
    The T tokens of each row in C chunks, each with Q places. The first chunk may go on from an earlier call.

    Args:
        columns (`(B, C, Q)`): which token stands at a place.
        present (`(B, C, Q)`, bool): whether there is one.
        places (`(B, T)`): the place of each token in the chunks, as an index of C Q.
        chunks (`(B, T)`): the chunk that each token is in or, where padded, comes after.
        ends (`(B, T)`, bool): whether the chunk is full with this token.
        in_chunk (`(B, T)`): the place of each token in its whole chunk, from 0 to K - 1.
        offset (`(B,)`): tokens that the first chunk has from earlier calls.
        fresh (`(B, C)`, bool): whether a chunk begins a sequence.
        full (`(B, C)`, bool): whether a chunk has all its K tokens.
    """

    columns: torch.Tensor
    present: torch.Tensor
    places: torch.Tensor
    chunks: torch.Tensor
    ends: torch.Tensor
    in_chunk: torch.Tensor
    offset: torch.Tensor
    fresh: torch.Tensor
    full: torch.Tensor

    @classmethod
    def of(
        cls, real: torch.Tensor, past: torch.Tensor, chunk_length: int, segment_ids: torch.Tensor | None = None
    ) -> "ChunkPlaces":
        """
        Args:
            real (`(B, T)`, bool): False where padded.
            past (`(B,)`): tokens of each row in earlier calls.
            segment_ids (`(B, T)`, *optional*): packed sequences, without a past.
        """
        batch, length = real.shape
        count = real.cumsum(1)
        in_sequence = past[:, None] + count - 1
        if segment_ids is not None:
            begins = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
            in_sequence = in_sequence - torch.where(begins, count - real.long(), 0).cummax(1).values
        offset = past % chunk_length
        in_chunk = in_sequence % chunk_length
        starts = real & (in_chunk == 0)
        chunks = (starts.cumsum(1) - 1 + (offset > 0)[:, None].long()).clamp(min=0)
        num_places = min(chunk_length, length)
        at_most = length if segment_ids is not None else (length + chunk_length - 1) // chunk_length + 1
        num_chunks = 1 if length == 1 else at_most if torch.compiler.is_compiling() else int(chunks.max()) + 1
        place = in_chunk - torch.where(chunks == 0, offset[:, None], 0)
        places = chunks * num_places + place.clamp(0, num_places - 1)
        nowhere = num_chunks * num_places
        target = torch.where(real, places, nowhere)
        columns = torch.arange(length, device=real.device).expand(batch, -1)
        columns = columns.new_zeros(batch, nowhere + 1).scatter(1, target, columns)[:, :-1]
        present = torch.zeros_like(columns, dtype=torch.bool)
        present = F.pad(present, (0, 1)).scatter(1, target, real)[:, :-1]
        by_chunk = (batch, num_chunks, num_places)
        columns, present = columns.view(by_chunk), present.view(by_chunk)
        first = in_sequence.gather(1, columns[:, :, 0])  # of the first token of each chunk
        so_far = present.sum(2)
        so_far[:, 0] += offset
        fresh = present[:, :, 0] & (first == 0)
        ends = real & (in_chunk == chunk_length - 1)
        return cls(columns, present, places, chunks, ends, in_chunk, offset, fresh, so_far == chunk_length)

    def spread(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(B, C, Q, D)` from `(B, T, D)`; a place without a token has another one's values."""
        flat = self.columns.flatten(1)[..., None].expand(-1, -1, tokens.shape[-1])
        return tokens.gather(1, flat).view(*self.columns.shape, -1)

    def collect(self, chunks: torch.Tensor) -> torch.Tensor:
        """`(B, T, D)` from `(B, C, Q, D)`; a padded token has another one's values."""
        flat = chunks.flatten(1, 2)
        return flat.gather(1, self.places[..., None].expand(-1, -1, flat.shape[-1]))
