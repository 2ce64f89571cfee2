# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
A LocalRNN on a GPU where W_h fits on the chip: one kernel runs all K steps of a block of rows, W_h and the hidden state
on chip, and reads the inputs of each step straight out of the padded projections.

Forward: the states after all steps but the last are kept, D values a step and position (2 D for an LSTM).
Backward: a program takes one block of rows after another, makes the gates of a step again from the state before it, and
sums the gradient of W_h on chip. Its rows are those of the padded projections, so a block of rows from r on reaches the
inputs r to r + rows + K - 2 and no others. It sums the gradients of these in a buffer of its own, one step after
another; where the buffers of neighbours overlap they are added at the end. So every sum has one order: results are the
same from run to run.
"""

# B batch, L length, D hidden size, K window, R = B L rows, P = K - 1 + L positions with the padding,
# W width of a tile, a power of 2 that is at least D, G gates: GRU 3, LSTM 4, tanh RNN 1

import torch

from .local_rnn_triton_cells import (
    add_rows_to,
    gate_offsets,
    gru_backward,
    gru_gates,
    load_bias,
    load_input,
    lstm_backward,
    of_same_segment,
    tanh,
    tl,
    triton,
)


# Elements of a block of rows, so that the dozen tiles of a step stay in registers (as ptxas reports for an H200).
TILE_ELEMENTS = 1024
# Rows of a block in the forward pass where its products run on tensor cores, which read W_h from shared memory then.
TENSOR_CORE_ROWS = 64
INTERPRETED = tl.constexpr(not isinstance(tanh, triton.runtime.JITFunction))  # what Triton has made of a function
# Programs of the backward kernel for each multiprocessor of the GPU; each has a W_h of gradients to add up at the end.
PROGRAMS_PER_PROCESSOR = 2


@triton.jit
def load_weight(weight, size, GATE: tl.constexpr, WIDTH: tl.constexpr):
    """W_h' of one gate `(in, out)`, zero beyond D."""
    column = tl.arange(0, WIDTH)
    mask = (column < size)[:, None] & (column < size)[None, :]
    return tl.load(weight + (GATE * size + column)[None, :] * size + column[:, None], mask=mask, other=0.0)


@triton.jit
def product(values, weight, PRECISION: tl.constexpr):
    """`values @ weight` in float32, with the values rounded to the weight's type."""
    values = values.to(weight.dtype)
    if INTERPRETED:  # there `tl.dot` multiplies the bits of bfloat16, read as whole numbers
        values = values.to(tl.float32)
        weight = weight.to(tl.float32)
    return tl.dot(values, weight, input_precision=PRECISION)


