# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
The K steps of a LocalRNN on a CPU, tile by tile as in local_rnn_tiled.py, with all gates of a step in one pass of C.

Next to its product a step is half a dozen operations there, each of which reads and writes a buffer as large as the
product's. Here it is one loop over the rows, and so is a step back. Inputs are read, and their gradients added, where
they are, without a copy of a tile. `TiledLocalRnn` is the twin in PyTorch's operations.
"""

# R rows of a tile (S sequences, T positions of each), D hidden size, G gates, K window

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch
from torch.autograd.function import once_differentiable

from .compiled_c import load
from .local_rnn_tiled import Tile, Workspace, in_own_segment, make_tiles


# exp is a power of 2, by the bits of the exponent, times a polynomial on [-ln 2 / 2, ln 2 / 2]; the coefficients are
# those of Cephes' expf and tanhf (Moshier 1992). Without a branch, so that compilers make vectors of it; NaN stays NaN.
SOURCE = r"""
#include <math.h>
#include <stddef.h>
#include <string.h>

typedef ptrdiff_t count;

#ifdef DOUBLE
typedef double real;
static inline real exponential(real x) { return exp(x); }
static inline real tangent(real x) { return tanh(x); }
#else
typedef float real;

static inline float exponential(float x) {
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f;  /* 1.5 * 2^23: rounds, with the integer in the lowest bits */
    float whole = shifted - 12582912.0f;
    float part = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float power = 1.9875691500e-4f;
    power = power * part + 1.3981999507e-3f;
    power = power * part + 8.3334519073e-3f;
    power = power * part + 4.1665795894e-2f;
    power = power * part + 1.6666665459e-1f;
    power = power * part + 5.0000001201e-1f;
    power = power * part * part + part + 1.0f;
    unsigned bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000u;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return power * scale;
}

static inline float tangent(float x) {
    float square = x * x;
    float small = -5.70498872745e-3f;
    small = small * square + 2.06390887954e-2f;
    small = small * square - 5.37397155531e-2f;
    small = small * square + 1.33314422036e-1f;
    small = small * square - 3.33332819422e-1f;
    small = small * square * x + x;
    float large = 1.0f - 2.0f / (1.0f + exponential(2.0f * fabsf(x)));
    return square < 0.390625f ? small : copysignf(large, x);
}
#endif

static inline real sigmoid(real x) { return 1 / (1 + exponential(-x)); }

/* Every row once, in PyTorch's threads where that pays. Arrays of a tile are (R, columns) without gaps. Its inputs are
   rows of the whole, `stride` from one sequence to the next, or `zero` where `same` says that packing hides them. */
#define EACH_ROW _Pragma("omp parallel for if (rows * size > 16384)") for (count row = 0; row < rows; row++)
#define EACH _Pragma("omp simd") for (count d = 0; d < size; d++)
#define ROW(array, columns) ((array) ? (array) + row * (columns) : NULL)
#define INPUT(array, columns) ((array) + row / positions * stride + row % positions * (columns))
#define SHOWN (!same || same[row])
#define PLACE count rows, count size, count positions, count stride
#define INLINE static inline __attribute__((always_inline))

/* Constants where these are called: `first` for the step from a zero state, with no product and no state before it, and
   `keep` where a backward pass may follow. */
INLINE void gru_row(count size, const real *x, const real *p, const real *bias, real *h, real *s, real *r, int first,
                    int keep) {
    EACH {
        real reset = sigmoid(x[d] + bias[d] + (first ? 0 : p[d]));
        real update = sigmoid(x[size + d] + bias[size + d] + (first ? 0 : p[size + d]));
        real recurrent = bias[2 * size + d] + (first ? 0 : p[2 * size + d]);
        real new = tangent(x[2 * size + d] + reset * recurrent);
        if (keep) s[d] = reset;
        if (keep) s[size + d] = update;
        if (keep && !first) r[d] = recurrent;
        h[d] = new + update * ((first ? 0 : h[d]) - new);
    }
}

void gru_step(PLACE, const real *inputs, const real *zero, const real *same, const real *bias, const real *product,
              real *hidden, real *sigmoids, real *recurrent) {
    EACH_ROW {
        const real *x = SHOWN ? INPUT(inputs, 3 * size) : zero, *p = ROW(product, 3 * size);
        real *h = ROW(hidden, size), *s = ROW(sigmoids, 2 * size), *r = ROW(recurrent, size);
        if (product && sigmoids) gru_row(size, x, p, bias, h, s, r, 0, 1);
        else if (product) gru_row(size, x, p, bias, h, s, r, 0, 0);
        else if (sigmoids) gru_row(size, x, p, bias, h, s, r, 1, 1);
        else gru_row(size, x, p, bias, h, s, r, 1, 0);
    }
}

