/* Products of a few rows with a matrix that is kept in 8 or 4 bits; README.md says how. */
#pragma once
#include "../linear/linear.h"
#include <stdlib.h>

enum {
    TOGETHER = 4, /* outputs and rows whose sums run side by side */
    CHAINS = 4,   /* sums side by side of one output and row */
    GROUP = 32    /* inputs that share a scale in 4 bits */
};

typedef int8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

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
INLINE float from_bfloat16(uint16_t from) {
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
INLINE void int8_stream(const Product *p, Int r, Int o) {
    const Int k = p->inputs;
    const Real *x = row(p->x, 0, r);
    const int8_t *q = p->bits + o * k;
    Vec sums[CHAINS] = {};
    Int c = 0;
    for (; c + CHAINS * LANES <= k; c += CHAINS * LANES)
        ALL(i, CHAINS) sums[i] += numbers(integers(q + c + i * LANES)) * load(x + c + i * LANES, LANES);
    for (; c + LANES <= k; c += LANES) sums[0] += numbers(integers(q + c)) * load(x + c, LANES);
    Real sum = total(sums[0] + sums[1] + (sums[2] + sums[3]));
    for (; c < k; c++) sum += (Real)q[c] * x[c];
    *output(p, r, o) = sum * from_bfloat16(p->scales[o]) + bias(p, o);
}
INLINE void int4_stream(const Product *p, Int r, Int o) {
    const Int groups = p->inputs / GROUP;
    const Real *x = row(p->x, 0, r);
    const int8_t *q = p->bits + o * groups * (GROUP / 2);
    const uint16_t *scales = p->scales + o * groups * 2;
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
    *output(p, r, o) = total(sums[0] + sums[1] + (sums[2] + sums[3])) + bias(p, o);
}

/* The same in integers, where the processor multiplies bytes: x becomes three of them.
 *
 * In each span of inputs X = rint(x / unit), |X| < 2^23, is x2 2^16 + x1 2^8 + x0 of signed bytes,
 * so that x has as many bits as the largest one of its span has. Weights are made unsigned, as the
 * instruction has it, by adding 128 or 8, which `offset` takes away again: integer sums are exact. */
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && LANES == 16
enum { LIMBS = 3, STEP = 64, AHEAD = 4096, SPAN8 = 4 * STEP, SPAN4 = 16 * GROUP, LARGEST = 127 << 16 };

typedef struct {
    int8_t x[SPAN8 / STEP][LIMBS][STEP];
    int32_t offset[LIMBS][16];
    float unit;
} __attribute__((aligned(BYTES))) Span8;

typedef struct { /* 16 groups, four in a step: first the halves that are in the lower bits */
    int8_t x[4][2][LIMBS][STEP];
    int32_t offset[4][16];
    float unit[16], sum[16]; /* of each group */
} __attribute__((aligned(BYTES))) Span4;

INLINE __m512 some_of(const float *x, Int count) { /* and zeros behind them */
    if (count <= 0) return _mm512_setzero_ps();
    return _mm512_maskz_loadu_ps((__mmask16)(count < 16 ? (1u << count) - 1 : 0xffff), x);
}
/* The unit of `count` numbers; -1 where they are not all finite or too small to divide by. */
INLINE float unit_of(const float *x, Int count) {
    __m512 most = _mm512_setzero_ps();
    __mmask16 infinite = 0;
    for (Int i = 0; i < count; i += 16) {
        __m512 size = _mm512_abs_ps(some_of(x + i, count - i));
        infinite |= _mm512_cmp_ps_mask(size, _mm512_set1_ps(INFINITY), _CMP_NLT_UQ);
        most = _mm512_max_ps(most, size);
    }
    const float all = _mm512_reduce_max_ps(most);
    if (infinite) return -1;
    return all == 0 ? 0 : all < 1e-30f ? -1 : all / LARGEST;
}
/* The bytes of 16 numbers, to places that lie STEP apart. */
INLINE void split(__m512 x, float per, int8_t *to) {
    __m512i rest = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(per)));
    ALL(n, LIMBS) {
        __m512i byte = _mm512_srai_epi32(_mm512_slli_epi32(rest, 24), 24);
        _mm_store_si128((__m128i *)(to + n * STEP), _mm512_cvtepi32_epi8(byte));
        rest = _mm512_srai_epi32(_mm512_sub_epi32(rest, byte), 8);
    }
}
/* Adds `weight` times the bytes of a step to its four-byte lanes. */
INLINE __m512i times(char weight, const int8_t *x, __m512i sums) {
    return _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(weight), _mm512_load_si512(x));
}

