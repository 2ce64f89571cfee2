"""
Temporal convolutional network (TCN): causal convolutions whose dilation doubles with each layer, by `pytorch_tcn`.

A layer is two convolutions of width `kernel_size` with weight normalisation, ReLU and dropout, beside a residual
connection; the outputs see 1 + 2 (kernel_size - 1) (2^layers - 1) positions. Initial values are those of torch.nn: the
library's, like the authors' 0.01, does not reach a convolution whose weight is normalised.

Source: Bai, Kolter, Koltun 2018, "An Empirical Evaluation of Generic Convolutional and Recurrent Networks for Sequence
Modeling" (arXiv 1803.01271), section 3. The library: github.com/paul-krug/pytorch-tcn.
"""

# B batch, T positions, D hidden size

import importlib.util

import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from scripts.baselines.heads import BaselineConfig, BaselineModel, register


@strict
class TCNConfig(BaselineConfig):
    """
    Args:
        kernel_size: width of each convolution, at least 2.
        hidden_dropout: after each convolution. The rest is in [`BaselineConfig`].

    Raises:
        ValueError: besides [`BaselineConfig`]'s, the library pytorch-tcn is not installed.
    """

    model_type = "tcn"

    kernel_size: int = 3

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        if self.kernel_size < 2:
            raise ValueError(f"`kernel_size` must be at least 2, got {self.kernel_size}")
        if importlib.util.find_spec("pytorch_tcn") is None:
            raise ValueError(
                "`model_type` tcn needs the library pytorch-tcn, which is not installed; pip install pytorch-tcn"
            )


class TCNModel(BaselineModel):
    """The convolutions over the embedded input."""

    config_class = TCNConfig

    @staticmethod
    def make_layers(config: TCNConfig) -> nn.Module:
        from pytorch_tcn import TCN

        return TCN(
            config.input_size,
            [config.hidden_size] * config.num_hidden_layers,
            kernel_size=config.kernel_size,
            dropout=config.hidden_dropout,
            causal=True,
            use_norm="weight_norm",
            activation="relu",
            input_shape="NLC",
        )

    def run(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(inputs)


register(TCNConfig, TCNModel)
