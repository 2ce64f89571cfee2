# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
The C of local_rnn_c.py: `forward` and `backward` take a block of positions through all K steps of a LocalRNN.

A block is part of one sequence, or several whole sequences: as many positions as fit into a core's own cache together
with the weights. Only its outputs, and what each step keeps for the backward pass, leave the cache. The matrix products
are written here, since a library's product would pass over all positions in each step.
"""

# Names of the C:  x projected inputs, h hidden state, c or cell the cell, p the product W_h h or its gradient, s gates,
# r W_h h + b_h of a GRU's new gate, b the state before the step, g or g_... the gradient of ...

# The sizes and arrays of a call, in this order; an array that a pass does not use is NULL.
COUNTS = ("kind", "batch", "length", "size", "window", "sequences", "positions", "threads", "buffer_size")
ARRAYS = (
    *("inputs", "zero", "bias", "weight", "kept", "extra", "buffers"),
    *("outputs", "grad_outputs", "grad_inputs", "grad_weight"),
)
TOTALS = ("grad_zero", "grad_new_bias")

# Sigmoid and tanh are computed from e^x - 1 without a branch, so that compilers vectorize them; NaN stays NaN. e^x is a
# power of 2, made from the bits of the exponent, times a polynomial on [-ln 2 / 2, ln 2 / 2] with the coefficients of
# Cephes' expf (Moshier 1992). x is cut off at 43, where a sigmoid is 2e-19, so that the product of two denominators is
# finite.
NUMBERS = r"""
#include <math.h>
#include <stddef.h>
#include <string.h>

typedef ptrdiff_t count;

#ifdef DOUBLE
typedef double real;
static inline real exponential_less_1(real x) { return expm1(x > 43 ? 43 : x); }
#else
typedef float real;

static inline float exponential_less_1(float x) {
    x = x > 43.0f ? 43.0f : x;
    x = x < -43.0f ? -43.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f;  /* 1.5 * 2^23: rounds, with the integer in the lowest bits */
    float whole = shifted - 12582912.0f;
    float part = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float power = 1.9875691500e-4f;
    power = power * part + 1.3981999507e-3f;
    power = power * part + 8.3334519073e-3f;
    power = power * part + 4.1665795894e-2f;
    power = power * part + 1.6666665459e-1f;
    power = power * part + 5.0000001201e-1f;
    power = power * part * part + part;
    unsigned bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000u;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return scale * power + (scale - 1.0f);
}
#endif

/* Two gates by one division: of sigmoid(x) = 1 / (2 + g), g = e^-x - 1, and tanh(x) = h / (2 + h), h = e^2x - 1. */
static inline void two_sigmoids(real x, real y, real *sigmoid_x, real *sigmoid_y) {
    real of_x = 2 + exponential_less_1(-x), of_y = 2 + exponential_less_1(-y), both = 1 / (of_x * of_y);
    *sigmoid_x = both * of_y;
    *sigmoid_y = both * of_x;
}

static inline void sigmoid_and_tangent(real x, real y, real *sigmoid_x, real *tangent_y) {
    real above = exponential_less_1(2 * y), of_x = 2 + exponential_less_1(-x), of_y = 2 + above;
    real both = 1 / (of_x * of_y);
    *sigmoid_x = both * of_y;
    *tangent_y = above * both * of_x;
}

static inline real tangent(real x) {
    real above = exponential_less_1(2 * x);
    return above / (2 + above);
}

#define INLINE static inline __attribute__((always_inline))
"""

PRODUCTS = r"""
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
#define VECTORS 4  /* 32 registers hold 6 x 4 sums and the factors */
#else
#define VECTORS 2  /* 16 registers */
#endif
#define ROWS 6
#define LANES ((count)(BYTES / sizeof(real)))
#define PANEL (VECTORS * LANES)
#define WHOLE(columns) (((columns) + 63) / 64 * 64)  /* a multiple of the panels of every processor */
#define PADDED(columns) (WHOLE(columns) + 16)  /* rows fall into different cache sets */
typedef real vector __attribute__((vector_size(BYTES), aligned(sizeof(real)), may_alias));

/* Some rows and a panel of columns of a product, summed in registers. Element (i, k) of `a` is a[i * a_row + k *
   a_depth]. Meanwhile memory that is read later is prefetched: `next`, then every `stride` bytes. */
