# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
The K steps of a LocalRNN on a CPU in C, a block of positions at a time.

A step in PyTorch's operations passes over all positions: a product, then the gates, each in memory that does not fit
into a core's cache, and each waits for the slowest thread. Here a thread takes a block through all K steps, forward or
backward, and the block stays in the core's cache. local_rnn_c_source.py has the C; the readable twin is
`local_rnn_plain` in local_rnn_steps.py.
"""

# B batch, L length, D hidden size, G gates, K window

import ctypes
import functools

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .compiled_c import load
from .local_rnn_c_source import ARRAYS, COUNTS, SOURCE, TOTALS
from .reused_memory import ReusedMemory


KINDS = ("gru", "lstm", "rnn")
# Positions of a block. More do not fit into a core's cache. With fewer, the weights are read and their gradient is
# updated more often, since every step of every block does both.
BLOCK_ROWS = 96
THREAD_ROWS = 12  # the fewest positions for which a further thread pays
PANEL = 64  # columns of a product that are computed together, at most


def padded(columns: int) -> int:
    """The length of a row in memory, as in C: whole panels, and 16 more so that rows fall into different cache sets."""
    return -(-columns // PANEL) * PANEL + 16


def block_shape(batch: int, length: int, window: int) -> tuple[int, int]:
    """Sequences and positions of a block: part of a long sequence, or several short sequences as a whole."""
    rows = max(THREAD_ROWS, min(BLOCK_ROWS, -(-batch * length // torch.get_num_threads())))
    if length <= rows:
        return rows // length, length
    # Parts of at least K - 1 positions: every second one then shares no input with another.
    parts = min(-(-length // rows), length // max(window - 1, 1))
    return 1, -(-length // max(parts, 1))


class Call(ctypes.Structure):
    """
    The argument of the C functions: sizes, the inputs, a buffer for each thread, and `arrays`, tensors or None by their
    names in C. It holds references to the tensors.
    """

    _fields_ = [(name, ctypes.c_ssize_t) for name in COUNTS] + [
        (name, ctypes.c_void_p) for name in (*ARRAYS, *TOTALS, "same")
    ]

    def __init__(self, rnn_type: str, window: int, projected: torch.Tensor, size: int, states: int, **arrays):
        batch, length, columns = projected.shape[0], projected.shape[1] - window + 1, projected.shape[2]
        sequences, positions = block_shape(batch, length, window)
        threads = min(torch.get_num_threads(), -(-batch // sequences) * -(-length // positions))
        rows = sequences * positions
        buffer_size = rows * ((states + 3) * padded(size) + padded(columns) + PANEL) + columns
        counts = KINDS.index(rnn_type), batch, length, size, window, sequences, positions, threads, buffer_size
        self.arrays = arrays | {"inputs": projected, "buffers": projected.new_empty(threads, buffer_size)}
        super().__init__(*counts, **{name: each.data_ptr() for name, each in self.arrays.items() if each is not None})


@functools.cache
def kernels(dtype: torch.dtype) -> ctypes.CDLL:
    """The C functions `forward` and `backward`, which take a [`Call`], and `pack`; raises [`NoCompiler`]."""
    library = load(SOURCE, *(["DOUBLE"] if dtype == torch.float64 else []))
    library.forward.argtypes = library.backward.argtypes = [ctypes.POINTER(Call)]
    library.pack.argtypes = [ctypes.c_ssize_t] * 2 + [ctypes.c_void_p] + [ctypes.c_ssize_t] * 2 + [ctypes.c_void_p]
    library.forward.restype = library.backward.restype = library.pack.restype = None
    return library


def packed(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix, which may be a transposed view, in the layout that the products in C read."""
    depth, columns = matrix.shape
    panels = matrix.new_empty(depth * padded(columns))
    kernels(matrix.dtype).pack(depth, columns, matrix.data_ptr(), *matrix.stride(), panels.data_ptr())
    return panels


