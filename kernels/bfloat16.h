/* Numbers in bfloat16, which are the upper halves of those in single precision. */
#pragma once
#include "common.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(1), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef float Floats __attribute__((vector_size(4 * LANES)));

INLINE Vec all_widened(const uint16_t *from) {
#if defined(__AVX512F__) && LANES == 16 /* one instruction, of which GCC makes many */
    Words words = (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__AVX2__) && LANES == 8
    Words words = (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
#else
    Words words = __builtin_convertvector(*(const Halves *)from, Words);
#endif
    return __builtin_convertvector((Floats)(words << 16), Vec);
}
/* LANES of them, or `count` and zeros. */
INLINE Vec widened(const uint16_t *from, Int count) {
    if (__builtin_expect(count >= LANES, 1)) return all_widened(from);
    uint16_t some[LANES] = {};
    if (count > 0) memcpy(some, from, count * sizeof *some);
    return all_widened(some);
}
/* To the nearest, of two as near to the even one; NaN stays one. */
INLINE void store_narrowed(uint16_t *to, const Real *from, Int count) {
    for (Int i = 0; i < count; i++) {
        const float x = from[i];
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        to[i] = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
    }
}
