# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
The C of local_rnn_fused.py: `forward` and `backward` take a block of positions through all K steps of a LocalRNN.

A block is as many positions as a core's own cache holds with the weights, some of one sequence or several sequences
whole. Nothing of it leaves the cache but its output and what is kept of each step for the way back. The products are
ours: a library's would go through all positions for each step.
"""

# The numbers and arrays of a call, in this order; of a pass that does not use it an array is NULL.
COUNTS = ("kind", "batch", "length", "size", "window", "sequences", "positions", "threads", "own")
ARRAYS = (
    *("inputs", "zero", "bias", "weight", "kept", "extra", "scratch"),
    *("outputs", "grad_outputs", "grad_inputs", "grad_weight"),
)
TOTALS = ("grad_zero", "grad_new_bias")

# Sigmoid and tanh follow from e^x - 1, without a branch, so that compilers make vectors of them; NaN stays NaN. e^x is
# a power of 2, by the bits of the exponent, times a polynomial on [-ln 2 / 2, ln 2 / 2], whose coefficients are those
# of Cephes' expf (Moshier 1992). Beyond x = 43, where a sigmoid is 2e-19, it does not grow: two denominators then have
# a product.
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
#define VECTORS 4  /* beside 6 x 4 sums, 32 registers have room for what is multiplied */
#else
#define VECTORS 2  /* 16 registers */
#endif
#define ROWS 6
#define LANES ((count)(BYTES / sizeof(real)))
#define PANEL (VECTORS * LANES)
#define WHOLE(columns) (((columns) + 63) / 64 * 64)  /* panels, on any processor */
#define PADDED(columns) (WHOLE(columns) + 16)  /* rows that do not share a set of the cache */
typedef real vector __attribute__((vector_size(BYTES), aligned(sizeof(real)), may_alias));

/* Some rows and a panel of a product, in registers: element (i, k) of `a` is a[i * a_row + k * a_depth]. What is read
   later, `next` and every `stride` bytes, comes into the cache beside it. */
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
            if (add) sums[i][j] += *to;  /* last: what is there is rounded once */
            *to = sums[i][j];
        }
}

/* c = a b, or c + a b, of whole vectors of columns. `b` is packed: panels of `depth` rows, one after the other. While
   one is multiplied the next comes into the cache; beside a single one, the next rows of `c`. */
static void multiply(count rows, count depth, count columns, const real *a, count a_row, count a_depth, const real *b,
                     real *c, count c_row, int add) {
    const int single = columns <= PANEL;
    const count tiles = (rows + ROWS - 1) / ROWS;
    const count step = (count)sizeof(real) * (single ? ROWS * c_row : depth * PANEL / tiles);
    for (count left = columns; left > 0; left -= PANEL, b += depth * PANEL, c += PANEL) {
        const char *next = (const char *)(single ? c + ROWS * c_row : b + depth * PANEL);
        count row = 0;
#define TILE(some, vectors)                                                                              \
    multiply_tile(some, vectors, depth, a + row * a_row, a_row, a_depth, b, c + row * c_row, c_row, add, \
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

/* A matrix (depth, columns), element (k, j) at b[k * b_depth + j * b_column], panel by panel. */
void pack(count depth, count columns, const real *b, count b_depth, count b_column, real *packed) {
    for (count first = 0; first < columns; first += PANEL)
        for (count k = 0; k < depth; k++)
            for (count j = first; j < first + PANEL; j++)
                *packed++ = j < columns ? b[k * b_depth + j * b_column] : 0;
}

"""

