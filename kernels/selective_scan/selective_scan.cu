/* Selective scan (Gu & Dao 2023, algorithm 2) forward and backward; README.md has the derivation.
 *
 * Time is split into chunks, each walked through by its own blocks: their end states from zero, the
 * composition of those, then the outputs. A thread holds some of the n states of one channel; the
 * threads of a channel share its work that does not depend on the state, and what it costs to load.
 *
 * STATES is n rounded up to 4, 8, 16, 32 or 64: states beyond n stay zero.
 */
#include "../common.cuh"

struct Arguments {
    Int tokens, width, states, chunk, chunks; /* chunk: tokens of one, a multiple of TILE */
    Rows x, dt, z, B, C;                      /* z.data may be null; so may D, dt_bias, state */
    Element *y, *dy, *dx, *ddt, *dz;          /* contiguous */
    float *A, *D, *dt_bias, *state;           /* (d, n), (d), (d), (b, d, n) */
    float *last, *saved;                      /* (b, d, n); (b, tiles, n, d): the states before */
    float *edges, *steps;                     /* (b, chunks, n, d), (b, chunks, d) */
    float *dA, *dD, *dbias;                   /* (b, chunks, n, d), (b, chunks, d) twice */
    float *dBC, *dlast, *dstate;              /* (b, groups, t, 2, n), (b, d, n) twice */
};

constexpr int TILE = 32; /* tokens whose B and C lie in shared memory; between saved states */

/* How a block of THREADS works: K states to a thread, S threads to a channel. A segment of SEGMENT
 * tokens is loaded at once; of those a thread does the stateless work for OWN. */
template <int STATES_PER_THREAD, int THREADS_, int SEGMENT_> struct Shape {
    static constexpr int K = STATES_PER_THREAD, S = STATES / K, THREADS = THREADS_;
    static constexpr int SEGMENT = SEGMENT_, OWN = SEGMENT / S ? SEGMENT / S : 1;
    static constexpr int W = WARP / S;         /* channels of a warp: its S digits are the upper */
    static constexpr int CHANNELS = THREADS / S, WARPS = THREADS / WARP;
};
typedef Shape<(STATES < 16 ? STATES : 16), 128, 4> Forward;
typedef Shape<4, (STATES <= 32 ? 256 : 128), 4> Backward;

template <typename X> struct Place {
    Int b, chunk, channel, start, end;
    int c, part, own;     /* among the warp's channels, the channel's threads, the segment's tokens */
    bool here, primary;   /* the channel exists; no other thread owns the same tokens */
    __device__ __forceinline__ Place(const Arguments &a, Int chunk_) {
        int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        b = blockIdx.z, chunk = chunk_;
        c = lane % X::W, part = lane / X::W;
        channel = (Int)blockIdx.x * X::CHANNELS + warp * X::W + c;
        start = chunk * a.chunk, end = smaller(start + a.chunk, a.tokens);
        here = channel < a.width;
        own = first_kept(X::SEGMENT, X::S, part);
        primary = X::S <= X::SEGMENT || part % (X::S / X::SEGMENT) == 0;
    }
    __device__ __forceinline__ int state(int i) const { return part * X::K + i; }
};
/* Of token m of the segment, from the thread that owns it. */
template <typename X>
__device__ __forceinline__ float spread(const float *own, int m, const Place<X> &p) {
    if constexpr (X::S == 1) return own[m];
    else return __shfl_sync(EVERYONE, own[m % X::OWN], p.c + m * X::S / X::SEGMENT * X::W);
}
/* The sum over a channel's threads. */
template <typename X> __device__ __forceinline__ float over_parts(float v) {
#pragma unroll
    for (int bit = X::W; bit < WARP; bit *= 2) v += __shfl_xor_sync(EVERYONE, v, bit);
    return v;
}