INLINE void multiply_tile(count rows, count vectors, count depth, const real *a, count a_row, count a_depth,
                          const real *b, real *c, count c_row, int add, const char *next, count stride) {
    vector sums[ROWS][VECTORS];
    for (count i = 0; i < rows; i++)
        for (count j = 0; j < vectors; j++) sums[i][j] = (vector){0};
    for (count k = 0; k < depth; k++) {
        __builtin_prefetch(next + k * stride);
        vector columns[VECTORS];
        for (count j = 0; j < vectors; j++) columns[j] = *(const vector *)(b + k * PANEL + j * LANES);
        for (count i = 0; i < rows; i++) {
            real factor = a[i * a_row + k * a_depth];
            for (count j = 0; j < vectors; j++) sums[i][j] += factor * columns[j];
        }
    }
    for (count i = 0; i < rows; i++)
        for (count j = 0; j < vectors; j++) {
            vector *to = (vector *)(c + i * c_row + j * LANES);
            if (add) sums[i][j] += *to;  /* after the sum, so that it is rounded once */
            *to = sums[i][j];
        }
}

/* c = a b, or c += a b, over whole vectors of columns. `b` is packed: panels of `depth` rows, one after the other.
   While one panel is multiplied the next is prefetched, or the next rows of `c` where there is a single panel. */
static void multiply(count rows, count depth, count columns, const real *a, count a_row, count a_depth, const real *b,
                     real *c, count c_row, int add) {
    const int single = columns <= PANEL;
    const count tiles = (rows + ROWS - 1) / ROWS;
    const count step = (count)sizeof(real) * (single ? ROWS * c_row : depth * PANEL / tiles);
    for (count left = columns; left > 0; left -= PANEL, b += depth * PANEL, c += PANEL) {
        const char *next = (const char *)(single ? c + ROWS * c_row : b + depth * PANEL);
        count row = 0;
#define TILE(num_rows, vectors)                                                                              \
    multiply_tile(num_rows, vectors, depth, a + row * a_row, a_row, a_depth, b, c + row * c_row, c_row, add, \
                  next + row / ROWS * step, step / depth)
#define TILES(vectors)                                               \
    {                                                                \
        for (; row + ROWS <= rows; row += ROWS) TILE(ROWS, vectors); \
        for (; row + 2 <= rows; row += 2) TILE(2, vectors);          \
        if (row < rows) TILE(1, vectors);                            \
    }
        if (left > (VECTORS - 1) * LANES) TILES(VECTORS)
#if VECTORS == 4
        else if (left > 2 * LANES) TILES(3)
        else if (left > LANES) TILES(2)
#endif
        else TILES(1)
    }
}

/* Copies a matrix (depth, columns), element (k, j) at b[k * b_depth + j * b_column], panel by panel. */
void pack(count depth, count columns, const real *b, count b_depth, count b_column, real *packed) {
    for (count first = 0; first < columns; first += PANEL)
        for (count k = 0; k < depth; k++)
            for (count j = first; j < first + PANEL; j++)
                *packed++ = j < columns ? b[k * b_depth + j * b_column] : 0;
}

"""

# One step of one position, forward and backward.
STEPS = r"""
#define EACH _Pragma("omp simd") for (count d = 0; d < size; d++)

/* `first` and `keep` are constants at each call: `first` in the step from a zero state, which has no product and no
   state before it, `keep` where a backward pass may follow. A backward step writes the gradient of W_h h + b_h, adds
   the gradient of the inputs, and replaces the gradient of the state after the step by that of the state before it, all
   but the part that goes through the product. */

INLINE void gru_row(count size, const real *x, real *p, const real *bias, real *h, real *s, real *r, int first,
                    int keep) {
    real *sigmoids = keep ? s : p;
    EACH two_sigmoids(x[d] + bias[d] + (first ? 0 : p[d]), x[size + d] + bias[size + d] + (first ? 0 : p[size + d]),
                      sigmoids + d, sigmoids + size + d);
    EACH {
        real recurrent = bias[2 * size + d] + (first ? 0 : p[2 * size + d]);
        real new = tangent(x[2 * size + d] + sigmoids[d] * recurrent);
        if (keep && !first) r[d] = recurrent;
        h[d] = new + sigmoids[size + d] * ((first ? 0 : h[d]) - new);
    }
}