# One step of one row, and its way back.
STEPS = r"""
#define EACH _Pragma("omp simd") for (count d = 0; d < size; d++)

/* Constants where these are called: `first` for the step from a zero state, with no product and no
   state before it, and `keep` where a backward pass may follow. A step back writes the gradient of W_h h + b_h, adds
   that of the inputs, and brings the state's to before the step, all but what passes through the product. */

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

/* The state of a step once more, from what is kept. */
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

/* `curve` is the tanh of the cell after the step, made at the last step and brought to before each. `s_b` are the gates
   of the step before, from which with it the hidden state `h` follows. */
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

/* Where a row of a block finds its own: the row of all, its input, and whether packing shows it that. */
#define FIND                                                                                        \
    count sequence = at.sequence + row / at.positions, position = at.position + row % at.positions; \
    count input = (sequence * (c->length + c->window - 1) + position + step) * columns;             \
    int shown = !c->same || c->same[(sequence * c->window + step) * c->length + position];
#define AT(array, index) ((array) ? (array) + (index) : NULL)
#define EACH_ROW for (count row = 0; row < at.rows; row++)
#define NAMES                                                                   \
    const count size = c->size, columns = GATES[c->kind] * size;                \
    const count wide = PADDED(size), wider = PADDED(columns);                   \
    const count room = c->sequences * c->positions, all = c->batch * c->length; \
    const count start = at.sequence * c->length + at.position;

static void forward_block(const call *c, block at, count thread) {
    NAMES
    real *hidden = c->scratch + thread * c->own, *cell = hidden + room * wide, *product = cell + room * wide;
    for (count step = 0; step < c->window; step++) {
        if (step)
            multiply(at.rows, size, columns, hidden, wide, 1, c->weight, product, wider, 0);
        EACH_ROW {
            FIND
            const real *x = shown ? c->inputs + input : c->zero;
            real *p = product + row * wider, *h = hidden + row * wide, *cell_row = cell + row * wide;
            real *s = AT(c->kept, (step * all + start + row) * KEPT[c->kind] * size);
            real *before = AT(c->extra, ((step - 1) * all + start + row) * size);
#define STEP(function, ...)                           \
    if (step && c->kept) function(__VA_ARGS__, 0, 1); \
    else if (step) function(__VA_ARGS__, 0, 0);       \
    else if (c->kept) function(__VA_ARGS__, 1, 1);    \
    else function(__VA_ARGS__, 1, 0);
            if (c->kind == GRU) {
                STEP(gru_row, size, x, p, c->bias, h, s, before)
            } else if (c->kind == LSTM) {
                real *after = before && step < c->window - 1 ? before + all * size : cell_row;
                before = before ? before : cell_row;
                STEP(lstm_row, size, x, p, c->bias, before, s, after, h)
            } else {
                STEP(rnn_row, size, x, p, c->bias, s, h)
            }
        }
    }
    EACH_ROW memcpy(c->outputs + (start + row) * size, hidden + row * wide, size * sizeof(real));
}

static void backward_block(const call *c, block at, count thread) {
    NAMES
    const count states = c->kind == GRU ? c->window - 1 : 1, kept = KEPT[c->kind] * size;
    real *hidden = c->scratch + thread * c->own, *grad_hidden = hidden + states * room * wide;
    real *grad_cell = grad_hidden + room * wide, *curve = grad_cell + room * wide;
    real *product = curve + room * wide, *panel = product + room * wider, *sums = panel + room * PANEL;
    real *grad_weight = c->grad_weight + thread * size * WHOLE(columns);
    double *grad_zero = c->grad_zero + thread * columns, *grad_new_bias = c->grad_new_bias + thread * size;
    EACH_ROW memcpy(grad_hidden + row * wide, c->grad_outputs + (start + row) * size, size * sizeof(real));
    if (c->kind == GRU)
        for (count step = 0; step < c->window - 1; step++)
            EACH_ROW {
                FIND
                const real *x = shown ? c->inputs + input : c->zero;
                const real *s = c->kept + (step * all + start + row) * kept;
                const real *r = AT(c->extra, ((step - 1) * all + start + row) * size);
                real *h = hidden + (step * room + row) * wide;
                if (step) gru_row_again(size, x, c->bias, h - room * wide, s, r, h, 0);
                else gru_row_again(size, x, c->bias, NULL, s, NULL, h, 1);
            }
    for (count step = c->window - 1; step >= 0; step--) {
        const real *before = hidden;  /* the hidden state before the step, its rows before_row apart */
        count before_row = wide;
        if (c->kind == GRU) before = hidden + (step - 1) * room * wide;
        if (c->kind == RNN) before = c->kept + ((step - 1) * all + start) * size, before_row = size;
        memset(sums, 0, columns * sizeof(real));
        EACH_ROW {
            FIND
            const real *x = shown ? c->inputs + input : c->zero;
            const real *s = c->kept + (step * all + start + row) * kept, *s_before = s - all * kept;
            const real *extra = AT(c->extra, ((step - 1) * all + start + row) * size);
            real *p = product + row * wider, *g_x = shown ? c->grad_inputs + input : sums;
            real *h = hidden + row * wide, *g = grad_hidden + row * wide;
            real *g_c = grad_cell + row * wide, *q = curve + row * wide;
            if (c->kind == RNN) rnn_row_back(size, s, g, p, g_x);
            else if (c->kind == GRU && step)
                gru_row_back(size, x, c->bias, before + row * wide, s, extra, g, p, g_x, 0);
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
        if (c->kind == GRU) EACH_ROW EACH grad_new_bias[d] += product[row * wider + 2 * size + d];
        if (step) {
            multiply(at.rows, columns, size, product, wider, 1, c->weight, grad_hidden, wide, c->kind == GRU);
            for (count first = 0; first < columns; first += PANEL) {  /* in one piece: its rows are far apart */
                EACH_ROW memcpy(panel + row * PANEL, product + row * wider + first, PANEL * sizeof(real));
                count some = columns - first < PANEL ? columns - first : PANEL;
                real *to = grad_weight + first / 64 * 64 * size + first % 64;  /* 64 columns of each row lie together */
                multiply(size, at.rows, some, before, 1, before_row, panel, to, 64, 1);
            }
        }
    }
}

/* All blocks, in so many threads; sums are the same in each run. */
void forward(const call *c) {
    count groups = (c->batch + c->sequences - 1) / c->sequences, parts = (c->length + c->positions - 1) / c->positions;
#pragma omp parallel for num_threads(c->threads) schedule(static)
    for (count index = 0; index < groups * parts; index++)
        forward_block(c, block_at(c, index / parts, index % parts), omp_get_thread_num());
}

/* Neighbours of one sequence share inputs: every second part first, then the others. */
void backward(const call *c) {
    count groups = (c->batch + c->sequences - 1) / c->sequences, parts = (c->length + c->positions - 1) / c->positions;
    for (count odd = 0; odd < 2; odd++) {
        count some = (parts + 1 - odd) / 2;
#pragma omp parallel for num_threads(c->threads) schedule(static)
        for (count index = 0; index < groups * some; index++)
            backward_block(c, block_at(c, index / some, index % some * 2 + odd), omp_get_thread_num());
    }
}
"""

SOURCE = NUMBERS + PRODUCTS + STEPS + CALL + BLOCKS
