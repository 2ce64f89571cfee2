# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""Heads that classify: whole sequences, positions, and the two ends of an answer."""

# B batch, T positions, D hidden size

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_rtransformer import RTransformerConfig
from .modeling_rtransformer import RTransformerModel, RTransformerPreTrainedModel, check_ids


class RTransformerForSequenceClassification(RTransformerPreTrainedModel):
    """
    One prediction a sequence: from the last real position of a causal model, from the mean over the real positions of a
    bidirectional one.
    """

    def __init__(self, config: RTransformerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = RTransformerModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        input_values: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """
        Inputs as in [`RTransformerModel.forward`]. What is padded is said by `attention_mask`; without one, by
        `input_ids` that equal `pad_token_id`, if the config has that.

        Args:
            labels (*optional*): `(B,)` class ids, `(B, num_labels)` for several labels or regression.

        Returns:
            `logits` `(B, num_labels)`, with `labels` also the `loss`.
        """
        if labels is not None and self.config.problem_type in (None, "single_label_classification"):
            if self.num_labels > 1 and not labels.is_floating_point():
                check_ids("labels", labels, self.num_labels, "`num_labels`")
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            input_values=input_values,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(self._pool(outputs.last_hidden_state, input_ids, attention_mask))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _pool(
        self,
        hidden_states: torch.Tensor,  # (B, T, D)
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """`(B, D)`: the last real position, or the mean over the real ones."""
        batch, length = hidden_states.shape[:2]
        real = torch.ones(batch, length, dtype=torch.bool, device=hidden_states.device)
        if attention_mask is not None and attention_mask.dim() == 2:
            real = attention_mask[:, -length:].bool()
        elif input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        if self.config.is_causal:
            last = (torch.arange(length, device=hidden_states.device) * real).argmax(-1)
            return hidden_states[torch.arange(batch, device=hidden_states.device), last]
        weights = real.to(hidden_states.dtype)
        return (hidden_states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)


class RTransformerForTokenClassification(RTransformerPreTrainedModel):
    """One prediction a position: tags of tokens, or several labels of a frame."""

    def __init__(self, config: RTransformerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = RTransformerModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        input_values: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """
        Inputs as in [`RTransformerModel.forward`].

        Args:
            labels (`(B, T)`, *optional*): class ids, of which -100 is not scored.

        Returns:
            `logits` `(B, T, num_labels)`, with `labels` also the `loss`.
        """
        if labels is not None:
            check_ids("labels", labels, self.num_labels, "`num_labels`")
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            input_values=input_values,
            **kwargs,
        )
        logits = self.score(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, config=self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class RTransformerForQuestionAnswering(RTransformerPreTrainedModel):
    """Extractive question answering: where the answer begins and ends."""

    def __init__(self, config: RTransformerConfig):
        super().__init__(config)
        self.model = RTransformerModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        input_values: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        """
        Inputs as in [`RTransformerModel.forward`].

        Args:
            start_positions, end_positions (`(B,)`, *optional*): the answer's first and last position.

        Returns:
            `start_logits` and `end_logits` `(B, T)`, with positions also the `loss`, the mean of both cross-entropies.
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
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "RTransformerForQuestionAnswering",
    "RTransformerForSequenceClassification",
    "RTransformerForTokenClassification",
]