/* The state after a step, computed again from what the forward pass kept. */
INLINE void gru_row_again(count size, const real *x, const real *bias, const real *b, const real *s, const real *r,
                          real *h, int first) {
    EACH {
        real new = tangent(x[2 * size + d] + s[d] * (first ? bias[2 * size + d] : r[d]));
        h[d] = new + s[size + d] * ((first ? 0 : b[d]) - new);
    }
}

INLINE void gru_row_back(count size, const real *x, const real *bias, const real *b, const real *s, const real *r,
                         real *g, real *p, real *g_x, int first) {
    EACH {
        real reset = s[d], update = s[size + d], recurrent = first ? bias[2 * size + d] : r[d], grad = g[d];
        real new = tangent(x[2 * size + d] + reset * recurrent);
        real to_new = grad * (1 - update) * (1 - new * new);
        real to_reset = to_new * recurrent * reset * (1 - reset);
        real to_update = grad * ((first ? 0 : b[d]) - new) * update * (1 - update);
        p[d] = to_reset;
        p[size + d] = to_update;
        p[2 * size + d] = to_new * reset;
        g_x[d] += to_reset;
        g_x[size + d] += to_update;
        g_x[2 * size + d] += to_new;
        g[d] = grad * update;
    }
}

/* The gates are input, forget, cell, output. */
INLINE void lstm_row(count size, const real *x, real *p, const real *bias, const real *b, real *s, real *c, real *h,
                     int first, int keep) {
    real *gates = keep ? s : p;
    EACH {
        two_sigmoids(x[d] + bias[d] + (first ? 0 : p[d]), x[size + d] + bias[size + d] + (first ? 0 : p[size + d]),
                     gates + d, gates + size + d);
        sigmoid_and_tangent(x[3 * size + d] + bias[3 * size + d] + (first ? 0 : p[3 * size + d]),
                            x[2 * size + d] + bias[2 * size + d] + (first ? 0 : p[2 * size + d]),
                            gates + 3 * size + d, gates + 2 * size + d);
    }
    EACH {
        c[d] = gates[d] * gates[2 * size + d] + (first ? 0 : gates[size + d] * b[d]);
        h[d] = gates[3 * size + d] * tangent(c[d]);
    }
}

/* `curve` is tanh(cell) after the step. The last step computes it; each step replaces it by that before the step, from
   which, with the gates `s_b` of the step before, the hidden state `h` before the step follows. */
INLINE void lstm_row_back(count size, const real *s, const real *b, const real *s_b, real *h, real *curve,
                          const real *g_h, real *g_c, real *p, real *g_x, int first, int last) {
    EACH {
        real input = s[d], forget = s[size + d], new = s[2 * size + d], output = s[3 * size + d], grad = g_h[d];
        real after = last ? tangent(input * new + (first ? 0 : forget * b[d])) : curve[d];
        real to_cell = (last ? 0 : g_c[d]) + grad * output * (1 - after * after);
        real to_input = to_cell * new * input * (1 - input);
        real to_forget = first ? 0 : to_cell * b[d] * forget * (1 - forget);
        real to_new = to_cell * input * (1 - new * new);
        real to_output = grad * after * output * (1 - output);
        p[d] = to_input;
        p[size + d] = to_forget;
        p[2 * size + d] = to_new;
        p[3 * size + d] = to_output;
        g_x[d] += to_input;
        g_x[size + d] += to_forget;
        g_x[2 * size + d] += to_new;
        g_x[3 * size + d] += to_output;
        g_c[d] = to_cell * forget;
    }
    if (!first) EACH {
        curve[d] = tangent(b[d]);
        h[d] = s_b[3 * size + d] * curve[d];
    }
}

INLINE void rnn_row(count size, const real *x, const real *p, const real *bias, real *s, real *h, int first, int keep) {
    EACH {
        h[d] = tangent(x[d] + bias[d] + (first ? 0 : p[d]));
        if (keep) s[d] = h[d];
    }
}

INLINE void rnn_row_back(count size, const real *s, const real *g, real *p, real *g_x) {
    EACH {
        p[d] = g[d] * (1 - s[d] * s[d]);
        g_x[d] += p[d];
    }
}

