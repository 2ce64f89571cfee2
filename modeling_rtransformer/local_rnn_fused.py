# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
The steps of a LocalRNN's tiles with all gates of a step in one pass, in C.

In the tiled form a step is a product and half a dozen operations, each of which reads and writes a buffer as large as
the product's. Here these are one loop over the rows, and so is a step back. Products and tiles are those of
local_rnn_tiled.py, whose cells are the readable twins.
"""

# R rows of a tile, D hidden size, G gates

import ctypes
import functools
from collections.abc import Callable

import torch

from . import compiled_c
from .local_rnn_tiled import GruCell, LstmCell, TanhCell


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
    float large = 1.0f - 2.0f / (1.0f + exponential(2.0f * x));
    return square < 0.390625f ? small : large;
}
#endif

static inline real sigmoid(real x) { return 1 / (1 + exponential(-x)); }

/* Every row once, in PyTorch's threads where that pays; all arrays are (R, columns) without gaps. */
#define EACH_ROW _Pragma("omp parallel for if (rows * size > 16384)") for (count row = 0; row < rows; row++)
#define EACH _Pragma("omp simd") for (count d = 0; d < size; d++)
#define ROW(array, columns) ((array) ? (array) + row * (columns) : NULL)
#define INLINE static inline __attribute__((always_inline))

/* `first`, a constant where these are called, is the step from a zero state: no product and no state before it. */
INLINE void gru_row(count size, const real *x, const real *p, const real *bias, const real *b, real *s, real *r,
                    real *n, real *h, int first) {
    EACH {
        real reset = sigmoid(first ? x[d] : x[d] + p[d]);
        real update = sigmoid(first ? x[size + d] : x[size + d] + p[size + d]);
        real recurrent = first ? bias[d] : p[2 * size + d] + bias[d];
        real new = tangent(x[2 * size + d] + reset * recurrent);
        s[d] = reset;
        s[size + d] = update;
        if (!first) r[d] = recurrent;
        n[d] = new;
        h[d] = new + update * ((first ? 0 : b[d]) - new);
    }
}

void gru_step(count rows, count size, const real *inputs, const real *product, const real *bias, const real *before,
              real *sigmoids, real *recurrent, real *new, real *hidden) {
    EACH_ROW {
        const real *x = ROW(inputs, 3 * size), *p = ROW(product, 3 * size), *b = ROW(before, size);
        real *s = ROW(sigmoids, 2 * size), *r = ROW(recurrent, size), *n = ROW(new, size), *h = ROW(hidden, size);
        if (product) gru_row(size, x, p, bias, b, s, r, n, h, 0);
        else gru_row(size, x, p, bias, b, s, r, n, h, 1);
    }
}

INLINE void gru_row_again(count size, const real *x, const real *bias, const real *b, const real *s, const real *r,
                          real *n, real *h, int first) {
    EACH {
        real new = tangent(x[2 * size + d] + s[d] * (first ? bias[d] : r[d]));
        n[d] = new;
        h[d] = new + s[size + d] * ((first ? 0 : b[d]) - new);
    }
}

void gru_advance(count rows, count size, const real *inputs, const real *bias, const real *before, const real *sigmoids,
                 const real *recurrent, real *new, real *hidden) {
    EACH_ROW {
        const real *x = ROW(inputs, 3 * size), *b = ROW(before, size), *s = ROW(sigmoids, 2 * size);
        const real *r = ROW(recurrent, size);
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
        real to_reset = to_new * (first ? bias[d] : r[d]) * reset * (1 - reset);
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

void gru_backward(count rows, count size, const real *bias, const real *before, const real *sigmoids,
                  const real *recurrent, const real *new, real *grad_hidden, real *grad_product, real *grad_inputs,
                  real *grad_masked, const real *same) {
    EACH_ROW {
        const real *b = ROW(before, size), *s = ROW(sigmoids, 2 * size), *r = ROW(recurrent, size), *n = ROW(new, size);
        real *g = ROW(grad_hidden, size), *p = ROW(grad_product, 3 * size);
        real *x = ROW(!same || same[row] ? grad_inputs : grad_masked, 3 * size);
        if (before) gru_row_back(size, bias, b, s, r, n, g, p, x, 0);
        else gru_row_back(size, bias, b, s, r, n, g, p, x, 1);
    }
}

/* The sigmoid gates are input, forget, output. */
INLINE void lstm_row(count size, const real *x, const real *p, const real *c, real *s, real *n, real *cell, real *bent,
                     real *h, int first) {
    EACH {
        real input = sigmoid(first ? x[d] : x[d] + p[d]);
        real forget = sigmoid(first ? x[size + d] : x[size + d] + p[size + d]);
        real output = sigmoid(first ? x[2 * size + d] : x[2 * size + d] + p[2 * size + d]);
        real new = tangent(first ? x[3 * size + d] : x[3 * size + d] + p[3 * size + d]);
        real sum = first ? input * new : input * new + forget * c[d];
        real curve = tangent(sum);
        s[d] = input;
        s[size + d] = forget;
        s[2 * size + d] = output;
        n[d] = new;
        cell[d] = sum;
        bent[d] = curve;
        h[d] = output * curve;
    }
}

void lstm_step(count rows, count size, const real *inputs, const real *product, const real *before, real *sigmoids,
               real *new, real *cell, real *tanh_cell, real *hidden) {
    EACH_ROW {
        const real *x = ROW(inputs, 4 * size), *p = ROW(product, 4 * size), *c = ROW(before, size);
        real *s = ROW(sigmoids, 3 * size), *n = ROW(new, size);
        real *sum = ROW(cell, size), *bent = ROW(tanh_cell, size), *h = ROW(hidden, size);
        if (product) lstm_row(size, x, p, c, s, n, sum, bent, h, 0);
        else lstm_row(size, x, p, c, s, n, sum, bent, h, 1);
    }
}

INLINE void lstm_row_again(count size, const real *c, const real *s, const real *n, real *cell, real *bent, real *h,
                           int first) {
    EACH {
        real sum = first ? s[d] * n[d] : s[d] * n[d] + s[size + d] * c[d];
        real curve = tangent(sum);
        cell[d] = sum;
        bent[d] = curve;
        h[d] = s[2 * size + d] * curve;
    }
}

void lstm_advance(count rows, count size, const real *before, const real *sigmoids, const real *new, real *cell,
                  real *tanh_cell, real *hidden) {
    EACH_ROW {
        const real *c = ROW(before, size), *s = ROW(sigmoids, 3 * size), *n = ROW(new, size);
        real *sum = ROW(cell, size), *bent = ROW(tanh_cell, size), *h = ROW(hidden, size);
        if (before) lstm_row_again(size, c, s, n, sum, bent, h, 0);
        else lstm_row_again(size, c, s, n, sum, bent, h, 1);
    }
}

INLINE void lstm_row_back(count size, const real *c, const real *s, const real *n, const real *bent, const real *g_h,
                          real *g_c, real *p, real *x, int first) {
    EACH {
        real input = s[d], forget = s[size + d], output = s[2 * size + d], new = n[d], curve = bent[d], grad = g_h[d];
        real to_cell = g_c[d] + grad * output * (1 - curve * curve);
        real to_input = to_cell * new * input * (1 - input);
        real to_forget = first ? 0 : to_cell * c[d] * forget * (1 - forget);
        real to_output = grad * curve * output * (1 - output);
        real to_new = to_cell * input * (1 - new * new);
        p[d] = to_input;
        p[size + d] = to_forget;
        p[2 * size + d] = to_output;
        p[3 * size + d] = to_new;
        x[d] += to_input;
        x[size + d] += to_forget;
        x[2 * size + d] += to_output;
        x[3 * size + d] += to_new;
        g_c[d] = to_cell * forget;
    }
}

void lstm_backward(count rows, count size, const real *before, const real *sigmoids, const real *new,
                   const real *tanh_cell, const real *grad_hidden, real *grad_cell, real *grad_product,
                   real *grad_inputs, real *grad_masked, const real *same) {
    EACH_ROW {
        const real *c = ROW(before, size), *s = ROW(sigmoids, 3 * size), *n = ROW(new, size);
        const real *bent = ROW(tanh_cell, size), *g_h = ROW(grad_hidden, size);
        real *g_c = ROW(grad_cell, size), *p = ROW(grad_product, 4 * size);
        real *x = ROW(!same || same[row] ? grad_inputs : grad_masked, 4 * size);
        if (before) lstm_row_back(size, c, s, n, bent, g_h, g_c, p, x, 0);
        else lstm_row_back(size, c, s, n, bent, g_h, g_c, p, x, 1);
    }
}

void rnn_step(count rows, count size, const real *inputs, const real *product, real *hidden) {
    EACH_ROW {
        const real *x = ROW(inputs, size), *p = ROW(product, size);
        real *h = ROW(hidden, size);
        if (product) EACH h[d] = tangent(x[d] + p[d]);
        else EACH h[d] = tangent(x[d]);
    }
}

void rnn_backward(count rows, count size, const real *hidden, const real *grad_hidden, real *grad_product,
                  real *grad_inputs, real *grad_masked, const real *same) {
    EACH_ROW {
        const real *h = ROW(hidden, size), *g = ROW(grad_hidden, size);
        real *p = ROW(grad_product, size), *x = ROW(!same || same[row] ? grad_inputs : grad_masked, size);
        EACH {
            real grad = g[d] * (1 - h[d] * h[d]);
            p[d] = grad;
            x[d] += grad;
        }
    }
}
"""

