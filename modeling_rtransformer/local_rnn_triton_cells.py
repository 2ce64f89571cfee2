# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
What the Triton kernels of a LocalRNN share: the elementwise half of a step and its backward, in float32, and how a tile
of gates is read and written. The readable twins are `gru_step` and `lstm_step` in local_rnn.py.

Importing this needs Triton; local_rnn.py imports it, by way of local_rnn_triton.py, where kernels are wanted.
"""

# R rows of a tile, C columns of it (some of the D hidden units), D hidden size, K window,
# G gates, whose number is the type: 3 GRU (reset, update, new), 4 LSTM (input, forget, cell, output), 1 tanh RNN

# The one import of Triton. In a `try`, because the Hub's loader of code takes any other import for a requirement.
try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the LocalRNN 'triton' needs Triton: `pip install triton`") from error


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


@triton.jit
def gru_gates(reset_x, update_x, new_x, reset_h, update_h, new_h):
    """(reset, update, new) from the parts of W_x x + b_x and W_h h + b_h; the state is new + update (h - new)."""
    reset = tl.sigmoid(reset_x + reset_h)
    update = tl.sigmoid(update_x + update_h)
    return reset, update, tanh(new_x + reset * new_h)


@triton.jit
def gru_backward(grad_hidden, reset, update, new, new_h, hidden):
    """
    Gradients of the parts of W_x x + b_x. Those of W_h h + b_h are the same but for the new gate's, which is `reset`
    times as large. `hidden` is the state before; `update * grad_hidden` reaches it past the product.
    """
    grad_new = grad_hidden * (1.0 - update) * (1.0 - new * new)
    grad_update = grad_hidden * (hidden - new) * update * (1.0 - update)
    grad_reset = grad_new * new_h * reset * (1.0 - reset)
    return grad_reset, grad_update, grad_new


@triton.jit
def lstm_backward(grad_hidden, grad_cell, input_gate, forget_gate, new, output_gate, cell):
    """Gradients of the four parts, of W_x x + b_x as of W_h h + b_h, and of `cell`, the cell before."""
    tanh_cell = tanh(input_gate * new + forget_gate * cell)
    grad_output = grad_hidden * tanh_cell * output_gate * (1.0 - output_gate)
    grad_cell += grad_hidden * output_gate * (1.0 - tanh_cell * tanh_cell)
    grad_input = grad_cell * new * input_gate * (1.0 - input_gate)
    grad_forget = grad_cell * cell * forget_gate * (1.0 - forget_gate)
    grad_new = grad_cell * input_gate * (1.0 - new * new)
    return grad_input, grad_forget, grad_new, grad_output, grad_cell * forget_gate


@triton.jit
def gate_offsets(row, column, size, GATE: tl.constexpr, GATES: tl.constexpr):
    """Where the tile `(R, C)` of one gate lies in a matrix `(..., G D)`. `row` is int64: G D rows may exceed 2^31."""
    return row[:, None] * (GATES * size) + (GATE * size + column)[None, :]


@triton.jit
def load_gate(matrix, row, column, mask, size, GATE: tl.constexpr, GATES: tl.constexpr):
    """The tile `(R, C)` of one gate in a matrix `(..., G D)`, in float32, zero outside the mask."""
    return tl.load(matrix + gate_offsets(row, column, size, GATE, GATES), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_bias(bias, column, size, GATE: tl.constexpr):
    """One gate's part `(1, C)` of a vector `(G D)`, in float32."""
    return tl.load(bias + GATE * size + column, mask=column < size, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_input(
    projected, zero_input, row, same, column, mask, size, GATE: tl.constexpr, GATES: tl.constexpr, PACKED: tl.constexpr
):
    """One gate of the inputs of a step, `(R, C)`; in packed sequences that of a zero input where not `same` `(R)`."""
    inputs = load_gate(projected, row, column, mask, size, GATE, GATES)
    if PACKED:
        inputs = tl.where(same[:, None], inputs, load_bias(zero_input, column, size, GATE))
    return inputs


@triton.jit
def of_same_segment(segment_ids, row, position, valid, step, window):
    """Whether the input of a step `(R)` is of the row's own segment; -1 is the segment before the sequence."""
    back = window - 1 - step
    own = tl.load(segment_ids + row, mask=valid, other=0)
    neighbour = tl.load(segment_ids + row - back, mask=valid & (position >= back), other=-1)
    return neighbour == own


@triton.jit
def add_rows_to(sums, values, column, size):
    """
    Adds the sum over the rows of `(R, C)` to float64 sums `(C)`, to which nothing else writes meanwhile. Such sums are
    often far smaller than what is summed.
    """
    mask = column < size
    total = tl.sum(values, axis=0).to(tl.float64)
    tl.store(sums + column, tl.load(sums + column, mask=mask, other=0.0) + total, mask=mask)
