/* The gated linear recurrence h_t = a_t h_{t-1} + u_t forward and backward; README.md derives it.
 *
 * Time is split into chunks, each walked through by its own threads: what each does to the state it
 * is given, the composition of those, then the outputs from the state before each chunk. The
 * backward is the same recurrence in the other direction. A thread is one channel of one chunk.
 */
#include "../common.cuh"

struct Arguments {
    Int tokens, width, chunks, back; /* back: `compose` goes from the last chunk to the first */
    Rows a, u;
    Element *h, *dh, *da, *du;       /* contiguous */
    float *state, *last;             /* (b, d) twice; state may be null, for zeros */
    float *edges;                    /* (b, chunks, 2, d), or null where there is one chunk */
    float *dlast, *dstate;           /* (b, d) twice; dlast may be null */
};

constexpr int THREADS = 64; /* channels of a block */
constexpr int CHUNK = 64;   /* tokens of a chunk */
constexpr int SEGMENT = 8;  /* tokens loaded at once */
constexpr int MAX_WARPS = 32; /* that share a composition */

/* s -> decay s + end: what tokens in a row do to a state, or to what comes back through them. */
struct Map {
    float decay, end;
    __device__ __forceinline__ float operator()(float s) const { return decay * s + end; }
    /* This after `earlier`. */
    __device__ __forceinline__ Map after(Map earlier) const {
        return {decay * earlier.decay, (*this)(earlier.end)};
    }
};

typedef ChunkPlace<THREADS, CHUNK> Place;
/* The place's channel from token `first` of its chunk on, in a row of its own stride or contiguous. */
struct Column {
    Element *data;
    Int row;
    __device__ __forceinline__ Column(const Rows &from, const Place &p, int first)
        : data(from.at(p.b, p.start + first, p.channel)), row(from.row) {}
    __device__ __forceinline__ Column(Element *from, const Arguments &a, const Place &p, int first)
        : data(from + (p.b * a.tokens + p.start + first) * a.width + p.channel), row(a.width) {}
    __device__ __forceinline__ Element &operator[](int token) const { return data[token * row]; }
};

/* A channel and chunk in the (b, chunks, 2, d) array: first its map, then what reaches it. */
__device__ __forceinline__ float *edge(const Arguments &a, Int b, Int chunk, Int channel) {
    return a.edges + (b * a.chunks + chunk) * 2 * a.width + channel;
}
__device__ __forceinline__ Map get(const Arguments &a, Int b, Int chunk, Int channel) {
    const float *at = edge(a, b, chunk, channel);
    return {at[0], at[a.width]};
}
__device__ __forceinline__ void put(const Arguments &a, const Place &p, Map map) {
    float *at = edge(a, p.b, p.chunk, p.channel);
    at[0] = map.decay, at[a.width] = map.end;
}
/* What a walk begins from: `outer`, (b, d) or null, at the one end of time. */
__device__ __forceinline__ float outermost(const Arguments &a, const float *outer, Int b, Int channel) {
    return outer ? outer[b * a.width + channel] : 0.0f;
}
__device__ __forceinline__ float reaching(const Arguments &a, const Place &p, const float *outer) {
    return a.edges ? *edge(a, p.b, p.chunk, p.channel) : outermost(a, outer, p.b, p.channel);
}

