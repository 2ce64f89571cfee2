# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
R-Transformer, RSA heads and both together, as Transformers models: the base model, its initial values, and a class for
each head. `block.py` has the block, `language_modeling.py` and `classification.py` the heads.

Sources: Wang et al. 2019, "R-Transformer" (arXiv 1907.05572), section 3; Huang et al. 2023, "Encoding Recurrence into
Transformers" (ICLR 2023), section 3.
"""

# B batch, T positions of this call, D hidden size, F input features

import math
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionCacheLayerMixin
from transformers.generation import GenerationMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from .attention import RTransformerAttention
from .attentive_recurrence import refuse_parts_of_rows
from .block import RTransformerBlock
from .block_recurrent import check_documents, check_padding
from .classification import (
    FrameClassificationHead,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
)
from .configuration_rtransformer import RTransformerConfig
from .engines import PAGED_ARGUMENTS, BackendCompatibility, PagedAttentionCache, refuse_foreign_attention
from .inputs import embed_inputs
from .language_modeling import CausalLMHead, MaskedLMHead
from .layer_norms import make_layer_norm
from .library_versions import (
    CACHE_NAMES,
    BaseModelOutputWithPast,
    accepts_both_cache_names,
    named_cache,
    refuse_unknown_arguments,
)
from .memory import (
    check_attention_implementation,
    check_memory,
    check_segment_ids,
    keys_at_hand,
    make_attention_mask,
)
from .positions import (
    SequenceInfo,
    packed_segment_ids,
    padding_of_call,
    positions_in_sequence,
    sequences_of_mask,
    sinusoidal_positions,
)
from .relative_positions import RelativeEmbedding
from .structured_linear import refuse_structure


INPUTS = ("input_ids", "attention_mask", "position_ids", *CACHE_NAMES, "inputs_embeds", "input_values", "labels")


class RTransformerPreTrainedModel(PreTrainedModel):
    """What all R-Transformer models share: capabilities and initial values."""

    config: RTransformerConfig
    config_class = RTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RTransformerBlock"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": RTransformerBlock, "attentions": RTransformerAttention}
    is_backend_compatible = BackendCompatibility()

    def __init__(self, config: RTransformerConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        refuse_foreign_attention(config)
        refuse_structure(config)
        distributed = getattr(config, "distributed_config", None)
        tp_size = getattr(distributed, "tp_size", None) or 1
        if config.num_attention_heads % tp_size:
            raise ValueError(
                f"`num_attention_heads` must be divisible by `tp_size` ({tp_size}), since a process has whole heads, "
                f"got {config.num_attention_heads}"
            )
        unsplit = config.position_embedding in ("relative", "t5") or config.recurrent_layers or config.normalize_keys
        if tp_size > 1 and unsplit:
            raise ValueError(
                "`tp_size` must be 1 with `position_embedding` 'relative' or 't5', `recurrent_layers` or "
                f"`normalize_keys`, whose parameters are not split by heads, got {tp_size}"
            )
        if config.recurrent_layers:
            self._can_compile_fullgraph = False  # which states are updated depends on the values of masks
        if config.attentive_steps and tp_size > 1:
            raise ValueError(
                f"`attentive_steps` must be 0 with `tp_size` {tp_size}, since its attention has all heads in one "
                f"process, got {config.attentive_steps}"
            )
        if config.num_input_features is not None:
            self.main_input_name = "input_values"
            self._input_embed_layer = "embed_values"  # for get_input_embeddings, which FSDP2 and PEFT ask

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """
        Each parameter on its own (the original code starts several as copies of one another). A module with a method
        `init_parameters` sets its own; the others are set by Transformers.

        | parameter | initial value |
        |---|---|
        | embeddings, projections, heads: weight | normal(0, `initializer_range`); the padding embedding zero |
        | projections, heads: bias | 0 |
        | structured factors | such that the product has the dense standard deviation (structured_linear.py) |
        | LayerNorm weight, bias | 1, 0 |
        | relative positions: u, v, W_r; the table of T5 | normal(0, `initializer_range`) |
        | factor of the scores with `normalize_keys` | 1 |
        | recurrent states: S_0, ids; gate of `state_gate` "fixed" | normal(0, .1), normal(0, 1); normal(0, .1) |
        | gates of `state_gate` "lstm": weight, bias | normal(0, sqrt(.1 / inputs)), 0 |
        | LocalRNN and attentive cell: weights and biases | uniform(-1 / sqrt(D), 1 / sqrt(D)), as in torch.nn |
        | attentive gate: bias | 1 |
        | REM eta (regular) | uniform on [-2, -1] u [1, 2] |
        | REM nu (cyclical) | uniform on [1, 2] |
        | REM theta (cyclical) | pi / 4 |
        | REM mu (gate) | uniform on [-3, 3] |
        """
        super()._init_weights(module)
        if hasattr(module, "init_parameters"):
            module.init_parameters()

    @staticmethod
    @accepts_both_cache_names
    def create_masks_for_generate(
        config: RTransformerConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor | None]:
        """
        The attention mask and the padding mask, as a compiled `generate` prepares them; a REM reads the padding. A 4D
        mask is taken as it is, and a ValueError if windows or REMs cannot follow it.
        """
        padding_mask = None
        if attention_mask is not None and attention_mask.dim() == 4 and config.reads_order:
            if config.memory_length is not None:
                raise ValueError("`attention_mask` must have two dimensions for `generate` with `memory_length`")
            past_length = 0 if cache is None else int(cache.get_seq_length())
            padding_mask, segment_ids = sequences_of_mask(attention_mask, past_length, config.is_causal)
            if segment_ids is not None:
                raise ValueError("`attention_mask` must describe one sequence a row for `generate`, got packed ones")
        if padding_mask is None:
            padding_mask = padding_of_call(attention_mask, inputs_embeds.shape[1])
        masks = {
            "full_attention": make_attention_mask(config, inputs_embeds, attention_mask, cache),
            "linear_attention": padding_mask,
        }
        return {**masks, "keys": attention_mask} if config.recurrent_layers else masks


class RTransformerModel(RTransformerPreTrainedModel):
    """The embedded input, the blocks and the final norm, without a head."""

    continues_documents = True  # `seq_idx` beside a cache may number the positions of the past too

    layer_class = RTransformerBlock

    def __init__(self, config: RTransformerConfig):
        super().__init__(config)
        if config.num_input_features is None:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        else:
            self.embed_values = nn.Linear(config.input_size, config.hidden_size)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(
            self.layer_class(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.relative_positions = RelativeEmbedding(config) if config.position_embedding == "relative" else None
        self.norm = make_layer_norm(config) if config.final_norm else nn.Identity()
        self.output_dropout = nn.Dropout(config.output_dropout)
        self.is_causal = config.is_causal  # Transformers changes the config's for the time of a call
        self.gradient_checkpointing = False
        self.post_init()

    @accepts_both_cache_names
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        input_values: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Exactly one of `input_ids` `(B, T)`, `inputs_embeds` `(B, T, D)` and, in a model with `num_input_features`,
        `input_values` `(B, T, F)`.

        Args:
            attention_mask (`(B, past + T)`, *optional*):
                0 where padded, on either side. Also a prepared 4D mask, or a dict of prepared masks with the keys
                `full_attention` and `linear_attention` (the padding of the T positions, 2D).
            position_ids (`(B, T)`, *optional*):
                Used by sinusoidal embeddings; positions that start over mark packed sequences, as do the arguments
                `seq_idx` `(B, T)` and `cu_seq_lens_q` of the padding-free collators. Beside a cache `seq_idx` is
                `(B, n)`, the numbers of the last n positions, which cover what the new ones may look at.
            cache (`Cache`, *optional*): keys, values, LocalRNN windows and recurrent states of the past.

        Raises:
            ValueError: none or several of the inputs, input of the wrong width, ids outside the vocabulary, a cache
                that has no room for LocalRNN windows or has lost them, a 4D mask that windows and REMs cannot follow.
            NotImplementedError: the attention implementation of an engine that leaves windows and REMs out.
        """
        is_paged = isinstance(cache, PagedAttentionCache)
        refuse_unknown_arguments(kwargs, INPUTS, PAGED_ARGUMENTS if is_paged else ())
        refuse_foreign_attention(self.config)
        embedded = embed_inputs(self, input_ids, inputs_embeds, input_values)
        check_attention_implementation(self.config)
        queries = embedded.shape[1]
        if not is_paged:
            use_cache = self._check_direction_and_cache(cache, queries, use_cache, kwargs)
        attention_mask, segment_ids = self._read_prepared_mask(attention_mask, cache)
        if cache is not None and not is_paged:
            self._refuse_packed_rows(attention_mask, position_ids, segment_ids, kwargs)
            segment_ids = self._segment_ids_beside(cache, queries, position_ids, kwargs.get("seq_idx"))
        elif cache is None and segment_ids is None:
            segment_ids = packed_segment_ids(
                *embedded.shape[:2],
                position_ids=position_ids if attention_mask is None else None,
                seq_idx=kwargs.get("seq_idx"),
                cu_seq_lens=kwargs.get("cu_seq_lens_q"),
            )
            if use_cache and segment_ids is None:
                cache = DynamicCache(config=self.config)
        if segment_ids is not None:
            segment_ids = segment_ids.expand(len(embedded), -1)
            if self.config.recurrent_layers:
                positions = queries if cache is None else cache.get_seq_length() + queries
                check_documents(segment_ids, queries, positions, self.config.block_length)
        if self.config.attentive_form == "slots":
            refuse_parts_of_rows(attention_mask, segment_ids)
        sequence = self._describe(embedded, attention_mask, position_ids, segment_ids, cache)
        hidden_states = self._run_blocks(self._add_positions(embedded, sequence), sequence, cache, **kwargs)
        hidden_states = self.output_dropout(self.norm(hidden_states))
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **named_cache(cache))

    def _check_direction_and_cache(
        self, cache: Cache | None, queries: int, use_cache: bool | None, kwargs: dict[str, Any]
    ) -> bool | None:
        """`use_cache`, or False for a bidirectional model; an error where the arguments contradict the model."""
        if kwargs.get("is_causal", self.config.is_causal) != self.is_causal:
            raise ValueError(
                f"`is_causal` must be {self.is_causal}, as in the config that the model was made with (the directions "
                f"of a LocalRNN are built in), got {kwargs['is_causal']}"
            )
        if cache is not None and not self.is_causal:
            raise ValueError("`cache` needs a causal model, but `config.is_causal` is False")
        if cache is not None and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise ValueError("`cache` cannot be given with gradient checkpointing, which would drop it; disable one")
        if cache is not None:
            self._check_keys(cache, queries)
            self._check_windows(cache)
        return use_cache if self.is_causal else False

    def _check_keys(self, cache: Cache, queries: int) -> None:
        """Raise a ValueError if the cache keeps other keys than `memory_length` asks for."""
        check_memory(self.config, cache, queries)

    def _read_prepared_mask(
        self, attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None, cache: Cache | None
    ) -> tuple[torch.Tensor | dict[str, torch.Tensor | None] | None, torch.Tensor | None]:
        """
        The mask and the packed sequences `(B, T)` that it describes, if it is a prepared one of four dimensions and the
        model reads the order of tokens; the padding that it describes stands beside it in a dict then.
        """
        is_dict = isinstance(attention_mask, dict)
        prepared = attention_mask["full_attention"] if is_dict else attention_mask
        is_read = self.config.reads_order and not isinstance(cache, PagedAttentionCache)
        if not is_read or prepared is None or len(prepared.shape) != 4:
            return attention_mask, None
        if is_dict and (is_tracing(prepared) or not isinstance(prepared, torch.Tensor)):
            return attention_mask, None  # made by `create_masks_for_generate`, which has looked at it
        if self.config.memory_length is not None or not self.config.see_own_position:
            if is_dict:
                return attention_mask, None
            raise ValueError(
                "`attention_mask` of four dimensions cannot be read in a model with `memory_length` and LocalRNN "
                "windows, REMs or recurrent layers; pass the padding (2D), and documents by `seq_idx`"
            )
        if is_tracing(prepared) or not isinstance(prepared, torch.Tensor):
            raise ValueError(
                "`attention_mask` of four dimensions cannot be read while a compiler traces the model, nor as a "
                f"BlockMask, in a model with LocalRNN windows or REMs, got a {type(prepared).__name__}; pass the "
                "padding (2D), or packed sequences by `position_ids`"
            )
        past_length = 0 if cache is None else int(cache.get_seq_length())
        padding_mask, segment_ids = sequences_of_mask(prepared, past_length, self.is_causal)
        return {"full_attention": prepared, "linear_attention": padding_mask}, segment_ids

    def _refuse_packed_rows(
        self,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None,
        position_ids: torch.LongTensor | None,
        segment_ids: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> None:
        """
        A ValueError where packed sequences come with a cache, which holds one sequence a row unless `seq_idx` has the
        numbers of the past too.
        """
        names = ("cu_seq_lens_q",) if self.continues_documents else ("seq_idx", "cu_seq_lens_q")
        found = [name for name in names if kwargs.get(name) is not None]
        if segment_ids is not None:
            found.append("attention_mask")
        is_described = kwargs.get("seq_idx") is not None
        if attention_mask is None and position_ids is not None and not is_described and not is_tracing(position_ids):
            if position_ids.shape[-1] > 1 and (position_ids.diff(dim=-1) != 1).any():
                found.append("position_ids")
        if found:
            raise ValueError(
                f"`{found[0]}` describes packed sequences, and a `cache` holds one sequence a row; leave the cache out "
                "(`use_cache=False`), or give each sequence a row of its own"
                + (", or number all positions by `seq_idx`" if self.continues_documents else "")
            )

    def _check_windows(self, cache: Cache) -> None:
        """
        Raise a ValueError if the cache has no room for LocalRNN windows, or has keys without the windows that belong to
        them, from which the outputs would be wrong without a sign. No tensor's values are looked at: a static cache,
        which counts its positions in a tensor, is taken as it is.
        """
        if not self.config.has_windows:
            return
        if not cache.layers or not isinstance(cache.layers[0], LinearAttentionCacheLayerMixin):
            raise ValueError(
                "`cache` must have room for the LocalRNNs' windows, as `DynamicCache(config=model.config)` "
                f"has, got a {type(cache).__name__} of keys and values alone"
            )
        if cache.offloading and cache.is_linear[0]:  # Transformers before 5.24 counts static layers with windows so
            raise ValueError(
                "an offloaded static cache has no room for the LocalRNNs' windows before Transformers 5.24; use "
                "`cache_implementation` 'offloaded', or 'static' without offloading"
            )
        past_length = cache.get_seq_length(0)
        has_windows = all(cache.has_previous_state(0, index) for index in range(self.config.num_local_rnns))
        if isinstance(past_length, int) and past_length > 0 and not has_windows:
            raise ValueError(
                f"`cache` must hold the LocalRNNs' windows with the keys and values of its {past_length} "
                "positions, got none, as in a cache made again from the (key, value) pairs of another; pass that other "
                "cache itself"
            )

    def _segment_ids_beside(
        self, cache: Cache, queries: int, position_ids: torch.LongTensor | None, segment_ids: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The numbers of the documents `(B, n)` that the last positions belong to, beside a cache; None without."""
        if segment_ids is not None:
            check_segment_ids(segment_ids, cache, queries, self.config.local_window if self.config.has_windows else 1)
            if self.config.position_embedding == "sinusoidal" and position_ids is None:
                raise ValueError("`position_ids` must be given with `seq_idx` beside a cache and sinusoidal positions")
        return segment_ids

    def _describe(
        self,
        embedded: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None,
        position_ids: torch.LongTensor | None,
        segment_ids: torch.Tensor | None,
        cache: Cache | None,
    ) -> SequenceInfo:
        """What the mixers need to know of the positions: masks, segments and places."""
        if position_ids is None:
            is_padding = isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2
            position_ids = positions_in_sequence(
                embedded.shape[1],
                attention_mask=attention_mask if is_padding else None,
                segment_ids=None if segment_ids is None else segment_ids[:, -embedded.shape[1] :],
                past_length=0 if cache is None else cache.get_seq_length(),
                device=embedded.device,
            )
        if isinstance(attention_mask, dict):
            padding_mask, key_mask = attention_mask.get("linear_attention"), attention_mask.get("keys")
            attention_mask = attention_mask["full_attention"]
        else:
            padding_mask = padding_of_call(attention_mask, embedded.shape[1])
            key_mask = attention_mask if self.config.recurrent_layers else None
            attention_mask = make_attention_mask(self.config, embedded, attention_mask, cache, segment_ids)
        if key_mask is not None:
            check_padding(key_mask, self.config.block_length)
        relative = None
        if self.relative_positions is not None:
            length, _ = keys_at_hand(cache, 0, embedded.shape[1])
            relative = self.relative_positions(length)
        return SequenceInfo(attention_mask, padding_mask, segment_ids, position_ids, relative, key_mask)

    def _add_positions(self, embedded: torch.Tensor, sequence: SequenceInfo) -> torch.Tensor:
        """The input of the first block: with the position embedding that the config asks for, after dropout."""
        if self.config.position_embedding in ("sinusoidal", "relative"):
            embedded = embedded * math.sqrt(self.config.hidden_size)
        if self.config.position_embedding == "sinusoidal":
            embedded = embedded + sinusoidal_positions(sequence.position_ids, self.config.hidden_size, embedded.dtype)
        return self.dropout(embedded)

    def _run_blocks(
        self,
        hidden_states: torch.Tensor,
        sequence: SequenceInfo,
        cache: Cache | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        for layer in self.layers[: self.config.num_hidden_layers]:
            outputs = layer(hidden_states, sequence, **named_cache(cache), **kwargs)
            hidden_states, *attentive_states = outputs if isinstance(outputs, tuple) else (outputs,)
            if attentive_states:  # of the first block
                sequence = sequence._replace(attentive_states=attentive_states[0])
        return hidden_states


RTransformerPreTrainedModel.base_class = RTransformerModel  # which its heads stand on


class RTransformerForCausalLM(CausalLMHead, RTransformerPreTrainedModel, GenerationMixin):
    __doc__ = CausalLMHead.__doc__


class RTransformerForMaskedLM(MaskedLMHead, RTransformerPreTrainedModel):
    __doc__ = MaskedLMHead.__doc__


class RTransformerForSequenceClassification(SequenceClassificationHead, RTransformerPreTrainedModel):
    __doc__ = SequenceClassificationHead.__doc__


class RTransformerForTokenClassification(TokenClassificationHead, RTransformerPreTrainedModel):
    __doc__ = TokenClassificationHead.__doc__


class RTransformerForAudioFrameClassification(FrameClassificationHead, RTransformerPreTrainedModel):
    __doc__ = FrameClassificationHead.__doc__


class RTransformerForQuestionAnswering(QuestionAnsweringHead, RTransformerPreTrainedModel):
    __doc__ = QuestionAnsweringHead.__doc__


__all__ = [
    "RTransformerForAudioFrameClassification",
    "RTransformerForCausalLM",
    "RTransformerForMaskedLM",
    "RTransformerForQuestionAnswering",
    "RTransformerForSequenceClassification",
    "RTransformerForTokenClassification",
    "RTransformerModel",
    "RTransformerPreTrainedModel",
]
