# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
The K steps of a LocalRNN on a GPU in Triton kernels, with a backward pass of its own.

Small hidden sizes run in one kernel (local_rnn_triton_small.py), large ones as library products and one kernel a step
(local_rnn_triton_large.py). Gates and sums are in float32, whatever the type of the inputs. With TRITON_INTERPRET=1 in
the environment the kernels run on a CPU, which is how they are tested without a GPU.

Both passes are operators of PyTorch (`torch.library.triton_op`). Compilers do not get them yet: PyTorch's analysis
takes inputs of the kernels for outputs, so compiled graphs have the plain operations.

The readable twin is `local_rnn_plain` in local_rnn_steps.py.
"""

# B batch, L length, D hidden size, K window, G gates

import functools
import re

import torch

from .local_rnn_triton_cells import INTERPRETED, Inputs, TritonError
from .local_rnn_triton_large import backward_large, forward_large
from .local_rnn_triton_small import backward_small, fits_small, forward_small


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A longer window keeps nothing for its backward pass if that would be more elements than this; the backward pass then
# runs the steps of so many elements again, one part of the positions after another.
KEPT_STEPS = 32
KEPT_ELEMENTS = 2**27
# Remote code is this file under another name, and an operator has one name in a process.
OPERATORS = "rtransformer::" + re.sub(r"\W", "_", __name__)


def check_inputs(projected: torch.Tensor) -> None:
    """An error for what the kernels do not take."""
    if projected.dtype not in DTYPES:
        raise ValueError(f"the LocalRNN 'triton' takes float32, bfloat16 and float16, not {projected.dtype}")
    if not (projected.is_cuda or INTERPRETED.value):
        raise ValueError(
            f"the LocalRNN 'triton' takes tensors on a CUDA device, not on {projected.device}; take 'auto' or 'plain', "
            "or set TRITON_INTERPRET=1 before Triton is imported to run its kernels on a CPU, slowly"
        )


def is_kept(inputs: Inputs) -> bool:
    """Whether a forward pass keeps what its backward pass needs, or leaves it to be computed again."""
    rows, _, _, window = inputs.sizes
    return window <= KEPT_STEPS or window * rows * len(inputs.bias) <= KEPT_ELEMENTS


def run_forward(inputs: Inputs, keep: bool) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The outputs `(B, L, D)`, and what `run_backward` needs with `keep`."""
    run = forward_small if fits_small(inputs) else forward_large
    with torch.cuda.device_of(inputs.projected):
        return run(inputs, keep)


