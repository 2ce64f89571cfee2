# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
A LocalRNN on a GPU where W_h fits on the chip: one kernel runs all K steps of a block of rows. W_h and the hidden state
stay on the chip, and the inputs of each step are read from the padded projections.

Forward: the states after all steps but the last are kept, D values a step and position (2 D for an LSTM).
Backward: a program takes one block of rows after another, computes the gates of a step again from the state before it,
and sums the gradient of W_h on the chip. Its rows are those of the padded projections, so a block of rows from r on
reads the inputs r to r + rows + K - 2 and no others. It sums their gradients in a buffer of its own, one step after
another; where the buffers of neighbouring blocks overlap they are added at the end. So every sum has one order: results
are the same from run to run.
"""

# B batch, L length, D hidden size, K window, R = B L rows, P = K - 1 + L positions with the padding,
# W width of a tile, a power of 2 that is at least D, G gates: GRU 3, LSTM 4, tanh RNN 1

import torch

from .local_rnn_triton_cells import (
    INTERPRETED,
    Inputs,
    add_rows_to,
    add_zero_gradients,
    gate_offsets,
    launch,
    load_biases,
    load_inputs,
    of_same_segment,
    run_step,
    run_step_backward,
    tl,
    triton,
)


# The largest D for which W_h, its gradient and the gates of a block of rows fit into the registers and shared memory of
# a multiprocessor: where products are in float32, and where they run on tensor cores, whose operands fill registers.
EXACT_SIZE = 64
TENSOR_CORE_SIZE = 32
# Bytes of shared memory that a D above 32 needs.
WIDE_SHARED_MEMORY = 84 * 1024
# Elements of a block of rows: few, since the dozen tiles of a step should stay in registers.
TILE_ELEMENTS = 1024
# Rows of a block in the forward pass where its products run on tensor cores, which then read W_h from shared memory.
TENSOR_CORE_ROWS = 64
# Programs of the backward kernel for each multiprocessor of the GPU; each has a W_h of gradients to add up at the end.
PROGRAMS_PER_PROCESSOR = 2


@triton.jit
def load_weights(weight, size, GATES: tl.constexpr, WIDTH: tl.constexpr):
    """W_h' of each gate `(in, out)`, zero beyond D."""
    column = tl.arange(0, WIDTH)
    mask = (column < size)[:, None] & (column < size)[None, :]
    weights = ()
    for gate in tl.static_range(GATES):
        weights += (tl.load(weight + (gate * size + column)[None, :] * size + column[:, None], mask=mask, other=0.0),)
    return weights


@triton.jit
def product(values, weight, PRECISION: tl.constexpr):
    """`values @ weight` in float32, with the values rounded to the weight's type."""
    values = values.to(weight.dtype)
    if INTERPRETED:  # there `tl.dot` multiplies the bits of bfloat16, read as whole numbers
        values = values.to(tl.float32)
        weight = weight.to(tl.float32)
    return tl.dot(values, weight, input_precision=PRECISION)


@triton.jit
def recurrent_gates(hidden, weights, biases, PRECISION: tl.constexpr, GATES: tl.constexpr):
    """The gates of W_h h + b_h."""
    gates = ()
    for gate in tl.static_range(GATES):
        gates += (product(hidden, weights[gate], PRECISION) + biases[gate],)
    return gates


@triton.jit(do_not_specialize=["rows", "length", "window"])
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
    weights = load_weights(weight, size, GATES, WIDTH)
    biases = load_biases(bias, column, size, GATES)
    hidden = tl.zeros((ROWS, WIDTH), tl.float32)
    cell = tl.zeros((ROWS, WIDTH), tl.float32)
    state_row = row
    for step in range(window):
        same = of_same_segment(segment_ids, row, position, valid, step, window, PACKED)
        x = load_inputs(projected, zero_input, source + step, same, column, mask, size, GATES, PACKED)
        h = recurrent_gates(hidden, weights, biases, PRECISION, GATES)
        hidden, cell, _ = run_step(x, h, hidden, cell, GATES)
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
def add_weight_gradients(sums, grads_h, hidden, PRECISION: tl.constexpr, GATES: tl.constexpr):
    """The sums of the gradient of W_h, `(out, in)` for each gate, with those of one step added."""
    added = ()
    for gate in tl.static_range(GATES):
        added += (sums[gate] + product(tl.trans(grads_h[gate].to(hidden.dtype)), hidden, PRECISION),)
    return added


