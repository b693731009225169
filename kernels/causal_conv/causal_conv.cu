/* Depthwise causal convolution with bias and silu, forward and backward; README.md derives it.
 *
 * A thread walks one channel through SEGMENT tokens, the last WINDOW inputs in registers.
 */
#include "../common.cuh"

struct Arguments {
    Int tokens, width, segments, silu;
    Rows x, state;                /* (b, t, d); (b, WINDOW - 1, d): the inputs before the first */
    Element *y, *last, *dy, *dx, *dstate;
    float *weight, *bias;         /* (d, WINDOW), the last column weighs the present; (d) or null */
    float *dweight, *dbias;       /* (b, segments, WINDOW, d), (b, segments, d) */
};

constexpr int SEGMENT = 64, THREADS = 128;

typedef ChunkPlace<THREADS, SEGMENT> Place;
/* Token t of the state followed by the sequence; zero beyond its end. */
__device__ __forceinline__ float input(const Arguments &a, const Place &p, Int t) {
    if (t >= a.tokens) return 0.0f;
    return widen(t < 0 ? *a.state.at(p.b, t + WINDOW - 1, p.channel) : *a.x.at(p.b, t, p.channel));
}
__device__ __forceinline__ void push(float *ring, float value) {
#pragma unroll
    for (int k = 0; k < WINDOW - 1; k++) ring[k] = ring[k + 1];
    ring[WINDOW - 1] = value;
}

extern "C" __global__ void __launch_bounds__(THREADS) forward(Arguments a) {
    const Place p(a);
    if (!p.here) return;
    float weight[WINDOW], x[WINDOW];
    const float bias = a.bias ? a.bias[p.channel] : 0.0f;
#pragma unroll
    for (int k = 0; k < WINDOW; k++) {
        weight[k] = a.weight[p.channel * WINDOW + k];
        x[k] = k ? input(a, p, p.start - WINDOW + k) : 0.0f;
    }
#pragma unroll 8
    for (Int t = p.start; t < p.end; t++) {
        push(x, input(a, p, t));
        float sum = bias;
#pragma unroll
        for (int k = 0; k < WINDOW; k++) sum += weight[k] * x[k];
        if (a.silu) sum *= sigmoid(sum, exp_minus_abs(sum));
        a.y[(p.b * a.tokens + t) * a.width + p.channel] = narrow(sum);
    }
    if (p.end == a.tokens)
        for (int k = 0; k < WINDOW - 1; k++)
            a.last[(p.b * (WINDOW - 1) + k) * a.width + p.channel] =
                narrow(input(a, p, a.tokens - WINDOW + 1 + k));
}

/* dx_s = sum_i weight_{WINDOW - 1 - i} dsum_{s + i}: finished WINDOW - 1 tokens later, so the dsum
 * after the segment are computed here again. */
extern "C" __global__ void __launch_bounds__(THREADS) backward(Arguments a) {
    const Place p(a);
    if (!p.here) return;
    float weight[WINDOW], x[WINDOW], dsum[WINDOW], dweight[WINDOW], dbias = 0.0f;
    const float bias = a.bias ? a.bias[p.channel] : 0.0f;
#pragma unroll
    for (int k = 0; k < WINDOW; k++) {
        weight[k] = a.weight[p.channel * WINDOW + k];
        x[k] = k ? input(a, p, p.start - WINDOW + k) : 0.0f;
        dsum[k] = dweight[k] = 0.0f;
    }
#pragma unroll 4
    for (Int t = p.start; t < p.end + WINDOW - 1; t++) {
        float d = t < a.tokens ? widen(a.dy[(p.b * a.tokens + t) * a.width + p.channel]) : 0.0f;
        float sum = bias, dx = 0.0f;
        push(x, input(a, p, t));
#pragma unroll
        for (int k = 0; k < WINDOW; k++) sum += weight[k] * x[k];
        if (a.silu) {
            const float s = sigmoid(sum, exp_minus_abs(sum));
            d *= s * (1.0f + sum * (1.0f - s));
        }
        push(dsum, d);
        if (t < p.end) {
            dbias += d;
#pragma unroll
            for (int k = 0; k < WINDOW; k++) dweight[k] += d * x[k];
        }
#pragma unroll
        for (int k = 0; k < WINDOW; k++) dx += weight[k] * dsum[WINDOW - 1 - k];
        const Int done = t - (WINDOW - 1);
        if (done >= p.start) a.dx[(p.b * a.tokens + done) * a.width + p.channel] = narrow(dx);
        else if (p.start == 0)
            a.dstate[(p.b * (WINDOW - 1) + t) * a.width + p.channel] = narrow(dx);
    }
    const Int at = p.b * a.segments + p.chunk;
    a.dbias[at * a.width + p.channel] = dbias;
#pragma unroll
    for (int k = 0; k < WINDOW; k++)
        a.dweight[(at * WINDOW + k) * a.width + p.channel] = dweight[k];
}
