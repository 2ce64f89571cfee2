# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
Heads that classify, over the base model of any system of this package: whole sequences, positions, frames, and the two
ends of an answer. A system gets one by a line such as `class SystemForX(XHead, SystemPreTrainedModel)`.
"""

# B batch, T positions, D hidden size

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import QuestionAnsweringModelOutput, TokenClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.import_utils import is_tracing

from .inputs import check_ids
from .library_versions import (
    BaseModelOutputWithPast,
    SequenceClassifierOutputWithPast,
    accepts_both_cache_names,
    named_cache,
)


IGNORED = -100  # the label of what is not scored, as everywhere in Transformers


def real_positions(attention_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """`(B, T)`, bool: which positions of this call are real, as a mask of two dimensions says; None without one."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -length:].bool()


def pool(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, is_causal: bool) -> torch.Tensor:
    """
    `(B, D)` from `(B, T, D)`: the last real position of a causal model, the mean over the real ones of a bidirectional
    one. What is real is said by a mask of two dimensions; all positions are without one.
    """
    batch, length = hidden_states.shape[:2]
    real = real_positions(attention_mask, length)
    if real is None:
        real = torch.ones(batch, length, dtype=torch.bool, device=hidden_states.device)
    if is_causal:
        last = (torch.arange(length, device=hidden_states.device) * real).argmax(-1)
        return hidden_states[torch.arange(batch, device=hidden_states.device), last]
    weights = real.to(hidden_states.dtype)
    return (hidden_states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)