__device__ __forceinline__ float element(const Rows &a, Int b, Int t, Int channel, bool there) {
    return there ? widen(*a.at(b, t, channel)) : 0.0f;
}
/* `count` rows of B or C; zero beyond them and beyond n. */
__device__ __forceinline__ void fill(float (*tile)[STATES], const Rows &a, const Arguments &s,
                                     Int start, Int count) {
#pragma unroll 4
    for (int i = threadIdx.x; i < TILE * STATES; i += blockDim.x) {
        int t = i / STATES, k = i % STATES;
        tile[t][k] = element(a, blockIdx.z, start + t, k, t < count && k < s.states);
    }
}
/* Rates A, scaled for exp2; zero where there is no state. */
template <typename X>
__device__ __forceinline__ void load_rates(float *rate, const Arguments &a, const Place<X> &p) {
#pragma unroll
    for (int i = 0; i < X::K; i++) {
        bool there = p.here && p.state(i) < a.states;
        rate[i] = there ? a.A[p.channel * a.states + p.state(i)] * LOG2E : 0.0f;
    }
}
/* States of one channel in a (..., n, d) array. */
template <typename X>
__device__ __forceinline__ void get(float *h, const float *from, Int index, const Arguments &a,
                                    const Place<X> &p) {
#pragma unroll
    for (int i = 0; i < X::K; i++) {
        bool there = p.here && p.state(i) < a.states;
        h[i] = there ? from[(index * a.states + p.state(i)) * a.width + p.channel] : 0.0f;
    }
}
template <typename X>
__device__ __forceinline__ void put(float *to, const float *h, Int index, const Arguments &a,
                                    const Place<X> &p) {
#pragma unroll
    for (int i = 0; i < X::K; i++)
        if (p.here && p.state(i) < a.states)
            to[(index * a.states + p.state(i)) * a.width + p.channel] = h[i];
}
/* The same in a (b, d, n) one, which may be null: then zero. */
template <typename X>
__device__ __forceinline__ void get_outer(float *h, const float *from, const Arguments &a,
                                          const Place<X> &p) {
#pragma unroll
    for (int i = 0; i < X::K; i++) {
        bool there = from && p.here && p.state(i) < a.states;
        h[i] = there ? from[(p.b * a.width + p.channel) * a.states + p.state(i)] : 0.0f;
    }
}
template <typename X>
__device__ __forceinline__ void put_outer(float *to, const float *h, const Arguments &a,
                                          const Place<X> &p) {
#pragma unroll
    for (int i = 0; i < X::K; i++)
        if (p.here && p.state(i) < a.states)
            to[(p.b * a.width + p.channel) * a.states + p.state(i)] = h[i];
}

/* The state when a chunk begins, or dL/dh when it ends: composed, or that of the one chunk. */
template <typename X>
__device__ __forceinline__ void get_edge(float *h, const float *outer, const Arguments &a,
                                         const Place<X> &p) {
    if (a.chunks > 1) get(h, a.edges, p.b * a.chunks + p.chunk, a, p);
    else get_outer(h, outer, a, p);
}

struct Tile {
    float B[TILE][STATES], C[TILE][STATES];
};

/* Through a chunk forwards. OUTPUT: from its start state, for y, the last state and the saved ones;
 * else from zero, for its end state and the sum of its steps. */
