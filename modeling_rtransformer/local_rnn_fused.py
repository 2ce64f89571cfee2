# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
The K steps of a LocalRNN on a CPU in C, a block of positions at a time.

A step by PyTorch's operations goes through all positions of a tile: a product, then gates, each in memory that a core's
cache does not hold, each waiting for the slowest thread. Here a thread takes a block through all K steps, and back,
without leaving its cache. `TiledLocalRnn` is the twin in PyTorch's operations; local_rnn_fused_c.py is the C.
"""

# D hidden size, G gates, K window

import ctypes
import functools

import torch
from torch.autograd.function import once_differentiable

from .compiled_c import load
from .local_rnn_fused_c import ARRAYS, COUNTS, SOURCE, TOTALS
from .local_rnn_tiled import Tile, in_own_segment
from .reused_memory import ReusedMemory


KINDS = ("gru", "lstm", "rnn")
# Rows of a block: more would leave a core's cache; with fewer the weights, which each step of a block reads, and their
# gradient, to which each step of a block adds, come into it too often.
BLOCK_ROWS = 96
# Rows that are worth a thread.
THREAD_ROWS = 12


PANEL = 64  # columns of a product that are computed together, at most


def padded(columns: int) -> int:
    """As in C: whole panels, and rows that do not share a set of the cache."""
    return -(-columns // PANEL) * PANEL + 16


def block_shape(batch: int, length: int, window: int) -> tuple[int, int]:
    """Sequences and positions of a block: part of one sequence where it is long, several sequences where short."""
    rows = max(THREAD_ROWS, min(BLOCK_ROWS, -(-batch * length // torch.get_num_threads())))
    if length <= rows:
        return rows // length, length
    parts = min(-(-length // rows), length // max(window - 1, 1))  # every second one shares no input with the others
    return 1, -(-length // max(parts, 1))


class Call(ctypes.Structure):
    """
    The numbers of a call, its inputs, room for its threads to work in, and `arrays`, tensors or None by their names in
    C. Keeps them alive.
    """

    _fields_ = [(name, ctypes.c_ssize_t) for name in COUNTS] + [
        (name, ctypes.c_void_p) for name in (*ARRAYS, *TOTALS, "same")
    ]

    def __init__(self, rnn_type: str, window: int, projected: torch.Tensor, size: int, states: int, **arrays):
        batch, length, columns = projected.shape[0], projected.shape[1] - window + 1, projected.shape[2]
        sequences, positions = block_shape(batch, length, window)
        threads = min(torch.get_num_threads(), -(-batch // sequences) * -(-length // positions))
        room = sequences * positions
        own = room * ((states + 3) * padded(size) + padded(columns) + PANEL) + columns
        counts = KINDS.index(rnn_type), batch, length, size, window, sequences, positions, threads, own
        self.arrays = arrays | {"inputs": projected, "scratch": projected.new_empty(threads, own)}
        super().__init__(*counts, **{name: each.data_ptr() for name, each in self.arrays.items() if each is not None})


@functools.cache
def kernels(dtype: torch.dtype) -> ctypes.CDLL:
    """`forward` and `backward` of a [`Call`], and `pack`, for float32 or float64; raises [`NoCompiler`]."""
    library = load(SOURCE, *(["DOUBLE"] if dtype == torch.float64 else []))
    library.forward.argtypes = library.backward.argtypes = [ctypes.POINTER(Call)]
    library.pack.argtypes = [ctypes.c_ssize_t] * 2 + [ctypes.c_void_p] + [ctypes.c_ssize_t] * 2 + [ctypes.c_void_p]
    library.forward.restype = library.backward.restype = library.pack.restype = None
    return library


def packed(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix, also a transposed view, as the products in C read it."""
    depth, columns = matrix.shape
    panels = matrix.new_empty(depth * padded(columns))
    kernels(matrix.dtype).pack(depth, columns, matrix.data_ptr(), *matrix.stride(), panels.data_ptr())
    return panels


def kept_shapes(rnn_type: str, window: int, rows: int, size: int) -> list[tuple[int, int, int]]:
    """
    What is kept of each step for the way back: of a GRU (reset, update) and, of all but the first, W_h h + b_h of the
    new gate; of an LSTM its gates and, of all but the last, the cell; of a tanh RNN the hidden state.
    """
    if rnn_type == "rnn":
        return [(window, rows, size)]
    return [(window, rows, (2 if rnn_type == "gru" else 4) * size), (window - 1, rows, size)]


KEPT = ReusedMemory()  # a forward pass that keeps nothing gives back what lies there


class FusedLocalRnn(torch.autograd.Function):
    """`local_rnn` on a CPU in float32 or float64; `keep` says whether a backward pass may follow."""

    @staticmethod
    def forward(ctx, projected, weight, bias, zero_input, segment_ids, rnn_type, window, keep):
        projected, bias = projected.contiguous(), bias.contiguous()
        ctx.zero_shape = None if zero_input is None else zero_input.shape
        zero_input = None if zero_input is None else zero_input.reshape(-1).contiguous()
        batch, length, size = projected.shape[0], projected.shape[1] - window + 1, weight.shape[1]
        whole = Tile(slice(0, batch), slice(0, length))
        same = in_own_segment(segment_ids, whole, window)
        same = None if same is None else same.contiguous()
        outputs = projected.new_empty(batch, length, size)
        kept = []
        if keep:
            kept = [KEPT.empty(projected, *shape) for shape in kept_shapes(rnn_type, window, whole.rows, size)]
        else:
            KEPT.clear()
        if whole.rows:
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
        gated = rnn_type == "gru"  # b_h of the new gate acts inside a product with the reset gate
        grad_projected = torch.zeros_like(projected)
        threads = torch.get_num_threads()
        grad_weight = weight.new_zeros(threads, -(-columns // PANEL), size, PANEL)
        grad_zero, grad_new_bias = (bias.new_zeros(threads, each, dtype=torch.float64) for each in (columns, size))
        if grad_outputs.numel():
            arrays = dict(zip(("kept", "extra"), kept)) | {"bias": bias, "zero": zero_input, "same": same}
            arrays |= {"grad_outputs": grad_outputs.contiguous(), "grad_inputs": grad_projected}
            arrays |= {"grad_weight": grad_weight, "grad_zero": grad_zero, "grad_new_bias": grad_new_bias}
            states = window - 1 if gated else 1
            call = Call(rnn_type, window, projected, size, states, weight=packed(weight), **arrays)
            kernels(projected.dtype).backward(call)
        grad_zero = grad_zero.sum(dim=0)
        grad_bias = grad_projected.sum(dim=(0, 1)) + grad_zero
        if gated:
            grad_bias[-size:] = grad_new_bias.sum(dim=0)
        grad_zero = None if zero_input is None else grad_zero.to(bias.dtype).view(ctx.zero_shape)
        grad_weight = grad_weight.sum(dim=0).transpose(1, 2).reshape(-1, size)[:columns]
        return grad_projected, grad_weight, grad_bias.to(bias.dtype), grad_zero, None, None, None, None
