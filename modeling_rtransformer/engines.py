# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
Engines that keep a model's keys and values themselves: which models they can run, and what they need of the attention.

| engine | keeps | runs |
|---|---|---|
| an attention backend (vLLM, SGLang) | keys and values, behind an attention implementation of its own | plain heads |
| continuous batching of Transformers | keys and values of all requests, in pages | plain and RSA heads |

An attention backend gives a layer its output and no values, which a REM needs; it keeps the keys of a layer at each of
its calls, of which an attentive recurrence makes several. Neither engine has room for the windows of a LocalRNN. The
models that an engine cannot run are refused before the first token.
"""

# T queries of all requests, L keys of all requests, H attention heads, d head size

import inspect
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.integrations.hub_kernels import is_kernel
from transformers.utils.generic import is_flash_attention_requested


# Attention implementations that compute softmax(Q K' / sqrt(d)) V from the keys and values that they are given.
OWN_ATTENTION = ("eager", "sdpa", "flex_attention", "paged|eager")
# What continuous batching passes to a forward beside the arguments of every model.
PAGED_ARGUMENTS = ("read_index", "write_index", "logits_indices", "block_table", "logits_processor_args")
HAS_PAGED_UPDATE = "kwargs" in inspect.signature(PagedAttentionCache.update).parameters  # from 5.23 on


def what_is_kept_beside_keys(config: PreTrainedConfig) -> list[str]:
    """What a model of this config remembers beyond keys and values, or reads in a way of its own, in words."""
    found = []
    if config.has_windows:
        found.append(f"the windows of its LocalRNNs (`local_window` is {config.local_window})")
    if config.has_rems:
        found.append("the REMs of its RSA heads (`rem_kinds`)")
    if config.memory_length is not None or not config.see_own_position:
        found.append("a mask of its own (`memory_length` or `see_own_position`)")
    if config.position_embedding in ("relative", "t5"):
        found.append(f"scores by distance (`position_embedding` is {config.position_embedding!r})")
    if config.recurrent_layers:
        found.append("recurrent states (`recurrent_layers`)")
    if config.attentive_steps:
        found.append("the steps that attend again to the first block's keys (`attentive_steps`)")
    return found


class BackendCompatibility:
    """
    `is_backend_compatible()`: whether an engine that keeps keys and values itself may run a model.

    Engines ask the class, which does not know the config: the answer is False, since most models of the class have
    windows or REMs. A model answers for itself: True where it has neither.
    """

    def __get__(self, model: PreTrainedModel | None, model_class: type[PreTrainedModel]):
        return lambda: model is not None and not what_is_kept_beside_keys(model.config)


def refuse_foreign_attention(config: PreTrainedConfig) -> None:
    """
    Raise a NotImplementedError if the attention implementation belongs to an engine and the model needs more than it
    offers.
    """
    name = config._attn_implementation
    if name is None or name in OWN_ATTENTION or is_kernel(name):
        return
    if is_flash_attention_requested(requested_attention_implementation=name):
        return
    kept = what_is_kept_beside_keys(config)
    if kept:
        raise NotImplementedError(
            f"`attn_implementation` is {name!r}, of an engine that keeps keys and values itself (as vLLM and SGLang "
            f"do), and this model also needs {' and '.join(kept)}, which would be left out; use `generate` of "
            "Transformers with 'sdpa' or 'eager'"
        )


def refuse_continuous_batching(config: PreTrainedConfig) -> None:
    """Raise a NotImplementedError if continuous batching cannot run a model of this config."""
    instead = "use `generate` on a batch that is padded left"
    if any(layer_type != "full_attention" for layer_type in getattr(config, "layer_types", None) or ["none"]):
        raise NotImplementedError(
            "continuous batching (`generate_batch`, `transformers serve --continuous-batching`) keeps keys and values "
            f"of full attention alone, and this model (`model_type` {config.model_type!r}) remembers more, such as the "
            f"windows of LocalRNNs; {instead}"
        )
    if not HAS_PAGED_UPDATE:
        raise NotImplementedError(f"continuous batching of this model needs Transformers 5.23 or newer; {instead}")


def paged_update(
    cache: PagedAttentionCache, key: torch.Tensor, value: torch.Tensor, layer_idx: int, arguments: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Keep the keys and values `(1, H, T, d)` of this call; the ones of all requests of the batch, those of each together
    and in order, `(1, H, L, d)`. `arguments` of the attention change to those of this layer.
    """
    return cache.update(key, value, layer_idx, kwargs=arguments)


def paged_distances(arguments: dict[str, Any], position_ids: torch.Tensor, length: int) -> torch.Tensor:
    """
    `(T, L)`: how far the key stands before the query, and 0 for a key of another request.

    Args:
        arguments: those of the attention after [`paged_update`], of which `cu_seq_lens_q` and `cu_seq_lens_k`
            `(requests + 1,)` are the first query and the first key of each request.
        position_ids (`(1, T)`): the place of each query in its request.
        length: L.
    """
    starts = arguments["cu_seq_lens_k"].long()
    keys = torch.arange(length, device=position_ids.device)
    queries = torch.arange(position_ids.shape[1], device=position_ids.device)
    of_key = torch.searchsorted(starts[1:].contiguous(), keys, right=True)
    of_query = torch.searchsorted(arguments["cu_seq_lens_q"].long()[1:].contiguous(), queries, right=True)
    distance = position_ids[0, :, None] - (keys - starts[of_key])
    return torch.where(of_query[:, None] == of_key, distance, 0)