/* Returns 0 where the numbers do not fit. */
ONCE int spread8(const float *x, Int k, Span8 *to) {
    for (; k > 0; x += SPAN8, k -= SPAN8, to++) {
        const Int count = min_int(SPAN8, k);
        if ((to->unit = unit_of(x, count)) < 0) return 0;
        const float per = to->unit ? 1 / to->unit : 0;
        __m512i sums[LIMBS];
        ALL(n, LIMBS) sums[n] = _mm512_setzero_si512();
        for (Int i = 0; i < count; i += STEP) {
            for (Int c = 0; c < STEP; c += 16)
                split(some_of(x + i + c, count - i - c), per, &to->x[i / STEP][0][c]);
            ALL(n, LIMBS) sums[n] = times((char)128, to->x[i / STEP][n], sums[n]);
        }
        ALL(n, LIMBS) _mm512_store_si512(to->offset[n], _mm512_sub_epi32(_mm512_setzero_si512(), sums[n]));
    }
    return 1;
}
ONCE int spread4(const float *x, Int k, Span4 *to) {
    for (; k > 0; to++) {
        memset(to, 0, sizeof *to);
        const Int groups = min_int(SPAN4, k) / GROUP;
        for (Int g = 0; g < groups; g++, x += GROUP, k -= GROUP) {
            if ((to->unit[g] = unit_of(x, GROUP)) < 0) return 0;
            const float per = to->unit[g] ? 1 / to->unit[g] : 0;
            __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
            split(low, per, &to->x[g / 4][0][0][g % 4 * 16]);
            split(high, per, &to->x[g / 4][1][0][g % 4 * 16]);
            to->sum[g] = _mm512_reduce_add_ps(low + high);
        }
        for (Int i = 0; 4 * i < groups; i++) {
            __m512i all = _mm512_setzero_si512();
            for (int n = LIMBS - 1; n >= 0; n--) {
                all = times(8, to->x[i][0][n], _mm512_slli_epi32(all, 8));
                all = times(8, to->x[i][1][n], all);
            }
            _mm512_store_si512(to->offset[i], _mm512_sub_epi32(_mm512_setzero_si512(), all));
        }
    }
    return 1;
}

