# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
The K steps of a LocalRNN on a GPU in Triton kernels, with a backward pass of its own.

Small hidden sizes run in one kernel (local_rnn_triton_small.py), large ones as library products and one kernel a step
(local_rnn_triton_large.py). Gates and sums are in float32, whatever the type of the inputs. With TRITON_INTERPRET=1 in
the environment the kernels run on a CPU, which is how they are tested without a GPU.

The readable twin is `local_rnn_plain` in local_rnn_steps.py.
"""

# B batch, L length, D hidden size, K window, G gates

import torch
from torch.autograd.function import once_differentiable

from .local_rnn_triton_cells import Inputs
from .local_rnn_triton_large import backward_large, forward_large
from .local_rnn_triton_small import INTERPRETED, backward_small, forward_small


# The largest D for which W_h, its gradient and the gates of a block of rows fit into the registers and shared memory of
# a multiprocessor, in any of the types.
SMALL_SIZE = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_inputs(projected: torch.Tensor) -> None:
    """An error for what the kernels do not take."""
    if projected.dtype not in DTYPES:
        raise ValueError(f"the LocalRNN 'triton' takes float32, bfloat16 and float16, not {projected.dtype}")
    if not (projected.is_cuda or INTERPRETED.value):
        raise ValueError(
            f"the LocalRNN 'triton' takes tensors on a CUDA device, not on {projected.device}; take 'auto' or 'plain', "
            "or set TRITON_INTERPRET=1 before Triton is imported to run its kernels on a CPU, slowly"
        )


class TritonLocalRnn(torch.autograd.Function):
    """`local_rnn` in Triton kernels; `keep` says whether a backward pass may follow."""

    @staticmethod
    def forward(ctx, projected, weight, bias, zero_input, segment_ids, rnn_type, window, keep):
        check_inputs(projected)
        tensors = projected, weight, bias, zero_input, segment_ids
        tensors = [None if tensor is None else tensor.contiguous() for tensor in tensors]
        run = forward_small if weight.shape[1] <= SMALL_SIZE else forward_large
        with torch.cuda.device_of(projected):
            outputs, kept = run(Inputs(*tensors, window), keep)
        ctx.window = window
        ctx.save_for_backward(*tensors, *kept)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_outputs):
        inputs, kept = Inputs(*ctx.saved_tensors[:5], ctx.window), ctx.saved_tensors[5:]
        run = backward_small if inputs.weight.shape[1] <= SMALL_SIZE else backward_large
        with torch.cuda.device_of(inputs.projected):
            grad_projected, grad_weight, *sums = run(inputs, grad_outputs.contiguous(), *kept)
        grad_new_bias, grad_zero_input = (each.sum(dim=0) for each in sums)
        # Every step adds the same to the gradient of b_h as to those of its inputs, but for a GRU's new gate. In
        # float64, since the sum is often far smaller than what is summed.
        grad_bias = grad_projected.sum(dim=(0, 1), dtype=torch.float64)
        if inputs.segment_ids is None:
            grad_zero_input = None
        else:
            grad_bias += grad_zero_input
            grad_zero_input = grad_zero_input.to(inputs.zero_input.dtype).view_as(inputs.zero_input)
        if len(grad_new_bias):
            grad_bias[-len(grad_new_bias) :] = grad_new_bias
        grads = grad_projected.to(inputs.projected.dtype), grad_weight.to(inputs.weight.dtype)
        return *grads, grad_bias.to(inputs.bias.dtype), grad_zero_input, None, None, None, None