INLINE void gru_row_again(count size, const real *x, const real *bias, const real *b, const real *s, const real *r,
                          real *n, real *h, int first) {
    EACH {
        real new = tangent(x[2 * size + d] + s[d] * (first ? bias[2 * size + d] : r[d]));
        n[d] = new;
        h[d] = new + s[size + d] * ((first ? 0 : b[d]) - new);
    }
}

/* The states of a step once more, from what is kept. */
void gru_again(PLACE, const real *inputs, const real *zero, const real *same, const real *bias, const real *before,
               const real *sigmoids, const real *recurrent, real *new, real *hidden) {
    EACH_ROW {
        const real *x = SHOWN ? INPUT(inputs, 3 * size) : zero, *b = ROW(before, size);
        const real *s = ROW(sigmoids, 2 * size), *r = ROW(recurrent, size);
        real *n = ROW(new, size), *h = ROW(hidden, size);
        if (before) gru_row_again(size, x, bias, b, s, r, n, h, 0);
        else gru_row_again(size, x, bias, b, s, r, n, h, 1);
    }
}

INLINE void gru_row_back(count size, const real *bias, const real *b, const real *s, const real *r, const real *n,
                         real *g, real *p, real *x, int first) {
    EACH {
        real reset = s[d], update = s[size + d], new = n[d], grad = g[d];
        real to_new = grad * (1 - update) * (1 - new * new);
        real to_reset = to_new * (first ? bias[2 * size + d] : r[d]) * reset * (1 - reset);
        real to_update = grad * ((first ? 0 : b[d]) - new) * update * (1 - update);
        p[d] = to_reset;
        p[size + d] = to_update;
        p[2 * size + d] = to_new * reset;
        x[d] += to_reset;
        x[size + d] += to_update;
        x[2 * size + d] += to_new;
        g[d] = grad * update;
    }
}

void gru_back(PLACE, real *grad_inputs, real *grad_masked, const real *same, const real *bias,
              const real *before, const real *sigmoids, const real *recurrent, const real *new, real *grad_hidden,
              real *grad_product) {
    EACH_ROW {
        const real *b = ROW(before, size), *s = ROW(sigmoids, 2 * size), *r = ROW(recurrent, size), *n = ROW(new, size);
        real *g = ROW(grad_hidden, size), *p = ROW(grad_product, 3 * size);
        real *x = SHOWN ? INPUT(grad_inputs, 3 * size) : ROW(grad_masked, 3 * size);
        if (before) gru_row_back(size, bias, b, s, r, n, g, p, x, 0);
        else gru_row_back(size, bias, b, s, r, n, g, p, x, 1);
    }
}

/* The gates are input, forget, cell, output. */
INLINE void lstm_row(count size, const real *x, const real *p, const real *bias, const real *b, real *s, real *c,
                     real *h, int first, int keep) {
    EACH {
        real input = sigmoid(x[d] + bias[d] + (first ? 0 : p[d]));
        real forget = sigmoid(x[size + d] + bias[size + d] + (first ? 0 : p[size + d]));
        real new = tangent(x[2 * size + d] + bias[2 * size + d] + (first ? 0 : p[2 * size + d]));
        real output = sigmoid(x[3 * size + d] + bias[3 * size + d] + (first ? 0 : p[3 * size + d]));
        real cell = input * new + (first ? 0 : forget * b[d]);
        if (keep) s[d] = input;
        if (keep) s[size + d] = forget;
        if (keep) s[2 * size + d] = new;
        if (keep) s[3 * size + d] = output;
        c[d] = cell;
        h[d] = output * tangent(cell);
    }
}

void lstm_step(PLACE, const real *inputs, const real *zero, const real *same, const real *bias, const real *product,
               const real *before, real *gates, real *cell, real *hidden) {
    EACH_ROW {
        const real *x = SHOWN ? INPUT(inputs, 4 * size) : zero, *p = ROW(product, 4 * size), *b = ROW(before, size);
        real *s = ROW(gates, 4 * size), *c = ROW(cell, size), *h = ROW(hidden, size);
        if (product && gates) lstm_row(size, x, p, bias, b, s, c, h, 0, 1);
        else if (product) lstm_row(size, x, p, bias, b, s, c, h, 0, 0);
        else if (gates) lstm_row(size, x, p, bias, b, s, c, h, 1, 1);
        else lstm_row(size, x, p, bias, b, s, c, h, 1, 0);
    }
}

