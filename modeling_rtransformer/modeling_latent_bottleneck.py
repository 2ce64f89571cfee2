# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
The Temporal Latent Bottleneck as a Transformers model: the chunks one after the other, and a class for each head.
`latent_bottleneck.py` has the equations, the layers and the places of tokens in chunks.

Source: Didolkar et al. 2022, "Temporal Latent Bottleneck" (arXiv 2205.14794), section 2.
"""

# B batch, T positions of this call, C chunks, Q places for the tokens of a chunk, K chunk length, N latents, D hidden
# size, H heads, d head size, R self-attention layers before each cross-attention layer, W window of a LocalRNN

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin
from transformers.generation import GenerationMixin
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing

from .block import wait_for_offloaded
from .classification import FrameClassificationHead, SequenceClassificationHead, TokenClassificationHead
from .configuration_latent_bottleneck import TemporalLatentBottleneckConfig
from .language_modeling import CausalLMHead
from .latent_bottleneck import ChunkLayer, ChunkPast, ChunkPlaces, ChunkRead, CrossLayer
from .library_versions import BaseModelOutputWithPast, accepts_both_cache_names, named_cache
from .positions import SequenceInfo, sinusoidal_positions
from .scheduled_layer import Visible
from .scheduled_model import ModelInputs, ScheduledModel, ScheduledPreTrainedModel


@dataclass
class TemporalLatentBottleneckModelOutputWithPast(BaseModelOutputWithPast):
    """
    Args:
        last_hidden_state (`(B, T, D)`): the last layer's output after the final norm.
        latents (`(B, N, D)`): after all positions, with `output_latents`; those of a chunk that is not full have their
            part in it.
        latent_states (`(B, C, N, D)`): the latents that each of the C chunks found, with `output_latents`.
        cache, hidden_states: as everywhere.
    """

    latents: torch.FloatTensor | None = None
    latent_states: torch.FloatTensor | None = None


class Past(NamedTuple):
    """
    What the cache has of the chunk that goes on.

    Args:
        layers: of each self-attention layer.
        latents (`(B, N, D)`): those that the chunk found.
        outputs (`(B, K - 1, D)`): the last layer's outputs at the last positions.
        in_chunk (`(B, S)`, bool): which of the S last positions belong to the chunk, of the outputs and keys.
    """

    layers: list[ChunkPast]
    latents: torch.Tensor
    outputs: torch.Tensor | None
    in_chunk: torch.Tensor | None


class Run(NamedTuple):
    """
    What all layers give for all chunks.

    Args:
        states: the output `(B, C, Q, D)` of each layer, with that of the cross-attention behind it.
        reads: what each layer adds to the cache, for all chunks: `(B, C, ...)`.
        found, after (`(B, C, N, D)`): the latents that each chunk found, and those after it.
        last (`(B, N, D)`): the latents after the last chunk, as if it were full; if they were asked for.
    """

    states: list[torch.Tensor]
    reads: list[ChunkRead]
    found: torch.Tensor
    after: torch.Tensor
    last: torch.Tensor


class TemporalLatentBottleneckPreTrainedModel(ScheduledPreTrainedModel):
    """What all Temporal Latent Bottlenecks share."""

    config: TemporalLatentBottleneckConfig
    config_class = TemporalLatentBottleneckConfig
    _no_split_modules = ["TemporalLatentBottleneckModel"]  # a chunk goes through all layers


class InitialLatents(nn.Module):
    """The latents before the first chunk, `(N, D)`."""

    def __init__(self, config: TemporalLatentBottleneckConfig):
        super().__init__()
        self.initializer_range = config.initializer_range
        self.weight = nn.Parameter(torch.empty(config.num_latents, config.hidden_size))

    def init_parameters(self) -> None:
        """normal(0, `initializer_range`), so that no two of them are the same."""
        init.normal_(self.weight, std=self.initializer_range)


class TemporalLatentBottleneckModel(TemporalLatentBottleneckPreTrainedModel, ScheduledModel):
    """The embedded input, the layers over chunks, the latents and the final norm, without a head."""

    layer_class = ChunkLayer

    def __init__(self, config: TemporalLatentBottleneckConfig):
        super().__init__(config)
        num_blocks = config.num_hidden_layers // config.cross_attention_every
        self.cross_layers = nn.ModuleList(CrossLayer(config) for _ in range(num_blocks))
        self.latent_layer = CrossLayer(config)
        self.initial_latents = InitialLatents(config) if config.latent_init == "learned" else None
        self.outputs_latents = False  # a head that reads them sets it
        self.post_init()

    @accepts_both_cache_names
    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        input_values: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_latents: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TemporalLatentBottleneckModelOutputWithPast:
        """
        Exactly one of `input_ids` `(B, T)`, `inputs_embeds` `(B, T, D)` and, in a model with `num_input_features`,
        `input_values` `(B, T, F)`.

        Args:
            attention_mask (`(B, past + T)`, *optional*): 0 where padded, on either side.
            position_ids, `seq_idx`, `cu_seq_lens_q`: as in [`RTransformerModel`].
            cache (`Cache`, *optional*): keys, values, outputs and LocalRNN windows of the chunk that is not full, and
                the latents.
            output_latents: whether to return the latents.

        Raises:
            ValueError: none or several of the inputs, input of the wrong width, ids outside the vocabulary, a mask of
                another shape, or with zeros between ones and a past, a cache that has no room for the latents or has
                lost them, `output_attentions`.
        """
        if self._wants("output_attentions", kwargs):
            raise ValueError("`output_attentions` must be False: a chunk attends to itself and to latents, got True")
        given = self._prepare(
            input_ids, attention_mask, position_ids, cache, inputs_embeds, input_values, use_cache, kwargs
        )
        cache, embedded = given.cache, given.embedded
        tokens_before, real = self._count_tokens(given)
        chunks = ChunkPlaces.of(real, tokens_before, self.config.chunk_length, given.segment_ids)
        if self.config.chunk_positions:
            places = chunks.in_chunk.clamp(min=0)
            embedded = embedded + sinusoidal_positions(places, self.config.hidden_size, embedded.dtype)
        hidden_states = self._add_positions(embedded, SequenceInfo(position_ids=given.position_ids))
        past = self._read(cache, hidden_states, chunks.offset)
        output_latents = output_latents or self.outputs_latents
        run = self._run_chunks(chunks.spread(hidden_states), chunks, past, cache is not None, output_latents)
        if cache is not None:
            self._write(cache, chunks, run)
        last = self.norm(chunks.collect(run.states[-1]))
        collected = None
        if self._wants("output_hidden_states", kwargs):
            collected = (hidden_states, *(chunks.collect(states) for states in run.states[:-1]), last)
        return TemporalLatentBottleneckModelOutputWithPast(
            last_hidden_state=last,
            **named_cache(cache),
            hidden_states=collected,
            latents=run.last if output_latents else None,
            latent_states=run.found if output_latents else None,
        )

    def _count_tokens(self, given: ModelInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of each row in earlier calls, `(B,)`, and which of the T positions are tokens, `(B, T)`."""
        batch, length = given.embedded.shape[:2]
        mask, past, device = given.attention_mask, given.past_length, given.embedded.device
        if mask is None:
            before = torch.zeros(batch, dtype=torch.long, device=device) + past
            return before, torch.ones(batch, length, dtype=torch.bool, device=device)
        mask = mask.bool()
        if isinstance(past, int) and past == 0:
            return torch.zeros(batch, dtype=torch.long, device=device), mask
        ended = (mask[:, :-1] & ~mask[:, 1:]).cumsum(1) > 0
        if not is_tracing(mask) and (ended & mask[:, 1:]).any():
            raise ValueError(
                "`attention_mask` must have no zeros between the ones of a row where a cache goes on, since the cache "
                "keeps the last positions alone, got some, as behind padding on the right; pad on the left"
            )
        is_past = torch.arange(mask.shape[1], device=device) < past
        return (mask & is_past).sum(1), mask[:, -length:]

    def _first_latents(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, N, D)`, as a sequence begins."""
        size = (hidden_states.shape[0], self.config.num_latents, self.config.hidden_size)
        if self.initial_latents is None:
            return hidden_states.new_zeros(size)
        return self.initial_latents.weight.to(hidden_states.dtype).expand(size)

    @staticmethod
    def _is_in_chunk(offset: torch.Tensor, columns: int) -> torch.Tensor:
        """Which of so many last positions belong to the chunk that goes on and has `offset`: `(B, columns)`."""
        return torch.arange(-columns, 0, device=offset.device) + offset[:, None] >= 0

    def _check_windows(self, cache: Cache) -> None:
        """Raise a ValueError if the cache has no room for the latents, or has keys without the latents beside them."""
        last, states = self.config.num_hidden_layers - 1, self.config.number_of_conv_states
        layer = cache.layers[last] if last < len(cache.layers) else None
        if not isinstance(layer, LinearAttentionCacheLayerMixin) or layer.number_of_states < states:
            raise ValueError(
                "`cache` must have room for the latents, as `DynamicCache(config=model.config)` has, got a "
                f"{type(cache).__name__} of keys and values alone"
            )
        past_length = self._length_of(cache.layers[0])
        if isinstance(past_length, int) and past_length > 0 and not layer.has_previous_state[states - 1]:
            raise ValueError(
                f"`cache` must hold the latents with the keys and values of its {past_length} positions, got none, as "
                "in a cache made again from the (key, value) pairs of another; pass that other cache itself"
            )

    def _read(self, cache: Cache | None, hidden_states: torch.Tensor, offset: torch.Tensor) -> Past:
        """What the cache has of the chunk that goes on. Nothing is written before all layers have run."""
        columns, rnns = self.config.chunk_length - 1, self.config.num_local_rnns
        width = self.config.local_window - 1
        nothing = hidden_states.new_zeros(hidden_states.shape[0], width, self.config.hidden_size + 1)
        layers, cached = [], None
        for layer_idx in range(self.config.num_hidden_layers):
            wait_for_offloaded(cache, layer_idx, hidden_states.device)
            cached = None if cache is None else cache.layers[layer_idx]
            keys, values = self._cached_keys(cached, columns)
            if keys is not None:
                keys, values = keys[:, :, -columns:], values[:, :, -columns:]
            before = [nothing] * rnns
            if keys is not None and self.config.has_windows:
                in_chunk = self._is_in_chunk(offset, width)[..., None]
                windows = [cached.conv_states[index][..., -width:].transpose(1, 2) for index in range(rnns)]
                before = [window * in_chunk for window in windows]
            layers.append(ChunkPast(keys, values, before))
        if layers[-1].keys is None:
            return Past(layers, self._first_latents(hidden_states), None, None)
        state = self.config.number_of_conv_states - 2
        latents = cached.conv_states[state][..., -1]
        if latents.shape[0] != hidden_states.shape[0]:
            raise ValueError(
                f"`cache` must have the latents of {hidden_states.shape[0]} rows, got {latents.shape[0]}: "
                "`batch_repeat_interleave` and `batch_select_indices` of Transformers leave them as they were"
            )
        outputs = cached.conv_states[state + 1][..., -columns:].transpose(1, 2)
        latents = latents.reshape(-1, self.config.num_latents, self.config.hidden_size)
        return Past(layers, latents, outputs, self._is_in_chunk(offset, columns))

    def _write(self, cache: Cache, chunks: ChunkPlaces, run: Run) -> None:
        """Add the keys, values, outputs, LocalRNN inputs and latents of the T positions to the cache."""
        states = self.config.number_of_conv_states
        for layer_idx, read in enumerate(run.reads):
            keys, values = (
                chunks.collect(part.transpose(2, 3).flatten(3)).unflatten(2, (part.shape[2], -1)).transpose(1, 2)
                for part in (read.keys, read.values)
            )
            cache.update(keys, values, layer_idx)
            if self.config.has_windows:
                for index, inputs in enumerate(read.inputs):
                    self._write_window(cache, layer_idx, index, chunks.collect(inputs), self.config.local_window)
                for index in range(states - 2, states if layer_idx < len(run.reads) - 1 else 0):
                    # room that the other layers have for latents too, and that Transformers crops with the rest
                    self._write_window(cache, layer_idx, index, torch.zeros_like(keys[:, 0, :, :1]), 1)
        last = len(run.reads) - 1
        self._write_window(cache, last, states - 1, chunks.collect(run.states[-1]), self.config.chunk_length - 1)
        found, after = run.found.flatten(2), run.after.flatten(2)  # (B, C, N D)
        which, ends = chunks.chunks, chunks.ends
        if not getattr(cache.layers[last], "record_past", False):
            which, ends = which[:, -1:], ends[:, -1:]
        which = which[..., None].expand(-1, -1, found.shape[2])
        latents = torch.where(ends[..., None], after.gather(1, which), found.gather(1, which))
        self._write_window(cache, last, states - 2, latents, 1)

    @staticmethod
    def _write_window(cache: Cache, layer_idx: int, index: int, inputs: torch.Tensor, size: int) -> None:
        """Add `(B, T, D)` to a window of the cache that keeps the last `size` positions."""
        inputs = inputs.transpose(1, 2)
        if not cache.has_previous_state(layer_idx, index):
            inputs = F.pad(inputs, (size, 0))  # here, where the cache would make short inputs a special case
        cache.update_conv_state(inputs, layer_idx, state_idx=index, conv_kernel_size=size)

    def _visible(self, chunks: ChunkPlaces, past: Past) -> tuple[torch.Tensor, torch.Tensor]:
        """Which keys each token sees, `(B, C, Q, S + Q)`, those of the past first, and how far back, `(Q, S + Q)`."""
        num_chunks, num_places = chunks.present.shape[1:]
        num_cached = 0 if past.layers[0].keys is None else past.layers[0].keys.shape[2]
        places = torch.arange(num_places, device=chunks.present.device)
        keys = torch.arange(-num_cached, num_places, device=places.device)
        distance = places[:, None] - keys
        mask = chunks.present[:, :, None].expand(-1, -1, num_places, -1)
        if self.config.is_causal:
            mask = mask & (distance[:, num_cached:] >= 0)
        if num_cached:
            of_chunk = F.pad(self._is_in_chunk(chunks.offset, num_cached)[:, None], (0, 0, 0, num_chunks - 1))
            mask = torch.cat([of_chunk[:, :, None].expand(-1, -1, num_places, -1), mask], dim=3)
        return mask, distance.abs()

    def _run_chunks(
        self, tokens: torch.Tensor, chunks: ChunkPlaces, past: Past, has_cache: bool, output_latents: bool
    ) -> Run:
        """All chunks `(B, C, Q, D)`, one after the other. The first layers need no latents, and run for all at once."""
        batch, num_chunks = tokens.shape[:2]
        layers = self.layers[: self.config.num_hidden_layers]
        at_once = min(self.config.cross_attention_every, len(layers))
        mask, distance = self._visible(chunks, past)
        visible, present = Visible(distance, mask.flatten(0, 1)[:, None]), chunks.present.flatten(0, 1)
        # what a cache has is not handed to a checkpoint, which would lose its gradient
        call = self.checkpointed.forward if has_cache else self.checkpointed
        states, reads = [tokens], []
        for layer, of_layer in zip(layers[:at_once], past.layers):
            run = partial(layer, visible=visible, present=present, past=of_layer.for_chunks(num_chunks))
            outputs, read = call(run, states[-1].flatten(0, 1))
            states.append(outputs.unflatten(0, (batch, num_chunks)))
            by_chunk = [part.unflatten(0, (batch, num_chunks)) for part in (read.keys, read.values, *read.inputs)]
            reads.append(ChunkRead(by_chunk[0], by_chunk[1], by_chunk[2:]))
        is_full = [True] * num_chunks if is_tracing(tokens) else chunks.full.any(0).tolist()
        latents, first_latents = past.latents, self._first_latents(tokens)
        last, found, after, runs, has_updated = latents, [], [], [], False
        for chunk in range(num_chunks):
            latents = torch.where(chunks.fresh[:, chunk, None, None], first_latents, latents)
            found.append(latents)
            is_last = chunk == num_chunks - 1
            is_read = has_cache or not is_last  # whether anything sees what the chunk makes of the latents
            # parameters without an effect get a gradient of zero, which data-parallel training waits for
            without_effect = is_last and torch.is_grad_enabled() and not has_updated
            updates = output_latents or (is_read and is_full[chunk]) or without_effect
            run = partial(self._run_chunk, chunk, chunks, past, mask, distance, updates)
            update, *outputs = call(run, states[at_once][:, chunk], latents)
            runs.append(outputs)
            if update is not None:
                has_updated = True
                latents = torch.where(chunks.full[:, chunk, None, None], update, latents)
                last = torch.where(chunks.present[:, chunk, :1, None], update, last)
            after.append(latents)
        joined = [torch.stack(parts, dim=1) for parts in zip(*runs)]
        states[at_once:] = joined[: len(layers) - at_once + 1]
        if without_effect:
            states[-1] = states[-1] + 0 * latents.sum()
        parts, per_layer = joined[len(layers) - at_once + 1 :], 2 + self.config.num_local_rnns
        reads += [
            ChunkRead(parts[first], parts[first + 1], parts[first + 2 : first + per_layer])
            for first in range(0, len(parts), per_layer)
        ]
        return Run(states[1:], reads, torch.stack(found, dim=1), torch.stack(after, dim=1), last)

    def _run_chunk(
        self,
        chunk: int,
        chunks: ChunkPlaces,
        past: Past,
        mask: torch.Tensor,
        distance: torch.Tensor,
        updates: bool,
        hidden_states: torch.Tensor,  # (B, Q, D)
        latents: torch.Tensor,  # (B, N, D)
    ) -> tuple[torch.Tensor | None, ...]:
        """
        One chunk, behind the layers that ran for all at once. Tensors alone are returned, which checkpointing needs:
        the new latents or None; the states of the last of those layers and of each further one; and what each further
        one read.
        """
        layers, every = self.layers[: self.config.num_hidden_layers], self.config.cross_attention_every
        if self.config.latent_positions:
            places = torch.arange(self.config.num_latents, device=latents.device)
            latents = latents + sinusoidal_positions(places, self.config.hidden_size, latents.dtype)
        goes_on = chunk == 0 and past.outputs is not None
        if not goes_on:  # the keys of the past are of another chunk
            own = slice(distance.shape[1] - distance.shape[0], None)
            mask, distance = mask[..., own], distance[:, own]
        visible, present = Visible(distance, mask[:, chunk, None]), chunks.present[:, chunk]
        states, reads = [], []
        for layer_idx in range(min(every, len(layers)) - 1, len(layers)):
            if layer_idx >= every:
                of_layer = past.layers[layer_idx]
                hidden_states, read = layers[layer_idx](
                    hidden_states, visible, present, of_layer if goes_on else of_layer.emptied()
                )
                reads += [read.keys, read.values, *read.inputs]
            if (layer_idx + 1) % every == 0:
                hidden_states = self.cross_layers[layer_idx // every](hidden_states, latents)
            states.append(hidden_states)
        if not updates:
            return (None, *states, *reads)
        context = hidden_states
        if goes_on:
            context = torch.cat([past.outputs, hidden_states], dim=1)
            present = torch.cat([past.in_chunk, present], dim=1)
        return (self.latent_layer(latents, context, present), *states, *reads)


TemporalLatentBottleneckPreTrainedModel.base_class = TemporalLatentBottleneckModel  # which its heads stand on


class TemporalLatentBottleneckForCausalLM(CausalLMHead, TemporalLatentBottleneckPreTrainedModel, GenerationMixin):
    __doc__ = CausalLMHead.__doc__
    _tp_plan = {}


class TemporalLatentBottleneckForSequenceClassification(
    SequenceClassificationHead, TemporalLatentBottleneckPreTrainedModel
):
    """
    One prediction a sequence. With `read_out` "latents" it is made of the latents S after the last token,

        scores = W_2 relu(W_1 mean(norm(S)))

    with the final norm of the base model, and with "positions" as by the other models: of the last real position, or of
    their mean if not causal.
    """

    def __init__(self, config: TemporalLatentBottleneckConfig):
        super().__init__(config)
        if config.read_out == "latents":
            self.model.outputs_latents = True
            self.latent_proj = nn.Linear(config.hidden_size, config.intermediate_size)
            self.latent_score = nn.Linear(config.intermediate_size, config.num_labels)
            del self.score  # of positions
            self.post_init()

    def scores(self, outputs: TemporalLatentBottleneckModelOutputWithPast, real: torch.Tensor | None) -> torch.Tensor:
        if self.config.read_out == "positions":
            return super().scores(outputs, real)
        return self.latent_score(F.relu(self.latent_proj(self.model.norm(outputs.latents).mean(1))))


class TemporalLatentBottleneckForTokenClassification(TokenClassificationHead, TemporalLatentBottleneckPreTrainedModel):
    __doc__ = TokenClassificationHead.__doc__


class TemporalLatentBottleneckForAudioFrameClassification(
    FrameClassificationHead, TemporalLatentBottleneckPreTrainedModel
):
    __doc__ = FrameClassificationHead.__doc__


__all__ = [
    "TemporalLatentBottleneckForAudioFrameClassification",
    "TemporalLatentBottleneckForCausalLM",
    "TemporalLatentBottleneckForSequenceClassification",
    "TemporalLatentBottleneckForTokenClassification",
    "TemporalLatentBottleneckModel",
    "TemporalLatentBottleneckModelOutputWithPast",
]