@triton.jit
def zeros_of_weights(GATES: tl.constexpr, WIDTH: tl.constexpr):
    zeros = ()
    for _gate in tl.static_range(GATES):
        zeros += (tl.zeros((WIDTH, WIDTH), tl.float32),)
    return zeros


@triton.jit(do_not_specialize=["rows", "length", "window", "batch", "blocks"])
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
    length,
    size,
    window,
    batch,
    blocks,
    GATES: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    column = tl.arange(0, WIDTH)
    weights = load_weights(weight, size, GATES, WIDTH)
    biases = load_biases(bias, column, size, GATES)
    weight_sums = zeros_of_weights(GATES, WIDTH)
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
            same = of_same_segment(segment_ids, row, position, valid, step, window, PACKED)
            state_row = row + tl.cast(step - 1, tl.int64) * rows
            before = state_row[:, None] * size + column[None, :]
            inner = mask & (state_row >= 0)[:, None]
            hidden = tl.load(hiddens + before, mask=inner, other=0.0)  # in the inputs' type, in which products take it
            hidden_before = hidden.to(tl.float32)
            cell = hidden_before
            if GATES == 4:
                cell = tl.load(cells + before, mask=inner, other=0.0).to(tl.float32)
            x = load_inputs(projected, zero_input, source + step, same, column, mask, size, GATES, PACKED)
            h = recurrent_gates(hidden, weights, biases, PRECISION, GATES)
            _, _, gates = run_step(x, h, hidden_before, cell, GATES)
            grads_x, grads_h, grad_hidden, grad_cell = run_step_backward(
                gates, x[GATES - 1], hidden_before, cell, grad_hidden, grad_cell, GATES
            )
            for gate in tl.static_range(GATES):
                grad_hidden += product(grads_h[gate], tl.trans(weights[gate]), PRECISION)
            weight_sums = add_weight_gradients(weight_sums, grads_h, hidden, PRECISION, GATES)
            if GATES == 3:
                add_rows_to(bias_sums + tl.program_id(0) * size, grads_h[2], column, size)
            if PACKED:
                add_zero_gradients(zero_sums, grads_x, mask & (same == 0)[:, None], column, size, GATES)
            # The step before this one wrote all rows but the first, from other threads.
            tl.debug_barrier()
            is_new = (local * back == 0)[:, None]  # rows to which no step has written
            for gate in tl.static_range(GATES):
                gradient = grads_x[gate]
                if PACKED:
                    gradient = tl.where(same[:, None], gradient, 0.0)
                pointers = grad_inputs + gate_offsets(own_row + step, column, size, gate, GATES)
                old = tl.load(pointers, mask=columns & (is_new == 0), other=0.0)
                tl.store(pointers, old + gradient, mask=columns)
    weight_mask = (column < size)[:, None] & (column < size)[None, :]
    for gate in tl.static_range(GATES):
        weight_row = tl.program_id(0).to(tl.int64) * (GATES * size) + gate * size + column
        tl.store(grad_weight + weight_row[:, None] * size + column[None, :], weight_sums[gate], mask=weight_mask)


def is_exact(inputs: Inputs) -> bool:
    """Whether products are in float32, without tensor cores."""
    # Torch's choice for float32 products. Its older flag cannot be read where the newer one was set.
    return inputs.projected.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block of the GPU can have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 2**18


