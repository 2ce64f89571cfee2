# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
What the Triton kernels of a LocalRNN share: their inputs, the elementwise half of a step and of its backward pass, in
float32, and how tiles of gates are read and written. The readable twins are `gru_step` and `lstm_step` in
local_rnn_steps.py.

Importing this needs Triton; local_rnn_steps.py imports it, by way of local_rnn_triton.py, where kernels are wanted.
"""

# B batch, L length, R rows of a tile, C columns of it (some of the D hidden units), D hidden size, K window,
# G gates, whose number is the type: 3 GRU (reset, update, new), 4 LSTM (input, forget, cell, output), 1 tanh RNN.
# "Gates" are a tuple of G tiles (R, C).

from typing import NamedTuple

import torch


# The one import of Triton. In a `try`, because the Hub's loader of code takes any other import for a requirement.
try:
    import triton
    import triton.language as tl
    from triton.errors import TritonError as TritonError
except ImportError as error:
    raise ImportError("the LocalRNN 'triton' needs Triton: `pip install triton`") from error


class Inputs(NamedTuple):
    """Tensors of `local_rnn`, contiguous, and the window."""

    projected: torch.Tensor  # (B, K - 1 + L, G D)
    weight: torch.Tensor  # (G D, D)
    bias: torch.Tensor  # (G D)
    zero_input: torch.Tensor | None  # (G D)
    segment_ids: torch.Tensor | None  # (B, L)
    window: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B L, L, D and K."""
        length = self.projected.shape[1] - self.window + 1
        return len(self.projected) * length, length, self.weight.shape[1], self.window

    @property
    def gates(self) -> int:
        return len(self.weight) // self.weight.shape[1]

    @property
    def constants(self) -> dict[str, int]:
        return {"GATES": self.gates, "PACKED": self.segment_ids is not None}

    @property
    def packing(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The zero input and the segments; where there are no segments any tensors, which are not read."""
        return (self.bias, self.bias) if self.segment_ids is None else (self.zero_input, self.segment_ids)

    def part(self, sequences: slice, positions: slice) -> "Inputs":
        """Some of the sequences, and some of their positions with the K - 1 inputs before them."""
        reached = slice(positions.start, positions.stop + self.window - 1)
        segment_ids = None if self.segment_ids is None else self.segment_ids[sequences, positions].contiguous()
        return self._replace(projected=self.projected[sequences, reached].contiguous(), segment_ids=segment_ids)

    def new_sums(self, programs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Float64 zeros for each program, for the gradients of the new gate's bias where that is not the sum of the
        inputs' (GRU), `(programs, D)`, and of the zero input where there are segments, `(programs, G D)`.
        """
        sizes = (self.weight.shape[1] if self.gates == 3 else 0), (0 if self.segment_ids is None else len(self.bias))
        return tuple(self.bias.new_zeros((programs, size), dtype=torch.float64) for size in sizes)


@triton.jit
def tanh(x):
    """
    tanh to a unit or two in the last place of float32. Near zero 1 - 2 / (exp(2 x) + 1) would cancel: there it is a
    polynomial, fitted to tanh on [0, 0.6] for the least relative error.
    """
    square = x * x
    series = 0.02078514762418967 - 0.005883233055919601 * square
    series = -0.053780399392792035 + series * square
    series = 0.1333188029888982 + series * square
    series = -0.333332961828236 + series * square
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.6, x + x * (square * series), tl.where(x < 0, -far, far))


# Whether Triton's interpreter runs the kernels: then it has compiled no function.
INTERPRETED = tl.constexpr(not isinstance(tanh, triton.runtime.JITFunction))


def launch(kernel):
    """A kernel, so that a compiler that traces the operator around it sees the kernel, as `torch.compile` does."""
    return kernel if INTERPRETED.value else torch.library.wrap_triton(kernel)


@triton.jit
def run_step(x, h, hidden, cell, GATES: tl.constexpr):
    """
    The hidden state and the cell after a step, and the gates that its backward pass needs, from the gates `x` of
    W_x x + b_x and `h` of W_h h + b_h and the state before. Only an LSTM has a cell. In place of the new gate a GRU
    gives that of W_h h + b_h, from which it follows.
    """
    if GATES == 1:
        hidden = tanh(x[0] + h[0])
        gates = (hidden,)
    elif GATES == 3:
        reset = tl.sigmoid(x[0] + h[0])
        update = tl.sigmoid(x[1] + h[1])
        new = tanh(x[2] + reset * h[2])
        hidden = new + update * (hidden - new)
        gates = (reset, update, h[2])
    else:
        gates = (tl.sigmoid(x[0] + h[0]), tl.sigmoid(x[1] + h[1]), tanh(x[2] + h[2]), tl.sigmoid(x[3] + h[3]))
        cell = gates[0] * gates[2] + gates[1] * cell
        hidden = gates[3] * tanh(cell)
    return hidden, cell, gates


