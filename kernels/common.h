/* What every CPU kernel needs: one register of channels, exp and its relatives, threads.
 *
 * A vector holds LANES neighbouring channels. Compile with -DDOUBLE for float64, else float32.
 * No -ffast-math: the rounding tricks below must stay as written; contraction to FMA may happen.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifndef _OPENMP
#include <pthread.h>
#endif
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#ifdef DOUBLE
typedef double Real;
typedef int64_t Bits;
#define LANES (BYTES / 8)
#else
typedef float Real;
typedef int32_t Bits;
#define LANES (BYTES / 4)
#endif
typedef int64_t Int;
typedef Real Vec __attribute__((vector_size(BYTES)));
typedef Bits Mask __attribute__((vector_size(BYTES)));
#define INLINE static inline __attribute__((always_inline))
/* For what takes the compiler long and the processor not, so that it is compiled once. */
#define ONCE static __attribute__((noinline, noclone, unused))

/* A (b, t, width) array whose last dimension is dense; strides count Reals. */
typedef struct {
    Real *data;
    Int batch, row;
} Rows;

INLINE Int min_int(Int a, Int b) { return a < b ? a : b; }
INLINE Int ceil_div(Int a, Int b) { return (a + b - 1) / b; }
INLINE Int blocks_of(Int width) { return ceil_div(width, LANES); }
INLINE Real *row(Rows a, Int b, Int t) { return a.data + b * a.batch + t * a.row; }

INLINE Vec splat(Real a) { return a - (Vec){}; } /* a - 0, not a + 0: keeps -0 */
INLINE Vec choose(Mask where, Vec a, Vec b) {
    return (Vec)(((Mask)a & where) | ((Mask)b & ~where));
}

/* The smaller, the larger; a where either is NaN. GCC makes three instructions of a choice. */
#ifdef __AVX__
#ifdef DOUBLE
#define EXTREME(name) __asm__("v" name "pd %2, %1, %0" : "=v"(a) : "v"(b), "v"(a))
#else
#define EXTREME(name) __asm__("v" name "ps %2, %1, %0" : "=v"(a) : "v"(b), "v"(a))
#endif
INLINE Vec smaller(Vec a, Vec b) {
    EXTREME("min");
    return a;
}
INLINE Vec larger(Vec a, Vec b) {
    EXTREME("max");
    return a;
}
#else
INLINE Vec smaller(Vec a, Vec b) { return choose(b < a, b, a); }
INLINE Vec larger(Vec a, Vec b) { return choose(b > a, b, a); }
#endif

/* The same, but NaN for infinity, whose distance to itself is no number. */
INLINE Vec no_infinity(Vec v) { return choose(v < splat(INFINITY), v, v - v); }

INLINE Vec blend(Mask where, Vec a, Vec b) { /* `choose` for masks not fresh from a comparison */
    return (Vec)((Mask)b ^ (((Mask)a ^ (Mask)b) & where));
}
INLINE Vec if_negative(Vec v, Vec a, Vec b) { /* by the sign bit: -0 and -NaN count */
    return blend((Mask)v >> (8 * (int)sizeof(Real) - 1), a, b);
}
INLINE Vec negative(Vec v) { return (Vec)((Mask)v | (Mask)splat((Real)-0.0)); } /* -|v| */

ONCE Real largest_lane(Vec v) { /* or 0; NaN does not count */
    Real most[4] = {};
    for (int i = 0; i < LANES; i++) most[i % 4] = v[i] > most[i % 4] ? v[i] : most[i % 4];
    for (int i = 1; i < 4; i++) most[0] = most[i] > most[0] ? most[i] : most[0];
    return most[0];
}

