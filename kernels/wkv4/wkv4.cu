/* WKV of RWKV-4 (Peng 2023, section 3.1.2) forward and backward; README.md has the derivation.
 *
 * Time is split into chunks, each walked through by its own threads: the chunks' ends from nothing,
 * the composition of those, then the outputs from the state before each chunk. The backward does
 * the same with what later tokens send back. A thread is one channel of one chunk.
 */
#include "../common.cuh"

struct Arguments {
    Int tokens, width, chunks;
    Rows k, v;
    Element *y, *dy, *dk, *dv;     /* contiguous */
    float *w, *u, *state, *last;   /* (d), (d), (b, 3, d) twice */
    float *edges, *ahead, *top;    /* (b, chunks, 4, d) twice, (b, d); edges may be null */
    float *dw, *du;                /* (b, chunks, d) twice */
    float *dlast, *dstate;         /* (b, 3, d) twice; dlast may be null */
};

constexpr int THREADS = 64;            /* channels of a block */
constexpr int CHUNK = 64;              /* tokens of a chunk */
constexpr int FORWARD = 8, BACKWARD = 4; /* tokens of a segment: what is loaded at once */
constexpr int MAX_WARPS = 32;          /* that share a composition */
constexpr float LOG_ZERO = -1e38f;     /* the maximum over no tokens */
constexpr float NEVER = -3e38f;        /* the key of a token past the end: less than LOG_ZERO */

/* Numerator p e^{o + low} and denominator q e^{o + low}. While no key exceeds o it falls by w again
 * and again, and its rounding would err the same way each time: `low` is what o lost. */
struct State {
    float p, q, o, low;
};

typedef ChunkPlace<THREADS, CHUNK> Place;

/* Four numbers of a channel and chunk in a (b, chunks, 4, d) array. */
__device__ __forceinline__ State get(const float *from, Int b, Int chunk, Int channel,
                                     const Arguments &a) {
    const float *at = from + (b * a.chunks + chunk) * 4 * a.width + channel;
    return {at[0], at[a.width], at[2 * a.width], at[3 * a.width]};
}
__device__ __forceinline__ void put(float *to, State s, Int b, Int chunk, Int channel,
                                    const Arguments &a) {
    float *at = to + (b * a.chunks + chunk) * 4 * a.width + channel;
    at[0] = s.p, at[a.width] = s.q, at[2 * a.width] = s.o, at[3 * a.width] = s.low;
}
/* v e^low = v (1 + low), also where v is infinite. */
__device__ __forceinline__ float lowered(float v, float low) {
    const float product = v + low * v;
    return product == product ? product : v;
}
/* The same of a (b, 3, d) one. */
__device__ __forceinline__ State get_outer(const float *from, Int b, Int channel,
                                           const Arguments &a) {
    const float *at = from + b * 3 * a.width + channel;
    return {at[0], at[a.width], at[2 * a.width], 0.0f};
}
__device__ __forceinline__ void put_outer(float *to, State s, Int b, Int channel,
                                          const Arguments &a) {
    float *at = to + b * 3 * a.width + channel;
    at[0] = lowered(s.p, s.low);
    at[a.width] = lowered(s.q, s.low);
    at[2 * a.width] = s.o;
}
__device__ __forceinline__ State before(const Place &p, const Arguments &a) {
    return a.edges ? get(a.edges, p.b, p.chunk, p.channel, a) : get_outer(a.state, p.b, p.channel, a);
}

__device__ __forceinline__ float power(float exponent) { return exp2f(exponent * LOG2E); }

/* s decays by e^-decay and takes in later.p, later.q at exponent later.o: what multiplies the two. One
 * of a and b is 1. */