/* One output: in 8 bits the memory is what it waits for, and one stream the fastest to read. */
INLINE void int8_whole(const Product *p, const Span8 *from, Int r, Int o) {
    const Int k = p->inputs;
    const int8_t *q = p->bits + o * k;
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    __m512 sum = _mm512_setzero_ps();
    for (Int c = 0; c < k; c += SPAN8, from++) {
        const Int count = min_int(SPAN8, k - c);
        __m512i a[LIMBS];
        ALL(n, LIMBS) a[n] = _mm512_load_si512(from->offset[n]);
        for (Int i = 0; i < count; i += STEP) {
            const __mmask64 there = count - i < STEP ? ((__mmask64)1 << (count - i)) - 1 : ~(__mmask64)0;
            __m512i w = _mm512_xor_si512(_mm512_maskz_loadu_epi8(there, q + c + i), sign);
            ALL(n, LIMBS) a[n] = _mm512_dpbusd_epi32(a[n], w, _mm512_load_si512(from->x[i / STEP][n]));
        }
        __m512 all = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a[1]), _mm512_set1_ps(256), _mm512_cvtepi32_ps(a[0]));
        all = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a[2]), _mm512_set1_ps(65536), all);
        sum = _mm512_fmadd_ps(all, _mm512_set1_ps(from->unit), sum);
    }
    *output(p, r, o) = total((Vec)sum) * from_bfloat16(p->scales[o]) + bias(p, o);
}
/* Outputs o .. o + some: in 4 bits they read x together, and fetch those behind them. */
INLINE void int4_whole(const Product *p, const Span4 *from, Int r, Int o, int some) {
    const Int groups = p->inputs / GROUP, bytes = groups * (GROUP / 2);
    const int8_t *q = p->bits + o * bytes;
    const uint16_t *scales = p->scales + o * groups * 2;
    const __m512i eights = _mm512_set1_epi8((char)0x88), lower = _mm512_set1_epi8(0x0f);
    const __m512i lane = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    __m512 sums[TOGETHER], zeros[TOGETHER], scale[TOGETHER];
    ALL(m, some) sums[m] = zeros[m] = _mm512_setzero_ps();
    for (Int g = 0; g < groups; g += 16, from++) {
        const Int count = min_int(16, groups - g);
        ALL(m, some) __builtin_prefetch(scales + AHEAD / 8 + 2 * some * g + 32 * m);
        ALL(m, some) {
            const uint16_t *at = scales + 2 * (m * groups + g);
            const __m512i pairs = _mm512_maskz_loadu_epi32((__mmask16)((1u << count) - 1), at);
            const __m512 zero = (__m512)_mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000));
            scale[m] = (__m512)_mm512_slli_epi32(pairs, 16);
            zeros[m] = _mm512_fmadd_ps(zero, _mm512_load_ps(from->sum), zeros[m]);
            scale[m] = _mm512_mul_ps(scale[m], _mm512_load_ps(from->unit));
        }
        for (Int i = 0; 4 * i < count; i++) {
            const Int left = count - 4 * i;
            const __mmask64 there = left < 4 ? ((__mmask64)1 << 16 * left) - 1 : ~(__mmask64)0;
            const __m512i which = _mm512_add_epi32(lane, _mm512_set1_epi32(4 * i));
            ALL(m, some) __builtin_prefetch(q + AHEAD + some * (g + 4 * i) * (GROUP / 2) + m * STEP);
            ALL(m, some) {
                const int8_t *at = q + m * bytes + (g + 4 * i) * (GROUP / 2);
                const __m512i both = _mm512_xor_si512(_mm512_maskz_loadu_epi8(there, at), eights);
                const __m512i low = _mm512_and_si512(both, lower);
                const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), lower);
                __m512i a[LIMBS];
                ALL(n, LIMBS) {
                    a[n] = n ? _mm512_setzero_si512() : _mm512_load_si512(from->offset[i]);
                    a[n] = _mm512_dpbusd_epi32(a[n], low, _mm512_load_si512(from->x[i][0][n]));
                    a[n] = _mm512_dpbusd_epi32(a[n], high, _mm512_load_si512(from->x[i][1][n]));
                }
                const __m512i upper = _mm512_slli_epi32(
                    _mm512_add_epi32(_mm512_slli_epi32(a[2], 8), a[1]), 8);
                const __m512 all = _mm512_cvtepi32_ps(_mm512_add_epi32(a[0], upper));
                sums[m] = _mm512_fmadd_ps(all, _mm512_permutexvar_ps(which, scale[m]), sums[m]);
            }
        }
    }
    ALL(m, some) *output(p, r, o + m) = total((Vec)(sums[m] + zeros[m])) + bias(p, o + m);
}
#else
enum { SPAN8 = 0 };
typedef Real Span8;
static int spread8(const Real *x, Int k, Span8 *to) { return (void)x, (void)k, (void)to, 0; }
#define int8_whole(p, from, r, o)
#endif