"""

CALL = f"""
typedef struct {{
    count {", ".join(COUNTS)};
    real *{", *".join(ARRAYS)};
    double *{", *".join(TOTALS)};
    const unsigned char *same;
}} call;
"""

BLOCKS = r"""
int omp_get_thread_num(void);

enum { GRU, LSTM, RNN };
static const count GATES[] = {3, 4, 1}, KEPT[] = {2, 4, 1};

typedef struct {
    count sequence, position, positions, rows;
} block;

static block block_at(const call *c, count group, count part) {
    count sequence = group * c->sequences, position = part * c->positions;
    count sequences = c->batch - sequence, positions = c->length - position;
    if (sequences > c->sequences) sequences = c->sequences;
    if (positions > c->positions) positions = c->positions;
    return (block){sequence, position, positions, sequences * positions};
}

/* The position of a row of a block, the index of its input, and whether the input is of the row's own segment. */
#define LOCATE                                                                                      \
    count sequence = at.sequence + row / at.positions, position = at.position + row % at.positions; \
    count input = (sequence * (c->length + c->window - 1) + position + step) * columns;             \
    int own_segment = !c->same || c->same[(sequence * c->window + step) * c->length + position];
#define AT(array, index) ((array) ? (array) + (index) : NULL)
#define EACH_ROW for (count row = 0; row < at.rows; row++)
#define NAMES                                                          \
    const count size = c->size, columns = GATES[c->kind] * size;       \
    const count state_row = PADDED(size), gates_row = PADDED(columns); \
    const count block_state = c->sequences * c->positions * state_row; \
    const count all_rows = c->batch * c->length;                       \
    const count start = at.sequence * c->length + at.position;

static void forward_block(const call *c, block at, count thread) {
    NAMES
    real *hidden = c->buffers + thread * c->buffer_size, *cell = hidden + block_state, *product = cell + block_state;
    for (count step = 0; step < c->window; step++) {
        if (step)
            multiply(at.rows, size, columns, hidden, state_row, 1, c->weight, product, gates_row, 0);
        EACH_ROW {
            LOCATE
            const real *x = own_segment ? c->inputs + input : c->zero;
            real *p = product + row * gates_row, *h = hidden + row * state_row, *cell_row = cell + row * state_row;
            real *s = AT(c->kept, (step * all_rows + start + row) * KEPT[c->kind] * size);
            real *before = AT(c->extra, ((step - 1) * all_rows + start + row) * size);
#define STEP(function, ...)                           \
    if (step && c->kept) function(__VA_ARGS__, 0, 1); \
    else if (step) function(__VA_ARGS__, 0, 0);       \
    else if (c->kept) function(__VA_ARGS__, 1, 1);    \
    else function(__VA_ARGS__, 1, 0);
            if (c->kind == GRU) {
                STEP(gru_row, size, x, p, c->bias, h, s, before)
            } else if (c->kind == LSTM) {
                real *after = before && step < c->window - 1 ? before + all_rows * size : cell_row;
                before = before ? before : cell_row;
                STEP(lstm_row, size, x, p, c->bias, before, s, after, h)
            } else {
                STEP(rnn_row, size, x, p, c->bias, s, h)
            }
        }
    }
    EACH_ROW memcpy(c->outputs + (start + row) * size, hidden + row * state_row, size * sizeof(real));
}

