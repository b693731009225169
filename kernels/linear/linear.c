/* Products of a few rows with a matrix; README.md says how. */
#include "../common.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

enum {
    BLOCK = 32, /* outputs of a unit of work */
    ROWS = 2,   /* rows that share a read of the weights */
    CHAINS = 2  /* sums side by side of one output and row */
};

const Int max_rows = 2; /* for more, a matrix product is faster */

typedef struct {
    Int rows, outputs, inputs, threads;
} Sizes;

typedef struct {
    Rows x, y;              /* (1, rows, inputs), (1, rows, outputs) */
    const Real *weight;     /* (outputs, inputs) */
    const uint16_t *narrow; /* the same in bfloat16, in its place */
    const Real *bias;       /* (outputs), or null */
} Arrays;

typedef struct {
    Sizes s;
    Arrays a;
} Job;

static void run(Sizes s, Arrays a, Work *work) {
    Job job = {s, a};
    Int threads = s.rows * s.outputs * s.inputs < 1 << 16 ? 1 : s.threads;
    parallel_for(threads, ceil_div(s.outputs, BLOCK), work, &job);
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
INLINE Vec weights(const Job *j, Int at, Int count, int narrow) {
    if (!narrow) return load(j->a.weight + at, count);
    if (count >= LANES) return widened(j->a.narrow + at);
    uint16_t some[LANES] = {};
    memcpy(some, j->a.narrow + at, count * sizeof *some);
    return widened(some);
}

/* Output o of rows r .. r + many. */
INLINE void tile(const Job *j, Int r, Int o, int many, int narrow) {
    const Int k = j->s.inputs, w = o * k;
    const Real *x[ROWS];
    Vec sums[ROWS][CHAINS] = {};
    ALL(m, many) x[m] = row(j->a.x, 0, r + m);
    Int c = 0;
    for (; c + CHAINS * LANES <= k; c += CHAINS * LANES)
        ALL(i, CHAINS) {
            const Int at = c + i * LANES;
            Vec v = weights(j, w + at, LANES, narrow);
            ALL(m, many) sums[m][i] += v * load(x[m] + at, LANES);
        }
    for (; c < k; c += LANES) {
        Vec v = weights(j, w + c, k - c, narrow);
        ALL(m, many) sums[m][0] += v * load(x[m] + c, k - c);
    }
    ALL(m, many) {
        for (int i = 1; i < CHAINS; i++) sums[m][0] += sums[m][i];
        row(j->a.y, 0, r + m)[o] = total(sums[m][0]) + (j->a.bias ? j->a.bias[o] : 0);
    }
}

#define UNIT(name, narrow)                                                               \
    ONCE void name##_pair(const Job *j, Int r, Int o) { tile(j, r, o, ROWS, narrow); }   \
    ONCE void name##_one(const Job *j, Int r, Int o) { tile(j, r, o, 1, narrow); }       \
    static void name##_unit(const void *job, Int unit) {                                 \
        const Job *j = job;                                                              \
        Int end = min_int((unit + 1) * BLOCK, j->s.outputs);                             \
        for (Int o = unit * BLOCK; o < end; o++) {                                       \
            Int r = 0;                                                                   \
            for (; r + ROWS <= j->s.rows; r += ROWS) name##_pair(j, r, o);               \
            for (; r < j->s.rows; r++) name##_one(j, r, o);                              \
        }                                                                                \
    }

UNIT(real, 0)
UNIT(bfloat16, 1)
ENTRY(real)
ENTRY(bfloat16)
