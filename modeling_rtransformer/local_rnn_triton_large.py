# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
A LocalRNN on a GPU where W_h does not fit on the chip: each step is a library product and one kernel for its gates.

Forward, step k:    product = h W_h'; the kernel reads W_x x + b_x from the padded projections, computes gates and h.
Backward, step k:   the kernel computes the gradient of W_h h + b_h and adds the gradient of W_x x + b_x to the rows of
                    the inputs; then two products give the gradients of h and of W_h.

Only the gates of each step are kept, G D values a position. The backward pass computes the states from them again,
which takes no product, for some rows at a time. Steps run one after another and a step adds to an input once, so every
sum has one order: results are the same from run to run.
"""

# B batch, L length, D hidden size, K window, R = B L rows, G gates: GRU 3, LSTM 4, tanh RNN 1

import torch

from .local_rnn_triton_cells import (
    Inputs,
    add_rows_to,
    add_zero_gradients,
    gate_offsets,
    launch,
    load_biases,
    load_gates,
    load_inputs,
    of_same_segment,
    run_step,
    run_step_backward,
    store_gates,
    tanh,
    tl,
    triton,
)


# Elements of a kernel's tile, and how many of them lie side by side in a row.
TILE_ELEMENTS = 1024
TILE_COLUMNS = 128
# Elements of one state of the rows that go through a backward pass together: few, for memory, yet enough to fill a GPU.
BACKWARD_ELEMENTS = 2**23


@triton.jit
def rows_and_columns(rows, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's rows (int64), which of them exist, its columns, and the mask `(ROWS, COLUMNS)`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    valid = row < rows
    return row, valid, column, valid[:, None] & (column < size)[None, :]


@triton.jit(do_not_specialize=["rows", "length", "window", "step"])
def forward_kernel(
    projected,  # (B, K - 1 + L, G D)
    bias,  # (G D), b_h
    zero_input,  # (G D)
    segment_ids,  # (R)
    product,  # (R, G D), W_h h of the step before; unread in the first step
    before,  # (R, D), h of the step before
    after,  # (R, D), h of this step
    cell,  # (R, D) float32, of an LSTM, replaced by that of this step
    kept,  # (R, G D), of this step
    rows,
    length,
    size,
    window,
    step,
    GATES: tl.constexpr,
    FIRST: tl.constexpr,
    PACKED: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, valid, column, mask = rows_and_columns(rows, size, ROWS, COLUMNS)
    source = row + (row // length) * (window - 1) + step  # the row of `projected`
    same = of_same_segment(segment_ids, row, row % length, valid, step, window, PACKED)
    x = load_inputs(projected, zero_input, source, same, column, mask, size, GATES, PACKED)
    h = load_biases(bias, column, size, GATES)
    state = row[:, None] * size + column[None, :]
    hidden = tl.zeros((ROWS, COLUMNS), tl.float32)
    old_cell = hidden
    if not FIRST:
        h = add_gates(h, load_gates(product, row, column, mask, size, GATES), GATES)
        if GATES == 3:
            hidden = tl.load(before + state, mask=mask, other=0.0).to(tl.float32)
        if GATES == 4:
            old_cell = tl.load(cell + state, mask=mask, other=0.0)
    hidden, new_cell, gates = run_step(x, h, hidden, old_cell, GATES)
    tl.store(after + state, hidden.to(after.dtype.element_ty), mask=mask)
    if GATES == 4:
        tl.store(cell + state, new_cell, mask=mask)
    if KEEP and GATES > 1:  # the hidden state of a tanh RNN is written where it is kept
        store_gates(kept, gates, row, column, mask, size, GATES)


@triton.jit
def add_gates(left, right, GATES: tl.constexpr):
    sums = ()
    for gate in tl.static_range(GATES):
        sums += (left[gate] + right[gate],)
    return sums


@triton.jit(do_not_specialize=["first_row", "all_rows", "rows", "length", "window"])
def states_kernel(
    projected,  # (B, K - 1 + L, G D)
    zero_input,  # (G D)
    segment_ids,  # (all rows)
    kept,  # (K, all rows, G D)
    hidden,  # (K - 1, R, D), written
    cells,  # (K - 1, R, D), written, of an LSTM
    first_row,
    all_rows,
    rows,
    length,
    size,
    window,
    GATES: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The states after all steps but the last, from the gates; of rows `first_row` to `first_row + R`."""
    local, valid, column, mask = rows_and_columns(rows, size, ROWS, COLUMNS)
    row = local + first_row
    source = row + (row // length) * (window - 1)
    state = tl.zeros((ROWS, COLUMNS), tl.float32)  # of a GRU the hidden state, of an LSTM the cell
    kept_row = row
    state_row = local
    for step in range(window - 1):
        gates = load_gates(kept, kept_row, column, mask, size, GATES)
        offsets = state_row[:, None] * size + column[None, :]
        if GATES == 3:
            same = of_same_segment(segment_ids, row, row % length, valid, step, window, PACKED)
            x = load_inputs(projected, zero_input, source + step, same, column, mask, size, GATES, PACKED)
            new = tanh(x[2] + gates[0] * gates[2])
            state = new + gates[1] * (state - new)
            tl.store(hidden + offsets, state.to(hidden.dtype.element_ty), mask=mask)
        else:
            state = gates[0] * gates[2] + gates[1] * state
            tl.store(cells + offsets, state.to(cells.dtype.element_ty), mask=mask)
            tl.store(hidden + offsets, (gates[3] * tanh(state)).to(hidden.dtype.element_ty), mask=mask)
        kept_row += all_rows
        state_row += rows


@triton.jit(do_not_specialize=["first_row", "rows", "length", "window", "step"])
def backward_kernel(
    projected,  # (B, K - 1 + L, G D)
    zero_input,  # (G D)
    segment_ids,  # (all rows)
    kept,  # (R, G D), of this step; of a tanh RNN (R, D), its h
    before,  # (R, D), h of the step before (GRU) or its cell (LSTM); unread in the first step
    grad_hidden,  # (R, D), the gradient of h after this step that came through a product, or of the output
    carry,  # (R, D) float32, what reaches it past the product (GRU), or the gradient of the cell (LSTM); replaced
    grad_recurrent,  # (R, G D), written: the gradient of W_h h + b_h
    grad_projected,  # (B, K - 1 + L, G D) float32, added to
    bias_sums,  # (programs, D) float64, added to: the new gate's of a GRU, the other gates' are the inputs'
    zero_sums,  # (programs, G D) float64, added to
    first_row,
    rows,
    length,
    size,
    window,
    step,
    GATES: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    local, valid, column, mask = rows_and_columns(rows, size, ROWS, COLUMNS)
    row = local + first_row
    source = row + (row // length) * (window - 1) + step
    same = of_same_segment(segment_ids, row, row % length, valid, step, window, PACKED)
    state = local[:, None] * size + column[None, :]
    gates = load_gates(kept, local, column, mask, size, GATES)
    grad_h = tl.load(grad_hidden + state, mask=mask, other=0.0).to(tl.float32)
    grad_cell = tl.zeros((ROWS, COLUMNS), tl.float32)
    old = grad_cell
    new_x = grad_cell
    if GATES > 1 and not FIRST:
        old = tl.load(before + state, mask=mask, other=0.0).to(tl.float32)
    if GATES == 3:
        x = load_inputs(projected, zero_input, source, same, column, mask, size, GATES, PACKED)
        new_x = x[2]
    if GATES > 1 and not LAST:
        carried = tl.load(carry + state, mask=mask, other=0.0)
        if GATES == 3:
            grad_h += carried
        else:
            grad_cell = carried
    grads_x, grads_h, past_product, grad_cell = run_step_backward(gates, new_x, old, old, grad_h, grad_cell, GATES)
    if GATES == 3:
        tl.store(carry + state, past_product, mask=mask)
        sums = bias_sums + tl.program_id(0).to(tl.int64) * size
        add_rows_to(sums, tl.where(mask, grads_h[2], 0.0), column, size)
    if GATES == 4:
        tl.store(carry + state, grad_cell, mask=mask)
    store_gates(grad_recurrent, grads_h, local, column, mask, size, GATES)
    if PACKED:
        add_zero_gradients(zero_sums, grads_x, mask & (same == 0)[:, None], column, size, GATES)
        mask = mask & same[:, None]
    for gate in tl.static_range(GATES):
        pointers = grad_projected + gate_offsets(source, column, size, gate, GATES)
        tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + grads_x[gate], mask=mask)


def tile_of(size: int) -> dict[str, int]:
    """Rows and columns of a kernel's tile."""
    columns = min(triton.next_power_of_2(size), TILE_COLUMNS)
    return {"ROWS": max(TILE_ELEMENTS // columns, 1), "COLUMNS": columns}


def grid_of(rows: int, size: int) -> tuple[int, int]:
    tile = tile_of(size)
    return triton.cdiv(rows, tile["ROWS"]), triton.cdiv(size, tile["COLUMNS"])


def forward_large(inputs: Inputs, keep: bool) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """`local_rnn` and what `backward_large` needs of it: the gates `(K, R, G D)`, or nothing without `keep`."""
    projected, weight, bias, gates = inputs.projected, inputs.weight, inputs.bias, inputs.gates
    rows, length, size, window = sizes = inputs.sizes
    constants = inputs.constants | tile_of(size)
    kept = projected.new_empty(window if keep else 0, rows, len(bias))
    product = projected.new_empty(rows, len(bias))
    outputs = projected.new_empty(rows, size)
    buffers = outputs, projected.new_empty(rows, size)
    cell = projected.new_empty((rows, size) if gates == 4 else 0, dtype=torch.float32)
    before = outputs
    for step in range(window):
        after = buffers[(window - 1 - step) % 2]  # the last one is `outputs`
        if gates == 1 and keep:
            after = kept[step]
        if step:
            torch.mm(before, weight.T, out=product)
        tensors = projected, bias, *inputs.packing, product, before, after, cell, kept[step] if keep else kept
        launch(forward_kernel)[grid_of(rows, size)](*tensors, *sizes, step, **constants, FIRST=step == 0, KEEP=keep)
        before = after
    if gates == 1 and keep:
        outputs = before.clone()  # `kept` must not change with them
    return outputs.view(-1, length, size), (kept,)


def backward_large(inputs: Inputs, grad_outputs: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients of `projected` and of `weight`, in float32, and the sums of `Inputs.new_sums`."""
    projected, weight, gates = inputs.projected, inputs.weight, inputs.gates
    rows, length, size, window = inputs.sizes
    count = max(min(rows, BACKWARD_ELEMENTS // size), 1)
    constants = inputs.constants | tile_of(size)
    sums = inputs.new_sums(grid_of(count, size)[0])
    grad_projected = torch.zeros_like(projected, dtype=torch.float32)
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)
    num_states = {1: 0, 3: 1, 4: 2}[gates]
    all_states = projected.new_empty(num_states * (window - 1) * count * size)
    all_grad_recurrent = projected.new_empty(count, len(weight))
    all_grad_hidden = projected.new_empty(count, size)
    carry = projected.new_empty((count, size) if gates > 1 else 0, dtype=torch.float32)
    grad_outputs = grad_outputs.reshape(rows, size)
    for first_row in range(0, rows, count):
        count = min(count, rows - first_row)
        sizes = count, length, size, window
        states = all_states[: num_states * (window - 1) * count * size].view(num_states, window - 1, count, size)
        hidden = states[0] if num_states else kept[:, first_row : first_row + count]
        cells = states[-1] if num_states else states
        if num_states:
            tensors = projected, *inputs.packing, kept, hidden, cells
            launch(states_kernel)[grid_of(count, size)](*tensors, first_row, rows, *sizes, **constants)
        grad_recurrent, product = all_grad_recurrent[:count], all_grad_hidden[:count]
        grad_hidden = grad_outputs[first_row : first_row + count]
        for step in reversed(range(window)):
            before = cells[step - 1] if step and num_states else grad_recurrent
            tensors = projected, *inputs.packing, kept[step, first_row : first_row + count], before
            gradients = grad_hidden, carry, grad_recurrent, grad_projected, *sums
            is_first, is_last = step == 0, step == window - 1
            launch(backward_kernel)[grid_of(count, size)](
                *tensors, *gradients, first_row, *sizes, step, **constants, FIRST=is_first, LAST=is_last
            )
            if step:
                grad_weight += grad_recurrent.T @ hidden[step - 1]
                grad_hidden = torch.mm(grad_recurrent, weight, out=product)
    return grad_projected, grad_weight, *sums