/* SEGMENT tokens, of which `count` are there; the others are `past`. */
struct Tokens {
    float at[SEGMENT];
    __device__ __forceinline__ Tokens(const Column &from, int count, float past) {
#pragma unroll
        for (int m = 0; m < SEGMENT; m++) at[m] = m < count ? widen(from[m]) : past;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 12) chunk_ends(Arguments a) {
    const Place p(a);
    if (!p.here) return;
    Map map = {1.0f, 0.0f};
#pragma unroll 1
    for (int i = 0; i < p.count; i += SEGMENT) {
        const Tokens decay({a.a, p, i}, p.count - i, 1.0f), u({a.u, p, i}, p.count - i, 0.0f);
#pragma unroll
        for (int m = 0; m < SEGMENT; m++) map = Map{decay.at[m], u.at[m]}.after(map);
    }
    put(a, p, map);
}

/* Maps become what reaches each chunk: each warp its stretch of the chunks, then the stretches before
 * it, then chunk by chunk. "Before" is later in time where `back`. */
extern "C" __global__ void __launch_bounds__(MAX_WARPS *WARP) compose(Arguments a) {
    __shared__ Map totals[MAX_WARPS][WARP];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    const Int b = blockIdx.z, channel = (Int)blockIdx.x * WARP + lane;
    const Int each = (a.chunks + warps - 1) / warps;
    const Int begin = smaller(warp * each, a.chunks), end = smaller(begin + each, a.chunks);
    const bool here = channel < a.width;
    Map total = {1.0f, 0.0f};
    if (here)
#pragma unroll 4
        for (Int i = begin; i < end; i++)
            total = get(a, b, a.back ? a.chunks - 1 - i : i, channel).after(total);
    totals[warp][lane] = total;
    __syncthreads();
    if (!here) return;
    float s = outermost(a, a.back ? a.dlast : a.state, b, channel);
    for (int i = 0; i < warp; i++) s = totals[i][lane](s);
#pragma unroll 4
    for (Int i = begin; i < end; i++) {
        const Int chunk = a.back ? a.chunks - 1 - i : i;
        const Map map = get(a, b, chunk, channel);
        *edge(a, b, chunk, channel) = s;
        s = map(s);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 10) outputs(Arguments a) {
    const Place p(a);
    if (!p.here) return;
    float h = reaching(a, p, a.state);
#pragma unroll 1
    for (int i = 0; i < p.count; i += SEGMENT) {
        const Tokens decay({a.a, p, i}, p.count - i, 1.0f), u({a.u, p, i}, p.count - i, 0.0f);
        const Column to(a.h, a, p, i);
#pragma unroll
        for (int m = 0; m < SEGMENT; m++) {
            h = decay.at[m] * h + u.at[m];
            if (m < p.count - i) to[m] = narrow(h);
        }
    }
    if (p.start + p.count == a.tokens) a.last[p.b * a.width + p.channel] = h;
}

/* What reaches a chunk from later tokens, c, passes a token as a (dh + c). */
extern "C" __global__ void __launch_bounds__(THREADS, 12) chunk_beginnings(Arguments a) {
    const Place p(a);
    if (!p.here) return;
    Map map = {1.0f, 0.0f};
#pragma unroll 1
    for (int i = (p.count - 1) / SEGMENT * SEGMENT; i >= 0; i -= SEGMENT) {
        const Tokens decay({a.a, p, i}, p.count - i, 1.0f), dh({a.dh, a, p, i}, p.count - i, 0.0f);
#pragma unroll
        for (int m = SEGMENT - 1; m >= 0; m--)
            map = Map{decay.at[m], decay.at[m] * dh.at[m]}.after(map);
    }
    put(a, p, map);
}

extern "C" __global__ void __launch_bounds__(THREADS, 10) gradients(Arguments a) {
    const Place p(a);
    if (!p.here) return;
    float carried = reaching(a, p, a.dlast);
#pragma unroll 1
    for (int i = (p.count - 1) / SEGMENT * SEGMENT; i >= 0; i -= SEGMENT) {
        const int count = p.count - i;
        const Tokens decay({a.a, p, i}, count, 1.0f), dh({a.dh, a, p, i}, count, 0.0f);
        const Tokens h({a.h, a, p, i}, count - 1, 0.0f); /* the token before's is one earlier */
        const float first = p.start + i ? widen(Column(a.h, a, p, i - 1)[0])
                                        : outermost(a, a.state, p.b, p.channel);
        const Column da(a.da, a, p, i), du(a.du, a, p, i);
#pragma unroll
        for (int m = SEGMENT - 1; m >= 0; m--) {
            const float g = dh.at[m] + carried;
            if (m < count) {
                da[m] = narrow(g * (m ? h.at[m - 1] : first));
                du[m] = narrow(g);
            }
            carried = decay.at[m] * g;
        }
    }
    if (p.chunk == 0) a.dstate[p.b * a.width + p.channel] = carried;
}