/* `s_b` are the gates of the step before, from which and its cell the hidden state `h` before this step follows. */
INLINE void lstm_row_back(count size, const real *s, const real *b, const real *s_b, real *h, const real *g_h,
                          real *g_c, real *p, real *x, int first) {
    EACH {
        real input = s[d], forget = s[size + d], new = s[2 * size + d], output = s[3 * size + d], grad = g_h[d];
        real curve = tangent(input * new + (first ? 0 : forget * b[d]));
        real to_cell = g_c[d] + grad * output * (1 - curve * curve);
        real to_input = to_cell * new * input * (1 - input);
        real to_forget = first ? 0 : to_cell * b[d] * forget * (1 - forget);
        real to_new = to_cell * input * (1 - new * new);
        real to_output = grad * curve * output * (1 - output);
        p[d] = to_input;
        p[size + d] = to_forget;
        p[2 * size + d] = to_new;
        p[3 * size + d] = to_output;
        x[d] += to_input;
        x[size + d] += to_forget;
        x[2 * size + d] += to_new;
        x[3 * size + d] += to_output;
        g_c[d] = to_cell * forget;
        if (!first) h[d] = s_b[3 * size + d] * tangent(b[d]);
    }
}

void lstm_back(PLACE, real *grad_inputs, real *grad_masked, const real *same, const real *gates, const real *before,
               const real *gates_before, real *hidden_before, const real *grad_hidden, real *grad_cell,
               real *grad_product) {
    EACH_ROW {
        const real *s = ROW(gates, 4 * size), *b = ROW(before, size), *s_b = ROW(gates_before, 4 * size);
        const real *g_h = ROW(grad_hidden, size);
        real *h = ROW(hidden_before, size), *g_c = ROW(grad_cell, size), *p = ROW(grad_product, 4 * size);
        real *x = SHOWN ? INPUT(grad_inputs, 4 * size) : ROW(grad_masked, 4 * size);
        if (before) lstm_row_back(size, s, b, s_b, h, g_h, g_c, p, x, 0);
        else lstm_row_back(size, s, b, s_b, h, g_h, g_c, p, x, 1);
    }
}

void rnn_step(PLACE, const real *inputs, const real *zero, const real *same, const real *bias, const real *product,
              real *hidden) {
    EACH_ROW {
        const real *x = SHOWN ? INPUT(inputs, size) : zero, *p = ROW(product, size);
        real *h = ROW(hidden, size);
        if (product) EACH h[d] = tangent(x[d] + bias[d] + p[d]);
        else EACH h[d] = tangent(x[d] + bias[d]);
    }
}

void rnn_back(PLACE, real *grad_inputs, real *grad_masked, const real *same, const real *hidden,
              const real *grad_hidden, real *grad_product) {
    EACH_ROW {
        const real *h = ROW(hidden, size), *g = ROW(grad_hidden, size);
        real *p = ROW(grad_product, size), *x = SHOWN ? INPUT(grad_inputs, size) : ROW(grad_masked, size);
        EACH {
            real grad = g[d] * (1 - h[d] * h[d]);
            p[d] = grad;
            x[d] += grad;
        }
    }
}
"""

# Arrays of each function, after R, D, T and the stride of the inputs.
ARRAYS = {
    "gru_step": 8,
    "gru_again": 9,
    "gru_back": 10,
    "lstm_step": 9,
    "lstm_back": 10,
    "rnn_step": 6,
    "rnn_back": 6,
}


@functools.cache
def kernels(dtype: torch.dtype) -> dict[str, Callable[..., None]]:
    """The functions above for float32 or float64, on numbers, tensors and None; raises [`NoCompiler`]."""
    library = load(SOURCE, *(["DOUBLE"] if dtype == torch.float64 else []))

    def on_tensors(name):
        function = getattr(library, name)
        function.restype = None
        function.argtypes = [ctypes.c_ssize_t] * 4 + [ctypes.c_void_p] * ARRAYS[name]

        def call(place: tuple[int, int, int, int], *tensors: torch.Tensor | None) -> None:
            function(*place, *(None if tensor is None else tensor.data_ptr() for tensor in tensors))

        return call

    return {name: on_tensors(name) for name in ARRAYS}


class Steps:
    """
    The steps of one tile by the kernels of one kind of RNN. `kept` are the arrays that serve the backward pass, as
    `shapes` says, or None where there will be none; `place` is (R, D, T, the stride of the inputs).
    """

    passes_by = 0  # 1 if some of the hidden state reaches the next step outside the product
    new_bias_is_gated = False  # whether b_h of the new gate acts inside a product with another gate

    def __init__(self, place: tuple[int, int, int, int], bias: torch.Tensor, kept: list | None, workspace: Workspace):
        self.place, self.bias, self.kept, self.workspace = place, bias, kept, workspace
        self.kernels = kernels(bias.dtype)

    @staticmethod
    def shapes(steps: int, rows: int, size: int) -> list[tuple[int, int, int]]:
        raise NotImplementedError

    def step(self, index: int, inputs: tuple, product: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden state `(R, D)`, in `hidden` or elsewhere, from `product` = W_h h, which the first step has not."""
        raise NotImplementedError

    def states(self, inputs: Sequence[tuple]) -> tuple[torch.Tensor, ...]:
        """What the steps back need beside what is kept, from the inputs of all steps."""
        return ()

    def back(self, index: int, grad_inputs: tuple, states: tuple, grad_hidden, grad_product) -> torch.Tensor | None:
        """
        Writes the gradient of W_h h + b_h, adds that of the inputs, and brings `grad_hidden` to before the step, all
        but what passes through the product. The hidden state before the step, of no meaning before the first.
        """
        raise NotImplementedError


