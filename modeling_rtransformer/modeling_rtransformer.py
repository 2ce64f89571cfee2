# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
R-Transformer, RSA heads and both together, as Transformers models: the base model, its initial values and the language
models. `block.py` has the block, `classification.py` the other heads.

Sources: Wang et al. 2019, "R-Transformer" (arXiv 1907.05572), section 3; Huang et al. 2023, "Encoding Recurrence into
Transformers" (ICLR 2023), section 3.
"""

# B batch, T positions of this call, D hidden size, V vocabulary, F input features

import math
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionCacheLayerMixin
from transformers.generation import GenerationMixin
from transformers.masking_utils import (
    create_causal_mask,
    create_recurrent_attention_mask,
    packed_sequence_mask_function,
)
from transformers.modeling_outputs import MaskedLMOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from .block import RTransformerAttention, RTransformerBlock, make_layer_norm
from .configuration_rtransformer import RTransformerConfig
from .library_versions import (
    CACHE_NAMES,
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    accepts_both_cache_names,
    named_cache,
    refuse_unknown_arguments,
)
from .local_rnn import GateProjection
from .positions import packed_segment_ids, positions_in_sequence, sinusoidal_positions
from .recurrence_encoding import RecurrenceEncoding


logger = logging.get_logger(__name__)

INPUTS = ("input_ids", "attention_mask", "position_ids", *CACHE_NAMES, "inputs_embeds", "input_values", "labels")


def check_ids(name: str, ids: torch.Tensor, size: int, what: str) -> None:
    """
    Raise a ValueError that names the first id outside [0, size); negative labels (-100) are ignored. Done on the CPU
    alone, where looking at a value costs nothing; an accelerator would have to wait for it.
    """
    if ids.device.type != "cpu" or is_tracing(ids) or ids.numel() == 0:
        return
    lowest, highest = torch.aminmax(ids)
    bad = highest if highest >= size else lowest
    if highest >= size or (lowest < 0 and not (name == "labels" and lowest == -100)):
        raise ValueError(f"`{name}` must lie in [0, {size - 1}] ({what} is {size}), got {bad.item()}")


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

    def __init__(self, config: RTransformerConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        distributed = getattr(config, "distributed_config", None)
        tp_size = getattr(distributed, "tp_size", None) or 1
        if config.num_attention_heads % tp_size:
            raise ValueError(
                f"`num_attention_heads` must be divisible by `tp_size` ({tp_size}), since a process has whole heads, "
                f"got {config.num_attention_heads}"
            )
        if config.num_input_features is not None:
            self.main_input_name = "input_values"
            self._input_embed_layer = "embed_values"  # for get_input_embeddings, which FSDP2 and PEFT ask

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """
        Each parameter on its own (the original code starts several as copies of one another):

        | parameter | initial value |
        |---|---|
        | embeddings, projections, heads: weight | normal(0, `initializer_range`); the padding embedding zero |
        | projections, heads: bias | 0 |
        | LayerNorm weight, bias | 1, 0 |
        | LocalRNN weights and biases | uniform(-1 / sqrt(D), 1 / sqrt(D)), as in torch.nn |
        | REM eta (regular) | uniform on [-2, -1] u [1, 2] |
        | REM nu (cyclical) | uniform on [1, 2] |
        | REM theta (cyclical) | pi / 4 |
        | REM mu (gate) | uniform on [-3, 3] |
        """
        super()._init_weights(module)
        if isinstance(module, GateProjection):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, RecurrenceEncoding):
            eta = torch.empty_like(module.eta).uniform_(-1, 1)
            init.copy_(module.eta, eta + torch.where(eta < 0, -1.0, 1.0))
            init.uniform_(module.nu, 1, 2)
            init.constant_(module.theta, math.pi / 4)
            init.uniform_(module.mu, -3, 3)
            for name, index in module.index_buffers().items():
                init.copy_(getattr(module, name), index)


class RTransformerModel(RTransformerPreTrainedModel):
    """The embedded input, the blocks and the final norm, without a head."""

    def __init__(self, config: RTransformerConfig):
        super().__init__(config)
        if config.num_input_features is None:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        else:
            self.embed_values = nn.Linear(config.num_input_features * config.patch_length, config.hidden_size)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(
            RTransformerBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = make_layer_norm(config) if config.final_norm else nn.Identity()
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
                `seq_idx` `(B, T)` and `cu_seq_lens_q` of the padding-free collators.
            cache (`Cache`, *optional*): keys, values and LocalRNN windows of the past.

        Raises:
            ValueError: none or several of the inputs, input of the wrong width, ids outside the vocabulary, a cache
                that has no room for LocalRNN windows or has lost them.
        """
        refuse_unknown_arguments(kwargs, INPUTS)
        inputs_embeds = self._embed(input_ids, inputs_embeds, input_values)
        batch, length = inputs_embeds.shape[:2]
        if kwargs.get("is_causal", self.config.is_causal) != self.layers[0].self_attn.is_causal:
            raise ValueError(
                f"`is_causal` must be {self.layers[0].self_attn.is_causal}, as in the config the model was made with "
                f"(a LocalRNN has its directions built in), got {kwargs['is_causal']}"
            )
        if not self.config.is_causal:
            if cache is not None:
                raise ValueError("`cache` needs a causal model, but `config.is_causal` is False")
            use_cache = False
        if cache is not None:
            self._check_windows(cache)

        segment_ids = None
        if cache is None:
            seq_idx, cu_seq_lens = kwargs.get("seq_idx"), kwargs.get("cu_seq_lens_q")
            segment_ids = packed_segment_ids(
                batch,
                length,
                position_ids=position_ids if attention_mask is None else None,
                seq_idx=seq_idx,
                cu_seq_lens=cu_seq_lens,
            )
        if use_cache and cache is None and segment_ids is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            is_padding = isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2
            position_ids = positions_in_sequence(
                length,
                attention_mask=attention_mask if is_padding else None,
                segment_ids=segment_ids,
                past_length=0 if cache is None else cache.get_seq_length(),
                device=inputs_embeds.device,
            )

        if isinstance(attention_mask, dict):
            padding_mask = attention_mask.get("linear_attention")
            attention_mask = attention_mask["full_attention"]
        else:
            padding_mask = create_recurrent_attention_mask(self.config, inputs_embeds, attention_mask)
            attention_mask = create_causal_mask(  # bidirectional where `config.is_causal` is False
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                **named_cache(cache),
                and_mask_function=None if segment_ids is None else packed_sequence_mask_function(segment_ids),
            )

        if self.config.position_embedding == "sinusoidal":
            inputs_embeds = inputs_embeds * math.sqrt(self.config.hidden_size)
            inputs_embeds = inputs_embeds + sinusoidal_positions(
                position_ids, self.config.hidden_size, inputs_embeds.dtype
            )
        hidden_states = self.dropout(inputs_embeds)
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                attention_mask=attention_mask,
                padding_mask=padding_mask,
                segment_ids=segment_ids,
                **named_cache(cache),
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **named_cache(cache))

    def _check_windows(self, cache: Cache) -> None:
        """
        Raise a ValueError if the cache has no room for LocalRNN windows, or has keys without the windows that belong to
        them, from which the outputs would be wrong without a sign. No tensor's values are looked at: a static cache,
        which counts its positions in a tensor, is taken as it is.
        """
        if "hybrid" not in self.config.layer_types:
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
        if isinstance(past_length, int) and past_length > 0 and not cache.has_previous_state(0):
            raise ValueError(
                f"`cache` must hold the LocalRNNs' windows with the keys and values of its {past_length} "
                "positions, got none, as in a cache made again from the (key, value) pairs of another; pass that other "
                "cache itself"
            )

    def _embed(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor | None,
        input_values: torch.FloatTensor | None,
    ) -> torch.Tensor:
        """`(B, T, D)` from the one input that is given."""
        features = self.config.num_input_features
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "input_values": input_values}
        given = {name: value for name, value in given.items() if value is not None}
        widths = {"inputs_embeds": ("hidden_size", self.config.hidden_size)}
        if features is None:
            widths["input_ids"] = None
        else:
            patch = self.config.patch_length
            field = "num_input_features" if patch == 1 else "num_input_features * patch_length"
            widths["input_values"] = (field, features * patch)
        if len(given) != 1 or not given.keys() <= widths.keys():
            raise ValueError(
                f"exactly one of {' and '.join(f'`{name}`' for name in widths)} must be given "
                f"(`num_input_features` is {features}), got {' and '.join(given) or 'neither'}"
            )
        [(name, values)] = given.items()
        if name == "input_ids":
            check_ids("input_ids", values, self.config.vocab_size, "`vocab_size`")
            return self.embed_tokens(values)
        field, width = widths[name]
        if values.dim() != 3 or values.shape[-1] != width:
            raise ValueError(
                f"`{name}` must have the shape (batch, length, `{field}` = {width}), got {tuple(values.shape)}"
            )
        return values if name == "inputs_embeds" else self.embed_values(values)


