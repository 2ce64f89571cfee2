# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the Feedback Transformer."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_rtransformer import SHARED_FIELDS, RTransformerConfig


# As in configuration_rtransformer.py: what Transformers saves beside a checkpoint of this config.
SAVED_BESIDE_A_CHECKPOINT = """
from .modeling_feedback import FeedbackTransformerModel
"""

FEEDBACK_POSITIONS = ("none", "shared", "layer")
FEEDBACK_FORMS = ("steps", "parallel")

AUTO_MAP = {
    "AutoConfig": "configuration_feedback.FeedbackTransformerConfig",
    "AutoModel": "modeling_feedback.FeedbackTransformerModel",
    "AutoModelForAudioFrameClassification": "modeling_feedback.FeedbackTransformerForAudioFrameClassification",
    "AutoModelForCausalLM": "modeling_feedback.FeedbackTransformerForCausalLM",
    "AutoModelForSequenceClassification": "modeling_feedback.FeedbackTransformerForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_feedback.FeedbackTransformerForTokenClassification",
}


@strict
class FeedbackTransformerConfig(RTransformerConfig):
    r"""
    A Transformer whose layers all attend to one memory a position, the weighted sum of all layers at that position.
    The fields of [`RTransformerConfig`] mean the same here; `is_causal` is True and `num_local_rnns` 0 by default.

    Args:
        feedback_window (`int`, *optional*): memories M that a position sees, of the M positions before it; None for
            all.
        feedback_shared_kv (`bool`, defaults to `True`):
            True: keys and values of a memory are computed once, for all layers. False: each layer has projections of
            its own, behind its own LayerNorm, which its queries have too.
        feedback_norm (`bool`, defaults to `True`): with `feedback_shared_kv`, a LayerNorm of the memory before the
            projections.
        feedback_positions (`str`, defaults to `"none"`):
            A learned score of the distance between query and memory: `"shared"` is one vector a distance for all layers
            and heads (the authors' code), `"layer"` one for each head of each layer, with biases (labml's code). Both
            need `feedback_window`, the largest distance. `"none"` leaves the order to the recurrence.
        feedback_form (`str`, defaults to `"steps"`):
            How several positions are computed: `"steps"`, one after the other; `"parallel"`, by passes over all of them
            until the memories do not change any more, with the same outputs and gradients up to `feedback_tolerance`.
        feedback_tolerance (`float`, defaults to 1e-6): the largest change of a memory in the last pass, relative to the
            largest entry of all memories; the same for the gradient of the memories.
        feedback_max_passes (`int`, defaults to 32): passes after which the steps are computed instead, with a warning.

    Raises:
        ValueError: a value out of range or an unknown name, with the field, the value and what would be right.

    Source: Fan et al. 2020, "Addressing Some Limitations of Transformers with Feedback Memory" (arXiv 2002.09402).

    Example:

    ```python
    >>> from modeling_rtransformer import FeedbackTransformerConfig, FeedbackTransformerForCausalLM

    >>> config = FeedbackTransformerConfig(hidden_size=128, num_attention_heads=4, feedback_window=64)
    >>> model = FeedbackTransformerForCausalLM(config)
    ```
    """

    model_type = "feedback_transformer"
    code: ClassVar[dict[str, str]] = AUTO_MAP
    base_model_tp_plan: ClassVar[None] = None

    num_local_rnns: int = 0
    feedback_window: int | None = None
    feedback_shared_kv: bool = True
    feedback_norm: bool = True
    feedback_positions: str = "none"
    feedback_form: str = "steps"
    feedback_tolerance: float = 1e-6
    feedback_max_passes: int = 32

    def validate_architecture(self) -> None:
        """Check every field against the others. Called by the strict dataclass; raises ValueError."""
        super().validate_architecture()
        self._refuse_unread(SHARED_FIELDS)
        self._require(self.position_embedding in ("none", "sinusoidal"), "position_embedding", "none or sinusoidal")
        self._require(self.is_causal, "is_causal", "True (a memory is made after the position before it)")
        self._require_name("feedback_positions", FEEDBACK_POSITIONS)
        self._require_name("feedback_form", FEEDBACK_FORMS)
        self._require(0 <= self.feedback_tolerance < 1, "feedback_tolerance", "in [0, 1)")
        self._require(self.feedback_max_passes >= 1, "feedback_max_passes", "at least 1")
        if self.feedback_window is not None:
            self._require(self.feedback_window >= 1, "feedback_window", "at least 1, or None for all memories")
        elif self.feedback_positions != "none":
            raise ValueError(
                "`feedback_window` must be the largest distance of `feedback_positions` "
                f"{self.feedback_positions!r}, got None"
            )

    @property
    def layer_types(self) -> list[str]:
        """
        What the cache of Transformers must hold for each layer: keys and values of all memories or of the last ones, in
        the first layer alone where all layers share them, and as a "hybrid" or "linear_attention" the LocalRNN windows.
        """
        kinds = ("full_attention", "hybrid")
        if self.feedback_window is not None:
            kinds = ("sliding_attention", "hybrid_sliding")
        with_keys = kinds[self.has_windows]
        if self.feedback_shared_kv:
            others = "linear_attention" if self.has_windows else with_keys
            return [with_keys] + [others] * (self.num_hidden_layers - 1)
        return [with_keys] * self.num_hidden_layers

    @property
    def kv_sharing_modes(self) -> list[str | None] | None:
        """Which layers have no cache of their own, for Transformers from 5.23 on."""
        return [None] + ["reuse"] * self.num_kv_shared_layers if self.num_kv_shared_layers else None

    @property
    def num_kv_shared_layers(self) -> int:
        """The same for older versions: the number of these layers, which are the last ones."""
        return self.num_hidden_layers - 1 if self.feedback_shared_kv and not self.has_windows else 0

    @property
    def sliding_window(self) -> int | None:
        """Positions of a sliding window of Transformers, which counts the current one: one more than the memories."""
        return None if self.feedback_window is None else self.feedback_window + 1

    @sliding_window.setter
    def sliding_window(self, positions: int | None) -> None:
        self.feedback_window = None if positions is None else positions - 1


__all__ = ["FeedbackTransformerConfig"]