# Arrays of each function, after R and D.
ARRAYS = {
    "gru_step": 8,
    "gru_advance": 7,
    "gru_backward": 10,
    "lstm_step": 8,
    "lstm_advance": 6,
    "lstm_backward": 10,
    "rnn_step": 3,
    "rnn_backward": 6,
}


@functools.cache
def kernels(dtype: torch.dtype) -> dict[str, Callable[..., None]]:
    """The functions above for float32 or float64, on tensors or None; raises [`compiled_c.NoCompiler`]."""
    library = compiled_c.load(SOURCE, *(["DOUBLE"] if dtype == torch.float64 else []))

    def on_tensors(name):
        function = getattr(library, name)
        function.restype = None
        function.argtypes = [ctypes.c_ssize_t] * 2 + [ctypes.c_void_p] * ARRAYS[name]

        def call(rows: int, size: int, *tensors: torch.Tensor | None) -> None:
            function(rows, size, *(None if tensor is None else tensor.data_ptr() for tensor in tensors))

        return call

    return {name: on_tensors(name) for name in ARRAYS}


class FusedGruCell(GruCell):
    def __init__(self, weight, bias):
        super().__init__(weight, bias)
        self.kernels = kernels(weight.dtype)

    def step(self, inputs, product, kept, before, after):
        new, hidden = after
        arrays = (inputs.all, product and product.all, self.new_bias, before and before[-1], kept.sigmoids, kept.new)
        self.kernels["gru_step"](len(hidden), self.size, *arrays, new, hidden)

    def advance(self, inputs, kept, before, after):
        new, hidden = after
        arrays = (inputs.all, self.new_bias, before and before[-1], kept.sigmoids, kept.new)
        self.kernels["gru_advance"](len(hidden), self.size, *arrays, new, hidden)

    def backward(self, kept, before, after, grads, back):
        arrays = (self.new_bias, before and before[-1], kept.sigmoids, kept.new, after[0], *grads)
        self.kernels["gru_backward"](len(grads[0]), self.size, *arrays, *back.arrays)