/* `count` channels are left: fewer than LANES, or none, where a width ends inside the vector. */
ONCE __attribute__((cold)) Vec load_some(const Real *from, Int count) {
    Vec v = {};
    if (count > 0) memcpy(&v, from, count * sizeof *from);
    return v;
}
ONCE __attribute__((cold)) void store_some(Real *to, Vec v, Int count) {
    if (count > 0) memcpy(to, &v, count * sizeof *to);
}
INLINE Vec load(const Real *from, Int count) {
    typedef Vec Anywhere __attribute__((aligned(sizeof(Real)), may_alias));
    if (__builtin_expect(count >= LANES, 1)) return *(const Anywhere *)from;
    return load_some(from, count);
}
INLINE void store(Real *to, Vec v, Int count) {
    if (__builtin_expect(count >= LANES, 1)) memcpy(to, &v, sizeof v);
    else store_some(to, v, count);
}
/* `count` rows of n Reals, as the channels of a (d, n) matrix are: vector i has their element i. */
ONCE void load_columns(Vec *to, const Real *from, Int n, Int count) {
    for (Int i = 0; i < n && count < LANES; i++) to[i] = splat(0);
    for (Int lane = 0; lane < min_int(count, LANES); lane++)
        for (Int i = 0; i < n; i++) to[i][lane] = from[lane * n + i];
}
ONCE void store_columns(Real *to, const Vec *from, Int n, Int count) {
    for (Int lane = 0; lane < min_int(count, LANES); lane++)
        for (Int i = 0; i < n; i++) to[lane * n + i] = from[i][lane];
}
/* A lane to each of `count` places `stride` apart. */
ONCE void store_strided(Real *to, Vec v, Int stride, Int count) {
    for (Int i = 0; i < min_int(count, LANES); i++) to[i * stride] = v[i];
}

/* 2^(a b), or exp(a b) for b scaled by log2 e.
 *
 * Adding 1.5 * 2^(mantissa bits) rounds y = a b to the nearest integer, which is then in the
 * low bits and goes straight to the exponent. The rest f lies in [-1/2, 1/2], where
 *     2^f = 1 + f P(f)
 * with constant term exactly 1, and P fitted so that (2^f - 1) / f has the least relative error:
 * a decay 1 - e is right in e too, else slow channels drift.
 *
 * Where the caller knows more of y, less is needed: ANY y is clamped to the normal exponents first,
 * a NORMAL one lies within LOWEST, and a MILD one in [-MILDEST, 0] needs no rounding: f = y.
 */
#define LOG2E 1.44269504088896340736
#ifdef DOUBLE
#define ROUND 6755399441055744.0
#define MANTISSA 52
#define LOWEST -1020.0
#define LOG2E_LOW 2.0355273740931033e-17
static const Real EXP2[] = {/* (ln 2)^k / k!: the series, below half a unit in the last place */
    6.9314718055994530942e-1,  2.4022650695910071233e-1,  5.5504108664821579953e-2,
    9.6181291076284771620e-3,  1.3333558146428443423e-3,  1.5403530393381609954e-4,
    1.5252733804059840280e-5,  1.3215486790144309488e-6,  1.0178086009239699728e-7,
    7.0549116208011233299e-9,  4.4455382718708114976e-10, 2.5678435993488205142e-11,
    1.3691488853904128881e-12};
#define MILDEST 0.5 /* a longer series would cost what it saves */
#define EXP2_MILD EXP2
#else
#define ROUND 12582912.0f
#define MANTISSA 23
#define LOWEST -125.0f
#define LOG2E_LOW 1.925963033500e-8
static const Real EXP2[] = {6.931471825e-1f, 2.402264923e-1f, 5.550367385e-2f,
                            9.618310258e-3f, 1.338738366e-3f, 1.538253418e-4f}; /* 1.3e-8 */
#define MILDEST 2
static const Real EXP2_MILD[] = {/* of [-2, 0], relative to 2^f and to 1 - 2^f: 6e-8 */
    6.931471825e-1f, 2.402256280e-1f, 5.549731851e-2f, 9.599153884e-3f,
    1.307605882e-3f, 1.354643900e-4f, 8.143807463e-6f};
#endif
enum {
    EXP2_TERMS = sizeof EXP2 / sizeof *EXP2,
    EXP2_MILD_TERMS = sizeof EXP2_MILD / sizeof *EXP2_MILD
};
typedef enum { MILD, NORMAL, ANY } Range;

/* `many` at once, step by step: independent chains side by side keep both FMA pipes busy, where one
 * after the other they would fill the scheduler with waiting instructions. */
