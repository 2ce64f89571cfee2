"""
The layer-normalised LSTM on a CPU in C; layer_norm_lstm.py has the equations and the readable twin.

In PyTorch's operations a step of a few rows is some twenty calls, each of which costs more than its arithmetic. Here a
thread takes its rows of the batch through all positions. The products of the inputs, and the gradient of W_h, are one
product over all positions each and stay in PyTorch.
"""

# B batch, T positions, D hidden size

import ctypes
import functools

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from modeling_rtransformer.compiled_c import load
from modeling_rtransformer.local_rnn_c import packed, padded
from modeling_rtransformer.local_rnn_c_source import NUMBERS, PRODUCTS


THREAD_ROWS = 4  # the fewest rows for which a further thread pays

# The sizes, numbers and arrays of a call, in this order; an array that a pass does not use is NULL.
COUNTS = ("batch", "length", "size", "threads", "buffer_size")
FACTORS = ("clip", "epsilon")
ARRAYS = (
    *("projected", "weight", "scale", "bias", "normalized", "inverse", "cells", "outputs", "buffers"),
    *("grad_outputs", "grad_projected"),
)
TOTALS = ("grad_scale", "grad_bias")

CALL = f"""
typedef struct {{
    count {", ".join(COUNTS)};
    double {", ".join(FACTORS)};
    real *{", *".join(ARRAYS)};
    double *{", *".join(TOTALS)};
}} call;
"""