struct Joined {
    float a, b;
    bool won; /* the new maximum is the later one's */
};
__device__ __forceinline__ Joined join(State &s, float decay, State later) {
    const float step = decay - s.low, aged = s.o - step;
    const bool won = later.o > aged;
    const float next = won ? later.o : aged, fall = (s.o - next) - step;
    const float e = power(won ? fall - later.low : (later.o - next) - fall + later.low);
    const Joined x = {won ? e : 1.0f, won ? 1.0f : e, won};
    s.p = x.a * s.p + x.b * later.p, s.q = x.a * s.q + x.b * later.q;
    s.o = next, s.low = won ? later.low : fall;
    return x;
}
/* What multiplies past and present where a token is read; one of them is 1. */
struct Read {
    float A, B;
};
__device__ __forceinline__ Read read(const State &s, float k, float u) {
    const float d = ((k + u) - s.o) - s.low, e = power(-fabsf(d));
    return {d < 0 ? 1.0f : e, d < 0 ? e : 1.0f};
}

/* SEGMENT tokens from `first` of the chunk on; those past its end weigh nothing and decay nothing. */
template <int SEGMENT> struct Tokens {
    float k[SEGMENT], v[SEGMENT];
    __device__ __forceinline__ Tokens(const Arguments &a, const Place &p, int first) {
#pragma unroll
        for (int m = 0; m < SEGMENT; m++) {
            const bool there = first + m < p.count;
            const Int t = p.start + first + m;
            k[m] = there ? widen(*a.k.at(p.b, t, p.channel)) : NEVER;
            v[m] = there ? widen(*a.v.at(p.b, t, p.channel)) : 0.0f;
        }
    }
};
template <int SEGMENT>
__device__ __forceinline__ Joined advance(State &s, const Tokens<SEGMENT> &x, int m, float w, bool there) {
    return join(s, there ? w : 0.0f, {x.v[m], 1.0f, x.k[m], 0.0f});
}
__device__ __forceinline__ Int sequence_index(const Arguments &a, const Place &p, int token) {
    return (p.b * a.tokens + p.start + token) * a.width + p.channel;
}

extern "C" __global__ void __launch_bounds__(THREADS, 12) chunk_ends(Arguments a) {
    const Place p(a);
    if (!p.here) return;
    const float w = a.w[p.channel];
    State s = {0.0f, 0.0f, LOG_ZERO, 0.0f};
#pragma unroll 1
    for (int i = 0; i < p.count; i += FORWARD) {
        const Tokens<FORWARD> x(a, p, i);
#pragma unroll
        for (int m = 0; m < FORWARD; m++) advance(s, x, m, w, i + m < p.count);
    }
    put(a.edges, s, p.b, p.chunk, p.channel, a);
}

/* What the warps of a block that composes share: a warp has a stretch of the chunks, a lane a
 * channel. */
struct Stretch {
    Int b, channel, begin, end;
    int warp, lane, warps;
    bool here;
    __device__ __forceinline__ Stretch(const Arguments &a) {
        warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
        const Int each = (a.chunks + warps - 1) / warps;
        b = blockIdx.z, channel = (Int)blockIdx.x * WARP + lane;
        begin = smaller(warp * each, a.chunks), end = smaller(begin + each, a.chunks);
        here = channel < a.width;
    }
};
__device__ __forceinline__ float tokens_faded(Int chunks) { return (float)(chunks * CHUNK); }

/* Ends from nothing become the states before the chunks: each warp's stretch, the stretches before
 * it, and then chunk by chunk. */