@triton.jit
def forward_kernel(
    projected,  # (B, P, G D)
    weight,  # (G D, D)
    bias,  # (G D)
    zero_input,  # (G D)
    segment_ids,  # (R)
    outputs,  # (R, D), written
    hiddens,  # (K - 1, R, D), written if KEEP
    cells,  # (K - 1, R, D), written if KEEP, of an LSTM
    rows,
    length,
    size,
    window,
    GATES: tl.constexpr,
    PACKED: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    position = row % length
    source = row + (row // length) * (window - 1)  # the row of `projected` in the first step
    column = tl.arange(0, WIDTH)
    mask = valid[:, None] & (column < size)[None, :]
    weight_0 = load_weight(weight, size, 0, WIDTH)
    bias_0 = load_bias(bias, column, size, 0)
    if GATES > 1:
        weight_1 = load_weight(weight, size, 1, WIDTH)
        weight_2 = load_weight(weight, size, 2, WIDTH)
        bias_1 = load_bias(bias, column, size, 1)
        bias_2 = load_bias(bias, column, size, 2)
    if GATES > 3:
        weight_3 = load_weight(weight, size, 3, WIDTH)
        bias_3 = load_bias(bias, column, size, 3)
    hidden = tl.zeros((ROWS, WIDTH), tl.float32)
    cell = tl.zeros((ROWS, WIDTH), tl.float32)
    state_row = row
    for step in range(window):
        same = valid
        if PACKED:
            same = of_same_segment(segment_ids, row, position, valid, step, window)
        x_0 = load_input(projected, zero_input, source + step, same, column, mask, size, 0, GATES, PACKED)
        h_0 = product(hidden, weight_0, PRECISION) + bias_0
        if GATES == 1:
            hidden = tanh(x_0 + h_0)
        else:
            x_1 = load_input(projected, zero_input, source + step, same, column, mask, size, 1, GATES, PACKED)
            x_2 = load_input(projected, zero_input, source + step, same, column, mask, size, 2, GATES, PACKED)
            h_1 = product(hidden, weight_1, PRECISION) + bias_1
            h_2 = product(hidden, weight_2, PRECISION) + bias_2
            if GATES == 3:
                _, update, new = gru_gates(x_0, x_1, x_2, h_0, h_1, h_2)
                hidden = new + update * (hidden - new)
            else:
                x_3 = load_input(projected, zero_input, source + step, same, column, mask, size, 3, GATES, PACKED)
                h_3 = product(hidden, weight_3, PRECISION) + bias_3
                cell = tl.sigmoid(x_0 + h_0) * tanh(x_2 + h_2) + tl.sigmoid(x_1 + h_1) * cell
                hidden = tl.sigmoid(x_3 + h_3) * tanh(cell)
        if KEEP:
            offsets = state_row[:, None] * size + column[None, :]
            inner = mask & (state_row < rows * tl.cast(window - 1, tl.int64))[:, None]
            tl.store(hiddens + offsets, hidden.to(hiddens.dtype.element_ty), mask=inner)
            if GATES == 4:
                tl.store(cells + offsets, cell.to(cells.dtype.element_ty), mask=inner)
            state_row += rows
    offsets = row[:, None] * size + column[None, :]
    tl.store(outputs + offsets, hidden.to(outputs.dtype.element_ty), mask=mask)


@triton.jit
def add_gradient(
    own_inputs, gradient, input_row, new_row, columns, column, size, GATE: tl.constexpr, GATES: tl.constexpr
):
    """Adds one gate's gradient of the inputs to the program's buffer; `new_row` `(ROWS, 1)` holds nothing yet."""
    pointers = own_inputs + gate_offsets(input_row, column, size, GATE, GATES)
    old = tl.load(pointers, mask=columns & (new_row == 0), other=0.0)
    tl.store(pointers, old + gradient, mask=columns)


@triton.jit
def store_weight(weights, values, size, GATE: tl.constexpr, GATES: tl.constexpr, WIDTH: tl.constexpr):
    """The program's sum of the gradient of W_h of one gate, `(out, in)`."""
    column = tl.arange(0, WIDTH)
    mask = (column < size)[:, None] & (column < size)[None, :]
    start = tl.program_id(0).to(tl.int64) * (GATES * size) + GATE * size
    tl.store(weights + (start + column)[:, None] * size + column[None, :], values, mask=mask)


@triton.jit
def add_zero_gradient(zero_sums, gradient, same, column, size, GATE: tl.constexpr, GATES: tl.constexpr):
    """Adds one gate's gradient of the zero inputs, which stand where not `same`."""
    sums = zero_sums + tl.program_id(0).to(tl.int64) * (GATES * size) + GATE * size
    add_rows_to(sums, tl.where(same[:, None], 0.0, gradient), column, size)


@triton.jit
def backward_kernel(
    projected,  # (B, P, G D)
    weight,  # (G D, D)
    bias,  # (G D)
    zero_input,  # (G D)
    segment_ids,  # (R)
    hiddens,  # (K - 1, R, D)
    cells,  # (K - 1, R, D), of an LSTM
    grad_outputs,  # (R, D)
    grad_inputs,  # (blocks, ROWS + K - 1, G D) float32, written
    grad_weight,  # (programs, G D, D) float32, written
    bias_sums,  # (programs, D) float64, added to: the new gate's of a GRU, the other gates' are the inputs'
    zero_sums,  # (programs, G D) float64, added to
    rows,
    batch,
    length,
    size,
    window,
    blocks,
    GATES: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    column = tl.arange(0, WIDTH)
    weight_0 = load_weight(weight, size, 0, WIDTH)
    bias_0 = load_bias(bias, column, size, 0)
    grad_weight_0 = tl.zeros((WIDTH, WIDTH), tl.float32)
    if GATES > 1:
        weight_1 = load_weight(weight, size, 1, WIDTH)
        weight_2 = load_weight(weight, size, 2, WIDTH)
        bias_1 = load_bias(bias, column, size, 1)
        bias_2 = load_bias(bias, column, size, 2)
        grad_weight_1 = tl.zeros((WIDTH, WIDTH), tl.float32)
        grad_weight_2 = tl.zeros((WIDTH, WIDTH), tl.float32)
    if GATES > 3:
        weight_3 = load_weight(weight, size, 3, WIDTH)
        bias_3 = load_bias(bias, column, size, 3)
        grad_weight_3 = tl.zeros((WIDTH, WIDTH), tl.float32)
    local = tl.arange(0, ROWS)
    positions = length + window - 1
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        source = tl.cast(block, tl.int64) * ROWS + local  # the row of `projected` in the first step
        position = source % positions
        sequence = source // positions
        row = sequence * length + position
        valid = (position < length) & (sequence < batch)
        columns = (local >= 0)[:, None] & (column < size)[None, :]  # of rows that are not valid too, for zeros
        mask = columns & valid[:, None]
        offsets = row[:, None] * size + column[None, :]
        grad_hidden = tl.load(grad_outputs + offsets, mask=mask, other=0.0).to(tl.float32)
        grad_cell = tl.zeros((ROWS, WIDTH), tl.float32)
        own_row = tl.cast(block, tl.int64) * (ROWS + window - 1) + local
        for back in range(window):
            step = window - 1 - back
            same = valid
            if PACKED:
                same = of_same_segment(segment_ids, row, position, valid, step, window)
            state_row = row + tl.cast(step - 1, tl.int64) * rows
            before = state_row[:, None] * size + column[None, :]
            inner = mask & (state_row >= 0)[:, None]
            hidden = tl.load(hiddens + before, mask=inner, other=0.0)  # in the inputs' type, in which products take it
            x_0 = load_input(projected, zero_input, source + step, same, column, mask, size, 0, GATES, PACKED)
            h_0 = product(hidden, weight_0, PRECISION) + bias_0
            if GATES == 1:
                new = tanh(x_0 + h_0)
                grad_0 = grad_hidden * (1.0 - new * new)
                grad_hidden = product(grad_0, tl.trans(weight_0), PRECISION)
            else:
                x_1 = load_input(projected, zero_input, source + step, same, column, mask, size, 1, GATES, PACKED)
                x_2 = load_input(projected, zero_input, source + step, same, column, mask, size, 2, GATES, PACKED)
                h_1 = product(hidden, weight_1, PRECISION) + bias_1
                h_2 = product(hidden, weight_2, PRECISION) + bias_2
                if GATES == 3:
                    reset, update, new = gru_gates(x_0, x_1, x_2, h_0, h_1, h_2)
                    grad_0, grad_1, grad_2 = gru_backward(grad_hidden, reset, update, new, h_2, hidden.to(tl.float32))
                    grad_h_2 = grad_2 * reset
                    add_rows_to(bias_sums + tl.program_id(0) * size, grad_h_2, column, size)
                    grad_hidden = grad_hidden * update
                else:
                    x_3 = load_input(projected, zero_input, source + step, same, column, mask, size, 3, GATES, PACKED)
                    h_3 = product(hidden, weight_3, PRECISION) + bias_3
                    cell = tl.load(cells + before, mask=inner, other=0.0).to(tl.float32)
                    grad_0, grad_1, grad_2, grad_3, grad_cell = lstm_backward(
                        grad_hidden,
                        grad_cell,
                        tl.sigmoid(x_0 + h_0),
                        tl.sigmoid(x_1 + h_1),
                        tanh(x_2 + h_2),
                        tl.sigmoid(x_3 + h_3),
                        cell,
                    )
                    grad_h_2 = grad_2
                    grad_hidden = product(grad_3, tl.trans(weight_3), PRECISION)
                    grad_weight_3 += product(tl.trans(grad_3.to(hidden.dtype)), hidden, PRECISION)
                grad_hidden += product(grad_0, tl.trans(weight_0), PRECISION)
                grad_hidden += product(grad_1, tl.trans(weight_1), PRECISION)
                grad_hidden += product(grad_h_2, tl.trans(weight_2), PRECISION)
                grad_weight_1 += product(tl.trans(grad_1.to(hidden.dtype)), hidden, PRECISION)
                grad_weight_2 += product(tl.trans(grad_h_2.to(hidden.dtype)), hidden, PRECISION)
            grad_weight_0 += product(tl.trans(grad_0.to(hidden.dtype)), hidden, PRECISION)
            if PACKED:
                add_zero_gradient(zero_sums, grad_0, same, column, size, 0, GATES)
                grad_0 = tl.where(same[:, None], grad_0, 0.0)
                if GATES > 1:
                    add_zero_gradient(zero_sums, grad_1, same, column, size, 1, GATES)
                    add_zero_gradient(zero_sums, grad_2, same, column, size, 2, GATES)
                    grad_1 = tl.where(same[:, None], grad_1, 0.0)
                    grad_2 = tl.where(same[:, None], grad_2, 0.0)
                if GATES > 3:
                    add_zero_gradient(zero_sums, grad_3, same, column, size, 3, GATES)
                    grad_3 = tl.where(same[:, None], grad_3, 0.0)
            # The step before this one wrote all rows but the first, from other threads.
            tl.debug_barrier()
            new_row = (local * back == 0)[:, None]
            input_row = own_row + step
            add_gradient(grad_inputs, grad_0, input_row, new_row, columns, column, size, 0, GATES)
            if GATES > 1:
                add_gradient(grad_inputs, grad_1, input_row, new_row, columns, column, size, 1, GATES)
                add_gradient(grad_inputs, grad_2, input_row, new_row, columns, column, size, 2, GATES)
            if GATES > 3:
                add_gradient(grad_inputs, grad_3, input_row, new_row, columns, column, size, 3, GATES)
    store_weight(grad_weight, grad_weight_0, size, 0, GATES, WIDTH)
    if GATES > 1:
        store_weight(grad_weight, grad_weight_1, size, 1, GATES, WIDTH)
        store_weight(grad_weight, grad_weight_2, size, 2, GATES, WIDTH)
    if GATES > 3:
        store_weight(grad_weight, grad_weight_3, size, 3, GATES, WIDTH)


def options_of(weight: torch.Tensor) -> dict:
    """Options of both kernels: rows and width of a tile, 16 at least for `tl.dot`, and how they are compiled."""
    width = max(triton.next_power_of_2(weight.shape[1]), 16)
    # Torch's choice for float32 products. Its older flag cannot be read where the newer one was set.
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return {
        "ROWS": max(TILE_ELEMENTS // width, 16),
        "WIDTH": width,
        "PRECISION": precision,
        "num_warps": 8 if width > 16 else 4,
        "num_stages": 1,  # a step needs the state of the last, and no load may pass the stores before it
    }


def num_programs(device: torch.device) -> int:
    """Programs of the backward kernel, which share the blocks of rows."""
    if device.type != "cuda":
        return PROGRAMS_PER_PROCESSOR
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def forward_small(
    projected: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    zero_input: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    window: int,
    keep: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """`local_rnn` and what `backward_small` needs: hidden states and cells `(K - 1, R, D)`, empty without `keep`."""
    batch, length, size = projected.shape[0], projected.shape[1] - window + 1, weight.shape[1]
    rows, gates = batch * length, len(weight) // size
    outputs = projected.new_empty(batch, length, size)
    hiddens = projected.new_empty(window - 1 if keep else 0, rows, size)
    cells = projected.new_empty(window - 1 if keep and gates == 4 else 0, rows, size)
    options = options_of(weight)
    if projected.dtype != torch.float32 or options["PRECISION"] == "tf32":
        options["ROWS"] = TENSOR_CORE_ROWS
    forward_kernel[(triton.cdiv(rows, options["ROWS"]),)](
        projected,
        weight,
        bias,
        bias if zero_input is None else zero_input,
        bias if segment_ids is None else segment_ids,
        outputs,
        hiddens,
        cells,
        rows,
        length,
        size,
        window,
        GATES=gates,
        PACKED=segment_ids is not None,
        KEEP=keep,
        **options,
    )
    return outputs, (hiddens, cells)


def backward_small(
    grad_outputs: torch.Tensor,
    projected: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    zero_input: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    window: int,
    hiddens: torch.Tensor,
    cells: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """
    Gradients of `projected`, of `weight`, of the new gate's bias where that is not the sum of the inputs' (GRU), and of
    `zero_input` where there are segments; the first two in float32, the others in float64.
    """
    batch, length, size = grad_outputs.shape
    gates, packed = len(weight) // size, segment_ids is not None
    inputs = batch * projected.shape[1]
    options = options_of(weight)
    blocks = triton.cdiv(inputs, options["ROWS"])
    programs = min(num_programs(projected.device), blocks)
    float32 = {"dtype": torch.float32, "device": projected.device}
    grad_inputs = torch.empty(blocks, options["ROWS"] + window - 1, gates * size, **float32)
    grad_weight = torch.empty(programs, *weight.shape, **float32)
    bias_sums = grad_weight.new_zeros((programs, size if gates == 3 else 0), dtype=torch.float64)
    zero_sums = grad_weight.new_zeros((programs, gates * size if packed else 0), dtype=torch.float64)
    backward_kernel[(programs,)](
        projected,
        weight,
        bias,
        bias if zero_input is None else zero_input,
        bias if segment_ids is None else segment_ids,
        hiddens,
        cells,
        grad_outputs,
        grad_inputs,
        grad_weight,
        bias_sums,
        zero_sums,
        batch * length,
        batch,
        length,
        size,
        window,
        blocks,
        GATES=gates,
        PACKED=packed,
        **options,
    )
    own, beyond = grad_inputs.split([options["ROWS"], window - 1], dim=1)
    for distance, part in enumerate(beyond.split(options["ROWS"], dim=1), start=1):  # of the block so far behind
        own[distance:, : part.shape[1]] += part[: max(blocks - distance, 0)]
    grad_projected = own.reshape(-1, gates * size)[:inputs].view_as(projected)
    grad_new_bias = bias_sums.sum(dim=0) if gates == 3 else None
    return grad_projected, grad_weight.sum(dim=0), grad_new_bias, zero_sums.sum(dim=0) if packed else None