/* With AVX2 alone, 4 bits are multiplied as numbers of 16, by X = 2^12 x1 + x0 of these. A step is two
 * groups, one in each half of a register, whose words hold inputs 2 j, 2 j + 16, 2 j + 1, 2 j + 17. */
#if !(defined(__AVX512VNNI__) && defined(__AVX512BW__)) && defined(__AVX2__) && LANES == 8
enum { LIMB = 12, AHEAD = 4096, PLACES = 4, STEPS = 4, SPAN4 = 2 * STEPS * GROUP, LARGEST = 127 << 16 };

typedef struct {
    int16_t x[STEPS][PLACES][2][16]; /* of each place in a word, x0 and x1 */
    int32_t offset[STEPS][8];
    float unit[2 * STEPS], sum[2 * STEPS]; /* of each group */
} __attribute__((aligned(BYTES))) Span4;

/* The unit of a group; -1 where its numbers are not all finite or too small to divide by. */
INLINE float unit_of(const float *x) {
    Vec most = {}, flaw = {};
    for (int i = 0; i < GROUP; i += LANES) {
        Vec v = load(x + i, LANES);
        flaw += v - v;
        most = larger(most, larger(v, -v));
    }
    SPREAD((&most), larger, 1)
    if (total(flaw) != 0) return -1;
    return most[0] == 0 ? 0 : most[0] < 1e-30f ? -1 : most[0] / LARGEST;
}
/* The words of a group, for each place and limb, to places that lie 16 apart; what a lane of their
 * products with the weights has too much. */
INLINE void cut(const __m256i *whole, int16_t *to, int32_t *offset) {
    int32_t all[2][LANES];
    ALL(half, 2) {
        const __m256i a = _mm256_add_epi32(whole[half], whole[half + 2]);
        _mm256_storeu_si256((__m256i *)all[half], a);
    }
    ALL(lane, 4) {
        const int32_t *four = &all[lane / 2][lane % 2 * 4];
        offset[lane] = -8 * (four[0] + four[1] + four[2] + four[3]);
    }
    ALL(half, 2) { /* inputs 0 .. 15, then 16 .. 31 */
        __m256i limbs[2][2];
        ALL(i, 2) {
            const __m256i v = whole[2 * half + i], round = _mm256_set1_epi32(1 << (LIMB - 1));
            limbs[1][i] = _mm256_srai_epi32(_mm256_add_epi32(v, round), LIMB);
            limbs[0][i] = _mm256_sub_epi32(v, _mm256_slli_epi32(limbs[1][i], LIMB));
        }
        ALL(n, 2) { /* in order, then those at even places before those at odd ones */
            __m256i v = _mm256_permute4x64_epi64(_mm256_packs_epi32(limbs[n][0], limbs[n][1]), 0xd8);
            const __m256i even = _mm256_srai_epi32(_mm256_slli_epi32(v, 16), 16);
            v = _mm256_permute4x64_epi64(_mm256_packs_epi32(even, _mm256_srai_epi32(v, 16)), 0xd8);
            int16_t *at = to + (2 * half + n) * 16;
            _mm_store_si128((__m128i *)at, _mm256_castsi256_si128(v));
            _mm_store_si128((__m128i *)(at + 4 * 16), _mm256_extracti128_si256(v, 1));
        }
    }
}
/* Returns 0 where the numbers do not fit. */
ONCE int spread4(const float *x, Int k, Span4 *to) {
    for (; k > 0; to++) {
        memset(to, 0, sizeof *to);
        for (Int g = 0; g < 2 * STEPS && k > 0; g++, x += GROUP, k -= GROUP) {
            if ((to->unit[g] = unit_of(x)) < 0) return 0;
            const float per = to->unit[g] ? 1 / to->unit[g] : 0;
            __m256i whole[PLACES];
            Vec sum = {};
            ALL(i, PLACES) {
                Vec v = load(x + i * LANES, LANES);
                whole[i] = _mm256_cvtps_epi32((__m256)(v * per));
                sum += v;
            }
            to->sum[g] = total(sum);
            cut(whole, &to->x[g / 2][0][0][g % 2 * 8], to->offset[g / 2] + g % 2 * 4);
        }
    }
    return 1;
}