class Gru(Steps):
    """Keeps (reset, update) and, of all steps but the first, W_h h + b_h of the new gate."""

    passes_by = 1
    new_bias_is_gated = True

    @staticmethod
    def shapes(steps, rows, size):
        return [(steps, rows, 2 * size), (steps - 1, rows, size)]

    def step(self, index, inputs, product, hidden):
        arrays = None, None
        if self.kept:
            sigmoids, recurrent = self.kept
            arrays = sigmoids[index], recurrent[index - 1] if index else None
        self.kernels["gru_step"](self.place, *inputs, self.bias, product, hidden, *arrays)
        return hidden

    def states(self, inputs):
        sigmoids, recurrent = self.kept
        new, hidden = (self.workspace(name, len(inputs), *self.place[:2]) for name in ("new", "states"))
        for index, each in enumerate(inputs):
            before, after_product = (hidden[index - 1], recurrent[index - 1]) if index else (None, None)
            arrays = before, sigmoids[index], after_product, new[index], hidden[index]
            self.kernels["gru_again"](self.place, *each, self.bias, *arrays)
        return new, hidden

    def back(self, index, grad_inputs, states, grad_hidden, grad_product):
        (sigmoids, recurrent), (new, hidden) = self.kept, states
        before, after_product = (hidden[index - 1], recurrent[index - 1]) if index else (None, None)
        arrays = before, sigmoids[index], after_product, new[index], grad_hidden, grad_product
        self.kernels["gru_back"](self.place, *grad_inputs, self.bias, *arrays)
        return before


class Lstm(Steps):
    """Keeps all gates and, of all steps but the last, the cell."""

    @staticmethod
    def shapes(steps, rows, size):
        return [(steps, rows, 4 * size), (steps - 1, rows, size)]

    def step(self, index, inputs, product, hidden):
        one_cell = self.workspace("cell", *hidden.shape)
        arrays = one_cell, None, one_cell
        if self.kept:
            gates, cells = self.kept
            before, after = cells[index - 1] if index else None, cells[index] if index < len(cells) else one_cell
            arrays = before, gates[index], after
        self.kernels["lstm_step"](self.place, *inputs, self.bias, product, *arrays, hidden)
        return hidden

    def states(self, inputs):
        return self.workspace("hidden", *self.place[:2]), self.workspace("grad_cell", *self.place[:2]).zero_()

    def back(self, index, grad_inputs, states, grad_hidden, grad_product):
        (gates, cells), (hidden, grad_cell) = self.kept, states
        arrays = (cells[index - 1], gates[index - 1], hidden) if index else (None, None, None)
        self.kernels["lstm_back"](self.place, *grad_inputs, gates[index], *arrays, grad_hidden, grad_cell, grad_product)
        return hidden


class Tanh(Steps):
    """Keeps the hidden states."""

    @staticmethod
    def shapes(steps, rows, size):
        return [(steps, rows, size)]

    def step(self, index, inputs, product, hidden):
        after = self.kept[0][index] if self.kept else hidden
        self.kernels["rnn_step"](self.place, *inputs, self.bias, product, after)
        return after

    def back(self, index, grad_inputs, states, grad_hidden, grad_product):
        (states,) = self.kept
        self.kernels["rnn_back"](self.place, *grad_inputs, states[index], grad_hidden, grad_product)
        return states[index - 1]


STEPS = {"gru": Gru, "lstm": Lstm, "rnn": Tanh}


