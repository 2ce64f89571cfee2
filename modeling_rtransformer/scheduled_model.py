# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
What the models share that visit positions in an order of their own: their input and its checks, and what they leave out
of what Transformers offers.
"""

# B batch, T positions of this call, D hidden size

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, StaticLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from .inputs import embed_inputs
from .library_versions import accepts_both_cache_names, refuse_unknown_arguments
from .modeling_rtransformer import INPUTS, RTransformerModel, RTransformerPreTrainedModel
from .positions import packed_segment_ids, positions_in_sequence


ATTENTION = ("eager", "sdpa")  # the implementations that take any mask and score of a distance


class ModelInputs(NamedTuple):
    """
    Args:
        embedded (`(B, T, D)`): the embedded input, without positions.
        cache: that of the call, a new one, or None.
        past_length: positions of the cache.
        attention_mask (`(B, past + T)`, *optional*): 0 where padded.
        segment_ids (`(B, T)`, *optional*): packed sequences.
        position_ids (`(B or 1, T)`): the place of each position in its sequence.
    """

    embedded: torch.Tensor
    cache: Cache | None
    past_length: int | torch.Tensor
    attention_mask: torch.Tensor | None
    segment_ids: torch.Tensor | None
    position_ids: torch.Tensor


class ScheduledPreTrainedModel(RTransformerPreTrainedModel):
    """What they share with their heads."""

    _can_record_outputs = {}  # a layer runs several times in a call; the models collect the outputs themselves
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    _can_compile_fullgraph = False  # not tried; `generate` then compiles nothing on its own

    @staticmethod
    @accepts_both_cache_names
    def create_masks_for_generate(
        config: PreTrainedConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """The padding as it is: what a position sees is none of the patterns that Transformers has masks for."""
        return attention_mask

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """No engine that keeps keys and values itself, such as vLLM, knows when a position sees which of them."""
        return False

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "continuous batching keeps keys and values of full attention alone, and a "
            f"{self.config.model_type} reads them in an order of its own; use `generate` on a batch that is padded left"
        )


class CheckpointedCall(GradientCheckpointingLayer):
    """The function of the tensors; with gradient checkpointing it is computed again in the backward pass."""

    def forward(self, function: Callable, *tensors: torch.Tensor | None) -> Any:
        return function(*tensors)


class ScheduledModel(ScheduledPreTrainedModel, RTransformerModel):
    """A base model; the subclass has the order of the positions in its `forward`."""

    continues_documents = False

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.checkpointed = CheckpointedCall()

    @property
    def is_checkpointing(self) -> bool:
        """Whether this call keeps less for the backward pass, and computes it again."""
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    def _check_keys(self, cache: Cache, queries: int) -> None:
        """These models have no `memory_length`; what their caches keep is checked where it is read."""

    def _prepare(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        inputs_embeds: torch.Tensor | None,
        input_values: torch.Tensor | None,
        use_cache: bool | None,
        kwargs: dict[str, Any],
    ) -> ModelInputs:
        """
        Raises:
            ValueError: none or several of the inputs, input of the wrong width, ids outside the vocabulary, a mask of
                another shape, a cache that does not fit.
            TypeError: an argument that the model does not have.
            NotImplementedError: an attention implementation that cannot add a mask of this model.
        """
        refuse_unknown_arguments(kwargs, INPUTS)
        if self.config._attn_implementation not in ATTENTION:
            raise NotImplementedError(
                f"`attn_implementation` must be one of {', '.join(ATTENTION)} for a {self.config.model_type}, "
                f"got {self.config._attn_implementation!r}"
            )
        embedded = embed_inputs(self, input_ids, inputs_embeds, input_values)
        use_cache = self._check_direction_and_cache(cache, embedded.shape[1], use_cache, kwargs)
        batch, length = embedded.shape[:2]
        segment_ids = None
        if cache is not None:
            self._refuse_packed_rows(attention_mask, position_ids, None, kwargs)
        else:
            segment_ids = packed_segment_ids(
                batch,
                length,
                position_ids=position_ids if attention_mask is None else None,
                seq_idx=kwargs.get("seq_idx"),
                cu_seq_lens=kwargs.get("cu_seq_lens_q"),
            )
            if use_cache and segment_ids is None:
                cache = DynamicCache(config=self.config)
        past_length = 0 if cache is None or not cache.layers else self._length_of(cache.layers[0])
        self._check_mask(attention_mask, batch, length, past_length)
        if position_ids is None:
            position_ids = positions_in_sequence(
                length,
                attention_mask=attention_mask,
                segment_ids=segment_ids,
                past_length=past_length,
                device=embedded.device,
            )
        return ModelInputs(embedded, cache, past_length, attention_mask, segment_ids, position_ids)

    def _wants(self, name: str, kwargs: dict[str, Any]) -> bool:
        """Whether an output is asked for, by the call or by the config."""
        wanted = kwargs.get(name)
        return bool(getattr(self.config, name, False) if wanted is None else wanted)

    @staticmethod
    def _check_mask(attention_mask: Any, batch: int, length: int, past_length: int | torch.Tensor) -> None:
        if attention_mask is None:
            return
        is_tensor = isinstance(attention_mask, torch.Tensor)
        shape = tuple(attention_mask.shape) if is_tensor else type(attention_mask).__name__
        is_static = isinstance(past_length, torch.Tensor)
        if not is_tensor or attention_mask.dim() != 2 or not (is_static or shape == (batch, past_length + length)):
            positions = "past + length" if is_static else past_length + length
            raise ValueError(
                f"`attention_mask` must have the shape (batch, past + length) = ({batch}, {positions}), 0 where "
                f"padded, got {shape}"
            )

    @staticmethod
    def _length_of(cached: CacheLayerMixin) -> int | torch.Tensor:
        """Positions of a layer of the cache: a tensor for a static one, whose free room stands behind its positions."""
        length = cached.get_seq_length()
        # before 5.23 assisted decoding leaves a tensor in dynamic layers too
        return length if isinstance(cached, StaticLayer) else int(length)

    @staticmethod
    def _cached_keys(
        cached: CacheLayerMixin | None, needed: int | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """
        Keys and values of a layer of the cache, before anything is added; those of a static one with the free room
        behind them, where Transformers counts its positions in a tensor.

        Args:
            needed: how many of the last positions the model reads; all if None.
        """
        if cached is None or not cached.is_initialized:
            return None, None
        length = ScheduledModel._length_of(cached)
        if isinstance(length, torch.Tensor):
            return cached.keys, cached.values
        needed = length if needed is None else min(length, needed)
        if needed == 0:
            return None, None
        keys, values = cached.keys[:, :, :length], cached.values[:, :, :length]
        if keys.shape[2] < needed:
            raise ValueError(
                f"`cache` must hold the keys and values of the last {needed} positions, got {keys.shape[2]}, as in a "
                "quantized cache; use one that `DynamicCache(config=model.config)` makes"
            )
        return keys, values