@triton.jit
def run_step_backward(gates, new_x, hidden, cell, grad_hidden, grad_cell, GATES: tl.constexpr):
    """
    From the gates that `run_step` gave, the new gate of W_x x + b_x (GRU), the state before the step and the gradients
    of the state after it: the gradients of W_x x + b_x and of W_h h + b_h, gates both, and of the hidden state and the
    cell before the step, all but what reaches the hidden state through W_h.
    """
    if GATES == 1:
        grad_x = (grad_hidden * (1.0 - gates[0] * gates[0]),)
        grad_h = grad_x
        grad_hidden = tl.zeros_like(grad_hidden)
    elif GATES == 3:
        reset, update, new_h = gates
        new = tanh(new_x + reset * new_h)
        grad_new = grad_hidden * (1.0 - update) * (1.0 - new * new)
        grad_update = grad_hidden * (hidden - new) * update * (1.0 - update)
        grad_reset = grad_new * new_h * reset * (1.0 - reset)
        grad_x = (grad_reset, grad_update, grad_new)
        grad_h = (grad_reset, grad_update, grad_new * reset)
        grad_hidden = grad_hidden * update
    else:
        input_gate, forget_gate, new, output_gate = gates
        tanh_cell = tanh(input_gate * new + forget_gate * cell)
        grad_output = grad_hidden * tanh_cell * output_gate * (1.0 - output_gate)
        grad_cell += grad_hidden * output_gate * (1.0 - tanh_cell * tanh_cell)
        grad_input = grad_cell * new * input_gate * (1.0 - input_gate)
        grad_forget = grad_cell * cell * forget_gate * (1.0 - forget_gate)
        grad_x = (grad_input, grad_forget, grad_cell * input_gate * (1.0 - new * new), grad_output)
        grad_h = grad_x
        grad_cell = grad_cell * forget_gate
        grad_hidden = tl.zeros_like(grad_hidden)
    return grad_x, grad_h, grad_hidden, grad_cell


@triton.jit
def gate_offsets(row, column, size, GATE: tl.constexpr, GATES: tl.constexpr):
    """Where the tile `(R, C)` of one gate lies in a matrix `(..., G D)`. `row` is int64: G D rows may exceed 2^31."""
    return row[:, None] * (GATES * size) + (GATE * size + column)[None, :]


@triton.jit
def load_gates(matrix, row, column, mask, size, GATES: tl.constexpr):
    """The gates in a matrix `(..., G D)`, in float32, zero outside the mask."""
    gates = ()
    for gate in tl.static_range(GATES):
        tile = tl.load(matrix + gate_offsets(row, column, size, gate, GATES), mask=mask, other=0.0)
        gates += (tile.to(tl.float32),)
    return gates


@triton.jit
def store_gates(matrix, gates, row, column, mask, size, GATES: tl.constexpr):
    """Writes gates into a matrix `(..., G D)`."""
    for gate in tl.static_range(GATES):
        pointers = matrix + gate_offsets(row, column, size, gate, GATES)
        tl.store(pointers, tl.broadcast_to(gates[gate], mask.shape).to(matrix.dtype.element_ty), mask=mask)


@triton.jit
def load_biases(bias, column, size, GATES: tl.constexpr):
    """The gates `(1, C)` of a vector `(G D)`, in float32."""
    gates = ()
    for gate in tl.static_range(GATES):
        part = tl.load(bias + gate * size + column, mask=column < size, other=0.0)
        gates += (part.to(tl.float32)[None, :],)
    return gates


@triton.jit
def load_inputs(projected, zero_input, row, same, column, mask, size, GATES: tl.constexpr, PACKED: tl.constexpr):
    """The gates of the inputs of a step; in packed sequences those of a zero input where not `same` `(R)`."""
    gates = load_gates(projected, row, column, mask, size, GATES)
    if PACKED:
        zero_gates = load_biases(zero_input, column, size, GATES)
        shown = ()
        for gate in tl.static_range(GATES):
            shown += (tl.where(same[:, None], gates[gate], zero_gates[gate]),)
        gates = shown
    return gates


@triton.jit
def of_same_segment(segment_ids, row, position, valid, step, window, PACKED: tl.constexpr):
    """Whether the input of a step `(R)` is of the row's own segment; -1 is the segment before the sequence."""
    same = valid
    if PACKED:
        back = window - 1 - step
        own = tl.load(segment_ids + row, mask=valid, other=0)
        same = own == tl.load(segment_ids + row - back, mask=valid & (position >= back), other=-1)
    return same


@triton.jit
def add_rows_to(sums, values, column, size):
    """
    Adds the sum over the rows of `(R, C)` to float64 sums `(C)`, to which nothing else writes meanwhile. Such sums are
    often far smaller than what is summed.
    """
    mask = column < size
    total = tl.sum(values, axis=0).to(tl.float64)
    tl.store(sums + column, tl.load(sums + column, mask=mask, other=0.0) + total, mask=mask)


@triton.jit
def add_zero_gradients(zero_sums, gradients, elsewhere, column, size, GATES: tl.constexpr):
    """Adds the gradients of the zero inputs, which stand where `elsewhere` `(R, C)`, to this program's sums `(G D)`."""
    sums = zero_sums + tl.program_id(0).to(tl.int64) * (GATES * size)
    for gate in tl.static_range(GATES):
        add_rows_to(sums + gate * size, tl.where(elsewhere, gradients[gate], 0.0), column, size)