# Names of the C:  x W_x x, p the product W_h h or its gradient, n the four normalised gates, v one over their standard
# deviation, s scale, b bias, c the cell, h hidden state, g_... the gradient of ...
STEPS = r"""
int omp_get_thread_num(void);

#define EACH _Pragma("omp simd") for (count d = 0; d < size; d++)
#define PRAGMA(text) _Pragma(#text)
#define SUM(total) PRAGMA(omp simd reduction(+ : total)) for (count d = 0; d < size; d++)

INLINE void normalize(count size, double epsilon, const real *x, const real *p, real *n, real *v) {
    real total = 0, squares = 0;
    SUM(total) total += n[d] = x[d] + p[d];
    real mean = total / size;
    SUM(squares) {
        n[d] -= mean;
        squares += n[d] * n[d];
    }
    real factor = (real)(1 / sqrt((double)(squares / size) + epsilon));
    EACH n[d] *= factor;
    *v = factor;
}

INLINE void gates(count size, count d, const real *n, const real *s, const real *b, real *new, real *input,
                  real *forget, real *output) {
    two_sigmoids(n[size + d] * s[size + d] + b[size + d], n[2 * size + d] * s[2 * size + d] + b[2 * size + d], input,
                 forget);
    sigmoid_and_tangent(n[3 * size + d] * s[3 * size + d] + b[3 * size + d], n[d] * s[d] + b[d], output, new);
}

/* One position of one row; `before` and `c` may be the same cell. */
INLINE void row(count size, real clip, const real *n, const real *s, const real *b, const real *before, real *c,
                real *h) {
    EACH {
        real new, input, forget, output;
        gates(size, d, n, s, b, &new, &input, &forget, &output);
        real cell = forget * before[d] + input * new;
        cell = cell > clip ? clip : cell;
        cell = cell < -clip ? -clip : cell;
        c[d] = cell;
        h[d] = output * cell;
    }
}

/* `g_h` is the gradient of h from the outputs, `p` that from the next step on entry, `g_c` that of the cell; afterwards
   `g_c` is the gradient of the cell before, and `g_z` that of the four sums. */
INLINE void row_back(count size, real clip, const real *n, const real *v, const real *s, const real *b,
                     const real *before, const real *c, const real *g_h, const real *p, real *g_c, real *g_z,
                     real *g_scale, real *g_bias) {
    EACH {
        real new, input, forget, output;
        gates(size, d, n, s, b, &new, &input, &forget, &output);
        real grad = g_h[d] + p[d], cell = forget * before[d] + input * new;
        real to_cell = g_c[d] + grad * output;
        to_cell = cell > clip || cell < -clip ? 0 : to_cell;
        g_z[d] = to_cell * input * (1 - new * new);
        g_z[size + d] = to_cell * new * input * (1 - input);
        g_z[2 * size + d] = to_cell * before[d] * forget * (1 - forget);
        g_z[3 * size + d] = grad * c[d] * output * (1 - output);
        g_c[d] = to_cell * forget;
    }
    for (count gate = 0; gate < 4; gate++, n += size, s += size, g_z += size, g_scale += size, g_bias += size) {
        real total = 0, along = 0;
        EACH {
            g_bias[d] += g_z[d];
            g_scale[d] += g_z[d] * n[d];
            g_z[d] *= s[d];
        }
        SUM(total) total += g_z[d];
        SUM(along) along += g_z[d] * n[d];
        total /= size;
        along /= size;
        EACH g_z[d] = v[gate] * (g_z[d] - total - n[d] * along);
    }
}

#define NAMES                                                                                        \
    const count size = c->size, columns = 4 * size, state_row = PADDED(size);                        \
    const count gates_row = PADDED(columns), rows = (c->batch + c->threads - 1) / c->threads;        \
    const count first = thread * rows, last = first + rows < c->batch ? first + rows : c->batch;     \
    const real clip = (real)c->clip;                                                                 \
    real *buffer = c->buffers + thread * c->buffer_size;
#define EACH_ROW for (count i = first; i < last; i++)
#define POSITION (i * c->length + t)

static void forward_rows(const call *c, count thread) {
    NAMES
    real *hidden = buffer, *cell = hidden + rows * state_row, *product = cell + rows * state_row;
    memset(buffer, 0, c->buffer_size * sizeof(real));
    for (count t = 0; t < c->length; t++) {
        if (t && first < last)
            multiply(last - first, size, columns, hidden, state_row, 1, c->weight, product, gates_row, 0);
        EACH_ROW {
            real *p = product + (i - first) * gates_row, *h = hidden + (i - first) * state_row;
            real *own = cell + (i - first) * state_row, unused[4];
            const real *x = c->projected + POSITION * columns;
            real *n = c->normalized ? c->normalized + POSITION * columns : p;
            real *v = c->inverse ? c->inverse + POSITION * 4 : unused;
            for (count gate = 0; gate < 4; gate++)
                normalize(size, c->epsilon, x + gate * size, p + gate * size, n + gate * size, v + gate);
            row(size, clip, n, c->scale, c->bias, own, own, h);
            memcpy(c->outputs + POSITION * size, h, size * sizeof(real));
            if (c->cells) memcpy(c->cells + POSITION * size, own, size * sizeof(real));
        }
    }
}

static void backward_rows(const call *c, count thread) {
    NAMES
    real *grad_hidden = buffer, *grad_cell = grad_hidden + rows * state_row;
    real *product = grad_cell + rows * state_row, *sums = product + rows * gates_row, *zero = sums + 2 * columns;
    double *grad_scale = c->grad_scale + thread * columns, *grad_bias = c->grad_bias + thread * columns;
    memset(buffer, 0, c->buffer_size * sizeof(real));
    for (count t = c->length - 1; t >= 0; t--) {
        memset(sums, 0, 2 * columns * sizeof(real));
        EACH_ROW {
            real *p = grad_hidden + (i - first) * state_row, *own = grad_cell + (i - first) * state_row;
            real *g_z = product + (i - first) * gates_row;
            const real *after = c->cells + POSITION * size;
            row_back(size, clip, c->normalized + POSITION * columns, c->inverse + POSITION * 4, c->scale, c->bias,
                     t ? after - size : zero, after, c->grad_outputs + POSITION * size, p, own, g_z, sums,
                     sums + columns);
            memcpy(c->grad_projected + POSITION * columns, g_z, columns * sizeof(real));
        }
        for (count d = 0; d < columns; d++) {
            grad_scale[d] += sums[d];
            grad_bias[d] += sums[columns + d];
        }
        if (t && first < last)
            multiply(last - first, columns, size, product, gates_row, 1, c->weight, grad_hidden, state_row, 0);
    }
}

/* The schedule is static, so that sums are the same from run to run. */
void forward(const call *c) {
#pragma omp parallel for num_threads(c->threads) schedule(static)
    for (count thread = 0; thread < c->threads; thread++) forward_rows(c, thread);
}

void backward(const call *c) {
#pragma omp parallel for num_threads(c->threads) schedule(static)
    for (count thread = 0; thread < c->threads; thread++) backward_rows(c, thread);
}
"""