class FusedLstmCell(LstmCell):
    def __init__(self, weight, bias):
        super().__init__(weight, bias)
        self.kernels = kernels(weight.dtype)

    def step(self, inputs, product, kept, before, after):
        arrays = (inputs.all, product and product.all, before and before[0], kept.sigmoids, kept.new)
        self.kernels["lstm_step"](len(kept.new), self.size, *arrays, *after)

    def advance(self, inputs, kept, before, after):
        arrays = (before and before[0], kept.sigmoids, kept.new)
        self.kernels["lstm_advance"](len(kept.new), self.size, *arrays, *after)

    def backward(self, kept, before, after, grads, back):
        arrays = (before and before[0], kept.sigmoids, kept.new, after[1], *grads)
        self.kernels["lstm_backward"](len(kept.new), self.size, *arrays, *back.arrays)


class FusedTanhCell(TanhCell):
    def __init__(self, weight, bias):
        super().__init__(weight, bias)
        self.kernels = kernels(weight.dtype)

    def step(self, inputs, product, kept, before, after):
        self.kernels["rnn_step"](len(kept.new), self.size, inputs.all, product and product.all, kept.new)

    def backward(self, kept, before, after, grads, back):
        self.kernels["rnn_backward"](len(kept.new), self.size, kept.new, *grads, *back.arrays)


CELLS = {"gru": FusedGruCell, "lstm": FusedLstmCell, "rnn": FusedTanhCell}