#define ALL(m, many) _Pragma("GCC unroll 8") for (int m = 0; m < many; m++)
/* polynomial(c, terms, f) = c_0 + c_1 f + c_2 f^2 + ... */
INLINE void polynomial(Vec *result, const Real *c, int terms, const Vec *f, int many) {
    ALL(m, many) result[m] = f[m] * c[terms - 1] + c[terms - 2];
#pragma GCC unroll 32
    for (int k = terms - 3; k >= 0; k--) ALL(m, many) result[m] = result[m] * f[m] + c[k];
}
INLINE void exp2_poly(Vec *result, const Vec *f, const Vec *rounded, int many) {
    polynomial(result, EXP2, EXP2_TERMS, f, many);
    ALL(m, many) result[m] = result[m] * f[m] + (Real)1;
    ALL(m, many) result[m] = (Vec)((Mask)result[m] + ((Mask)rounded[m] << MANTISSA));
}
INLINE void exp2_products(Vec *result, Vec a, const Vec *b, int many, Range range) {
    Vec y[8], rounded[8], f[8];
    if (range == MILD) {
        ALL(m, many) f[m] = a * b[m];
        polynomial(result, EXP2_MILD, EXP2_MILD_TERMS, f, many);
        ALL(m, many) result[m] = result[m] * f[m] + (Real)1;
        return;
    }
    if (range == ANY) { /* 0 and infinity beyond, and NaN of NaN */
        ALL(m, many) y[m] = smaller(larger(a * b[m], splat((Real)LOWEST)), splat((Real)-LOWEST));
        ALL(m, many) rounded[m] = y[m] + (Real)ROUND;
        ALL(m, many) f[m] = y[m] - (rounded[m] - (Real)ROUND);
        exp2_poly(result, f, rounded, many);
        ALL(m, many) result[m] = choose(y[m] > (Real)LOWEST, result[m], y[m] - (Real)LOWEST);
        ALL(m, many) result[m] = choose(y[m] >= (Real)-LOWEST, splat(INFINITY), result[m]);
        return;
    } else {
        ALL(m, many) rounded[m] = a * b[m] + (Real)ROUND;
        ALL(m, many) f[m] = rounded[m] - (Real)ROUND;
        ALL(m, many) f[m] = a * b[m] - f[m];
    }
    exp2_poly(result, f, rounded, many);
}

/* e = exp(-|v|) in [0, 1]: what softplus and sigmoid of v share without overflow. NaN of NaN, whose
 * bits the sum of exponents would make a number of. */
INLINE void exp_minus_abs(Vec *e, const Vec *v, int many) {
    const Real lowest = (Real)(LOWEST / LOG2E);
    Vec a[8], rounded[8], f[8];
    ALL(m, many) a[m] = larger(negative(v[m]), splat(lowest));
    ALL(m, many) rounded[m] = a[m] * (Real)LOG2E + (Real)ROUND;
    ALL(m, many) f[m] = rounded[m] - (Real)ROUND;
    ALL(m, many) f[m] = a[m] * (Real)LOG2E - f[m];
    ALL(m, many) f[m] += a[m] * (Real)LOG2E_LOW;
    exp2_poly(e, f, rounded, many);
    ALL(m, many) e[m] = choose(a[m] > lowest, e[m], a[m] - lowest);
}
/* softplus(v) = max(v, 0) + log(1 + e) and, unless null, its derivative sigmoid(v).
 * log(1 + e) = e (1 + e P(e)), with P fitted on [0, 1]: accurate relative to itself for small e. */
#ifdef DOUBLE
static const Real LOG1P[] = {
    -4.99999999999999833e-01, 3.33333333333295345e-01,  -2.49999999997070621e-01,
    1.99999999883986868e-01,  -1.66666663880294164e-01, 1.42857098218161699e-01,
    -1.24999492722288455e-01, 1.11106843676368097e-01,  -9.99725872292441531e-02,
    9.07714525258963567e-02,  -8.27833231276749043e-02, 7.51484381227694315e-02,
    -6.67491268413180072e-02, 5.64724933086993772e-02,  -4.39482041828084882e-02,
    3.02531688784143382e-02,  -1.76834931070630058e-02, 8.40221687762507038e-03,
    -3.08228128682449740e-03, 8.12804061879703272e-04,  -1.36396195886874429e-04,
    1.09002433220063295e-05};
