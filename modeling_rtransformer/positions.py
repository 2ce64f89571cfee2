# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
The positions of a batch: the packed sequence of each, its place in that sequence, and the sinusoids of the place.
"""

# B batch, T positions of this call, L positions with the past, D hidden size

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers.masking_utils import find_packed_sequence_indices


class SequenceInfo(NamedTuple):
    """
    What a mixer must know of the T positions that it is given.

    Args:
        attention_mask: as the attention implementation takes it: `(B, 1, T, L)`, a `BlockMask`, or None for no mask.
        padding_mask (`(B, T)`): 0 where padded; None where nothing is.
        segment_ids (`(B, T)`): equal ids mark the positions of one packed sequence; None where rows are not packed.
        position_ids (`(B or 1, T)`): the place of each position in its sequence.
    """

    attention_mask: torch.Tensor | None = None
    padding_mask: torch.Tensor | None = None
    segment_ids: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None


def sinusoidal_positions(position_ids: torch.Tensor, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
    """
    The position embeddings of Vaswani et al. 2017, section 3.5: `(B, L, D)` from `(B, L)`.

    PE[p, 2 i] = sin(p / 10000^(2 i / D)) and PE[p, 2 i + 1] = cos of the same.
    """
    exponents = torch.arange(0, hidden_size, 2, device=position_ids.device, dtype=torch.float32) / hidden_size
    angles = position_ids[..., None].float() * torch.exp(-math.log(10000.0) * exponents)  # (B, L, D / 2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2).to(dtype)


def packed_segment_ids(
    batch: int,
    length: int,
    *,
    position_ids: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu_seq_lens: torch.Tensor | None,
) -> torch.Tensor | None:
    """
    Which sequence each position belongs to, when several are packed in a row: `(B, L)` with equal ids for the positions
    of one sequence, or None if every row is one sequence. Any one of the three descriptions is enough.

    Args:
        position_ids (`(B or 1, L)`, *optional*): a position that is not its predecessor plus one begins a sequence.
        seq_idx (`(B or 1, L)`, *optional*): the ids themselves.
        cu_seq_lens (`(sequences + 1,)`, *optional*): the first position of each sequence in the one row; last, L.
    """
    if seq_idx is not None:
        return seq_idx.expand(batch, -1)
    if cu_seq_lens is not None:
        if batch != 1:
            raise ValueError(f"`cu_seq_lens_q` describes a batch of one packed row, got {batch} rows")
        positions = torch.arange(length, device=cu_seq_lens.device, dtype=cu_seq_lens.dtype)
        return torch.searchsorted(cu_seq_lens[1:].contiguous(), positions, right=True)[None]
    if position_ids is not None:
        return find_packed_sequence_indices(position_ids.expand(batch, -1))
    return None


def positions_in_sequence(
    length: int,
    *,
    attention_mask: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    past_length: int | torch.Tensor,
    device: torch.device,
) -> torch.Tensor:
    """
    Positions `(B or 1, T)` that start at 0 in each sequence: after the padding, and after each packed boundary.

    Args:
        length: T.
        attention_mask (`(B, L)`, *optional*): 0 where padded.
        segment_ids (`(B, T)`, *optional*): from [`packed_segment_ids`].
        past_length: L - T, where nothing is padded.
    """
    positions = torch.arange(length, device=device)
    if segment_ids is not None:
        begins = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
        return positions - torch.where(begins, positions, 0).cummax(dim=1).values
    if attention_mask is not None:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    return (positions + past_length)[None]