SOURCE = NUMBERS + PRODUCTS + CALL + STEPS


class Call(ctypes.Structure):
    """The argument of the C functions. It holds references to the tensors, given by their names in C, or None."""

    _fields_ = [
        *((name, ctypes.c_ssize_t) for name in COUNTS),
        *((name, ctypes.c_double) for name in FACTORS),
        *((name, ctypes.c_void_p) for name in (*ARRAYS, *TOTALS)),
    ]

    def __init__(self, projected: torch.Tensor, clip: float, epsilon: float, **arrays):
        batch, length, columns = projected.shape
        size, threads = columns // 4, thread_count(batch)
        buffer_size = -(-batch // threads) * (2 * padded(size) + padded(columns)) + 2 * columns + size
        self.arrays = arrays | {"projected": projected, "buffers": projected.new_empty(threads, buffer_size)}
        pointers = {name: each.data_ptr() for name, each in self.arrays.items() if each is not None}
        super().__init__(batch, length, size, threads, buffer_size, clip, epsilon, **pointers)


def thread_count(batch: int) -> int:
    return max(1, min(torch.get_num_threads(), batch // THREAD_ROWS))


@functools.cache
def functions(dtype: torch.dtype) -> ctypes.CDLL:
    """The C functions `forward` and `backward`, which take a [`Call`]; raises `NoCompiler`."""
    library = load(SOURCE, *(["DOUBLE"] if dtype == torch.float64 else []))
    library.forward.argtypes = library.backward.argtypes = [ctypes.POINTER(Call)]
    library.forward.restype = library.backward.restype = None
    return library


class CLayerNormLSTM(torch.autograd.Function):
    """`layer_norm_lstm` on a CPU in float32 or float64; `keep` says whether a backward pass may follow."""

    @staticmethod
    def forward(ctx, projected, weight, scale, bias, clip, epsilon, keep):
        if projected.device.type != "cpu" or projected.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"the layer-normalised LSTM 'c' takes float32 and float64 on a CPU, not {projected.dtype} on "
                f"{projected.device}; take 'auto' or 'plain'"
            )
        projected, scale, bias = projected.contiguous(), scale.contiguous(), bias.contiguous()
        batch, length, columns = projected.shape
        outputs = projected.new_empty(batch, length, columns // 4)
        kept = {}
        if keep:
            kept = {"normalized": torch.empty_like(projected), "cells": torch.empty_like(outputs)}
            kept["inverse"] = projected.new_empty(batch, length, 4)
        if outputs.numel():
            arrays = {"weight": packed(weight.T), "scale": scale, "bias": bias, "outputs": outputs}
            functions(projected.dtype).forward(Call(projected, clip, epsilon, **arrays, **kept))
        ctx.options = clip, epsilon
        ctx.save_for_backward(weight, scale, bias, outputs, *kept.values())
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_outputs):
        weight, scale, bias, outputs, normalized, cells, inverse = ctx.saved_tensors
        grad_projected = torch.empty_like(normalized)
        threads = thread_count(len(outputs))
        grad_scale, grad_bias = (bias.new_zeros(threads, len(bias), dtype=torch.float64) for _ in range(2))
        if outputs.numel():
            arrays = {"weight": packed(weight), "scale": scale, "bias": bias, "normalized": normalized, "cells": cells}
            arrays |= {"inverse": inverse, "grad_outputs": grad_outputs.contiguous(), "grad_projected": grad_projected}
            arrays |= {"grad_scale": grad_scale, "grad_bias": grad_bias}
            functions(normalized.dtype).backward(Call(normalized, *ctx.options, **arrays))
        before = F.pad(outputs, (0, 0, 1, 0))[:, :-1]  # the hidden state that each step begins with
        grad_weight = grad_projected.flatten(0, 1).T @ before.flatten(0, 1)
        grad_scale, grad_bias = (each.sum(0).to(bias.dtype) for each in (grad_scale, grad_bias))
        return grad_projected, grad_weight, grad_scale, grad_bias, None, None, None