#else
static const Real LOG1P[] = {-4.999964833e-1f, 3.332132399e-1f,  -2.485716492e-1f,
                             1.915365607e-1f,  -1.375380903e-1f, 7.920461893e-2f,
                             -3.006575629e-2f, 5.364760756e-3f};
#endif
enum { LOG1P_TERMS = sizeof LOG1P / sizeof *LOG1P };

INLINE void softplus(Vec *result, Vec *slope, const Vec *v, int many) {
    Vec e[8], p[8];
    exp_minus_abs(e, v, many);
    if (slope) ALL(m, many) slope[m] = if_negative(v[m], e[m], splat(1)) / (1 + e[m]);
    polynomial(p, LOG1P, LOG1P_TERMS, e, many);
    ALL(m, many) p[m] = p[m] * e[m] + (Real)1;
    ALL(m, many) result[m] = p[m] * e[m] + larger(v[m], splat(0));
}
/* silu(v) = v sigmoid(v) and, unless null, its derivative. */
INLINE void silu(Vec *result, Vec *slope, const Vec *v, int many) {
    Vec e[8], s[8];
    exp_minus_abs(e, v, many);
    ALL(m, many) s[m] = if_negative(v[m], e[m], splat(1)) / (1 + e[m]);
    if (slope) ALL(m, many) slope[m] = s[m] * (1 + v[m] * (1 - s[m]));
    ALL(m, many) result[m] = v[m] * s[m];
}

/* Sums over the lanes of LANES vectors: lane j of the result is the sum of rows[j].
 * Two rows become one by adding lanes `w` apart, the second row's sums going to the lanes with bit
 * w set: one blend, one shuffle, one addition. */
#if LANES == 16
#define EACH_LANE(f, w)                                                                           \
    f(0, w), f(1, w), f(2, w), f(3, w), f(4, w), f(5, w), f(6, w), f(7, w), f(8, w), f(9, w),     \
        f(10, w), f(11, w), f(12, w), f(13, w), f(14, w), f(15, w)
#elif LANES == 8
#define EACH_LANE(f, w) f(0, w), f(1, w), f(2, w), f(3, w), f(4, w), f(5, w), f(6, w), f(7, w)
#elif LANES == 4
#define EACH_LANE(f, w) f(0, w), f(1, w), f(2, w), f(3, w)
#else
#define EACH_LANE(f, w) f(0, w), f(1, w)
#endif
#define HAS_BIT(i, w) (i & w ? -1 : 0)
#define OTHER(i, w) ((i ^ w) + (i & w ? LANES : 0))
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Mask){__VA_ARGS__})
#endif
#define FOLD(w)                                                                                   \
    if (LANES > w) ALL(i, w) sums[i] = blend((Mask){EACH_LANE(HAS_BIT, w)}, sums[i + w], sums[i]) \
                                     + SHUFFLE(sums[i], sums[i + w], EACH_LANE(OTHER, w));
INLINE Vec row_sums(Vec *sums) { /* overwrites its argument */
    FOLD(8)
    FOLD(4)
    FOLD(2)
    FOLD(1)
    return sums[0];
}

/* Every lane of `many` vectors gets the sum, or the largest, of the vector's lanes. */
#define ACROSS(i, w) (i ^ w)
#define SPREAD_BY(w, v, with, many) \
    if (LANES > w) ALL(m, many) v[m] = with(v[m], SHUFFLE(v[m], v[m], EACH_LANE(ACROSS, w)));
#define SPREAD(v, with, many)     \
    SPREAD_BY(8, v, with, many)   \
    SPREAD_BY(4, v, with, many)   \
    SPREAD_BY(2, v, with, many)   \
    SPREAD_BY(1, v, with, many)
INLINE Vec plus(Vec a, Vec b) { return a + b; }
INLINE Real total(Vec v) { /* the sum of the lanes */
    SPREAD((&v), plus, 1)
    return v[0];
}