def run_backward(inputs: Inputs, grad_outputs: torch.Tensor, *kept: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The gradients of `projected` and `weight`, in float32, and the sums of `Inputs.new_sums`."""
    run = backward_small if fits_small(inputs) else backward_large
    with torch.cuda.device_of(inputs.projected):
        return run(inputs, grad_outputs.contiguous(), *kept)


def run_backward_in_parts(inputs: Inputs, grad_outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`run_backward` where nothing was kept, one part of the sequences or of their positions after another."""
    batch, length = grad_outputs.shape[:2]
    rows = max(KEPT_ELEMENTS // (inputs.window * len(inputs.bias)), 1)
    sequences, positions = max(rows // length, 1), min(rows, length)
    # A packed position reads the segments of the K - 1 before it; their own gradients are zero.
    before = 0 if inputs.segment_ids is None else inputs.window - 1
    grad_projected = torch.zeros_like(inputs.projected, dtype=torch.float32)
    grad_weight = torch.zeros_like(inputs.weight, dtype=torch.float32)
    all_sums = []
    for first in range(0, batch, sequences):
        those = slice(first, min(first + sequences, batch))
        for begin in range(0, length, positions):
            reach = slice(max(begin - before, 0), min(begin + positions, length))
            part, grads = inputs.part(those, reach), grad_outputs[those, reach].clone()
            grads[:, : begin - reach.start] = 0
            _, kept = run_forward(part, True)
            part_projected, part_weight, *sums = run_backward(part, grads, *kept)
            grad_projected[those, reach.start : reach.stop + inputs.window - 1] += part_projected
            grad_weight += part_weight
            all_sums.append(sums)
    return grad_projected, grad_weight, *(torch.cat(sums) for sums in zip(*all_sums))


@torch.library.triton_op(f"{OPERATORS}_forward", mutates_args=())
def forward_operator(
    projected: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    zero_input: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    window: int,
    keep: bool,
) -> list[torch.Tensor]:
    """The outputs `(B, L, D)`, and what the backward pass needs with `keep`."""
    inputs = Inputs(projected, weight, bias, zero_input, segment_ids, window)
    outputs, kept = run_forward(inputs, keep and is_kept(inputs))
    return [outputs, *kept]


@torch.library.triton_op(f"{OPERATORS}_backward", mutates_args=())
def backward_operator(
    projected: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    zero_input: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    window: int,
    grad_outputs: torch.Tensor,
    kept: list[torch.Tensor],
) -> list[torch.Tensor]:
    """The gradients of `projected`, `weight`, `bias` and `zero_input`; the last is empty without segments."""
    inputs = Inputs(projected, weight, bias, zero_input, segment_ids, window)
    if is_kept(inputs):
        grad_projected, grad_weight, *sums = run_backward(inputs, grad_outputs, *kept)
    else:
        grad_projected, grad_weight, *sums = run_backward_in_parts(inputs, grad_outputs)
    grad_new_bias, grad_zero_input = (each.sum(dim=0) for each in sums)
    # Every step adds the same to the gradient of b_h as to those of its inputs, but for a GRU's new gate. In float64,
    # since the sum is often far smaller than what is summed.
    grad_bias = grad_projected.sum(dim=(0, 1), dtype=torch.float64)
    if segment_ids is not None:
        grad_bias += grad_zero_input
        grad_zero_input = grad_zero_input.view_as(zero_input)
    if len(grad_new_bias):
        grad_bias[-len(grad_new_bias) :] = grad_new_bias
    grads = grad_projected.to(projected.dtype), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)
    return [*grads, grad_zero_input.to(bias.dtype, copy=True)]


def _keep_for_backward(ctx, inputs, output) -> None:
    *tensors, ctx.window, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx, grads):
    tensors, kept = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
    grads = backward_operator(*tensors, ctx.window, grads[0], list(kept))
    *grads, grad_zero_input = grads
    return *grads, grad_zero_input if tensors[4] is not None else None, None, None, None


forward_operator.register_autograd(_backward, setup_context=_keep_for_backward)


def local_rnn_triton(
    projected: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    zero_input: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    rnn_type: str,
    window: int,
    keep: bool,
) -> torch.Tensor:
    """`local_rnn` in Triton kernels; `keep` says whether a backward pass may follow."""
    check_inputs(projected)
    tensors = projected, weight, bias, zero_input, segment_ids
    tensors = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    return forward_operator(*tensors, window, keep)[0]


@functools.cache
def reason_against(device: torch.device, dtype: torch.dtype, gates: int, size: int, packed: bool) -> str | None:
    """
    Why the kernels of these sizes do not run on this device, such as too little shared memory or an error of the
    compiler; None where they do. Both passes of one short sequence are tried, once.
    """
    like = {"device": device, "dtype": dtype}
    projected, weight = torch.zeros(1, 2, gates * size, **like), torch.zeros(gates * size, size, **like)
    bias = torch.zeros(gates * size, **like)
    segment_ids = torch.zeros(1, 1, device=device, dtype=torch.long) if packed else None
    inputs = Inputs(projected, weight, bias, bias, segment_ids, window=2)
    try:
        outputs, kept = run_forward(inputs, True)
        run_backward(inputs, outputs, *kept)
    except TritonError as error:
        return f"its Triton kernels do not run on {device}: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None
