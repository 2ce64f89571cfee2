"""The LocalRNN against its definition (unfolded windows in `torch.nn`'s RNN) and its matrix products alone."""

# B batch, L length, D hidden size, K window, G gates

from functools import partial

import torch
from torch import nn

from modeling_rtransformer.local_rnn import LocalRNN
from modeling_rtransformer.local_rnn_steps import NUM_GATES, local_rnn_reference
from scripts.benchmarks.measuring import Case


TORCH_RNNS = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}
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
        self.rnn = TORCH_RNNS[local_rnn.rnn_type](size, size, batch_first=True).to(local_rnn.input_proj.weight)
        with torch.no_grad():
            for name, projection in (("ih_l0", local_rnn.input_proj), ("hh_l0", local_rnn.recurrent_proj)):
                getattr(self.rnn, f"weight_{name}").copy_(projection.weight)
                getattr(self.rnn, f"bias_{name}").copy_(projection.bias)

    def forward(self, inputs: torch.Tensor, segment_ids: torch.Tensor | None = None) -> torch.Tensor:
        return local_rnn_reference(inputs, self.rnn, self.window, segment_ids)


def forward_and_backward(module: nn.Module, inputs: torch.Tensor, grad: torch.Tensor) -> None:
    torch.autograd.grad(module(inputs), [inputs, *module.parameters()], grad)


def forward(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(inputs)


def build(kind, batch, length, size, window, training, device, small):
    if small:
        batch, length, size = 2, 20, 8
    torch.manual_seed(0)
    local_rnn = LocalRNN(size, window, kind).to(device)
    modules = local_rnn, UnfoldedLocalRNN(local_rnn).to(device)
    inputs = torch.randn(batch, window - 1 + length, size, device=device, requires_grad=training)
    if not training:
        return tuple(partial(forward, module, inputs) for module in modules)
    grad = torch.randn(batch, length, size, device=device)
    return tuple(partial(forward_and_backward, module, inputs, grad) for module in modules)


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


def cases(device_type: str) -> list[Case]:
    found = []
    on_gpu = device_type == "cuda"
    for kind, batch, length, size, window, on_cpu_target, on_gpu_target in SHAPES:
        sizes = {"B": batch, "L": length, "D": size, "K": window}
        shape = " ".join(f"{letter}{number}" for letter, number in sizes.items())
        label = f"LocalRNN {kind} {shape}"
        rows, width = batch * length, NUM_GATES[kind] * size
        forward_flops = 2 * rows * size * width * window  # one input product and K - 1 recurrent ones
        forward_bytes = 4 * rows * (2 * size + 2 * width)  # inputs and outputs; the projection is written and read
        for training in (True, False):
            target = (on_gpu_target if on_gpu else on_cpu_target) if training else (5 if on_gpu else 2)
            found.append(
                Case(
                    f"{label}, {'forward and backward' if training else 'inference'}",
                    "unfolded windows",
                    partial(build, kind, batch, length, size, window, training),
                    target=target,
                    flops=forward_flops * (3 if training else 1),
                    bytes=forward_bytes * (3 if training else 1),
                    tokens=rows,
                    sizes=sizes,
                )
            )
        arguments = kind, batch, length, size, window
        memory = partial(build, *arguments, True)
        memory_target = 1 / 3 if (kind, size) == ("gru", 512) else None
        found.append(Case(label, "unfolded windows", memory, quantity="memory", target=memory_target))
        target = (1.6 if on_gpu else 1.4) if size == 512 else None
        products = partial(build_products, *arguments)
        found.append(Case(label, "its matrix products alone", products, quantity="time", target=target))
    return found