def shown_inputs(segment_ids: torch.Tensor | None, tile: Tile, window: int, dtype) -> Sequence[torch.Tensor | None]:
    """`in_own_segment` as the kernels read it, `(R)` of 1 and 0 for each step."""
    same = in_own_segment(segment_ids, tile, window)
    return [None] * window if same is None else same.transpose(0, 1).to(dtype).reshape(window, -1).contiguous().unbind()


class FusedLocalRnn(torch.autograd.Function):
    """`local_rnn` on a CPU in float32 or float64; `keep` says whether a backward pass may follow."""

    @staticmethod
    def forward(ctx, projected, weight, bias, zero_input, segment_ids, rnn_type, window, keep):
        kind = STEPS[rnn_type]
        batch, length, size = projected.shape[0], projected.shape[1] - window + 1, weight.shape[1]
        projected, bias = projected.contiguous(), bias.contiguous()
        ctx.zero_shape = None if zero_input is None else zero_input.shape
        zero_input = None if zero_input is None else zero_input.reshape(-1).contiguous()
        weight_columns = weight.T.contiguous()  # (D, G D): its products are faster than those of the transposed view
        workspace = Workspace(projected)
        outputs = projected.new_empty(batch, length, size)
        kept_tiles = []
        for tile in make_tiles(batch, length, size):
            rows, (positions, sequences) = tile.rows, tile.shape
            kept = None
            if keep:
                kept = [projected.new_empty(shape) for shape in kind.shapes(window, rows, size)]
                kept_tiles += kept
            steps = kind((rows, size, positions, projected.stride(0)), bias, kept, workspace)
            shown = shown_inputs(segment_ids, tile, window, projected.dtype)
            product, hidden = workspace("product", rows, len(weight)), workspace("hidden", rows, size)
            for index in range(window):
                inputs = projected[tile.sequences, tile.positions.start + index :], zero_input, shown[index]
                if index:
                    torch.mm(hidden, weight_columns, out=product)
                hidden = steps.step(index, inputs, product if index else None, hidden)
            outputs[tile.sequences, tile.positions] = hidden.view(sequences, positions, size)
        ctx.options = kind, window
        ctx.save_for_backward(projected, weight, bias, zero_input, segment_ids, *kept_tiles)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_outputs):
        kind, window = ctx.options
        projected, weight, bias, zero_input, segment_ids, *kept_tiles = ctx.saved_tensors
        batch, length, size = grad_outputs.shape
        workspace = Workspace(projected)
        grad_projected = torch.zeros_like(projected)
        grad_weight = weight.new_zeros(size, len(weight))  # its transpose: faster for the same reason
        grad_new_bias = bias.new_zeros(size, dtype=torch.float64)
        grad_zero_input = torch.zeros_like(bias, dtype=torch.float64)
        kept_tiles = iter(kept_tiles)
        for tile in make_tiles(batch, length, size):
            rows, (positions, sequences) = tile.rows, tile.shape
            kept = [next(kept_tiles) for _ in kind.shapes(window, rows, size)]
            steps = kind((rows, size, positions, projected.stride(0)), bias, kept, workspace)
            shown = shown_inputs(segment_ids, tile, window, projected.dtype)
            starts = range(tile.positions.start, tile.positions.start + window)
            states = steps.states(
                [(projected[tile.sequences, start:], zero_input, shown[index]) for index, start in enumerate(starts)]
            )
            grad_product = workspace("grad_product", rows, len(weight))
            grad_masked = None if shown[0] is None else workspace("grad_masked", rows, len(weight)).zero_()
            grad_hidden = workspace("grad_hidden", rows, size)
            grad_hidden.view(sequences, positions, size).copy_(grad_outputs[tile.sequences, tile.positions])
            for index in reversed(range(window)):
                grad_inputs = grad_projected[tile.sequences, starts[index] :], grad_masked, shown[index]
                before = steps.back(index, grad_inputs, states, grad_hidden, grad_product)
                if kind.new_bias_is_gated:
                    grad_new_bias += grad_product[:, -size:].sum(dim=0)
                if index:
                    grad_weight.addmm_(before.T, grad_product)
                    grad_hidden.addmm_(grad_product, weight, beta=steps.passes_by)
            if grad_masked is not None:
                grad_zero_input += grad_masked.sum(dim=0)
        grad_bias = grad_projected.sum(dim=(0, 1)) + grad_zero_input
        if kind.new_bias_is_gated:
            grad_bias[-size:] = grad_new_bias
        grad_zero_input = None if zero_input is None else grad_zero_input.to(bias.dtype).view(ctx.zero_shape)
        return grad_projected, grad_weight.T, grad_bias.to(bias.dtype), grad_zero_input, None, None, None, None
