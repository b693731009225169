/* Products of a few rows with a matrix that is kept in 8 or 4 bits; README.md says how. */
#include "../common.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

enum {
    TOGETHER = 4, /* outputs and rows whose sums run side by side, where there are several rows */
    CHAINS = 4,   /* sums side by side of one output and row */
    BLOCK = 32,   /* outputs of a unit of work */
    GROUP = 32    /* inputs that share a scale in 4 bits */
};

const Int max_rows = 64; /* for more, restoring the matrix once is cheaper */

typedef struct {
    Int rows, outputs, inputs, bytes, scales, threads;
} Sizes;

typedef struct {
    Rows x, y;              /* (1, rows, inputs), (1, rows, outputs) */
    const int8_t *q;        /* (outputs, inputs) of 8 bits, (outputs, inputs / 2) of 4 */
    const uint16_t *scales; /* bfloat16: (outputs, 1), or (outputs, 2 inputs / GROUP) */
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

typedef int8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef float Floats __attribute__((vector_size(4 * LANES)));

/* One instruction, of which GCC makes many. */
INLINE Ints integers(const int8_t *from) {
#if defined(__AVX512F__) && LANES == 16
    return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif defined(__AVX2__) && LANES == 8
    return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    return __builtin_convertvector(*(const Bytes *)from, Ints);
#endif
}
INLINE Vec numbers(Ints i) { return __builtin_convertvector(i, Vec); }

/* A number in bfloat16, which is the upper half of one in single precision; two in all lanes. */
INLINE float widened(uint16_t from) {
    uint32_t bits = (uint32_t)from << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
INLINE void pair(Vec *first, Vec *second, const uint16_t *from) {
    int32_t word;
    memcpy(&word, from, sizeof word);
    Ints both = word - (Ints){};
    *first = __builtin_convertvector((Floats)(both << 16), Vec);
    *second = __builtin_convertvector((Floats)(both & ~0xffff), Vec);
}

/* s q + z of each lane's lowest 4 bits q, in two's complement. */
#if defined(__AVX512F__) && LANES == 16
static const Real LEVELS[16] __attribute__((aligned(BYTES))) = {0,  1,  2,  3,  4,  5,  6,  7,
                                                               -8, -7, -6, -5, -4, -3, -2, -1};
INLINE Vec value(Ints four, Vec s, Vec z) { /* all 16 are computed once and looked up */
    return (Vec)_mm512_permutexvar_ps((__m512i)four, (__m512)(*(const Vec *)LEVELS * s + z));
}
#else
INLINE Vec value(Ints four, Vec s, Vec z) { return numbers((four << 28) >> 28) * s + z; }
#endif

/* One row and output: the matrix is one stream, which the processor fetches ahead. */
INLINE void int8_stream(const Job *j, Int r, Int o) {
    const Int k = j->s.inputs;
    const Real *x = row(j->a.x, 0, r);
    const int8_t *q = j->a.q + o * k;
    Vec sums[CHAINS] = {};
    Int c = 0;
    for (; c + CHAINS * LANES <= k; c += CHAINS * LANES)
        ALL(i, CHAINS) sums[i] += numbers(integers(q + c + i * LANES)) * load(x + c + i * LANES, LANES);
    for (; c + LANES <= k; c += LANES) sums[0] += numbers(integers(q + c)) * load(x + c, LANES);
    Real sum = total(sums[0] + sums[1] + (sums[2] + sums[3]));
    for (; c < k; c++) sum += (Real)q[c] * x[c];
    row(j->a.y, 0, r)[o] = sum * widened(j->a.scales[o]);
}
INLINE void int4_stream(const Job *j, Int r, Int o) {
    const Int groups = j->s.inputs / GROUP;
    const Real *x = row(j->a.x, 0, r);
    const int8_t *q = j->a.q + o * groups * (GROUP / 2);
    const uint16_t *scales = j->a.scales + o * groups * 2;
    Vec sums[CHAINS] = {};
    for (Int g = 0; g < groups; g++) {
        Vec scale, zero;
        pair(&scale, &zero, scales + 2 * g);
        ALL(i, GROUP / 2 / LANES) {
            Ints both = integers(q + g * (GROUP / 2) + i * LANES);
            const Real *from = x + g * GROUP + i * LANES;
            sums[2 * i % CHAINS] += value(both, scale, zero) * load(from, LANES);
            sums[(2 * i + 1) % CHAINS] += value(both >> 4, scale, zero) * load(from + GROUP / 2, LANES);
        }
    }
    row(j->a.y, 0, r)[o] = total(sums[0] + sums[1] + (sums[2] + sums[3]));
}

/* Rows r .. r + many of outputs o .. o + some. */
INLINE void int8_tile(const Job *j, Int r, Int o, int many, int some) {
    const Int k = j->s.inputs;
    const Real *x[TOGETHER];
    const int8_t *q[TOGETHER];
    Vec sums[TOGETHER][TOGETHER] = {};
    ALL(m, many) x[m] = row(j->a.x, 0, r + m);
    ALL(i, some) q[i] = j->a.q + (o + i) * k;
    Int c = 0;
    for (; c + LANES <= k; c += LANES) {
        Vec w[TOGETHER];
        ALL(i, some) w[i] = numbers(integers(q[i] + c));
        __builtin_prefetch(q[0] + TOGETHER * (k + c)); /* the next tile, which lies behind */
        ALL(m, many) {
            Vec v = load(x[m] + c, LANES);
            ALL(i, some) sums[m][i] += w[i] * v;
        }
    }
    ALL(m, many) ALL(i, some) {
        Real sum = total(sums[m][i]);
        for (Int rest = c; rest < k; rest++) sum += (Real)q[i][rest] * x[m][rest];
        row(j->a.y, 0, r + m)[o + i] = sum * widened(j->a.scales[o + i]);
    }
}

/* A byte holds inputs i and i + GROUP / 2 of its group, in two's complement of 4 bits. */
INLINE void int4_tile(const Job *j, Int r, Int o, int many, int some) {
    const Int groups = j->s.inputs / GROUP;
    const Real *x[TOGETHER];
    Vec sums[TOGETHER][TOGETHER] = {};
    ALL(m, many) x[m] = row(j->a.x, 0, r + m);
    const int8_t *q[TOGETHER];
    const uint16_t *scales[TOGETHER];
    ALL(i, some) q[i] = j->a.q + (o + i) * groups * (GROUP / 2);
    ALL(i, some) scales[i] = j->a.scales + (o + i) * groups * 2;
    for (Int g = 0; g < groups; g++) {
        Vec scale[TOGETHER], zero[TOGETHER];
        ALL(i, some) pair(&scale[i], &zero[i], scales[i] + 2 * g);
        for (int c = 0; c < GROUP / 2; c += LANES) {
            Vec low[TOGETHER], high[TOGETHER];
            __builtin_prefetch(q[0] + TOGETHER * GROUP / 2 * (groups + g));
            ALL(i, some) {
                Ints both = integers(q[i] + g * (GROUP / 2) + c);
                low[i] = value(both, scale[i], zero[i]);
                high[i] = value(both >> 4, scale[i], zero[i]);
            }
            ALL(m, many) {
                const Real *from = x[m] + g * GROUP + c;
                Vec v = load(from, LANES), w = load(from + GROUP / 2, LANES);
                ALL(i, some) sums[m][i] += low[i] * v;
                ALL(i, some) sums[m][i] += high[i] * w;
            }
        }
    }
    ALL(m, many) ALL(i, some) row(j->a.y, 0, r + m)[o + i] = total(sums[m][i]);
}

#define UNIT(name)                                                                       \
    ONCE void name##_four(const Job *j, Int r, Int o) { name##_tile(j, r, o, 4, 4); }    \
    ONCE void name##_one(const Job *j, Int r, Int o) { name##_stream(j, r, o); }         \
    static void name##_unit(const void *job, Int unit) {                                 \
        const Job *j = job;                                                              \
        Int o = unit * BLOCK, end = min_int(o + BLOCK, j->s.outputs);                    \
        const Int fours = j->s.rows / TOGETHER * TOGETHER;                               \
        for (; fours && o + TOGETHER <= end; o += TOGETHER) {                            \
            for (Int r = 0; r < fours; r += TOGETHER) name##_four(j, r, o);              \
            for (Int i = o; i < o + TOGETHER; i++)                                       \
                for (Int r = fours; r < j->s.rows; r++) name##_one(j, r, i);             \
        }                                                                                \
        for (; o < end; o++)                                                             \
            for (Int r = 0; r < j->s.rows; r++) name##_one(j, r, o);                     \
    }

UNIT(int8)
UNIT(int4)
ENTRY(int8)
ENTRY(int4)
