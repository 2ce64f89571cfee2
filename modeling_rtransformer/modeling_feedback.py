# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
The Feedback Transformer as a Transformers model: the positions one after the other, and a class for each head.
`feedback.py` has the equations, the layers and the memory.

Source: Fan et al. 2020, "Addressing Some Limitations of Transformers with Feedback Memory" (arXiv 2002.09402), section
3.
"""

# B batch, T positions of this call, S memories (the cached ones, then those of this call), D hidden size, H heads,
# d head size, L layers, M memories that are seen, K window of a LocalRNN

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing

from .block import wait_for_offloaded
from .classification import FrameClassificationHead, SequenceClassificationHead, TokenClassificationHead
from .configuration_feedback import FeedbackTransformerConfig
from .feedback import DistanceScores, FeedbackLayer, FeedbackMemory
from .fixed_point import AtFixedPoint, fixed_point
from .language_modeling import CausalLMHead
from .library_versions import BaseModelOutputWithPast, accepts_both_cache_names, named_cache
from .positions import SequenceInfo
from .scheduled_layer import Visible
from .scheduled_model import ModelInputs, ScheduledModel, ScheduledPreTrainedModel


logger = logging.get_logger(__name__)

CHECKPOINTED_STEPS = 64  # positions between two checkpoints, with gradient checkpointing


@dataclass
class FeedbackModelOutputWithPast(BaseModelOutputWithPast):
    """
    Args:
        last_hidden_state (`(B, T, D)`): the last layer's output after the final norm.
        memories (`(B, T, D)`): the memory of each position, before any norm.
        cache, hidden_states, attentions: as everywhere.
    """

    memories: torch.FloatTensor | None = None


class Carried(NamedTuple):
    """What a position finds of those before it; `keys` and `values` have one entry, or one for each layer."""

    keys: list[torch.Tensor | None]  # (B, H, S, d); None where there is no memory yet
    values: list[torch.Tensor | None]
    windows: list[torch.Tensor]  # (B, K - 1, D + 1), of each LocalRNN of each layer

    def after(self, keys: list[torch.Tensor], values: list[torch.Tensor], inputs: list[torch.Tensor]) -> "Carried":
        """With further memories and further inputs of the LocalRNNs behind those that are there."""
        return Carried(
            [new if old is None else torch.cat([old, new], dim=2) for old, new in zip(self.keys, keys)],
            [new if old is None else torch.cat([old, new], dim=2) for old, new in zip(self.values, values)],
            [torch.cat([old, new], dim=1)[:, new.shape[1] :] for old, new in zip(self.windows, inputs)],
        )


class View(NamedTuple):
    """
    What some positions must know of each other and of the memories.

    Args:
        columns: the memories, of those that are carried, that `visible` is about.
        visible: which of them each position sees, and how far back they are.
        present (`(B, T)`, *optional*): 0 where padded.
        segment_ids (`(B, T)`, *optional*): packed sequences, for LocalRNNs over several positions.
        before (`(B, K - 1, 1)`, *optional*): 0 for the carried inputs of LocalRNNs that are of another sequence.
    """

    columns: slice
    visible: Visible
    present: torch.Tensor | None = None
    segment_ids: torch.Tensor | None = None
    before: torch.Tensor | None = None


class Surroundings(NamedTuple):
    """
    What is known of all T positions of a call and of all S memories, those of the past and then those of the T.

    Args:
        queries (`(T,)`), keys (`(S,)`): where the positions and the memories stand, from the beginning of the cache.
        past: how many of the memories are of the past.
        window: M, or None for all memories.
        seen (`(B or 1, S)`, bool, *optional*): False for memories of padding, and for free room of a static cache.
        present (`(B, T)`, *optional*): 0 where padded.
        segment_ids (`(B, T)`, *optional*): packed sequences; there is no past then.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    past: int
    window: int | None
    seen: torch.Tensor | None
    present: torch.Tensor | None
    segment_ids: torch.Tensor | None

    def of_all(self) -> View:
        """The view of all positions together, on all memories."""
        distance = self.queries[:, None] - self.keys
        visible = Visible(distance, self._mask(distance, slice(None), slice(None)))
        return View(slice(None), visible, self.present, self.segment_ids)

    def of_step(self, step: int, local_window: int) -> View:
        """The view of position `step`, whose memory comes after those of `past + step`."""
        here, last = slice(step, step + 1), self.past + step
        in_order = self.seen is None and self.segment_ids is None
        columns = slice(max(0, last - self.window) if in_order and self.window is not None else 0, last)
        distance = self.queries[here, None] - self.keys[columns]
        visible = Visible(distance, None if in_order else self._mask(distance, here, columns))
        ids, before = self.segment_ids, None
        if ids is not None:
            ids_before = F.pad(ids, (local_window - 1, 0), value=-1)[:, step : step + local_window - 1]
            before = (ids_before == ids[:, here])[..., None]
        return View(columns, visible, None if self.present is None else self.present[:, here], None, before)

    def _mask(self, distance: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
        """`(B or 1, 1, rows, columns)`: of the past, within the window, there, and of the same sequence."""
        mask = (distance >= 1)[None]
        if self.window is not None:
            mask = mask & (distance <= self.window)
        if self.seen is not None:
            mask = mask & self.seen[:, None, columns]
        if self.segment_ids is not None:
            mask = mask & (self.segment_ids[:, rows, None] == self.segment_ids[:, None, columns])
        return mask[:, None]


class Run(NamedTuple):
    """What the layers give for some positions."""

    memories: torch.Tensor  # (B, T, D)
    states: list[torch.Tensor]  # (B, T, D), of the embedding and of each layer
    inputs: list[torch.Tensor]  # (B, T, D + 1), of each LocalRNN of each layer
    weights: list[torch.Tensor]  # (B, H, T, S) of each layer, or nothing

    @classmethod
    def joined(cls, runs: Sequence["Run"]) -> "Run":
        """Runs over consecutive positions as one."""
        return cls(
            torch.cat([run.memories for run in runs], dim=1),
            [torch.cat(parts, dim=1) for parts in zip(*(run.states for run in runs))],
            [torch.cat(parts, dim=1) for parts in zip(*(run.inputs for run in runs))],
            [torch.cat(parts, dim=2) for parts in zip(*(run.weights for run in runs))],
        )


def flatten(*groups: NamedTuple) -> tuple[list[torch.Tensor | None], list[int]]:
    """The tensors in the fields of [`Carried`] or [`Run`], in one list, and how many each field has."""
    fields = [field if isinstance(field, list) else [field] for group in groups for field in group]
    return [tensor for field in fields for tensor in field], [len(field) for field in fields]


def unflatten(tensors: Sequence[torch.Tensor | None], sizes: Sequence[int]) -> list[list[torch.Tensor | None]]:
    """The fields again."""
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    return [list(tensors[end - size : end]) for end, size in zip(ends, sizes)]


class FeedbackTransformerPreTrainedModel(ScheduledPreTrainedModel):
    """What all Feedback Transformers share."""

    config: FeedbackTransformerConfig
    config_class = FeedbackTransformerConfig
    _no_split_modules = ["FeedbackTransformerModel"]  # a step goes through all layers


class FeedbackTransformerModel(FeedbackTransformerPreTrainedModel, ScheduledModel):
    """The embedded input, the layers with their memory, and the final norm, without a head."""

    layer_class = FeedbackLayer

    def __init__(self, config: FeedbackTransformerConfig):
        super().__init__(config)
        self.memory = FeedbackMemory(config)
        self.positions = DistanceScores(config) if config.feedback_positions == "shared" else None
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> FeedbackModelOutputWithPast:
        """
        Exactly one of `input_ids` `(B, T)`, `inputs_embeds` `(B, T, D)` and, in a model with `num_input_features`,
        `input_values` `(B, T, F)`.

        Args:
            attention_mask (`(B, past + T)`, *optional*):
                0 where padded, on either side. Windows and distances count positions, padded ones between others too.
            position_ids, `seq_idx`, `cu_seq_lens_q`: as in [`RTransformerModel`].
            cache (`Cache`, *optional*): keys and values of the memories of the past, and LocalRNN windows.

        Raises:
            ValueError: none or several of the inputs, input of the wrong width, ids outside the vocabulary, a mask of
                another shape, a cache that has no room for LocalRNN windows or has lost them.
        """
        given = self._prepare(
            input_ids, attention_mask, position_ids, cache, inputs_embeds, input_values, use_cache, kwargs
        )
        cache = given.cache
        hidden_states = self._add_positions(given.embedded, SequenceInfo(position_ids=given.position_ids))
        carried = self._read(cache, hidden_states)
        around = self._look_around(given, carried)
        output_attentions = self._wants("output_attentions", kwargs)
        run_all = self._run_steps
        if self.config.feedback_form == "parallel" and hidden_states.shape[1] > 1:
            run_all = self._run_parallel
        run, carried = run_all(hidden_states, around, carried, output_attentions)
        if cache is not None:
            self._write(cache, carried, run)
        last = self.norm(run.states[-1])
        return FeedbackModelOutputWithPast(
            last_hidden_state=last,
            **named_cache(cache),
            hidden_states=(hidden_states, *run.states[1:-1], last)
            if self._wants("output_hidden_states", kwargs)
            else None,
            attentions=self._by_position(run.weights, around, cache) if run.weights else None,
            memories=run.memories,
        )

    def _read(self, cache: Cache | None, hidden_states: torch.Tensor) -> Carried:
        """What the cache has of the past. Nothing is written before all layers have run, so nothing is copied here."""
        layers = self.layers[: self.config.num_hidden_layers]
        banks = 1 if self.config.feedback_shared_kv else len(layers)
        carried = Carried([None] * banks, [None] * banks, [])
        size = (hidden_states.shape[0], self.config.local_window - 1, self.config.hidden_size + 1)
        for layer_idx, layer in enumerate(layers):
            wait_for_offloaded(cache, layer_idx, hidden_states.device)
            cached = cache.layers[layer_idx] if cache is not None and layer_idx < len(cache.layers) else None
            if layer_idx < banks:
                carried.keys[layer_idx], carried.values[layer_idx] = self._cached_keys(
                    cached, self.config.feedback_window
                )
            for index in range(len(layer.local_rnns)):
                window = None
                if cached is not None and size[1] > 0 and cached.has_previous_state[index]:
                    window = cached.conv_states[index][..., -size[1] :].transpose(1, 2)
                carried.windows.append(hidden_states.new_zeros(size) if window is None else window)
        return carried

    def _write(self, cache: Cache, carried: Carried, run: Run) -> None:
        """Add the memories and the LocalRNN inputs of the T positions to the cache."""
        length = run.memories.shape[1]
        for layer_idx, (keys, values) in enumerate(zip(carried.keys, carried.values)):
            cache.update(keys[:, :, -length:], values[:, :, -length:], layer_idx)
        window = self.config.local_window
        for number, inputs in enumerate(run.inputs if window > 1 else []):
            layer_idx, index = divmod(number, self.config.num_local_rnns)
            inputs = inputs.transpose(1, 2)
            if not cache.has_previous_state(layer_idx, index):
                inputs = F.pad(inputs, (window - 1, 0))  # here, where the cache would make short inputs a special case
            cache.update_conv_state(inputs, layer_idx, state_idx=index, conv_kernel_size=window)

    def _look_around(self, given: ModelInputs, carried: Carried) -> Surroundings:
        """Where positions and memories stand, and which of these are there to be seen."""
        past, attention_mask = given.past_length, given.attention_mask
        length, device = given.embedded.shape[1], given.embedded.device
        num_cached = 0 if carried.keys[0] is None else carried.keys[0].shape[2]
        is_static = isinstance(past, torch.Tensor)  # memories stand at their positions, and free room behind them
        queries = past + torch.arange(length, device=device)
        cached = torch.arange(num_cached, device=device) + (0 if is_static else past - num_cached)
        keys = torch.cat([cached, queries])
        seen, present = None, None
        if is_static:
            seen = torch.cat([cached < past, torch.ones_like(queries, dtype=torch.bool)])[None]
        if attention_mask is not None and (is_tracing(attention_mask) or not attention_mask.all()):
            real = attention_mask.bool()[:, keys.clamp(max=attention_mask.shape[1] - 1)]
            seen = real if seen is None else seen & real
            present = attention_mask[:, -length:]
        return Surroundings(queries, keys, num_cached, self.config.feedback_window, seen, present, given.segment_ids)

    def _run_steps(
        self, hidden_states: torch.Tensor, around: Surroundings, carried: Carried, output_attentions: bool
    ) -> tuple[Run, Carried]:
        """The definition: one position after the other. With gradient checkpointing, a stretch of them at a time."""
        length = hidden_states.shape[1]
        if not self.is_checkpointing:
            return self._run_stretch(range(length), hidden_states, around, carried, output_attentions)
        runs = []
        for first in range(0, length, CHECKPOINTED_STEPS):
            steps = range(first, min(first + CHECKPOINTED_STEPS, length))
            run, carried = self._run_checkpointed(steps, hidden_states, around, carried, output_attentions)
            runs.append(run)
        return Run.joined(runs), carried

    def _run_parallel(
        self, hidden_states: torch.Tensor, around: Surroundings, carried: Carried, output_attentions: bool
    ) -> tuple[Run, Carried]:
        """`_run_steps` by passes over all T positions, from the embeddings as the first memories."""
        if self.is_checkpointing:
            logger.warning_once(
                "`feedback_form` 'parallel' has no gradient checkpointing; one step after the other runs"
            )
            return self._run_steps(hidden_states, around, carried, output_attentions)
        if is_tracing(hidden_states):  # the number of passes depends on values
            return self._run_steps(hidden_states, around, carried, output_attentions)
        needs_grad, view = torch.is_grad_enabled(), around.of_all()
        devices = [hidden_states.device] if hidden_states.is_cuda else []

        def run_pass(memories: torch.Tensor) -> Run:
            seen = carried.after(*self._keys_and_values(memories), [])._replace(windows=carried.windows)
            return self._run_layers(hidden_states, seen, view, self._rems(around))

        def next_memories(memories: torch.Tensor) -> torch.Tensor:
            with torch.random.fork_rng(devices, enabled=self.training):  # every pass has the same dropout
                return run_pass(memories).memories

        memories, settled = fixed_point(
            next_memories, hidden_states, self.config.feedback_tolerance, self.config.feedback_max_passes
        )
        if not settled:
            logger.warning_once(
                f"after `feedback_max_passes` ({self.config.feedback_max_passes}) the memories still changed by more "
                f"than `feedback_tolerance` ({self.config.feedback_tolerance}); one step after the other runs"
            )
            return self._run_steps(hidden_states, around, carried, output_attentions)
        start = memories.detach().requires_grad_(needs_grad)
        run = run_pass(start)
        weights = run.weights if output_attentions else []
        if needs_grad and run.memories.requires_grad:
            sizes = [len(run.states) - 1, len(run.inputs), len(weights)]
            memories, *others = AtFixedPoint.apply(
                self.config.feedback_tolerance, start, run.memories, *run.states[1:], *run.inputs, *weights
            )
            states, inputs, weights = unflatten(others, sizes)
            run = Run(memories, [run.states[0], *states], inputs, weights)
        return run._replace(weights=weights), carried.after(*self._keys_and_values(run.memories), run.inputs)

    def _run_checkpointed(
        self, steps: range, hidden_states: torch.Tensor, around: Surroundings, carried: Carried, output_attentions: bool
    ) -> tuple[Run, Carried]:
        """`_run_stretch`, computed again in the backward pass; for that, tensors alone go in and out."""
        tensors, sizes = flatten(carried)
        out_sizes = []

        def run(hidden_states: torch.Tensor, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
            given = Carried(*unflatten(tensors, sizes))
            outputs, out_sizes[:] = flatten(*self._run_stretch(steps, hidden_states, around, given, output_attentions))
            return tuple(outputs)

        outputs = self.checkpointed(run, hidden_states, *tensors)
        [memories], states, inputs, weights, *left = unflatten(outputs, out_sizes)
        return Run(memories, states, inputs, weights), Carried(*left)

    def _run_stretch(
        self, steps: range, hidden_states: torch.Tensor, around: Surroundings, carried: Carried, output_attentions: bool
    ) -> tuple[Run, Carried]:
        """The positions `steps` of the T, one after the other."""
        runs, rems = [], self._rems(around)
        for step in steps:
            view = around.of_step(step, self.config.local_window)
            run = self._run_layers(hidden_states[:, step : step + 1], carried, view, rems)
            carried = carried.after(*self._keys_and_values(run.memories), run.inputs)
            weights = []
            if output_attentions:  # the memories that were left out of the view have no weight
                behind = len(around.keys) - view.columns.stop
                weights = [F.pad(layer, (view.columns.start, behind)) for layer in run.weights]
            runs.append(run._replace(weights=weights))
        return Run.joined(runs), carried

    def _run_layers(
        self, hidden_states: torch.Tensor, carried: Carried, view: View, rems: list[torch.Tensor | None]
    ) -> Run:
        """All layers at some positions `(B, T, D)`, and what is remembered of them."""
        states, inputs, weights = [hidden_states], [], []
        per_layer = self.config.num_local_rnns
        for layer_idx, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            bank = min(layer_idx, len(carried.keys) - 1)
            keys, values = (
                None if part[bank] is None else part[bank][:, :, view.columns]
                for part in (carried.keys, carried.values)
            )
            windows = carried.windows[layer_idx * per_layer : (layer_idx + 1) * per_layer]
            if view.before is not None:
                windows = [window * view.before for window in windows]
            hidden_states, layer_weights, read = layer(
                hidden_states,
                keys,
                values,
                view.visible,
                windows,
                view.present,
                view.segment_ids,
                positions=self.positions,
                rem=rems[layer_idx],
            )
            states.append(hidden_states)
            inputs += read
            if layer_weights is not None:
                weights.append(layer_weights)
            elif keys is None and self.config._attn_implementation == "eager":
                weights.append(hidden_states.new_zeros(len(hidden_states), self.config.num_attention_heads, 1, 0))
        return Run(self.memory(states), states, inputs, weights)

    def _rems(self, around: Surroundings) -> list[torch.Tensor | None]:
        """The REMs of each layer by distance, for the largest one that there may be."""
        length = len(around.keys) + 1
        return [layer.self_attn.rem_by_distance(length) for layer in self.layers[: self.config.num_hidden_layers]]

    def _keys_and_values(self, memories: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Keys and values `(B, H, T, d)` of memories `(B, T, D)`, for all layers or for each."""
        if self.config.feedback_shared_kv:
            pairs = [self.memory.keys_and_values(memories)]
        else:
            layers = self.layers[: self.config.num_hidden_layers]
            pairs = [layer.self_attn.keys_and_values(layer.self_attn_norm(memories)) for layer in layers]
        return [keys for keys, _ in pairs], [values for _, values in pairs]

    @staticmethod
    def _by_position(
        weights: list[torch.Tensor], around: Surroundings, cache: Cache | None
    ) -> tuple[torch.Tensor, ...]:
        """The weights with a column for each position: a static cache has free room between past and present."""
        layer = None if cache is None else cache.layers[0]
        if layer is None or not isinstance(layer.get_seq_length(), torch.Tensor):
            return tuple(weights)
        columns = layer.keys.shape[2]
        free = weights[0].new_zeros(*weights[0].shape[:3], columns)
        places = around.keys.clamp(max=columns - 1)
        return tuple(free.index_add(3, places, of_layer) for of_layer in weights)

    def cache_of(self, memories: torch.Tensor) -> Cache:
        """
        A cache that goes on after `memories` `(B, S, D)`, the oldest first, such as the last ones of an earlier call.
        Training in segments gives the memories of a segment, detached, to the next; their keys and values are made
        with the weights of that time. LocalRNN windows begin anew.
        """
        cache = DynamicCache(config=self.config)
        for layer_idx, (keys, values) in enumerate(zip(*self._keys_and_values(memories))):
            cache.update(keys, values, layer_idx)
        return cache


FeedbackTransformerPreTrainedModel.base_class = FeedbackTransformerModel  # which its heads stand on


class FeedbackTransformerForCausalLM(CausalLMHead, FeedbackTransformerPreTrainedModel, GenerationMixin):
    __doc__ = CausalLMHead.__doc__
    _tp_plan = {}


class FeedbackTransformerForSequenceClassification(SequenceClassificationHead, FeedbackTransformerPreTrainedModel):
    __doc__ = SequenceClassificationHead.__doc__


class FeedbackTransformerForTokenClassification(TokenClassificationHead, FeedbackTransformerPreTrainedModel):
    __doc__ = TokenClassificationHead.__doc__


class FeedbackTransformerForAudioFrameClassification(FrameClassificationHead, FeedbackTransformerPreTrainedModel):
    __doc__ = FrameClassificationHead.__doc__


__all__ = [
    "FeedbackModelOutputWithPast",
    "FeedbackTransformerForAudioFrameClassification",
    "FeedbackTransformerForCausalLM",
    "FeedbackTransformerForSequenceClassification",
    "FeedbackTransformerForTokenClassification",
    "FeedbackTransformerModel",
]