extern "C" __global__ void __launch_bounds__(MAX_WARPS *WARP) compose(Arguments a) {
    __shared__ State totals[MAX_WARPS][WARP];
    const Stretch r(a);
    const float w = r.here ? a.w[r.channel] : 0.0f;
    State s = {0.0f, 0.0f, LOG_ZERO, 0.0f};
    if (r.here && r.warp + 1 < r.warps)
#pragma unroll 4
        for (Int i = r.begin; i < smaller(r.end, a.chunks - 1); i++)
            join(s, tokens_faded(1) * w, get(a.edges, r.b, i, r.channel, a));
    totals[r.warp][r.lane] = s;
    __syncthreads();
    if (!r.here) return;
    s = get_outer(a.state, r.b, r.channel, a);
    const Int each = (a.chunks + r.warps - 1) / r.warps;
    if (r.begin < r.end)
        for (int i = 0; i < r.warp; i++)
            join(s, tokens_faded(each) * w, totals[i][r.lane]);
#pragma unroll 4
    for (Int i = r.begin; i < r.end; i++) {
        State end = s;
        if (i + 1 < a.chunks) end = get(a.edges, r.b, i, r.channel, a);
        put(a.edges, s, r.b, i, r.channel, a);
        join(s, tokens_faded(1) * w, end);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 12) outputs(Arguments a) {
    const Place p(a);
    if (!p.here) return;
    const float w = a.w[p.channel], u = a.u[p.channel];
    State s = before(p, a);
#pragma unroll 1
    for (int i = 0; i < p.count; i += FORWARD) {
        const Tokens<FORWARD> x(a, p, i);
#pragma unroll
        for (int m = 0; m < FORWARD; m++) {
            const bool there = i + m < p.count;
            const Read r = read(s, x.k[m], u);
            const float y = __fdividef(r.A * s.p + r.B * x.v[m], r.A * s.q + r.B);
            if (there) a.y[sequence_index(a, p, i + m)] = narrow(y);
            advance(s, x, m, w, there);
        }
    }
    if (p.start + p.count == a.tokens) put_outer(a.last, s, p.b, p.channel, a);
}

/* What reaches a state from later tokens is linear in what reaches that after the chunk: P before is
 * product P after + P from zero, the same of Q, and the maximum's own gradient lives while no key
 * wins. Forwards in time, for the products of a come one by one. */
extern "C" __global__ void __launch_bounds__(THREADS, 12) chunk_futures(Arguments a) {
    const Place p(a);
    if (!p.here) return;
    const float w = a.w[p.channel], u = a.u[p.channel];
    State s = before(p, a);
    float P = 0.0f, Q = 0.0f, product = 1.0f, kept = 1.0f;
#pragma unroll 1
    for (int i = 0; i < p.count; i += BACKWARD) {
        const Tokens<BACKWARD> x(a, p, i);
        float dy[BACKWARD];
#pragma unroll
        for (int m = 0; m < BACKWARD; m++)
            dy[m] = i + m < p.count ? widen(a.dy[sequence_index(a, p, i + m)]) : 0.0f;
#pragma unroll
        for (int m = 0; m < BACKWARD; m++) {
            const bool there = i + m < p.count;
            const Read r = read(s, x.k[m], u);
            const float inverse = __fdividef(1.0f, r.A * s.q + r.B);
            const float y = (r.A * s.p + r.B * x.v[m]) * inverse;
            const float past = there ? product * dy[m] * inverse * r.A : 0.0f;
            P += past, Q -= there ? past * y : 0.0f;
            const Joined j = advance(s, x, m, w, there);
            product *= j.a;
            if (j.won) kept = 0.0f;
        }
    }
    put(a.ahead, {P, Q, product, kept}, p.b, p.chunk, p.channel, a);
    if (p.start + p.count < a.tokens) return;
    const State after = a.dlast ? get_outer(a.dlast, p.b, p.channel, a) : State{};
    a.top[p.b * a.width + p.channel] = after.o - s.p * after.p - s.q * after.q;
}

/* dL/dp, dL/dq, and h, dL/do at constant p e^o and q e^o. */
struct Future {
    float P, Q, h;
    __device__ __forceinline__ void pass(State chunk) {
        P = chunk.o * P + chunk.p, Q = chunk.o * Q + chunk.q, h *= chunk.low;
    }
};
/* Backwards: `ahead` becomes what reaches each chunk's end. */
extern "C" __global__ void __launch_bounds__(MAX_WARPS *WARP) compose_back(Arguments a) {
    __shared__ State totals[MAX_WARPS][WARP];
    const Stretch r(a);
    Future f = {0.0f, 0.0f, 1.0f};
    float product = 1.0f;
    if (r.here && r.warp)
#pragma unroll 4
        for (Int i = r.end - 1; i >= r.begin; i--) {
            const State chunk = get(a.ahead, r.b, i, r.channel, a);
            f.pass(chunk);
            product *= chunk.o;
        }
    totals[r.warp][r.lane] = {f.P, f.Q, product, f.h};
    __syncthreads();
    if (!r.here) return;
    const State after = a.dlast ? get_outer(a.dlast, r.b, r.channel, a) : State{};
    f = {after.p, after.q, a.top[r.b * a.width + r.channel]};
    for (int i = r.warps - 1; i > r.warp; i--) f.pass(totals[i][r.lane]);
#pragma unroll 4
    for (Int i = r.end - 1; i >= r.begin; i--) {
        const State chunk = get(a.ahead, r.b, i, r.channel, a);
        put(a.ahead, {f.P, f.Q, f.h, 0.0f}, r.b, i, r.channel, a);
        f.pass(chunk);
    }
}

/* Through a chunk forwards, leaving the state before each segment; then segment by segment backwards,
 * each walked through again with its weights kept in registers. */
extern "C" __global__ void __launch_bounds__(THREADS, 10) gradients(Arguments a) {
    __shared__ State checkpoints[CHUNK / BACKWARD][THREADS]; /* a thread's own: no barrier */
    const Place p(a);
    if (!p.here) return;
    const float w = a.w[p.channel], u = a.u[p.channel];
    State s = before(p, a);
    int first = 0;
#pragma unroll 1
    for (; first + BACKWARD < p.count; first += BACKWARD) {
        checkpoints[first / BACKWARD][threadIdx.x] = s;
        const Tokens<BACKWARD> x(a, p, first);
#pragma unroll
        for (int m = 0; m < BACKWARD; m++) advance(s, x, m, w, true);
    }
    checkpoints[first / BACKWARD][threadIdx.x] = s;
    const State future = get(a.ahead, p.b, p.chunk, p.channel, a);
    Future f = {future.p, future.q, future.o};
    float sum_w = 0.0f, sum_u = 0.0f;
#pragma unroll 1
    for (; first >= 0; first -= BACKWARD) {
        const Tokens<BACKWARD> x(a, p, first);
        float P[BACKWARD], Q[BACKWARD], y[BACKWARD], past[BACKWARD], here[BACKWARD];
        Joined j[BACKWARD];
        s = checkpoints[first / BACKWARD][threadIdx.x];
#pragma unroll
        for (int m = 0; m < BACKWARD; m++) {
            const bool there = first + m < p.count;
            const float dy = there ? widen(a.dy[sequence_index(a, p, first + m)]) : 0.0f;
            const Read r = read(s, x.k[m], u);
            const float inverse = __fdividef(1.0f, r.A * s.q + r.B), g = dy * inverse;
            P[m] = s.p, Q[m] = s.q;
            y[m] = (r.A * s.p + r.B * x.v[m]) * inverse;
            past[m] = g * r.A, here[m] = g * r.B;
            j[m] = advance(s, x, m, w, there);
        }
#pragma unroll
        for (int m = BACKWARD - 1; m >= 0; m--) {
            if (first + m >= p.count) continue;
            const Int at = sequence_index(a, p, first + m);
            const float mine = here[m] * (x.v[m] - y[m]), to_k = j[m].won ? f.h : 0.0f;
            a.dk[at] = narrow(j[m].b * (f.P * x.v[m] + f.Q) + mine + to_k);
            a.dv[at] = narrow(j[m].b * f.P + here[m]);
            f.h -= to_k;
            sum_u += mine;
            sum_w += j[m].a * (f.P * P[m] + f.Q * Q[m]) + f.h;
            f.P = j[m].a * f.P + past[m];
            f.Q = j[m].a * f.Q - past[m] * y[m];
        }
        s = {P[0], Q[0], 0.0f, 0.0f};
    }
    const Int index = (p.b * a.chunks + p.chunk) * a.width + p.channel;
    a.dw[index] = -sum_w, a.du[index] = sum_u;
    if (p.chunk == 0) put_outer(a.dstate, {f.P, f.Q, f.h + s.p * f.P + s.q * f.Q, 0.0f}, p.b, p.channel, a);
}