/* Denormals cost a hundred cycles each and mean nothing in a decaying state: flush them. */
INLINE unsigned flush_denormals(void) {
#ifdef __SSE__
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
#else
    return 0;
#endif
}
INLINE void restore_denormals(unsigned before) {
#ifdef __SSE__
    _mm_setcsr(before);
#else
    (void)before;
#endif
}

/* work(job, unit) for every unit; each unit writes its own outputs, so order does not matter.
 * OpenMP shares PyTorch's pool of threads (one libgomp in the process); without it, plain threads. */
typedef void Work(const void *job, Int unit);
typedef struct {
    Work *work;
    const void *job;
    Int units, next;
} Queue;

static void *drain(void *queue_) {
    Queue *queue = queue_;
    unsigned before = flush_denormals();
    for (Int i; (i = __atomic_fetch_add(&queue->next, 1, __ATOMIC_RELAXED)) < queue->units;)
        queue->work(queue->job, i);
    restore_denormals(before);
    return 0;
}
static void parallel_for(Int threads, Int units, Work *work, const void *job) {
    Queue queue = {work, job, units, 0};
    threads = min_int(threads, units);
    if (threads <= 1) {
        drain(&queue);
        return;
    }
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    drain(&queue);
#else
    pthread_t pool[threads - 1];
    Int started = 0;
    while (started < threads - 1 && !pthread_create(&pool[started], 0, drain, &queue)) started++;
    drain(&queue);
    while (started) pthread_join(pool[--started], 0);
#endif
}

/* The functions that Python calls: `name` does `name_unit` for every unit of work, in the order and
 * on the threads that the source's `run` chooses. Sources define Sizes and Arrays before. */
#define ENTRY(name)               \
    int name(Sizes s, Arrays a) { \
        run(s, a, name##_unit);   \
        return 0;                 \
    }

/* Work by segments: a unit is TOKENS tokens of one batch row; `width` is the work at a token. */
typedef struct {
    Int b, start, end;
} Segment;
#define BY_SEGMENTS(width)                                                                    \
    typedef struct {                                                                          \
        Sizes s;                                                                              \
        Arrays a;                                                                             \
        Int segments;                                                                         \
    } Job;                                                                                    \
    INLINE Segment segment_of(const Job *j, Int unit) {                                       \
        Int start = unit % j->segments * TOKENS;                                              \
        return (Segment){unit / j->segments, start, min_int(start + TOKENS, j->s.tokens)};    \
    }                                                                                         \
    static void run(Sizes s, Arrays a, Work *work) {                                          \
        Job job = {s, a, ceil_div(s.tokens, TOKENS)};                                         \
        Int threads = s.batch * s.tokens * (width) < 1 << 15 ? 1 : s.threads;                 \
        parallel_for(threads, s.batch * job.segments, work, &job);                            \
    }

/* Work by channels: a unit is up to GROUP neighbouring channel blocks of one batch row, with all of
 * their time; calls of less than `least` numbers have one thread. */
typedef struct {
    Int b, first, blocks;
} Group;
#define BY_CHANNELS(least)                                                                    \
    typedef struct {                                                                          \
        Sizes s;                                                                              \
        Arrays a;                                                                             \
        Int group, groups; /* channel blocks in a unit; units in a batch row */               \
    } Job;                                                                                    \
    INLINE Group group_of(const Job *j, Int unit) {                                           \
        Int first = unit % j->groups * j->group;                                              \
        return (Group){unit / j->groups, first,                                               \
                       min_int(j->group, blocks_of(j->s.width) - first)};                     \
    }                                                                                         \
    static void run(Sizes s, Arrays a, Work *work) {                                          \
        Int blocks = blocks_of(s.width), spread = s.batch * blocks / s.threads;               \
        Int group = spread < 1 ? 1 : min_int(spread, GROUP);                                  \
        Job job = {s, a, group, ceil_div(blocks, group)};                                     \
        Int threads = s.batch * s.tokens * s.width < (least) ? 1 : s.threads;                 \
        parallel_for(threads, s.batch * job.groups, work, &job);                              \
    }
