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
from transformers.utils.import_utils import is_tracing

from .relative_positions import RelativePositions


class SequenceInfo(NamedTuple):
    """
    What a mixer must know of the T positions that it is given.

    Args:
        attention_mask: as the attention implementation takes it: `(B, 1, T, L)`, a `BlockMask`, or None for no mask.
        padding_mask (`(B, T)`): 0 where padded; None where nothing is.
        segment_ids (`(B, n)`):
            equal ids mark the positions of one packed sequence. They are those of the last n positions, the T new ones
            last; n is T without a cache. None where rows are not packed.
        position_ids (`(B or 1, T)`): the place of each position in its sequence.
        relative: what the layers share of relative positions; None where there are none.
        key_mask (`(B, past + T)`): as `padding_mask`, of all positions; only for block-recurrent mixers.
        attentive_states (`(B, T or slots, D)`): from the first block, for others (attentive_recurrence.py), or None.
    """

    attention_mask: torch.Tensor | None = None
    padding_mask: torch.Tensor | None = None
    segment_ids: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    relative: RelativePositions | None = None
    key_mask: torch.Tensor | None = None
    attentive_states: torch.Tensor | None = None


def sinusoidal_positions(position_ids: torch.Tensor, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
    """
    The position embeddings of Vaswani et al. 2017, section 3.5: `(B, L, D)` from `(B, L)`.

    PE[p, 2 i] = sin(p / 10000^(2 i / D)) and PE[p, 2 i + 1] = cos of the same.
    """
    exact = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, hidden_size, 2, device=position_ids.device, dtype=exact) / hidden_size
    angles = position_ids[..., None].to(exact) * torch.exp(-math.log(10000.0) * exponents)  # (B, L, D / 2)
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


def sequences_of_mask(
    attention_mask: torch.Tensor, past_length: int, is_causal: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """
    The padding and the packed sequences that a 4D attention mask describes, for layers that read the order of tokens,
    which a mask does not say.

    Args:
        attention_mask (`(B, 1, T, L)` or `(B, H, T, L)`):
            bool, True for the keys that a query sees; or added to the scores, below -10,000 for the keys that it does
            not see, which is zero after the softmax.
        past_length: keys before those of the T queries.
        is_causal: a query sees the keys up to its own, or all of its sequence.

    Returns:
        `padding_mask` `(B, T)`, bool, and `segment_ids` `(B, T)`, each None where it would say nothing.

    Raises:
        ValueError: a mask of another kind, such as a window, or branches that continue one beginning.
    """
    visible = attention_mask
    if visible.dtype != torch.bool:
        visible = visible > -1e4 if visible.is_floating_point() else visible != 0
    heads_agree = (visible == visible[:, :1]).all()
    visible = visible[:, 0]  # (B, T, L)
    length = visible.shape[1]
    past, own, beyond = visible.split([past_length, length, visible.shape[2] - past_length - length], dim=2)
    sees_itself = own.diagonal(dim1=1, dim2=2)
    # A padded query sees nothing or, in a mask that was made for a softmax, everything; nobody reads what it gives.
    real = sees_itself & own.triu(1).any(2).logical_not() if is_causal else sees_itself
    begins = F.pad(own.diagonal(-1, dim1=1, dim2=2).logical_not(), (1, 0), value=True)
    segment_ids = begins.cumsum(1)
    expected = (segment_ids[:, :, None] == segment_ids[:, None, :]) & real[:, None, :]
    if is_causal:
        expected = expected.tril()
    fits = ((own == expected).all(2) & beyond.any(2).logical_not()) | real.logical_not()
    is_packed = ((segment_ids != segment_ids.max(1, keepdim=True).values) & real).any()
    if past_length:  # the sequence goes on: all see the same of the past, which is padded on the left at most
        last = past[:, -1:]
        in_order = (past[..., 1:] >= past[..., :-1]).all(2)
        fits &= ((past == last).all(2) & in_order & is_packed.logical_not()) | real.logical_not()
    if not (fits.all() & heads_agree):
        raise ValueError(
            "`attention_mask` of four dimensions must describe padding and packed sequences alone (in each of them "
            "every token sees all tokens before it, and with a past there is one) in a model with LocalRNN windows or "
            "REMs, which read the order of the tokens; windows and branches cannot be read from a mask"
        )
    padding_mask = None if real.all() else real
    return padding_mask, segment_ids if is_packed else None


def same_segment(segment_ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Which keys are of a query's segment: `(B, 1, T, L)`, from ids `(B, L)` and the queries' rows, all L if None."""
    of_queries = segment_ids if positions is None else segment_ids[:, positions]
    return of_queries[:, None, :, None] == segment_ids[:, None, None, :]


def padding_of_call(attention_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """
    The last `length` columns of a 2D attention mask, those of a call: `(B, T)`; None if nothing is padded, or for
    another kind of mask. Transformers' `create_recurrent_attention_mask` takes a single position for a real one, which
    it is not where a padded prompt is given in pieces.
    """
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    mask = attention_mask[:, -length:]
    return mask.contiguous() if is_tracing(mask) or not bool((mask != 0).all()) else None


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