class RTransformerForCausalLM(RTransformerPreTrainedModel, GenerationMixin):
    """A causal language model: the next token's logits at each position."""

    generate = accepts_both_cache_names(GenerationMixin.generate)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: RTransformerConfig):
        super().__init__(config)
        self.model = RTransformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    @staticmethod
    @accepts_both_cache_names
    def create_masks_for_generate(
        config: RTransformerConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor | None]:
        """Both masks for a compiled `generate`: the REM needs the padding too where no LocalRNN asks for it."""
        mask_kwargs = {
            "config": config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            **named_cache(cache),
        }
        return {
            "full_attention": create_causal_mask(**mask_kwargs),
            "linear_attention": create_recurrent_attention_mask(**mask_kwargs),
        }

    @accepts_both_cache_names
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        input_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """
        Inputs as in [`RTransformerModel.forward`].

        Args:
            labels (`(B, T)`, *optional*): the input ids; they are shifted inside, and -100 is not scored.
            logits_to_keep (`int` or tensor): logits of the last so many positions, or of these; 0 for all.

        Returns:
            `logits` `(B, T, V)`, with `labels` also the `loss` in nats a token.
        """
        if labels is not None:
            check_ids("labels", labels, self.config.vocab_size, "`vocab_size`")
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            input_values=input_values,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **named_cache(outputs.cache),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class RTransformerForMaskedLM(RTransformerPreTrainedModel):
    """A masked language model: the logits of each position's own token, from both sides (`is_causal=False`)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: RTransformerConfig):
        super().__init__(config)
        if config.is_causal:
            logger.warning_once(
                "RTransformerForMaskedLM with `is_causal=True` fills each mask from the text before it alone; "
                "`is_causal=False` in the config lets it see both sides"
            )
        self.model = RTransformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        input_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """
        Inputs as in [`RTransformerModel.forward`].

        Args:
            labels (`(B, T)`, *optional*): the token that belongs at each position; -100 is not scored.

        Returns:
            `logits` `(B, T, V)`, with `labels` also the `loss` in nats a scored token.
        """
        if labels is not None:
            check_ids("labels", labels, self.config.vocab_size, "`vocab_size`")
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            input_values=input_values,
            use_cache=False,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["RTransformerForCausalLM", "RTransformerForMaskedLM", "RTransformerModel", "RTransformerPreTrainedModel"]
