# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the Temporal Latent Bottleneck."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_rtransformer import SHARED_FIELDS, RTransformerConfig


# As in configuration_rtransformer.py: what Transformers saves beside a checkpoint of this config.
SAVED_BESIDE_A_CHECKPOINT = """
from .modeling_latent_bottleneck import TemporalLatentBottleneckModel
"""

LATENT_INITS = ("learned", "zeros")
READ_OUTS = ("latents", "positions")

HEADS = ("ForAudioFrameClassification", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification")
AUTO_MAP = {
    "AutoConfig": "configuration_latent_bottleneck.TemporalLatentBottleneckConfig",
    "AutoModel": "modeling_latent_bottleneck.TemporalLatentBottleneckModel",
    **{f"AutoModel{head}": f"modeling_latent_bottleneck.TemporalLatentBottleneck{head}" for head in HEADS},
}


@strict
class TemporalLatentBottleneckConfig(RTransformerConfig):
    r"""
    A Transformer over chunks of a sequence, and latents that carry what is needed from one chunk to the next. The
    fields of [`RTransformerConfig`] mean the same here; `num_local_rnns` is 0 by default.

    Args:
        num_hidden_layers (`int`, defaults to 3): self-attention layers, divisible by `cross_attention_every`.
        chunk_length (`int`, defaults to 32): positions K of a chunk, at least 2. Self-attention, LocalRNNs and REMs do
            not leave their chunk.
        num_latents (`int`, defaults to 8): vectors N that are carried from chunk to chunk.
        cross_attention_every (`int`, defaults to 1): self-attention layers R before each layer in which the positions
            attend to the latents.
        latent_init (`str`, defaults to `"learned"`): the latents before the first chunk, `"learned"` or `"zeros"`.
        latent_positions (`bool`, defaults to `False`): add sinusoids of 0 to N - 1 to the latents at the start of every
            chunk, as the code for Long Range Arena does; needed with `latent_init` "zeros", whose latents would all
            be the same.
        chunk_positions (`bool`, defaults to `False`): add sinusoids of 0 to K - 1 to the positions of every chunk.
        read_out (`str`, defaults to `"latents"`):
            What classifies a sequence: `"latents"` is an MLP on the mean of the normalised last latents, `"positions"`
            a linear layer on the last position, or on the mean if not causal.
        is_causal (`bool`, defaults to `True`): False: the positions of a chunk see each other; the latents still go
            from left to right. No LocalRNN then.

    Raises:
        ValueError: a value out of range or an unknown name, with the field, the value and what would be right.

    Source: Didolkar et al. 2022, "Temporal Latent Bottleneck" (arXiv 2205.14794).

    Example:

    ```python
    >>> from modeling_rtransformer import TemporalLatentBottleneckConfig, TemporalLatentBottleneckForCausalLM

    >>> config = TemporalLatentBottleneckConfig(hidden_size=128, num_attention_heads=4, chunk_length=16, num_latents=5)
    >>> model = TemporalLatentBottleneckForCausalLM(config)
    ```
    """

    model_type = "temporal_latent_bottleneck"
    code: ClassVar[dict[str, str]] = AUTO_MAP
    base_model_tp_plan: ClassVar[None] = None

    num_local_rnns: int = 0
    chunk_length: int = 32
    num_latents: int = 8
    cross_attention_every: int = 1
    latent_init: str = "learned"
    latent_positions: bool = False
    chunk_positions: bool = False
    read_out: str = "latents"

    def validate_architecture(self) -> None:
        """Check every field against the others. Called by the strict dataclass; raises ValueError."""
        super().validate_architecture()
        self._refuse_unread(SHARED_FIELDS)
        self._require(self.position_embedding in ("none", "sinusoidal"), "position_embedding", "none or sinusoidal")
        self._require(self.chunk_length >= 2, "chunk_length", "at least 2")
        self._require(self.num_latents >= 1, "num_latents", "at least 1")
        self._require(self.cross_attention_every >= 1, "cross_attention_every", "at least 1")
        self._require(
            self.num_hidden_layers % self.cross_attention_every == 0,
            "num_hidden_layers",
            f"divisible by `cross_attention_every` ({self.cross_attention_every})",
        )
        self._require_name("latent_init", LATENT_INITS)
        self._require_name("read_out", READ_OUTS)
        self._require(
            self.latent_positions or self.latent_init == "learned" or self.num_latents == 1,
            "latent_positions",
            "True with `latent_init` 'zeros', since nothing else tells the latents apart",
        )
        if self.latent_positions or self.chunk_positions:
            self._require(self.hidden_size % 2 == 0, "hidden_size", "even with sinusoidal positions")
        if not self.is_causal:
            self._require(self.num_local_rnns == 0, "num_local_rnns", "0 with `is_causal` False")

    @property
    def layer_types(self) -> list[str]:
        """
        What the cache of Transformers must hold: of each self-attention layer the keys and values of the chunk, and the
        LocalRNN windows if any; with the last layer also the latents and the outputs of the chunk.
        """
        others = "hybrid_sliding" if self.has_windows else "sliding_attention"
        return [others] * (self.num_hidden_layers - 1) + ["hybrid_sliding"]

    @property
    def sliding_window(self) -> int:
        """Positions of a sliding window of Transformers, which counts the current one."""
        return self.chunk_length

    @sliding_window.setter
    def sliding_window(self, positions: int) -> None:
        self.chunk_length = positions

    @property
    def number_of_conv_states(self) -> int:
        """Windows of each layer of the cache: the LocalRNNs', then the latents, then the outputs of the chunk."""
        return (self.num_local_rnns if self.has_windows else 0) + 2


__all__ = ["TemporalLatentBottleneckConfig"]
