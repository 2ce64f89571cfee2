# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
Heads of language models, over the base model of any system of this package.

A system gets a head by one line, `class SystemForCausalLM(CausalLMHead, SystemPreTrainedModel, GenerationMixin)`, where
`SystemPreTrainedModel.base_class` is its base model. The generic heads of Transformers ask `AutoModel` for the base,
which fails for code that is loaded from a folder: Transformers then loads the config's class twice, and `AutoModel`
knows one of the two.
"""

# B batch, T positions of this call, V vocabulary

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.generation import ContinuousBatchingManager, StoppingCriteria, StoppingCriteriaList
from transformers.modeling_outputs import MaskedLMOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .engines import refuse_continuous_batching
from .inputs import check_ids
from .library_versions import BaseModelOutputWithPast, CausalLMOutputWithPast, accepts_both_cache_names, named_cache
from .structured_linear import with_folded_linears


logger = logging.get_logger(__name__)


class LanguageModelHead:
    """A projection to the vocabulary, which uses the embedding's weight if the config ties them."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.model = self.base_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    def loss_of(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor | None,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """The loss of the labels, or of those that are shifted already, after they are checked; None without labels."""
        targets = {"labels": labels, "shift_labels": shift_labels}
        targets = {name: ids for name, ids in targets.items() if ids is not None}
        if not targets:
            return None
        for name, ids in targets.items():
            check_ids(name, ids, self.config.vocab_size, "`vocab_size`")
        return self.loss_function(
            logits=logits, vocab_size=self.config.vocab_size, **{"labels": None, **targets}, **kwargs
        )


class StopText(StoppingCriteria):
    """Stops a row when its last token completes one of some texts in what the tokenizer decodes."""

    def __init__(self, tokenizer, texts: str | list[str]):
        self.tokenizer = tokenizer
        self.texts = [texts] if isinstance(texts, str) else list(texts)
        self.tokens = 1 + max(map(len, self.texts))  # of which the text may be made

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        stopped = []
        for row in input_ids[:, -self.tokens - 1 :].tolist():
            before, now = self.tokenizer.decode(row[:-1]), self.tokenizer.decode(row)
            stopped.append(any(now.count(text) > before.count(text) for text in self.texts))
        return torch.tensor(stopped, device=input_ids.device)


class CausalLMHead(LanguageModelHead):
    """
    A causal language model: the next token's logits at each position. `GenerationMixin` stands behind the system's
    `PreTrainedModel` among the base classes.
    """

    @accepts_both_cache_names
    @with_folded_linears
    def generate(self, inputs: torch.Tensor | None = None, *arguments, **options):
        """
        As `GenerationMixin.generate`. Prompts that are padded behind their end are padded before their beginning first,
        and `stop_strings` work with every tokenizer: Transformers' own criterion needs one that can spell "abcdef".
        """
        ids, mask = options.pop("input_ids", None) if inputs is None else inputs, options.get("attention_mask")
        if ids is not None and mask is not None and mask.shape == ids.shape and not mask[:, -1].all():
            order = mask.bool().long().argsort(dim=1, stable=True)
            ids, options["attention_mask"] = ids.gather(1, order), mask.gather(1, order)
        if options.get("stop_strings") and options.get("tokenizer") is not None:
            stop = StopText(options["tokenizer"], options.pop("stop_strings"))
            options["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or ()), stop])
        return super().generate(ids, *arguments, **options)

    def init_continuous_batching(self, *args, **kwargs) -> ContinuousBatchingManager:
        """As in Transformers; a NotImplementedError where a model remembers more than keys and values."""
        refuse_continuous_batching(self.config)
        manager = super().init_continuous_batching(*args, **kwargs)
        # REMs and the attentive recurrence read the values of the past, and block tables leave them in the cache.
        if self.config.has_rems or self.config.attentive_steps:
            manager.continuous_batching_config.max_blocks_per_request = 0
        return manager

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
        Inputs as in the base model's `forward`.

        Args:
            labels (`(B, T)`, *optional*): the input ids; they are shifted inside, and -100 is not scored.
            logits_to_keep (`int` or tensor): logits of the last so many positions, or of these; 0 for all.
            shift_labels (`(B, T)`, *optional*):
                in place of `labels`, the targets, shifted already, as Trainer gives them where it splits sequences over
                processes.

        Returns:
            `logits` `(B, T, V)`, with `labels` or `shift_labels` also the `loss` in nats a token.
        """
        shift_labels = kwargs.pop("shift_labels", None)  # no parameter, since Trainer asks a data set for those
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
        return CausalLMOutputWithPast(
            loss=self.loss_of(logits, labels, shift_labels, **kwargs),
            logits=logits,
            **named_cache(outputs.cache),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MaskedLMHead(LanguageModelHead):
    """A masked language model: the logits of each position's own token, from both sides (`is_causal=False`)."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        if config.is_causal:
            logger.warning_once(
                f"{type(self).__name__} with `is_causal=True` fills each mask from the text before it alone; "
                "`is_causal=False` in the config lets it see both sides"
            )

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
        Inputs as in the base model's `forward`.

        Args:
            labels (`(B, T)`, *optional*): the token that belongs at each position; -100 is not scored.

        Returns:
            `logits` `(B, T, V)`, with `labels` also the `loss` in nats a scored token.
        """
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
        return MaskedLMOutput(
            loss=self.loss_of(logits, labels, **kwargs),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