template <bool OUTPUT>
__device__ __forceinline__ void walk(const Arguments &a, Tile &tile) {
    typedef Forward X;
    const Place<X> p(a, blockIdx.y);
    float h[X::K], rate[X::K], total = 0.0f;
    const float bias = a.dt_bias && p.here ? a.dt_bias[p.channel] : 0.0f;
    const float D = a.D && p.here ? a.D[p.channel] : 0.0f;
    const Int tiles = (a.tokens + TILE - 1) / TILE;
    load_rates(rate, a, p);
    if constexpr (OUTPUT) get_edge(h, a.state, a, p);
    else
#pragma unroll
        for (int i = 0; i < X::K; i++) h[i] = 0.0f;
#pragma unroll 1
    for (Int t0 = p.start; t0 < p.end; t0 += TILE) {
        const int count = (int)smaller(TILE, p.end - t0);
        __syncthreads();
        fill(tile.B, a.B, a, t0, count);
        if (OUTPUT) fill(tile.C, a.C, a, t0, count);
        __syncthreads();
        if (OUTPUT && a.saved) put(a.saved, h, p.b * tiles + t0 / TILE, a, p);
#pragma unroll 1
        for (int s = 0; s < count; s += X::SEGMENT) {
            float x[X::OWN], z[X::OWN], step[X::OWN], u[X::OWN], y[X::SEGMENT];
#pragma unroll
            for (int m = 0; m < X::OWN; m++) {
                const bool there = p.here && s + p.own + m < count;
                const Int t = t0 + s + p.own + m;
                const float v = element(a.dt, p.b, t, p.channel, there) + bias;
                x[m] = element(a.x, p.b, t, p.channel, there);
                if (OUTPUT) z[m] = element(a.z, p.b, t, p.channel, there && a.z.data);
                step[m] = there ? softplus(v, exp_minus_abs(v)) : 0.0f;
                u[m] = step[m] * x[m];
                total += step[m];
            }
#pragma unroll
            for (int m = 0; m < X::SEGMENT; m++) {
                const float step_m = spread(step, m, p), u_m = spread(u, m, p);
                const float *B = tile.B[s + m] + p.state(0), *C = tile.C[s + m] + p.state(0);
                y[m] = 0.0f;
#pragma unroll
                for (int i = 0; i < X::K; i++) {
                    h[i] = exp2f(step_m * rate[i]) * h[i] + u_m * B[i];
                    if (OUTPUT) y[m] += C[i] * h[i];
                }
            }
            if constexpr (OUTPUT) {
                fold<X::SEGMENT, X::S, X::W>(y, p.part);
#pragma unroll
                for (int m = 0; m < X::OWN; m++) {
                    if (!(p.here && p.primary && s + p.own + m < count)) continue;
                    float o = y[m] + D * x[m];
                    if (a.z.data) o *= z[m] * sigmoid(z[m], exp_minus_abs(z[m]));
                    a.y[(p.b * a.tokens + t0 + s + p.own + m) * a.width + p.channel] = narrow(o);
                }
            }
        }
    }
    if constexpr (OUTPUT) {
        if (p.end == a.tokens) put_outer(a.last, h, a, p);
    } else {
        const Int index = p.b * a.chunks + p.chunk;
        put(a.edges, h, index, a, p);
        total = over_parts<X>(p.primary ? total : 0.0f);
        if (p.here && p.part == 0) a.steps[index * a.width + p.channel] = total;
    }
}
extern "C" __global__ void __launch_bounds__(Forward::THREADS, 3) chunk_ends(Arguments a) {
    __shared__ Tile tile;
    walk<false>(a, tile);
}
extern "C" __global__ void __launch_bounds__(Forward::THREADS, 3) outputs(Arguments a) {
    __shared__ Tile tile;
    walk<true>(a, tile);
}

/* Ends from zero become starts: edge_{c+1} = exp(A sum of c's steps) edge_c + end_c. */
extern "C" __global__ void compose(Arguments a) {
    const Int e = (Int)blockIdx.x * blockDim.x + threadIdx.x, size = a.states * a.width;
    if (e >= size) return;
    const Int b = blockIdx.z, channel = e % a.width, outer = channel * a.states + e / a.width;
    const float rate = a.A[outer] * LOG2E;
    float h = a.state ? a.state[b * size + outer] : 0.0f;
#pragma unroll 4
    for (Int i = b * a.chunks; i < (b + 1) * a.chunks - 1; i++) {
        const float end = a.edges[i * size + e];
        a.edges[i * size + e] = h;
        h = exp2f(rate * a.steps[i * a.width + channel]) * h + end;
    }
    a.edges[((b + 1) * a.chunks - 1) * size + e] = h;
}
/* The same backwards in time for q, dL/dh from the future: edge_c is that at the end of chunk c. */
extern "C" __global__ void compose_back(Arguments a) {
    const Int e = (Int)blockIdx.x * blockDim.x + threadIdx.x, size = a.states * a.width;
    if (e >= size) return;
    const Int b = blockIdx.z, channel = e % a.width, outer = channel * a.states + e / a.width;
    const float rate = a.A[outer] * LOG2E;
    float q = a.dlast ? a.dlast[b * size + outer] : 0.0f;
#pragma unroll 4
    for (Int i = (b + 1) * a.chunks - 1; i > b * a.chunks; i--) {
        const float start = a.edges[i * size + e];
        a.edges[i * size + e] = q;
        q = exp2f(rate * a.steps[i * a.width + channel]) * q + start;
    }
    a.edges[b * a.chunks * size + e] = q;
}

