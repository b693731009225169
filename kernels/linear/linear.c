/* Products of a few rows with a matrix; README.md says how. */
#include "../common.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

enum {
    BLOCK = 32, /* outputs of a unit of work */
    ROWS = 2,   /* rows that share a read of the weights */
    MANY = 4,   /* matrices of a call */
    CHAINS = 2  /* sums side by side of one output and row */
};

const Int max_rows = 2; /* for more, a matrix product is faster */

typedef struct {
    Int rows, inputs, outputs[MANY], threads;
} Sizes;

typedef struct {
    Rows x, y[MANY];              /* (1, rows, inputs), (1, rows, outputs) */
    const Real *weight[MANY];     /* (outputs, inputs) */
    const uint16_t *narrow[MANY]; /* the same in bfloat16, in its place */
    const Real *bias[MANY];       /* (outputs), or null */
} Arrays;

typedef struct {
    Int rows, inputs, outputs;
    Rows x, y;
    const Real *weight;
    const uint16_t *narrow;
    const Real *bias;
} Product; /* with one of the matrices */

typedef struct {
    Int first[MANY + 1]; /* unit of each matrix */
    Product of[MANY];
} Job;

static void run(Sizes s, Arrays a, Work *work) {
    Job job = {};
    Int weights = 0;
    for (int m = 0; m < MANY; m++) {
        job.of[m] = (Product){s.rows, s.inputs, s.outputs[m], a.x, a.y[m],
                              a.weight[m], a.narrow[m], a.bias[m]};
        job.first[m + 1] = job.first[m] + ceil_div(s.outputs[m], BLOCK);
        weights += s.outputs[m] * s.inputs;
    }
    parallel_for(s.rows * weights < 1 << 16 ? 1 : s.threads, job.first[MANY], work, &job);
}

typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(1), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef float Floats __attribute__((vector_size(4 * LANES)));

/* Numbers in bfloat16, which are the upper halves of those in single precision. */
INLINE Vec widened(const uint16_t *from) {
#if defined(__AVX512F__) && LANES == 16 /* one instruction, of which GCC makes many */
    Words words = (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__AVX2__) && LANES == 8
    Words words = (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
#else
    Words words = __builtin_convertvector(*(const Halves *)from, Words);
#endif
    return __builtin_convertvector((Floats)(words << 16), Vec);
}

/* LANES weights, or `count` and zeros. */
INLINE Vec weights(const Product *p, Int at, Int count, int narrow) {
    if (!narrow) return load(p->weight + at, count);
    if (count >= LANES) return widened(p->narrow + at);
    uint16_t some[LANES] = {};
    memcpy(some, p->narrow + at, count * sizeof *some);
    return widened(some);
}

/* Output o of rows r .. r + many. */
INLINE void tile(const Product *p, Int r, Int o, int many, int narrow) {
    const Int k = p->inputs, w = o * k;
    const Real *x[ROWS];
    Vec sums[ROWS][CHAINS] = {};
    ALL(m, many) x[m] = row(p->x, 0, r + m);
    Int c = 0;
    for (; c + CHAINS * LANES <= k; c += CHAINS * LANES)
        ALL(i, CHAINS) {
            const Int at = c + i * LANES;
            Vec v = weights(p, w + at, LANES, narrow);
            ALL(m, many) sums[m][i] += v * load(x[m] + at, LANES);
        }
    for (; c < k; c += LANES) {
        Vec v = weights(p, w + c, k - c, narrow);
        ALL(m, many) sums[m][0] += v * load(x[m] + c, k - c);
    }
    ALL(m, many) {
        for (int i = 1; i < CHAINS; i++) sums[m][0] += sums[m][i];
        row(p->y, 0, r + m)[o] = total(sums[m][0]) + (p->bias ? p->bias[o] : 0);
    }
}

#define UNIT(name, narrow)                                                                \
    ONCE void name##_pair(const Product *p, Int r, Int o) { tile(p, r, o, ROWS, narrow); } \
    ONCE void name##_one(const Product *p, Int r, Int o) { tile(p, r, o, 1, narrow); }     \
    static void name##_unit(const void *job, Int unit) {                                  \
        const Job *j = job;                                                               \
        int m = 0;                                                                        \
        while (unit >= j->first[m + 1]) m++;                                              \
        const Product *p = &j->of[m];                                                     \
        Int o = (unit - j->first[m]) * BLOCK, end = min_int(o + BLOCK, p->outputs);       \
        for (; o < end; o++) {                                                            \
            Int r = 0;                                                                    \
            for (; r + ROWS <= p->rows; r += ROWS) name##_pair(p, r, o);                  \
            for (; r < p->rows; r++) name##_one(p, r, o);                                 \
        }                                                                                 \
    }

UNIT(real, 0)
UNIT(bfloat16, 1)
ENTRY(real)
ENTRY(bfloat16)
