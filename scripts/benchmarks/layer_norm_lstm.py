"""The layer-normalised LSTM of the baseline RNMT+ against torch.nn's LSTM and against its definition."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from scripts.baselines.layer_norm_lstm import LayerNormLSTM
from scripts.benchmarks.measuring import Case, backward


BATCH, LENGTH, SIZE = 16, 80, 128


class TorchLSTM(nn.LSTM):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs)[0]


def build(against, device, small):
    """The forward and backward pass of the layer, and of its definition or of torch.nn's LSTM."""
    batch, length, size = (2, 20, 8) if small else (BATCH, LENGTH, SIZE)
    torch.manual_seed(0)
    ours = LayerNormLSTM(size, size).to(device)
    theirs = TorchLSTM(size, size, batch_first=True).to(device)
    if against == "definition":
        theirs = LayerNormLSTM(size, size).to(device)
        theirs.load_state_dict(ours.state_dict())
        theirs.implementation = "plain"
    inputs = torch.randn(batch, length, size, device=device, requires_grad=True)
    grad = torch.randn(batch, length, size, device=device)
    return tuple(partial(backward, partial(m, inputs), [inputs, *m.parameters()], grad) for m in (ours, theirs))


def cases(device_type: str) -> Iterator[Case]:
    name = f"layer-normalised LSTM B{BATCH} L{LENGTH} D{SIZE}, forward and backward"
    on_cpu = device_type == "cpu"
    yield Case(name, "torch.nn's LSTM", partial(build, "torch"), "time", 2 if on_cpu else None)
    yield Case(name, "its definition", partial(build, "definition"))