/* What a chunk adds to q at its start, from zero at its end, and the sum of its steps. */
extern "C" __global__ void __launch_bounds__(Forward::THREADS, 3) chunk_starts(Arguments a) {
    typedef Forward X;
    __shared__ float C_tile[TILE][STATES];
    const Place<X> p(a, blockIdx.y + 1); /* the start of the first is not needed */
    float q[X::K], rate[X::K], total = 0.0f;
    const float bias = a.dt_bias && p.here ? a.dt_bias[p.channel] : 0.0f;
    load_rates(rate, a, p);
#pragma unroll
    for (int i = 0; i < X::K; i++) q[i] = 0.0f;
#pragma unroll 1
    for (Int t0 = p.start + (p.end - 1 - p.start) / TILE * TILE; t0 >= p.start; t0 -= TILE) {
        const int count = (int)smaller(TILE, p.end - t0);
        __syncthreads();
        fill(C_tile, a.C, a, t0, count);
        __syncthreads();
#pragma unroll 1
        for (int s = (count - 1) / X::SEGMENT * X::SEGMENT; s >= 0; s -= X::SEGMENT) {
            float step[X::OWN], dout[X::OWN];
#pragma unroll
            for (int m = 0; m < X::OWN; m++) {
                const bool there = p.here && s + p.own + m < count;
                const Int t = t0 + s + p.own + m;
                const float v = element(a.dt, p.b, t, p.channel, there) + bias;
                const float z = element(a.z, p.b, t, p.channel, there && a.z.data);
                dout[m] = there ? widen(a.dy[(p.b * a.tokens + t) * a.width + p.channel]) : 0.0f;
                if (a.z.data) dout[m] *= z * sigmoid(z, exp_minus_abs(z));
                step[m] = there ? softplus(v, exp_minus_abs(v)) : 0.0f;
                total += step[m];
            }
#pragma unroll
            for (int m = X::SEGMENT - 1; m >= 0; m--) {
                const float step_m = spread(step, m, p), dout_m = spread(dout, m, p);
                const float *C = C_tile[s + m] + p.state(0);
#pragma unroll
                for (int i = 0; i < X::K; i++)
                    q[i] = (q[i] + dout_m * C[i]) * exp2f(step_m * rate[i]);
            }
        }
    }
    const Int index = p.b * a.chunks + p.chunk;
    put(a.edges, q, index, a, p);
    total = over_parts<X>(p.primary ? total : 0.0f);
    if (p.here && p.part == 0) a.steps[index * a.width + p.channel] = total;
}

/* Through a chunk backwards, tile by tile. A tile is first walked through forwards from its saved
 * state, which leaves a checkpoint before every segment; then each segment again, its states and
 * decays kept in registers, and back. */
