# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
What a model with `memory_length` remembers, and which keys a query sees.

The memory is the cache of Transformers: layers that keep the last keys and values of each block (and, as everywhere,
LocalRNN windows and recurrent states). Nothing is stored on a module. A key belongs to one position, and relative
positions are counted when a query meets a key, so cached keys equal cached hidden states, as Transformer-XL keeps them.

Source: Dai et al. 2019, "Transformer-XL" (arXiv 1901.02860), section 3.2.
"""

# B batch, T positions of this call, L keys at hand, n columns of the segment ids

from collections.abc import Callable

import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    and_masks,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sliding_window_overlay,
)

from .library_versions import named_cache


ATTENTION_WITH_MEMORY = ("eager", "sdpa", "flex_attention")


def keys_at_hand(cache: Cache | None, layer_idx: int, queries: int) -> tuple[int, int | torch.Tensor]:
    """
    How many keys the `queries` new positions meet, and the row of the first of them among these keys. A layer that
    drops keys counts all positions that ever came, so the row is the number of positions less those that it dropped.
    """
    if cache is None:
        return queries, 0
    length, offset = cache.get_mask_sizes(queries, layer_idx)
    return length, cache.get_seq_length(layer_idx) - offset


def segment_ids_of_keys(
    segment_ids: torch.Tensor | None, first_row: int, queries: int, length: int
) -> torch.Tensor | None:
    """The ids `(B, length)` of the keys at hand, from those of the last positions `(B, n)`; -1 beyond the queries."""
    if segment_ids is None:
        return None
    last = first_row + queries
    return F.pad(segment_ids[:, segment_ids.shape[1] - last :], (0, length - last), value=-1)


def _before_own_position(batch_idx, head_idx, q_idx, kv_idx):
    return kv_idx < q_idx


def _same_segment(segment_ids: torch.Tensor, positions: int) -> Callable:
    """The mask function of segment ids `(B, n)`, the last of which is that of position `positions` - 1."""
    first, last = positions - segment_ids.shape[1], segment_ids.shape[1] - 1

    def inner_mask(batch_idx, head_idx, q_idx, kv_idx):
        query, key = ((index - first).clamp(0, last) for index in (q_idx, kv_idx))
        return segment_ids[batch_idx, query] == segment_ids[batch_idx, key]

    return inner_mask


def make_attention_mask(
    config: PreTrainedConfig,
    embedded: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    segment_ids: torch.Tensor | None = None,
):
    """
    Which keys each query sees, as the attention implementation takes it: causal (both sides where `config.is_causal` is
    False), no padding, of the same segment, and as `memory_length`, `memory_mask` and `see_own_position` say.

    Args:
        embedded (`(B, T, D)`): for the sizes.
        attention_mask (`(B, past + T)`, *optional*): 0 where padded; a 4D mask is returned as it is.
        segment_ids (`(B, n)`, *optional*): of the last n positions.
    """
    arguments = {"config": config, "inputs_embeds": embedded, "attention_mask": attention_mask, **named_cache(cache)}
    arguments["allow_is_causal_skip"] = config.position_embedding not in ("relative", "t5")  # they add to the mask
    overlays = []
    if not config.see_own_position:
        overlays.append(_before_own_position)
    if segment_ids is not None:
        past_length = 0 if cache is None else cache.get_seq_length()
        overlays.append(_same_segment(segment_ids, past_length + embedded.shape[1]))
    if config.memory_length is not None and config.memory_mask == "window":
        window = config.memory_length + 1
        if not overlays and config.sliding_window == window:
            return create_sliding_window_causal_mask(**arguments)
        overlays.append(sliding_window_overlay(window))
    return create_causal_mask(**arguments, and_mask_function=and_masks(*overlays) if overlays else None)


def check_attention_implementation(config: PreTrainedConfig) -> None:
    """Raise a ValueError if the attention implementation cannot compute what the config asks for."""
    name = config._attn_implementation
    by_distance = config.position_embedding in ("relative", "t5")
    if (by_distance or not config.see_own_position) and name not in ("eager", "sdpa"):
        raise ValueError(
            f"`attn_implementation` must be 'eager' or 'sdpa' with `position_embedding` 'relative' or 't5' and with "
            f"`see_own_position` False, got {name!r}"
        )
    if config.memory_length is not None and name not in ATTENTION_WITH_MEMORY:
        raise ValueError(
            f"`attn_implementation` must be one of {', '.join(ATTENTION_WITH_MEMORY)} with `memory_length`, "
            f"got {name!r}"
        )


def check_memory(config: PreTrainedConfig, cache: Cache, queries: int) -> None:
    """
    Raise a ValueError if the cache keeps more or fewer keys than the config asks for, as one that was made for another
    config does: the outputs would be wrong without a sign.
    """
    layers = getattr(cache, "layers", [])
    sliding = [getattr(layer, "is_sliding", False) for layer in layers]
    if config.memory_length is None:
        if any(sliding):
            raise ValueError(
                "`cache` must keep all keys, since `memory_length` is None, got layers that keep the last ones; make "
                "it with `DynamicCache(config=model.config)`"
            )
        return
    remedy = f"`DynamicCache(config=model.config)` with `memory_length` {config.memory_length}"
    if not layers or not all(sliding):
        raise ValueError(
            f"`cache` must keep the last keys of each block, as {remedy} does, got a {type(cache).__name__} of "
            "layers that keep all keys"
        )
    if config.recurrent_layers and any(getattr(layer, "record_past", False) for layer in layers):
        raise ValueError("assisted decoding takes tokens back, which `recurrent_layers` cannot; generate without it")
    for layer in layers:
        window = getattr(layer, "sliding_window", None)  # of a dynamic layer; a static one has room for as many
        if window is None and layer.max_cache_len < layer.get_seq_length() + queries:
            window = layer.max_cache_len
        if window is not None and window != config.sliding_window:
            raise ValueError(
                f"`cache` must keep the keys that {remedy} keeps, {config.sliding_window - 1} of each block, got one "
                f"that keeps {window - 1}"
            )


def check_segment_ids(segment_ids: torch.Tensor, cache: Cache, queries: int, window: int) -> None:
    """
    Raise a ValueError unless the segment ids `(B, n)` cover all positions that the `queries` new ones may look at: the
    keys at hand, and of the past the `window` - 1 inputs that a LocalRNN reads.
    """
    length, first_row = keys_at_hand(cache, 0, queries)
    if isinstance(first_row, torch.Tensor):
        raise ValueError("`seq_idx` cannot be used with a StaticCache of all keys; use a DynamicCache")
    needed = queries + max(first_row, min(window - 1, cache.get_seq_length()))
    if segment_ids.shape[1] < needed:
        raise ValueError(
            f"`seq_idx` must have the numbers of the past positions too, those of the last {needed} positions or more, "
            f"got {segment_ids.shape[1]} columns for {queries} new positions"
        )


def detach_memory(cache: Cache) -> None:
    """
    Cut the graph behind everything that the cache holds, in place: after a training step that the next one follows with
    this cache. Gradients then reach back to the beginning of a call.
    """
    for layer in cache.layers:
        for name in ("keys", "values"):
            if getattr(layer, name, None) is not None:
                setattr(layer, name, getattr(layer, name).detach())
        for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            for index, state in states.items():
                states[index] = None if state is None else state.detach()


__all__ = ["detach_memory"]
