"""
RNN, GRU and LSTM of torch.nn, stacked: the recurrent networks that the papers compare with.

Initial values of the layers: uniform(-1 / sqrt(D), 1 / sqrt(D)), as torch.nn has them. `hidden_dropout` acts between
layers.
"""

# B batch, T positions, D hidden size

import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from modeling_rtransformer.configuration_rtransformer import nearest
from scripts.baselines.heads import BaselineConfig, BaselineModel, register


KINDS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


@strict
class RecurrentConfig(BaselineConfig):
    """
    Args:
        kind: `rnn` (tanh), `gru` or `lstm`. The rest is in [`BaselineConfig`].
    """

    model_type = "recurrent"

    kind: str = "lstm"

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        if self.kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {self.kind!r}{nearest(self.kind, KINDS)}")


class RecurrentModel(BaselineModel):
    """The stacked recurrent layers over the embedded input."""

    config_class = RecurrentConfig

    @staticmethod
    def make_layers(config: RecurrentConfig) -> nn.Module:
        return KINDS[config.kind](
            config.input_size,
            config.hidden_size,
            config.num_hidden_layers,
            dropout=config.hidden_dropout if config.num_hidden_layers > 1 else 0.0,
            batch_first=True,
        )

    def run(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(inputs)[0]


register(RecurrentConfig, RecurrentModel)