INLINE __m256i aligned(const void *from) { return _mm256_load_si256(from); }
INLINE void int4_whole(const Product *p, const Span4 *from, Int r, Int o, int some) {
    const Int groups = p->inputs / GROUP, bytes = groups * (GROUP / 2);
    const int8_t *q = p->bits + o * bytes;
    const uint16_t *scales = p->scales + o * groups * 2;
    const __m256i eights = _mm256_set1_epi8((char)0x88), lowest = _mm256_set1_epi16(0x0f);
    Vec sums[TOGETHER] = {}, zeros[TOGETHER] = {};
    for (Int g = 0; g < groups; g += 2 * STEPS, from++) {
        const Int count = min_int(2 * STEPS, groups - g);
        Vec scale[TOGETHER];
        ALL(m, some / 2) __builtin_prefetch(scales + AHEAD / 8 + 2 * some * g + 32 * m);
        ALL(m, some) {
            const uint16_t *at = scales + 2 * (m * groups + g);
            __m256i pairs = _mm256_setzero_si256();
            if (count == 2 * STEPS) pairs = _mm256_loadu_si256((const __m256i *)at);
            else memcpy(&pairs, at, 2 * count * sizeof *at);
            scale[m] = (Vec)_mm256_slli_epi32(pairs, 16) * load(from->unit, LANES);
            zeros[m] += (Vec)_mm256_and_si256(pairs, _mm256_set1_epi32(-0x10000)) * load(from->sum, LANES);
        }
        for (int i = 0; 2 * i < count; i++) {
            const __m256i both = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
            const __m256i which = _mm256_add_epi32(both, _mm256_set1_epi32(2 * i));
            const int8_t *ahead = q + AHEAD + some * (g + 2 * i) * (GROUP / 2);
            if (i % 2 == 0) ALL(m, some) __builtin_prefetch(ahead + m * 64);
            ALL(m, some) {
                const int8_t *at = q + m * bytes + (g + 2 * i) * (GROUP / 2);
                __m256i w, low = aligned(from->offset[i]), high = _mm256_setzero_si256();
                if (count - 2 * i > 1) w = _mm256_loadu_si256((const __m256i *)at);
                else w = _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)at));
                w = _mm256_xor_si256(w, eights);
                ALL(t, PLACES) {
                    __m256i four = t ? _mm256_srli_epi16(w, 4 * t) : w;
                    if (t < PLACES - 1) four = _mm256_and_si256(four, lowest);
                    low = _mm256_add_epi32(low, _mm256_madd_epi16(four, aligned(from->x[i][t][0])));
                    high = _mm256_add_epi32(high, _mm256_madd_epi16(four, aligned(from->x[i][t][1])));
                }
                low = _mm256_add_epi32(low, _mm256_slli_epi32(high, LIMB));
                sums[m] += (Vec)_mm256_cvtepi32_ps(low)
                         * (Vec)_mm256_permutevar8x32_ps((__m256)scale[m], which);
            }
        }
    }
    ALL(m, some) *output(p, r, o + m) = total(sums[m] + zeros[m]) + bias(p, o + m);
}
#elif !(defined(__AVX512VNNI__) && defined(__AVX512BW__) && LANES == 16)
enum { SPAN4 = 0 };
typedef Real Span4;
static int spread4(const Real *x, Int k, Span4 *to) { return (void)x, (void)k, (void)to, 0; }
#define int4_whole(p, from, r, o, some)
#endif

/* Rows r .. r + many of outputs o .. o + some. */
INLINE void int8_tile(const Product *p, Int r, Int o, int many, int some) {
    const Int k = p->inputs;
    const Real *x[TOGETHER];
    const int8_t *q[TOGETHER];
    Vec sums[TOGETHER][TOGETHER] = {};
    ALL(m, many) x[m] = row(p->x, 0, r + m);
    ALL(i, some) q[i] = p->bits + (o + i) * k;
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
        *output(p, r + m, o + i) = sum * from_bfloat16(p->scales[o + i]) + bias(p, o + i);
    }
}

