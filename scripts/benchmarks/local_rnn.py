"""The LocalRNN against its definition (unfolded windows in `torch.nn`'s RNN) and its matrix products alone."""

# B batch, L length, D hidden size, K window, G gates

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from modeling_rtransformer.local_rnn import LocalRNN
from modeling_rtransformer.local_rnn_steps import NUM_GATES, local_rnn_reference
from scripts.benchmarks.measuring import Case, backward


# kind, B, L, D, K; target speed-ups of training on a CPU and on a GPU
SHAPES = [
    ("gru", 16, 400, 512, 7, 2.5, 3),
    ("gru", 32, 784, 32, 7, 2, 8),
    ("lstm", 16, 80, 128, 9, 2, 5),
    ("rnn", 16, 255, 160, 6, 2, 5),
]


class UnfoldedLocalRNN(nn.Module):
    """The definition of a LocalRNN, with the parameters of `local_rnn`."""

    def __init__(self, local_rnn: LocalRNN):
        super().__init__()
        size = local_rnn.hidden_size
        self.window = local_rnn.window
        torch_rnn = getattr(nn, local_rnn.rnn_type.upper())  # nn.GRU, nn.LSTM or nn.RNN
        self.rnn = torch_rnn(size, size, batch_first=True).to(local_rnn.input_proj.weight)
        with torch.no_grad():
            for name, projection in (("ih_l0", local_rnn.input_proj), ("hh_l0", local_rnn.recurrent_proj)):
                getattr(self.rnn, f"weight_{name}").copy_(projection.weight)
                getattr(self.rnn, f"bias_{name}").copy_(projection.bias)

    def forward(self, inputs: torch.Tensor, segment_ids: torch.Tensor | None = None) -> torch.Tensor:
        return local_rnn_reference(inputs, self.rnn, self.window, segment_ids)


def build(kind, batch, length, size, window, training, device, small):
    """Inference, or the forward and backward pass, of a LocalRNN and of its definition."""
    if small:
        batch, length, size = 2, 20, 8
    torch.manual_seed(0)
    local_rnn = LocalRNN(size, window, kind).to(device)
    modules = local_rnn, UnfoldedLocalRNN(local_rnn)
    inputs = torch.randn(batch, window - 1 + length, size, device=device, requires_grad=training)
    if not training:
        return tuple(torch.no_grad()(partial(module, inputs)) for module in modules)
    grad = torch.randn(batch, length, size, device=device)
    return tuple(partial(backward, partial(m, inputs), [inputs, *m.parameters()], grad) for m in modules)


def build_products(kind, batch, length, size, window, device, small):
    ours, _ = build(kind, batch, length, size, window, True, device, small)
    rows, size = (40, 8) if small else (batch * length, size)
    width = NUM_GATES[kind] * size
    hidden, weight = torch.randn(rows, size, device=device), torch.randn(width, size, device=device)
    grad = torch.randn(rows, width, device=device)

    def products():
        for _ in range(window):
            hidden @ weight.T, grad @ weight, grad.T @ hidden

    return ours, products


def cases(device_type: str) -> Iterator[Case]:
    on_gpu = device_type == "cuda"
    for *shape, on_cpu_target, on_gpu_target in SHAPES:
        kind, batch, length, size, window = shape
        name = f"LocalRNN {kind} B{batch} L{length} D{size} K{window}"
        training, inference = partial(build, *shape, True), partial(build, *shape, False)
        target = on_gpu_target if on_gpu else on_cpu_target
        yield Case(f"{name}, forward and backward", "unfolded windows", training, target=target)
        yield Case(f"{name}, inference", "unfolded windows", inference, target=5 if on_gpu else 2)
        yield Case(name, "unfolded windows", training, "memory", 1 / 3 if size == 512 else None)
        target = (1.6 if on_gpu else 1.4) if size == 512 else None
        yield Case(name, "its matrix products alone", partial(build_products, *shape), "time", target)