static void backward_block(const call *c, block at, count thread) {
    NAMES
    const count states = c->kind == GRU ? c->window - 1 : 1, kept = KEPT[c->kind] * size;
    real *hidden = c->buffers + thread * c->buffer_size, *grad_hidden = hidden + states * block_state;
    real *grad_cell = grad_hidden + block_state, *curve = grad_cell + block_state;
    const count block_rows = c->sequences * c->positions;
    real *product = curve + block_state, *panel = product + block_rows * gates_row, *sums = panel + block_rows * PANEL;
    real *grad_weight = c->grad_weight + thread * size * WHOLE(columns);
    double *grad_zero = c->grad_zero + thread * columns, *grad_new_bias = c->grad_new_bias + thread * size;
    EACH_ROW memcpy(grad_hidden + row * state_row, c->grad_outputs + (start + row) * size, size * sizeof(real));
    if (c->kind == GRU)
        for (count step = 0; step < c->window - 1; step++)
            EACH_ROW {
                LOCATE
                const real *x = own_segment ? c->inputs + input : c->zero;
                const real *s = c->kept + (step * all_rows + start + row) * kept;
                const real *r = AT(c->extra, ((step - 1) * all_rows + start + row) * size);
                real *h = hidden + step * block_state + row * state_row;
                if (step) gru_row_again(size, x, c->bias, h - block_state, s, r, h, 0);
                else gru_row_again(size, x, c->bias, NULL, s, NULL, h, 1);
            }
    for (count step = c->window - 1; step >= 0; step--) {
        const real *before = hidden;  /* the hidden state before the step, its rows `before_row` apart */
        count before_row = state_row;
        if (c->kind == GRU) before = hidden + (step - 1) * block_state;
        if (c->kind == RNN) before = c->kept + ((step - 1) * all_rows + start) * size, before_row = size;
        memset(sums, 0, columns * sizeof(real));
        EACH_ROW {
            LOCATE
            const real *x = own_segment ? c->inputs + input : c->zero;
            const real *s = c->kept + (step * all_rows + start + row) * kept, *s_before = s - all_rows * kept;
            const real *extra = AT(c->extra, ((step - 1) * all_rows + start + row) * size);
            real *p = product + row * gates_row, *g_x = own_segment ? c->grad_inputs + input : sums;
            real *h = hidden + row * state_row, *g = grad_hidden + row * state_row;
            real *g_c = grad_cell + row * state_row, *q = curve + row * state_row;
            if (c->kind == RNN) rnn_row_back(size, s, g, p, g_x);
            else if (c->kind == GRU && step)
                gru_row_back(size, x, c->bias, before + row * state_row, s, extra, g, p, g_x, 0);
            else if (c->kind == GRU) gru_row_back(size, x, c->bias, NULL, s, NULL, g, p, g_x, 1);
            else {
                const int last = step == c->window - 1;
#define BACK(first, last) lstm_row_back(size, s, extra, s_before, h, q, g, g_c, p, g_x, first, last)
                if (step && last) BACK(0, 1);
                else if (step) BACK(0, 0);
                else if (last) BACK(1, 1);
                else BACK(1, 0);
            }
        }
        if (c->same)
            for (count d = 0; d < columns; d++) grad_zero[d] += sums[d];
        if (c->kind == GRU) EACH_ROW EACH grad_new_bias[d] += product[row * gates_row + 2 * size + d];
        if (step) {
            multiply(at.rows, columns, size, product, gates_row, 1, c->weight, grad_hidden, state_row, c->kind == GRU);
            for (count first = 0; first < columns; first += PANEL) {  /* copied, since its rows are far apart */
                EACH_ROW memcpy(panel + row * PANEL, product + row * gates_row + first, PANEL * sizeof(real));
                count width = columns - first < PANEL ? columns - first : PANEL;
                real *to = grad_weight + first / 64 * 64 * size + first % 64;  /* 64 columns of each row lie together */
                multiply(size, at.rows, width, before, 1, before_row, panel, to, 64, 1);
            }
        }
    }
}

/* All blocks. The schedule is static, so that sums are the same from run to run. */
void forward(const call *c) {
    count groups = (c->batch + c->sequences - 1) / c->sequences, parts = (c->length + c->positions - 1) / c->positions;
#pragma omp parallel for num_threads(c->threads) schedule(static)
    for (count index = 0; index < groups * parts; index++)
        forward_block(c, block_at(c, index / parts, index % parts), omp_get_thread_num());
}

/* Neighbouring blocks of a sequence add to the gradient of the same inputs: every second one runs first, then the
   others. */
void backward(const call *c) {
    count groups = (c->batch + c->sequences - 1) / c->sequences, parts = (c->length + c->positions - 1) / c->positions;
    for (count odd = 0; odd < 2; odd++) {
        count num_parts = (parts + 1 - odd) / 2;
#pragma omp parallel for num_threads(c->threads) schedule(static)
        for (count index = 0; index < groups * num_parts; index++)
            backward_block(c, block_at(c, index / num_parts, index % num_parts * 2 + odd), omp_get_thread_num());
    }
}
"""

SOURCE = NUMBERS + PRODUCTS + STEPS + CALL + BLOCKS
