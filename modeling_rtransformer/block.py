# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
One block of R-Transformer, RSA or both, and the table of the mixers that a block is made of:

    for each LocalRNN n of the block:   x = x + dropout(LocalRNN_n(norm(x)))
                                        x = x + dropout(Attention(norm(x)))
                                        x = x + dropout(FeedForward(norm(x)))

Source: Wang et al. 2019, "R-Transformer" (arXiv 1907.05572), section 3 and the published code.
"""

# B batch, T positions of this call, D hidden size

from typing import NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention import RTransformerAttention
from .block_recurrent import BlockRecurrentAttention
from .configuration_rtransformer import RTransformerConfig
from .layer_norms import make_layer_norm
from .library_versions import accepts_both_cache_names
from .local_rnn import RTransformerLocalRNN
from .positions import SequenceInfo
from .structured_linear import make_linear


def wait_for_offloaded(cache: Cache | None, layer_idx: int, device: torch.device) -> None:
    """
    Wait until an offloading cache has the state of a block back on the block's device.

    The cache copies the state back on a stream of its own, and waits for that stream when keys and values are added.
    This is too late for the LocalRNN windows, which are read before. In a model of one block the cache never waits.
    """
    if isinstance(cache, Cache) and cache.offloading and layer_idx < len(cache.layers):
        torch.cuda.current_stream(device).wait_stream(cache.prefetch_stream)
        cache.layers[layer_idx].prefetch()


class RTransformerMLP(nn.Module):
    """Feed-forward sublayer: D -> intermediate size -> D, with dropout between."""

    def __init__(self, config: RTransformerConfig):
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.up_proj = make_linear(config, "feed_forward", size, inner, bias)
        self.down_proj = make_linear(config, "feed_forward", inner, size, bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.dropout(self.act_fn(self.up_proj(hidden_states))))


class Mixer(NamedTuple):
    """
    A kind of sublayer that mixes positions.

    Args:
        module: `module(config, layer_idx, index)`, whose `forward(hidden_states, sequence, cache, **kwargs)` returns
            the output `(B, T, D)`, the attention weights or None where it has none, and, where it makes them, the
            attentive states for the blocks above.
        name: of the module in a block, by which its parameters are saved; its LayerNorm is `{name}_norm`.
        several: whether a block may have several. They are a list then, named `{name}s`, as are `{name}_norms`.
    """

    module: type[nn.Module]
    name: str
    several: bool = False


# The mixers that a block may have, by the names that `config.layer_mixers` uses.
MIXERS = {
    "local_rnn": Mixer(RTransformerLocalRNN, "local_rnn", several=True),
    "attention": Mixer(RTransformerAttention, "self_attn"),
    "block_recurrent": Mixer(BlockRecurrentAttention, "recurrent_attn"),
}


class RTransformerBlock(GradientCheckpointingLayer):
    """
    The mixers that `config.layer_mixers(layer_idx)` names, in that order, and the feed-forward sublayer, each with a
    LayerNorm and beside a residual connection:

        x = x + dropout(mixer(norm(x)))          for each mixer
        x = x + dropout(feed_forward(norm(x)))

    With `norm_position` "post" it is x = norm(x + dropout(sublayer(x))).
    """

    def __init__(self, config: RTransformerConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.kinds = list(config.layer_mixers(layer_idx))
        for kind, count in config.layer_mixers(layer_idx).items():
            mixer = MIXERS[kind]
            modules = [mixer.module(config, layer_idx, index) for index in range(count)]
            norms = [make_layer_norm(config) for _ in range(count)]
            if mixer.several:
                self.add_module(f"{mixer.name}s", nn.ModuleList(modules))
                self.add_module(f"{mixer.name}_norms", nn.ModuleList(norms))
            else:
                [module], [norm] = modules, norms
                self.add_module(mixer.name, module)
                self.add_module(f"{mixer.name}_norm", norm)
        self.mlp = RTransformerMLP(config)
        self.mlp_norm = make_layer_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.norm_after = config.norm_position == "post"

    @accepts_both_cache_names
    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, T, D)
        sequence: SequenceInfo,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Returns `(B, T, D)`; the first block of a model with attentive states returns these too, as a pair."""
        wait_for_offloaded(cache, self.layer_idx, hidden_states.device)
        attentive_states = []
        for norm, mixer in self._sublayers():
            update, _, *made = mixer(
                hidden_states if self.norm_after else norm(hidden_states), sequence, cache, **kwargs
            )
            attentive_states += made
            hidden_states = self._add(hidden_states, update, norm)
        update = self.mlp(hidden_states if self.norm_after else self.mlp_norm(hidden_states))
        hidden_states = self._add(hidden_states, update, self.mlp_norm)
        return (hidden_states, *attentive_states) if attentive_states else hidden_states

    def _add(self, hidden_states: torch.Tensor, update: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """The residual connection."""
        hidden_states = hidden_states + self.dropout(update)
        return norm(hidden_states) if self.norm_after else hidden_states

    def _sublayers(self) -> list[tuple[nn.Module, nn.Module]]:
        """Each mixer behind its LayerNorm, in the order in which they run."""
        pairs = []
        for kind in self.kinds:
            name = MIXERS[kind].name
            if MIXERS[kind].several:
                pairs += zip(getattr(self, f"{name}_norms"), getattr(self, f"{name}s"))
            else:
                pairs.append((getattr(self, f"{name}_norm"), getattr(self, name)))
        return pairs
