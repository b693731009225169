/* What every CUDA kernel needs: the type of the sequences, exp and its relatives, places, warps.
 *
 * Header-free: NVRTC compiles it on machines that have no CUDA toolkit. All arithmetic is float32.
 * DTYPE is that of the sequences: 0 float, 1 bfloat16, 2 half. Sizes and offsets are 64 bits wide.
 */
#pragma once

typedef long long Int;

#ifndef EMULATOR
__device__ __forceinline__ float half_to_float(unsigned short a) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(a));
    return f;
}
__device__ __forceinline__ unsigned short float_to_half(float a) {
    unsigned short h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(a));
    return h;
}
#endif

#if DTYPE == 0
typedef float Element;
__device__ __forceinline__ float widen(Element a) { return a; }
__device__ __forceinline__ Element narrow(float a) { return a; }
#elif DTYPE == 1
typedef unsigned short Element;
__device__ __forceinline__ float widen(Element a) { return __int_as_float(a << 16); }
__device__ __forceinline__ Element narrow(float a) { /* to nearest, ties to even */
    unsigned bits = (unsigned)__float_as_int(a);
    if (a != a) return 0x7fff;
    return (Element)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#else
typedef unsigned short Element;
__device__ __forceinline__ float widen(Element a) { return half_to_float(a); }
__device__ __forceinline__ Element narrow(float a) { return float_to_half(a); }
#endif

/* A (b, t, width) array whose last dimension is dense; strides count elements. */
struct Rows {
    Element *data;
    Int batch, row;
    __device__ __forceinline__ Element *at(Int b, Int t, Int channel) const {
        return data + b * batch + t * row + channel;
    }
};

__device__ __forceinline__ Int smaller(Int a, Int b) { return a < b ? a : b; }

/* What a thread works at: a channel of batch row b in one of the chunks of SIZE tokens. Chunks lie
 * along the grid's first side, the only one of more than 65535 blocks. */
template <int THREADS, int SIZE> struct ChunkPlace {
    Int b, chunk, channel, start, end;
    int count; /* tokens of the chunk */
    bool here; /* the channel exists */
    template <typename Arguments> __device__ __forceinline__ ChunkPlace(const Arguments &a) {
        const Int groups = (a.width + THREADS - 1) / THREADS;
        b = blockIdx.z, chunk = blockIdx.x / groups;
        channel = blockIdx.x % groups * THREADS + threadIdx.x;
        start = chunk * SIZE, count = (int)smaller(SIZE, a.tokens - start), end = start + count;
        here = channel < a.width;
    }
};

constexpr float LOG2E = 1.44269504088896340736f, LN2 = 0.69314718055994530942f;

/* e = exp(-|v|) in (0, 1]: what softplus and sigmoid of v share without overflow. */
__device__ __forceinline__ float exp_minus_abs(float v) { return exp2f(-fabsf(v) * LOG2E); }

__device__ __forceinline__ float sigmoid(float v, float e) {
    return __fdividef(v < 0 ? e : 1.0f, 1.0f + e);
}
/* softplus(v) = max(v, 0) + log(1 + e), with log(1 + e) = e (1 + e P(e)) and P fitted on [0, 1]:
 * accurate relative to itself, for small steps are small e. */
__device__ __forceinline__ float softplus(float v, float e) {
    float p = 5.364760756e-3f;
    p = p * e - 3.006575629e-2f;
    p = p * e + 7.920461893e-2f;
    p = p * e - 1.375380903e-1f;
    p = p * e + 1.915365607e-1f;
    p = p * e - 2.485716492e-1f;
    p = p * e + 3.332132399e-1f;
    p = p * e - 4.999964833e-1f;
    return (p * e + 1.0f) * e + fmaxf(v, 0.0f);
}

constexpr unsigned EVERYONE = 0xffffffffu;
constexpr int WARP = 32;

/* v[0..V) summed over the W lanes that differ in the bits stride, 2 stride ... of their index, and
 * scattered among them: the lane whose digit in those bits is `digit` keeps, as v[0], v[1] ..., the
 * sums from first_kept(V, W, digit) on, V / W of them, or one that it shares with its neighbours.
 * Half of the values go to each half of the lanes: a shuffle and an addition per sum and step. */
__device__ __forceinline__ constexpr int first_kept(int V, int W, int digit) { return digit * V / W; }

template <int V, int W, int STRIDE>
__device__ __forceinline__ void fold(float *v, int digit) {
    if constexpr (W > 1 && V > 1) {
        const bool upper = digit & W / 2;
#pragma unroll
        for (int i = 0; i < V / 2; i++) {
            float mine = upper ? v[i + V / 2] : v[i], theirs = upper ? v[i] : v[i + V / 2];
            v[i] = mine + __shfl_xor_sync(EVERYONE, theirs, W / 2 * STRIDE);
        }
        fold<V / 2, W / 2, STRIDE>(v, digit);
    } else if constexpr (W > 1) {
        v[0] += __shfl_xor_sync(EVERYONE, v[0], W / 2 * STRIDE);
        fold<1, W / 2, STRIDE>(v, digit);
    }
}