/* A byte holds inputs i and i + GROUP / 2 of its group, in two's complement of 4 bits. */
INLINE void int4_tile(const Product *p, Int r, Int o, int many, int some) {
    const Int groups = p->inputs / GROUP;
    const Real *x[TOGETHER];
    Vec sums[TOGETHER][TOGETHER] = {};
    ALL(m, many) x[m] = row(p->x, 0, r + m);
    const int8_t *q[TOGETHER];
    const uint16_t *scales[TOGETHER];
    ALL(i, some) q[i] = p->bits + (o + i) * groups * (GROUP / 2);
    ALL(i, some) scales[i] = p->scales + (o + i) * groups * 2;
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
    ALL(m, many) ALL(i, some) *output(p, r + m, o + i) = total(sums[m][i]) + bias(p, o + i);
}

/* One row of those that are no four, and outputs o .. end: as integers where it fits. */
ONCE void int8_row(const Product *p, const void *integers, Int r, Int o, Int end) {
    if (integers) for (; o < end; o++) int8_whole(p, integers, r, o);
    else for (; o < end; o++) int8_stream(p, r, o);
}
ONCE void int4_row(const Product *p, const void *integers, Int r, Int o, Int end) {
    for (; integers && o + TOGETHER <= end; o += TOGETHER) int4_whole(p, integers, r, o, TOGETHER);
    if (integers) for (; o < end; o++) int4_whole(p, integers, r, o, 1);
    else for (; o < end; o++) int4_stream(p, r, o);
}

/* `name`_products: products of the same rows with up to MANY matrices; 1 without memory. */
#define BITS(name, Span, spread, span)                                                                 \
    ONCE void name##_four(const Product *p, Int r, Int o) { name##_tile(p, r, o, TOGETHER, TOGETHER); }\
    static void name##_unit(const void *job, Int unit) {                                               \
        Int o, end;                                                                                    \
        const Product *p = product_of(job, unit, &o, &end);                                            \
        const Int fours = p->rows / TOGETHER * TOGETHER, step = fours ? TOGETHER : OUTPUTS;            \
        for (; o < end; o += step) {                                                                   \
            const Int last = min_int(o + step, end);                                                   \
            for (Int r = 0; r < fours; r += TOGETHER)                                                  \
                if (last - o == TOGETHER) name##_four(p, r, o);                                        \
                else for (Int i = r; i < r + TOGETHER; i++) name##_row(p, 0, i, o, last);              \
            for (Int r = fours; r < p->rows; r++) name##_row(p, p->integers[r - fours], r, o, last);   \
        }                                                                                              \
    }                                                                                                  \
    ONCE int name##_products(Product *of, int many, Int threads) {                                     \
        const void *integers[TOGETHER] = {};                                                           \
        const Int rows = of->rows, fours = rows / TOGETHER * TOGETHER;                                 \
        const Int spans = span ? ceil_div(of->inputs, span) : 0;                                       \
        Span *all = 0;                                                                                 \
        if (rows > fours && spans) {                                                                   \
            all = aligned_alloc(BYTES, (rows - fours) * spans * sizeof *all);                          \
            if (!all) return 1;                                                                        \
            for (Int r = fours; r < rows; r++) {                                                       \
                Span *to = all + (r - fours) * spans;                                                  \
                if (spread(row(of->x, 0, r), of->inputs, to)) integers[r - fours] = to;                \
            }                                                                                          \
        }                                                                                              \
        for (int m = 0; m < many; m++) of[m].integers = integers;                                      \
        all_products(of, many, threads, name##_unit);                                                  \
        free(all);                                                                                     \
        return 0;                                                                                      \
    }

BITS(int8, Span8, spread8, SPAN8)
BITS(int4, Span4, spread4, SPAN4)