def fitting_labels(labels: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """
    Labels of sequences in the type that the loss of `config.problem_type` takes, which may be None for any.

    Raises:
        ValueError: several labels a row without that problem type, or that problem type with other labels.
    """
    several = labels.dim() > 1 and labels.shape[-1] == config.num_labels > 1
    if config.problem_type == "multi_label_classification":
        if not several:
            raise ValueError(
                f"`labels` must have the shape (batch, `num_labels` = {config.num_labels}) for `problem_type` "
                f"multi_label_classification, got {tuple(labels.shape)}"
            )
        return labels.float()
    if config.problem_type == "regression":
        return labels.float()
    if several and not labels.is_floating_point():
        raise ValueError(
            f"`labels` must have the shape (batch,), got {tuple(labels.shape)}; for several labels a row set "
            "`problem_type` to multi_label_classification"
        )
    return labels.long() if labels.dtype == torch.bool else labels


class LabelScores:
    """A projection to the labels."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = self.base_class(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class SequenceClassificationHead(LabelScores):
    """
    One prediction a sequence: from the last real position of a causal model, from the mean over the real positions of a
    bidirectional one.
    """

    def scores(self, outputs: BaseModelOutputWithPast, real: torch.Tensor | None) -> torch.Tensor:
        """`(B, num_labels)` from the base model's outputs; `real` `(B, T)` is 0 where padded."""
        return self.score(pool(outputs.last_hidden_state, real, self.config.is_causal))

    @accepts_both_cache_names
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        input_values: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """
        Inputs as in the base model's `forward`. What is padded is said by `attention_mask`; without one, by
        `input_ids` that equal `pad_token_id`, if the config has that.

        Args:
            labels (*optional*): `(B,)` class ids, `(B, num_labels)` for several labels or regression.

        Returns:
            `logits` `(B, num_labels)`, with `labels` also the `loss`: the mean over the labels or, with
            `num_items_in_batch`, as `Trainer` gives it where it accumulates gradients, the sum divided by it.
        """
        if labels is not None:
            labels = fitting_labels(labels, self.config)
        if labels is not None and self.config.problem_type in (None, "single_label_classification"):
            if self.num_labels > 1 and not labels.is_floating_point():
                check_ids("labels", labels, self.num_labels, "`num_labels`")
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
        real = attention_mask
        if (real is None or real.dim() != 2) and input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        logits = self.scores(outputs, real)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config, **kwargs)
            count = kwargs.get("num_items_in_batch")
            if count is not None and self.config.problem_type != "single_label_classification":
                loss = loss * (labels.numel() / count)  # the library's losses of numbers are means, whatever the count
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            **named_cache(outputs.cache),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class TokenClassificationHead(LabelScores):
    """One prediction a position, such as tags of tokens."""

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
        Inputs as in the base model's `forward`.

        Args:
            labels (`(B, T)`, *optional*): class ids, of which -100 is not scored.

        Returns:
            `logits` `(B, T, num_labels)`, with `labels` also the `loss`.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            input_values=input_values,
            **kwargs,
        )
        logits = self.score(outputs.last_hidden_state)
        loss = None if labels is None else self.score_labels(logits, labels, attention_mask, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def score_labels(
        self, logits: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs
    ) -> torch.Tensor:
        """The loss of the labels, after they are checked; `num_items_in_batch` divides a summed loss."""
        check_ids("labels", labels, self.num_labels, "`num_labels`")
        return self.loss_function(logits=logits, labels=labels, config=self.config, **kwargs)


class FrameClassificationHead(TokenClassificationHead):
    """
    One or several labels of each frame, such as the notes that sound in it.

    The loss of several labels is the mean of the binary cross-entropies

        -y log sigmoid(z) - (1 - y) log(1 - sigmoid(z))

    over all labels of all frames that are scored; of one label a frame, the mean cross-entropy over those frames. With
    `num_items_in_batch` the sum is divided by that number in place of the number of labels that are scored.

    `labels` are `(B, T, num_labels)`, each from 0 to 1, for several labels a frame, and `(B, T)` class ids for one. Not
    scored are labels of -100 and frames whose `attention_mask` is 0. Labels of another shape than `config.problem_type`
    asks for, or out of range, raise a ValueError.
    """

    def score_labels(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> torch.Tensor:
        self._check_labels(labels, logits.shape[1])
        labels, count = labels.to(logits.device), num_items_in_batch
        scored = labels != IGNORED
        real = real_positions(attention_mask, logits.shape[1])
        if real is not None:
            scored = scored & real.to(labels.device).view(*real.shape, *[1] * (labels.dim() - 2))
        targets = torch.where(scored, labels, 0)
        if labels.dim() == 3:
            losses = F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none")
        else:
            losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        if count is None:
            count = scored.sum().clamp(min=1)
        elif torch.is_tensor(count):
            count = count.to(losses.device)
        return (losses * scored).sum() / count

    def _check_labels(self, labels: torch.Tensor, length: int) -> None:
        wanted = {
            None: (2, 3),
            "single_label_classification": (2,),
            "multi_label_classification": (3,),
        }.get(self.config.problem_type)
        if wanted is None:
            raise ValueError(
                "`problem_type` must be multi_label_classification, single_label_classification or None for frames, "
                f"got {self.config.problem_type!r}"
            )
        shapes = {2: f"(batch, length = {length})", 3: f"(batch, length = {length}, `num_labels` = {self.num_labels})"}
        fits = labels.dim() in wanted and tuple(labels.shape[1:]) in ((length,), (length, self.num_labels))
        if not fits:
            raise ValueError(
                f"`labels` must have the shape {' or '.join(shapes[dims] for dims in wanted)} (`problem_type` is "
                f"{self.config.problem_type}), got {tuple(labels.shape)}"
            )
        if labels.dim() == 2:
            check_ids("labels", labels, self.num_labels, "`num_labels`")
        elif labels.device.type == "cpu" and not is_tracing(labels):
            wrong = labels[(labels != IGNORED) & ~((labels >= 0) & (labels <= 1))]
            if wrong.numel():
                raise ValueError(f"`labels` must lie in [0, 1], or be -100 where not scored, got {wrong[0].item()}")


class QuestionAnsweringHead:
    """Extractive question answering: where the answer begins and ends."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.model = self.base_class(config)
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
        Inputs as in the base model's `forward`.

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