def kept_shapes(rnn_type: str, window: int, rows: int, size: int) -> list[tuple[int, int, int]]:
    """
    Shapes of what each step keeps for the backward pass. GRU: reset and update gate, and W_h h + b_h of the new gate in
    all steps but the first. LSTM: the gates, and the cell in all steps but the last. Tanh RNN: the hidden state.
    """
    if rnn_type == "rnn":
        return [(window, rows, size)]
    return [(window, rows, (2 if rnn_type == "gru" else 4) * size), (window - 1, rows, size)]


def in_own_segment(segment_ids: torch.Tensor | None, window: int) -> torch.Tensor | None:
    """`(B, K, L)`, whether the k-th input of a position's window is of its own segment; None where all are."""
    if segment_ids is None:
        return None
    neighbours = F.pad(segment_ids, (window - 1, 0), value=-1).unfold(1, segment_ids.shape[1], 1)
    same = neighbours == segment_ids[:, None]
    return None if same.all() else same.contiguous()


KEPT = ReusedMemory()  # a forward pass without gradients empties its pool


def check_inputs(projected: torch.Tensor) -> None:
    """An error for what the kernels do not take."""
    if projected.device.type != "cpu" or projected.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the LocalRNN 'c' takes float32 and float64 on a CPU, not {projected.dtype} on {projected.device}; take "
            "'auto' or 'plain'"
        )


class CLocalRnn(torch.autograd.Function):
    """`local_rnn` on a CPU in float32 or float64; `keep` says whether a backward pass may follow."""

    @staticmethod
    def forward(ctx, projected, weight, bias, zero_input, segment_ids, rnn_type, window, keep):
        check_inputs(projected)
        projected, bias = projected.contiguous(), bias.contiguous()
        ctx.zero_shape = None if zero_input is None else zero_input.shape
        zero_input = None if zero_input is None else zero_input.reshape(-1).contiguous()
        batch, length, size = projected.shape[0], projected.shape[1] - window + 1, weight.shape[1]
        same = in_own_segment(segment_ids, window)
        outputs = projected.new_empty(batch, length, size)
        kept = []
        if keep:
            kept = [KEPT.empty(projected, *shape) for shape in kept_shapes(rnn_type, window, batch * length, size)]
        else:
            KEPT.clear()
        if outputs.numel():
            arrays = dict(zip(("kept", "extra"), kept)) | {"bias": bias, "zero": zero_input, "same": same}
            call = Call(rnn_type, window, projected, size, 1, weight=packed(weight.T), outputs=outputs, **arrays)
            kernels(projected.dtype).forward(call)
        ctx.options = rnn_type, window
        ctx.save_for_backward(projected, weight, bias, zero_input, same, *kept)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_outputs):
        rnn_type, window = ctx.options
        projected, weight, bias, zero_input, same, *kept = ctx.saved_tensors
        columns, size = weight.shape
        is_gru = rnn_type == "gru"
        grad_projected = torch.zeros_like(projected)
        threads = torch.get_num_threads()
        grad_weight = weight.new_zeros(threads, -(-columns // PANEL), size, PANEL)
        grad_zero, grad_new_bias = (bias.new_zeros(threads, each, dtype=torch.float64) for each in (columns, size))
        if grad_outputs.numel():
            arrays = dict(zip(("kept", "extra"), kept)) | {"bias": bias, "zero": zero_input, "same": same}
            arrays |= {"grad_outputs": grad_outputs.contiguous(), "grad_inputs": grad_projected}
            arrays |= {"grad_weight": grad_weight, "grad_zero": grad_zero, "grad_new_bias": grad_new_bias}
            states = window - 1 if is_gru else 1
            call = Call(rnn_type, window, projected, size, states, weight=packed(weight), **arrays)
            kernels(projected.dtype).backward(call)
        grad_zero = grad_zero.sum(dim=0)
        grad_bias = grad_projected.sum(dim=(0, 1)) + grad_zero
        if is_gru:  # the reset gate multiplies b_h of the new gate
            grad_bias[-size:] = grad_new_bias.sum(dim=0)
        grad_zero = None if zero_input is None else grad_zero.to(bias.dtype).view(ctx.zero_shape)
        grad_weight = grad_weight.sum(dim=0).transpose(1, 2).reshape(-1, size)[:columns]
        return grad_projected, grad_weight, grad_bias.to(bias.dtype), grad_zero, None, None, None, None
