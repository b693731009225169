/* Products of a few rows with matrices of plain numbers; README.md says how. */
#pragma once
#include "../bfloat16.h"

enum {
    MANY = 4,       /* matrices of a call */
    OUTPUTS = 32,   /* of a unit of work */
    ROWS = 2,       /* that share a read of the weights */
    PLAIN_CHAINS = 2 /* sums side by side of one output and row */
};

typedef struct {
    Int rows, inputs, outputs;
    Rows x, y;              /* (1, rows, inputs), (1, rows, outputs) */
    const Real *weight;     /* (outputs, inputs) */
    const uint16_t *narrow; /* the same in bfloat16, in its place */
    const int8_t *bits;     /* or in 8 or 4 bits, as quantized_linear.h reads them */
    const uint16_t *scales;
    const Real *bias; /* (outputs), or null */
    const void *const *integers;
} Product; /* of x with one matrix */

typedef int Form(Product *of, int many, Int threads); /* 0, or 1 where there is no memory */

typedef struct {
    Int first[MANY + 1]; /* unit of each matrix */
    const Product *of;
} Products;

INLINE Real *output(const Product *p, Int r, Int o) { return row(p->y, 0, r) + o; }
INLINE Real bias(const Product *p, Int o) { return p->bias ? p->bias[o] : 0; }

/* Products with up to MANY matrices, whose outputs are one queue of work. */
static void all_products(const Product *of, int many, Int threads, Work *work) {
    Products job = {{}, of};
    Int weights = 0;
    for (int m = 0; m < many; m++) {
        job.first[m + 1] = job.first[m] + ceil_div(of[m].outputs, OUTPUTS);
        weights += of[m].rows * of[m].outputs * of[m].inputs;
    }
    parallel_for(weights < 1 << 16 ? 1 : threads, job.first[many], work, &job);
}

/* The matrix that a unit of work belongs to, and the unit's outputs of it, *o .. *end. */
INLINE const Product *product_of(const Products *j, Int unit, Int *o, Int *end) {
    int m = 0;
    while (unit >= j->first[m + 1]) m++;
    const Product *p = &j->of[m];
    *o = (unit - j->first[m]) * OUTPUTS;
    *end = min_int(*o + OUTPUTS, p->outputs);
    return p;
}

/* LANES weights, or `count` and zeros. */
INLINE Vec weights(const Product *p, Int at, Int count, int narrow) {
    if (!narrow) return load(p->weight + at, count);
    return widened(p->narrow + at, count);
}

/* Output o of rows r .. r + many. */
INLINE void tile(const Product *p, Int r, Int o, int many, int narrow) {
    const Int k = p->inputs, w = o * k;
    const Real *x[ROWS];
    Vec sums[ROWS][PLAIN_CHAINS] = {};
    ALL(m, many) x[m] = row(p->x, 0, r + m);
    Int c = 0;
    for (; c + PLAIN_CHAINS * LANES <= k; c += PLAIN_CHAINS * LANES)
        ALL(i, PLAIN_CHAINS) {
            const Int at = c + i * LANES;
            Vec v = weights(p, w + at, LANES, narrow);
            ALL(m, many) sums[m][i] += v * load(x[m] + at, LANES);
        }
    for (; c < k; c += LANES) {
        Vec v = weights(p, w + c, k - c, narrow);
        ALL(m, many) sums[m][0] += v * load(x[m] + c, k - c);
    }
    ALL(m, many) {
        for (int i = 1; i < PLAIN_CHAINS; i++) sums[m][0] += sums[m][i];
        *output(p, r + m, o) = total(sums[m][0]) + bias(p, o);
    }
}

#define PRODUCTS(name, narrow)                                                                    \
    ONCE void name##_pair(const Product *p, Int r, Int o) { tile(p, r, o, ROWS, narrow); }        \
    ONCE void name##_one(const Product *p, Int r, Int o) { tile(p, r, o, 1, narrow); }            \
    static void name##_unit(const void *job, Int unit) {                                          \
        Int o, end;                                                                               \
        const Product *p = product_of(job, unit, &o, &end);                                       \
        for (; o < end; o++) {                                                                    \
            Int r = 0;                                                                            \
            for (; r + ROWS <= p->rows; r += ROWS) name##_pair(p, r, o);                          \
            for (; r < p->rows; r++) name##_one(p, r, o);                                         \
        }                                                                                         \
    }                                                                                             \
    ONCE int name##_products(Product *of, int many, Int threads) {                                \
        all_products(of, many, threads, name##_unit);                                             \
        return 0;                                                                                 \
    }

PRODUCTS(real, 0)
PRODUCTS(bfloat16, 1)
