# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
A LocalRNN on a GPU where W_h does not fit on the chip: each step is a library product and one kernel for its gates.

Forward, step k:    product = h W_h'; the kernel reads x W_x' + b_x out of the padded projections, makes gates and h.
Backward, step k:   the kernel makes the gradient of the product's gates and adds that of the inputs to their slice;
                    then two products, for the gradients of h and of W_h.

Of each step the gates alone are kept, G D values a position; a backward pass gets the states from them again, which
takes no product, for some rows at a time. Steps run one after another and a step adds to a position once, so every sum
has one order: results are the same from run to run.
"""

# B batch, L length, D hidden size, K window, R = B L rows, G gates: GRU 3, LSTM 4, tanh RNN 1

import torch

from .local_rnn_triton_cells import (
    add_rows_to,
    gate_offsets,
    gru_backward,
    gru_gates,
    load_bias,
    load_gate,
    load_input,
    lstm_backward,
    of_same_segment,
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
    """This program's rows (int64), which of them are there, its columns, and the mask `(ROWS, COLUMNS)`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    valid = row < rows
    return row, valid, column, valid[:, None] & (column < size)[None, :]


@triton.jit
def forward_kernel(
    projected,  # (B, K - 1 + L, G D)
    product,  # (R, G D), W_h h of the step before; unread in the first step
    bias,  # (G D), b_h
    zero_input,  # (G D)
    segment_ids,  # (R)
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
    same = valid
    if PACKED:
        same = of_same_segment(segment_ids, row, row % length, valid, step, window)
    state = row[:, None] * size + column[None, :]
    x_0 = load_input(projected, zero_input, source, same, column, mask, size, 0, GATES, PACKED)
    h_0 = load_bias(bias, column, size, 0)
    if not FIRST:
        h_0 += load_gate(product, row, column, mask, size, 0, GATES)
    if GATES == 1:
        tl.store(after + state, tanh(x_0 + h_0).to(after.dtype.element_ty), mask=mask)
    else:
        x_1 = load_input(projected, zero_input, source, same, column, mask, size, 1, GATES, PACKED)
        x_2 = load_input(projected, zero_input, source, same, column, mask, size, 2, GATES, PACKED)
        h_1 = load_bias(bias, column, size, 1)
        h_2 = load_bias(bias, column, size, 2)
        if not FIRST:
            h_1 += load_gate(product, row, column, mask, size, 1, GATES)
            h_2 += load_gate(product, row, column, mask, size, 2, GATES)
        if GATES == 3:
            gate_0, gate_1, new = gru_gates(x_0, x_1, x_2, h_0, h_1, h_2)
            gate_2 = tl.broadcast_to(h_2, (ROWS, COLUMNS))
            if FIRST:
                hidden = new - gate_1 * new
            else:
                hidden = tl.load(before + state, mask=mask, other=0.0).to(tl.float32)
                hidden = new + gate_1 * (hidden - new)
        else:
            x_3 = load_input(projected, zero_input, source, same, column, mask, size, 3, GATES, PACKED)
            h_3 = load_bias(bias, column, size, 3)
            if not FIRST:
                h_3 += load_gate(product, row, column, mask, size, 3, GATES)
            gate_0 = tl.sigmoid(x_0 + h_0)
            gate_1 = tl.sigmoid(x_1 + h_1)
            gate_2 = tanh(x_2 + h_2)
            gate_3 = tl.sigmoid(x_3 + h_3)
            new_cell = gate_0 * gate_2
            if not FIRST:
                new_cell += gate_1 * tl.load(cell + state, mask=mask, other=0.0)
            tl.store(cell + state, new_cell, mask=mask)
            hidden = gate_3 * tanh(new_cell)
            if KEEP:
                store_gate(kept, gate_3, row, column, mask, size, 3, GATES)
        tl.store(after + state, hidden.to(after.dtype.element_ty), mask=mask)
        if KEEP:
            store_gate(kept, gate_0, row, column, mask, size, 0, GATES)
            store_gate(kept, gate_1, row, column, mask, size, 1, GATES)
            store_gate(kept, gate_2, row, column, mask, size, 2, GATES)


@triton.jit
def store_gate(matrix, values, row, column, mask, size, GATE: tl.constexpr, GATES: tl.constexpr):
    """Writes the tile `(ROWS, COLUMNS)` of one gate into a matrix `(R, G D)`."""
    tl.store(matrix + gate_offsets(row, column, size, GATE, GATES), values.to(matrix.dtype.element_ty), mask=mask)


@triton.jit
def states_kernel(
    projected,  # (B, K - 1 + L, G D)
    zero_input,  # (G D)
    segment_ids,  # (all rows)
    kept,  # (K, all rows, G D)
    hidden,  # (K - 1, R, D), written
    cells,  # (K - 1, R, D), written, of an LSTM
    first_row,
    rows,
    all_rows,
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
        gate_0 = load_gate(kept, kept_row, column, mask, size, 0, GATES)
        gate_1 = load_gate(kept, kept_row, column, mask, size, 1, GATES)
        gate_2 = load_gate(kept, kept_row, column, mask, size, 2, GATES)
        offsets = state_row[:, None] * size + column[None, :]
        if GATES == 3:
            same = valid
            if PACKED:
                same = of_same_segment(segment_ids, row, row % length, valid, step, window)
            new_x = load_input(projected, zero_input, source + step, same, column, mask, size, 2, GATES, PACKED)
            new = tanh(new_x + gate_0 * gate_2)
            state = new + gate_1 * (state - new)
            tl.store(hidden + offsets, state.to(hidden.dtype.element_ty), mask=mask)
        else:
            gate_3 = load_gate(kept, kept_row, column, mask, size, 3, GATES)
            state = gate_0 * gate_2 + gate_1 * state
            tl.store(cells + offsets, state.to(cells.dtype.element_ty), mask=mask)
            tl.store(hidden + offsets, (gate_3 * tanh(state)).to(hidden.dtype.element_ty), mask=mask)
        kept_row += all_rows
        state_row += rows


@triton.jit
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
    same = valid
    if PACKED:
        same = of_same_segment(segment_ids, row, row % length, valid, step, window)
    state = local[:, None] * size + column[None, :]
    grad_h = tl.load(grad_hidden + state, mask=mask, other=0.0).to(tl.float32)
    gate_0 = load_gate(kept, local, column, mask, size, 0, GATES)
    if GATES == 1:
        grad_0 = grad_h * (1.0 - gate_0 * gate_0)
    else:
        gate_1 = load_gate(kept, local, column, mask, size, 1, GATES)
        gate_2 = load_gate(kept, local, column, mask, size, 2, GATES)
        old = tl.zeros((ROWS, COLUMNS), tl.float32)
        if not FIRST:
            old = tl.load(before + state, mask=mask, other=0.0).to(tl.float32)
        carried = tl.zeros((ROWS, COLUMNS), tl.float32)
        if not LAST:
            carried = tl.load(carry + state, mask=mask, other=0.0)
        if GATES == 3:
            new_x = load_input(projected, zero_input, source, same, column, mask, size, 2, GATES, PACKED)
            new = tanh(new_x + gate_0 * gate_2)
            grad_h += carried
            grad_0, grad_1, grad_2 = gru_backward(grad_h, gate_0, gate_1, new, gate_2, old)
            carried = grad_h * gate_1
            grad_new_h = tl.where(mask, grad_2 * gate_0, 0.0)
            store_gate(grad_recurrent, grad_new_h, local, column, mask, size, 2, GATES)
            add_rows_to(bias_sums + tl.program_id(0).to(tl.int64) * size, grad_new_h, column, size)
        else:
            gate_3 = load_gate(kept, local, column, mask, size, 3, GATES)
            grad_0, grad_1, grad_2, grad_3, carried = lstm_backward(
                grad_h, carried, gate_0, gate_1, gate_2, gate_3, old
            )
            store_gate(grad_recurrent, grad_2, local, column, mask, size, 2, GATES)
            store_gate(grad_recurrent, grad_3, local, column, mask, size, 3, GATES)
            add_gradient(grad_projected, zero_sums, grad_3, source, valid, same, column, mask, size, 3, GATES, PACKED)
        tl.store(carry + state, carried, mask=mask)
        store_gate(grad_recurrent, grad_1, local, column, mask, size, 1, GATES)
        add_gradient(grad_projected, zero_sums, grad_1, source, valid, same, column, mask, size, 1, GATES, PACKED)
        add_gradient(grad_projected, zero_sums, grad_2, source, valid, same, column, mask, size, 2, GATES, PACKED)
    store_gate(grad_recurrent, grad_0, local, column, mask, size, 0, GATES)
    add_gradient(grad_projected, zero_sums, grad_0, source, valid, same, column, mask, size, 0, GATES, PACKED)


@triton.jit
def add_gradient(
    grad_projected,
    zero_sums,
    gradient,
    source,
    valid,
    same,
    column,
    mask,
    size,
    GATE: tl.constexpr,
    GATES: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Adds the gradient `(ROWS, COLUMNS)` of one gate of the inputs to their rows, or to the zero input's."""
    if PACKED:
        sums = zero_sums + tl.program_id(0).to(tl.int64) * (GATES * size) + GATE * size
        others = mask & (valid & (same == 0))[:, None]
        add_rows_to(sums, tl.where(others, gradient, 0.0), column, size)
        mask = mask & same[:, None]
    pointers = grad_projected + gate_offsets(source, column, size, GATE, GATES)
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + gradient, mask=mask)


def tile_of(size: int) -> dict[str, int]:
    """Rows and columns of a kernel's tile."""
    columns = min(triton.next_power_of_2(size), TILE_COLUMNS)
    return {"ROWS": max(TILE_ELEMENTS // columns, 1), "COLUMNS": columns}


def grid_of(rows: int, size: int) -> tuple[int, int]:
    tile = tile_of(size)
    return triton.cdiv(rows, tile["ROWS"]), triton.cdiv(size, tile["COLUMNS"])


def forward_large(
    projected: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    zero_input: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    window: int,
    keep: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """`local_rnn` and what `backward_large` needs of it: the gates `(K, R, G D)`, or nothing without `keep`."""
    batch, length, width = projected.shape[0], projected.shape[1] - window + 1, projected.shape[2]
    rows, size = batch * length, weight.shape[1]
    gates = width // size
    kept = projected.new_empty(window if keep else 0, rows, width)
    product = projected.new_empty(rows, width)
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
        forward_kernel[grid_of(rows, size)](
            projected,
            product,
            bias,
            bias if zero_input is None else zero_input,
            bias if segment_ids is None else segment_ids,
            before,
            after,
            cell,
            kept[step] if keep else kept,
            rows,
            length,
            size,
            window,
            step,
            GATES=gates,
            FIRST=step == 0,
            PACKED=segment_ids is not None,
            KEEP=keep,
            **tile_of(size),
        )
        before = after
    if gates == 1 and keep:
        outputs = before.clone()  # `kept` must not change with them
    return outputs.view(batch, length, size), (kept,)


def backward_large(
    grad_outputs: torch.Tensor,
    projected: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    zero_input: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    window: int,
    kept: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """
    Gradients of `projected`, of `weight`, of the new gate's bias where that is not the sum of the inputs' (GRU), and of
    `zero_input` where there are segments; the first two in float32, the others in float64.
    """
    batch, length, size = grad_outputs.shape
    rows, width = batch * length, projected.shape[2]
    gates = width // size
    count = max(min(rows, BACKWARD_ELEMENTS // size), 1)
    programs = grid_of(count, size)[0]
    packed = segment_ids is not None
    float32 = {"dtype": torch.float32, "device": projected.device}
    grad_projected = torch.zeros(projected.shape, **float32)
    grad_weight = torch.zeros(weight.shape, **float32)
    bias_sums = grad_weight.new_zeros((programs, size if gates == 3 else 0), dtype=torch.float64)
    zero_sums = grad_weight.new_zeros((programs, width if packed else 0), dtype=torch.float64)
    num_states = {1: 0, 3: 1, 4: 2}[gates]
    all_states = projected.new_empty(num_states * (window - 1) * count * size)
    all_grad_recurrent = projected.new_empty(count, width)
    all_grad_hidden = projected.new_empty(count, size)
    carry = torch.empty((count, size) if gates > 1 else 0, **float32)
    flat_grad_outputs = grad_outputs.reshape(rows, size)
    zero_input = bias if zero_input is None else zero_input
    segment_ids = bias if segment_ids is None else segment_ids
    for first_row in range(0, rows, count):
        count = min(count, rows - first_row)
        states = all_states[: num_states * (window - 1) * count * size].view(num_states, window - 1, count, size)
        hidden = states[0] if num_states else kept[:, first_row : first_row + count]
        cells = states[-1] if num_states else states
        if num_states:
            states_kernel[grid_of(count, size)](
                projected,
                zero_input,
                segment_ids,
                kept,
                hidden,
                cells,
                first_row,
                count,
                rows,
                length,
                size,
                window,
                GATES=gates,
                PACKED=packed,
                **tile_of(size),
            )
        grad_recurrent, product = all_grad_recurrent[:count], all_grad_hidden[:count]
        grad_hidden = flat_grad_outputs[first_row : first_row + count]
        for step in reversed(range(window)):
            backward_kernel[grid_of(count, size)](
                projected,
                zero_input,
                segment_ids,
                kept[step, first_row : first_row + count],
                cells[step - 1] if step and num_states else grad_recurrent,
                grad_hidden,
                carry,
                grad_recurrent,
                grad_projected,
                bias_sums,
                zero_sums,
                first_row,
                count,
                length,
                size,
                window,
                step,
                GATES=gates,
                FIRST=step == 0,
                LAST=step == window - 1,
                PACKED=packed,
                **tile_of(size),
            )
            if step:
                grad_weight += grad_recurrent.T @ hidden[step - 1]
                grad_hidden = torch.mm(grad_recurrent, weight, out=product)
    grad_new_bias = bias_sums.sum(dim=0) if gates == 3 else None
    return grad_projected, grad_weight, grad_new_bias, zero_sums.sum(dim=0) if packed else None