def fits_small(inputs: Inputs) -> bool:
    """Whether the kernels of this file run these inputs; those of local_rnn_triton_large.py run all."""
    size = inputs.weight.shape[1]
    if size > (EXACT_SIZE if is_exact(inputs) else TENSOR_CORE_SIZE):
        return False
    return size <= 32 or shared_memory(inputs.projected.device) >= WIDE_SHARED_MEMORY


def options_of(size: int, exact: bool, forward: bool) -> dict:
    """
    Options of a kernel: rows and width of a tile, 16 at least for `tl.dot`, and how it is compiled: those of the few
    that were compiled with which it spills least. tests/test_triton_compilation.py checks what each needs of a card.
    """
    width = max(triton.next_power_of_2(size), 16)
    if forward:
        rows = max(TILE_ELEMENTS // width, 16) if exact else TENSOR_CORE_ROWS
    else:
        rows = max(min(TILE_ELEMENTS // width, 32) if exact else TILE_ELEMENTS // 2 // width, 16)
    return {
        "ROWS": rows,
        "WIDTH": width,
        "PRECISION": "ieee" if exact else "tf32",
        "num_warps": 4 if forward and width == 16 else 8,
        "num_stages": 1,  # a step needs the state of the last, and no load may pass the stores before it
    }


def num_programs(device: torch.device) -> int:
    """Programs of the backward kernel, which share the blocks of rows."""
    if device.type != "cuda":
        return PROGRAMS_PER_PROCESSOR
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def forward_small(inputs: Inputs, keep: bool) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """`local_rnn` and what `backward_small` needs: hidden states and cells `(K - 1, R, D)`, empty without `keep`."""
    projected, weight, bias = inputs.projected, inputs.weight, inputs.bias
    rows, length, size, window = inputs.sizes
    outputs = projected.new_empty(len(projected), length, size)
    hiddens = projected.new_empty(window - 1 if keep else 0, rows, size)
    cells = projected.new_empty(window - 1 if keep and inputs.gates == 4 else 0, rows, size)
    options = options_of(size, is_exact(inputs), forward=True)
    tensors = projected, weight, bias, *inputs.packing, outputs, hiddens, cells
    grid = (triton.cdiv(rows, options["ROWS"]),)
    launch(forward_kernel)[grid](*tensors, *inputs.sizes, **inputs.constants, **options, KEEP=keep)
    return outputs, (hiddens, cells)


def backward_small(
    inputs: Inputs, grad_outputs: torch.Tensor, hiddens: torch.Tensor, cells: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gradients of `projected` and of `weight`, in float32, and the sums of `Inputs.new_sums`."""
    projected, weight, bias = inputs.projected, inputs.weight, inputs.bias
    batch, positions, width = projected.shape
    options = options_of(weight.shape[1], is_exact(inputs), forward=False)
    rows, beyond = options["ROWS"], inputs.window - 1
    blocks = triton.cdiv(batch * positions, rows)
    programs = min(num_programs(projected.device), blocks)
    float32 = {"dtype": torch.float32, "device": projected.device}
    grad_inputs = torch.empty(blocks, rows + beyond, width, **float32)
    grad_weight = torch.empty(programs, *weight.shape, **float32)
    sums = inputs.new_sums(programs)
    tensors = projected, weight, bias, *inputs.packing, hiddens, cells
    gradients = grad_outputs, grad_inputs, grad_weight, *sums
    sizes = *inputs.sizes, batch, blocks
    launch(backward_kernel)[(programs,)](*tensors, *gradients, *sizes, **inputs.constants, **options)
    own, shared = grad_inputs.split([rows, beyond], dim=1)
    for distance, part in enumerate(shared.split(rows, dim=1), start=1):  # rows of the block so many blocks ahead
        own[distance:, : part.shape[1]] += part[: max(blocks - distance, 0)]
    grad_projected = own.reshape(-1, width)[: batch * positions].view_as(projected)
    return grad_projected, grad_weight.sum(dim=0), *sums