extern "C" __global__ void __launch_bounds__(Backward::THREADS, STATES <= 32 ? 2 : 4)
gradients(Arguments a) {
    typedef Backward X;
    constexpr int K = X::K, SEGMENT = X::SEGMENT, OWN = X::OWN;
    constexpr int SUMS = 2 * K / X::W ? 2 * K / X::W : 1; /* of dB and dC, left to a thread */
    __shared__ Tile tile;
    __shared__ float checkpoints[TILE / SEGMENT - 1][K][X::THREADS];
    __shared__ float sums[X::WARPS][SEGMENT][2 * STATES];
    const Place<X> p(a, blockIdx.y);
    const int thread = threadIdx.x, warp = thread / WARP;
    const Int groups = (a.width + X::CHANNELS - 1) / X::CHANNELS;
    const Int tiles = (a.tokens + TILE - 1) / TILE;
    const float bias = a.dt_bias && p.here ? a.dt_bias[p.channel] : 0.0f;
    const float D = a.D && p.here ? a.D[p.channel] : 0.0f;
    float q[K], rate[K], dA[K], dD = 0.0f, dbias = 0.0f;
    load_rates(rate, a, p);
    get_edge(q, a.dlast, a, p);
#pragma unroll
    for (int i = 0; i < K; i++) dA[i] = 0.0f;

#pragma unroll 1
    for (Int t0 = p.start + (p.end - 1 - p.start) / TILE * TILE; t0 >= p.start; t0 -= TILE) {
        const int count = (int)smaller(TILE, p.end - t0);
        fill(tile.B, a.B, a, t0, count); /* nobody has read it since the last segment's barrier */
        fill(tile.C, a.C, a, t0, count);
        __syncthreads();
        const int final = (count - 1) / SEGMENT * SEGMENT;
        float h[K];
        get(h, a.saved, p.b * tiles + t0 / TILE, a, p);
#pragma unroll 1
        for (int s = 0; s < final; s += SEGMENT) {
            float step[OWN], u[OWN];
#pragma unroll
            for (int m = 0; m < OWN; m++) {
                const Int t = t0 + s + p.own + m;
                const float v = element(a.dt, p.b, t, p.channel, p.here) + bias;
                step[m] = softplus(v, exp_minus_abs(v));
                u[m] = step[m] * element(a.x, p.b, t, p.channel, p.here);
            }
#pragma unroll
            for (int m = 0; m < SEGMENT; m++) {
                const float step_m = spread(step, m, p), u_m = spread(u, m, p);
                const float *B = tile.B[s + m] + p.state(0);
#pragma unroll
                for (int i = 0; i < K; i++) h[i] = exp2f(step_m * rate[i]) * h[i] + u_m * B[i];
            }
#pragma unroll
            for (int i = 0; i < K; i++) checkpoints[s / SEGMENT][i][thread] = h[i];
        }
#pragma unroll 1
        for (int s = final; s >= 0; s -= SEGMENT) {
            float x[OWN], step[OWN], u[OWN], slope[OWN], dout[OWN], dgate[OWN];
            float before[SEGMENT][K], decay[SEGMENT][K], o[SEGMENT];
            const Int first = (p.b * a.tokens + t0 + s + p.own) * a.width + p.channel;
            if (s != final) { /* else h is there already */
                if (s == 0) get(h, a.saved, p.b * tiles + t0 / TILE, a, p);
                else
#pragma unroll
                    for (int i = 0; i < K; i++) h[i] = checkpoints[s / SEGMENT - 1][i][thread];
            }
#pragma unroll
            for (int m = 0; m < OWN; m++) {
                const bool there = p.here && s + p.own + m < count;
                const Int t = t0 + s + p.own + m;
                const float v = element(a.dt, p.b, t, p.channel, there) + bias;
                const float z = element(a.z, p.b, t, p.channel, there && a.z.data);
                const float dy = there ? widen(a.dy[first + m * a.width]) : 0.0f;
                const float e = exp_minus_abs(v), gate = sigmoid(z, exp_minus_abs(z));
                x[m] = element(a.x, p.b, t, p.channel, there);
                step[m] = there ? softplus(v, e) : 0.0f;
                slope[m] = sigmoid(v, e);
                u[m] = step[m] * x[m];
                dout[m] = a.z.data ? dy * z * gate : dy;
                dgate[m] = dy * gate * (1.0f + z * (1.0f - gate));
            }
#pragma unroll
            for (int m = 0; m < SEGMENT; m++) {
                const float step_m = spread(step, m, p), u_m = spread(u, m, p);
                const float *B = tile.B[s + m] + p.state(0), *C = tile.C[s + m] + p.state(0);
                o[m] = 0.0f;
#pragma unroll
                for (int i = 0; i < K; i++) {
                    before[m][i] = h[i];
                    decay[m][i] = exp2f(step_m * rate[i]);
                    h[i] = decay[m][i] * h[i] + u_m * B[i];
                    o[m] += C[i] * h[i];
                }
            }
            if (a.z.data) {
                fold<SEGMENT, X::S, X::W>(o, p.part);
#pragma unroll
                for (int m = 0; m < OWN; m++)
                    if (p.here && p.primary && s + p.own + m < count)
                        a.dz[first + m * a.width] = narrow(dgate[m] * (o[m] + D * x[m]));
            }
            float du[SEGMENT], dstep[SEGMENT];
#pragma unroll
            for (int m = SEGMENT - 1; m >= 0; m--) {
                const float step_m = spread(step, m, p), u_m = spread(u, m, p);
                const float dout_m = spread(dout, m, p);
                const float *B = tile.B[s + m] + p.state(0), *C = tile.C[s + m] + p.state(0);
                float both[2 * K]; /* dB, dC */
                du[m] = dstep[m] = 0.0f;
#pragma unroll
                for (int i = 0; i < K; i++) {
                    q[i] += dout_m * C[i]; /* dL/dh */
                    both[i] = q[i] * u_m;
                    both[K + i] = dout_m * h[i];
                    du[m] += q[i] * B[i];
                    q[i] *= decay[m][i];
                    h[i] = before[m][i];
                    const float w = q[i] * h[i];
                    dA[i] += w * step_m;
                    dstep[m] += w * rate[i];
                }
                fold<2 * K, X::W, 1>(both, p.c);
                if (X::W <= 2 * K || p.c % (X::W / (2 * K) ? X::W / (2 * K) : 1) == 0)
#pragma unroll
                    for (int i = 0; i < SUMS; i++) {
                        const int f = first_kept(2 * K, X::W, p.c) + i;
                        sums[warp][m][f / K * STATES + p.state(f % K)] = both[i];
                    }
            }
            fold<SEGMENT, X::S, X::W>(du, p.part);
            fold<SEGMENT, X::S, X::W>(dstep, p.part);
#pragma unroll
            for (int m = 0; m < OWN; m++) {
                if (!(p.here && p.primary && s + p.own + m < count)) continue;
                const float ddt = (LN2 * dstep[m] + du[m] * x[m]) * slope[m];
                a.dx[first + m * a.width] = narrow(du[m] * step[m] + dout[m] * D);
                a.ddt[first + m * a.width] = narrow(ddt);
                dD += dout[m] * x[m];
                dbias += ddt;
            }
            __syncthreads();
#pragma unroll 1
            for (int i = thread; i < SEGMENT * 2 * STATES; i += X::THREADS) {
                const int m = i / (2 * STATES), f = i % (2 * STATES), k = f % STATES;
                if (s + m >= count || k >= a.states) continue;
                float sum = 0.0f;
#pragma unroll
                for (int w = 0; w < X::WARPS; w++) sum += sums[w][m][f];
                const Int row = ((p.b * groups + blockIdx.x) * a.tokens + t0 + s + m) * 2;
                a.dBC[(row + f / STATES) * a.states + k] = sum;
            }
            __syncthreads();
        }
    }
    const Int index = p.b * a.chunks + p.chunk;
    put(a.dA, dA, index, a, p);
    dD = over_parts<X>(dD), dbias = over_parts<X>(dbias);
    if (p.here && p.part == 0) {
        a.dD[index * a.width + p.channel] = dD;
        a.dbias[index * a.width + p.channel] = dbias;
    }
    if (p.chunk == 0) put_outer(a.dstate, q, a, p);
}
