/* The average of AFT-conv (Zhai 2021, section 3.2) forward and backward; README.md derives it.
 *
 * Tokens come in tiles, those before the first query too. A thread is one channel of some tiles; a
 * tile of queries meets a tile of keys as a product of 8 by 8 weights, its own as a triangle.
 *
 * TILES: how many tiles before its own a query sees token by token, 0 to 16. The tokens in them
 * that are beyond the window have the weight of the older ones, whose sum they are kept out of.
 */
#include "../common.cuh"

struct Arguments {
    Int batch, tokens, before, width, window; /* tokens: keys, the first `before` no queries */
    Int chunks, run; /* chunks of keys; of queries, as many as one thread walks through */
    Rows k, v;
    Element *y, *dy, *dk, *dv;    /* contiguous: (b, queries, d) twice, (b, tokens, d) twice */
    float *m, *state, *last;      /* (ROWS, d), (b, 3, d) twice */
    float *edges, *read, *ahead;  /* (b, chunks + 1, 3, d), may be null; (b, queries, 2, d); (b, chunks, 2, d) */
    float *dm, *dlast, *dstate;   /* (b, walks, ROWS, d), (b, 3, d) twice; dlast may be null */
};

constexpr int TILE = 8;                      /* tokens whose keys are taken at once */
constexpr int TILES_PER_CHUNK = 8;           /* tiles of a chunk */
constexpr int NEAR = TILES * TILE;           /* tokens before a tile that its queries see */
constexpr int ROWS = NEAR + 2;               /* of the weights: distances 0 to NEAR, and beyond */
constexpr int THREADS = TILES <= 4 ? 64 : 32; /* channels of a block: for 48 KB of shared memory */
constexpr int SLOTS = TILES ? TILES : 1;
constexpr int MAX_WARPS = 32;                /* that share a composition */
constexpr float LOG_ZERO = -1e38f;           /* the maximum over no tokens */
constexpr float NEVER = -3e38f;              /* the key of no token: less than LOG_ZERO */

__device__ __forceinline__ float power(float exponent) { return exp2f(exponent * LOG2E); }
__device__ __forceinline__ Int queries_of(const Arguments &a) { return a.tokens - a.before; }
/* Tiles that hold queries; the tile of the first query is number 0. */
__device__ __forceinline__ Int tiles_of(const Arguments &a) { return (queries_of(a) + TILE - 1) / TILE; }
__device__ __forceinline__ Int walks_of(const Arguments &a) {
    return (tiles_of(a) + TILES_PER_CHUNK * a.run - 1) / (TILES_PER_CHUNK * a.run);
}

/* Numerator p e^o and denominator q e^o of some tokens, o their largest key. */
struct State {
    float p, q, o;
};
__device__ __forceinline__ State join(State s, State later) {
    const bool won = later.o > s.o;
    const float e = power(-fabsf(later.o - s.o)), a = won ? e : 1.0f, b = won ? 1.0f : e;
    return {a * s.p + b * later.p, a * s.q + b * later.q, won ? later.o : s.o};
}

/* A block's batch row, and its part of the channels and of `count` parts of time. */
struct Place {
    Int b, part, channel;
    bool here; /* the channel exists */
    __device__ __forceinline__ Place(const Arguments &a, Int count) {
        const Int groups = (a.width + THREADS - 1) / THREADS, index = blockIdx.x / groups;
        b = index / count, part = index % count;
        channel = blockIdx.x % groups * THREADS + threadIdx.x;
        here = channel < a.width;
    }
};

/* Three numbers of a channel in a (..., 3, d) array. */
__device__ __forceinline__ State get(const float *from, Int index, Int channel, const Arguments &a) {
    const float *at = from + index * 3 * a.width + channel;
    return {at[0], at[a.width], at[2 * a.width]};
}
__device__ __forceinline__ void put(float *to, State s, Int index, Int channel, const Arguments &a) {
    float *at = to + index * 3 * a.width + channel;
    at[0] = s.p, at[a.width] = s.q, at[2 * a.width] = s.o;
}
/* The state before a chunk of keys: of all tokens before its tiles. */
__device__ __forceinline__ State before(Int b, Int chunk, Int channel, const Arguments &a) {
    if (!a.edges) return get(a.state, b, channel, a);
    return get(a.edges, b * (a.chunks + 1) + chunk, channel, a);
}
/* A chunk of keys lies NEAR tokens before that of queries with its number: this is its first tile. */
__device__ __forceinline__ Int first_tile(Int chunk) { return chunk * TILES_PER_CHUNK - TILES; }

/* The keys and values of a tile. */
struct Tokens {
    float k[TILE], v[TILE];
    __device__ __forceinline__ Tokens(const Arguments &a, const Place &p, Int tile) {
        const Int first = a.before + tile * TILE;
#pragma unroll
        for (int i = 0; i < TILE; i++) {
            const Int t = first + i;
            const bool there = 0 <= t && t < a.tokens;
            k[i] = there ? widen(*a.k.at(p.b, t, p.channel)) : NEVER;
            v[i] = there ? widen(*a.v.at(p.b, t, p.channel)) : 0.0f;
        }
    }
    __device__ __forceinline__ float top(float c) const {
#pragma unroll
        for (int i = 0; i < TILE; i++) c = fmaxf(c, k[i]);
        return c;
    }
};

/* Pairs of numbers for every token of the last tiles, a thread's own: no barrier. Those of a tile
 * are over e^top, or over e^-top. */
struct Ring {
    float first[SLOTS * TILE][THREADS], second[SLOTS * TILE][THREADS];
};
/* Where the tile is that lies r tiles before, or after, the one whose turn it is to be replaced. */
__device__ __forceinline__ int slot_at(int oldest, int r) {
    const int slot = oldest + TILES - r;
    return slot >= TILES ? slot - TILES : slot;
}
__device__ __forceinline__ int next_slot(int slot) { return slot + 1 >= TILES ? 0 : slot + 1; }
__device__ __forceinline__ void fetch(float *f, float *g, const Ring &ring, int slot, float scale) {
#pragma unroll
    for (int i = 0; i < TILE; i++) {
        f[i] = ring.first[slot * TILE + i][threadIdx.x] * scale;
        g[i] = ring.second[slot * TILE + i][threadIdx.x] * scale;
    }
}
__device__ __forceinline__ void keep(Ring &ring, int slot, const float *f, const float *g) {
#pragma unroll
    for (int i = 0; i < TILE; i++) {
        ring.first[slot * TILE + i][threadIdx.x] = f[i];
        ring.second[slot * TILE + i][threadIdx.x] = g[i];
    }
}

/* Weights of the distances 8 r - 7 to 8 r + 7, r growing by one. */
struct Weights {
    float w[2 * TILE - 1];
    __device__ __forceinline__ Weights(const Arguments &a, const Place &p) {
#pragma unroll
        for (int i = 1; i < TILE; i++) w[TILE - 1 + i] = weight(a, p, i);
    }
    __device__ __forceinline__ static float weight(const Arguments &a, const Place &p, int distance) {
        return a.m[(Int)(distance > NEAR ? NEAR + 1 : distance) * a.width + p.channel];
    }
    __device__ __forceinline__ void shift(const Arguments &a, const Place &p, int r) {
#pragma unroll
        for (int i = 0; i < TILE - 1; i++) w[i] = w[TILE + i];
#pragma unroll
        for (int i = 0; i < TILE; i++) w[TILE - 1 + i] = weight(a, p, r * TILE + i);
    }
    /* Of the distances 0 to 7. */
    __device__ __forceinline__ static void nearest(float *w, const Arguments &a, const Place &p) {
#pragma unroll
        for (int i = 0; i < TILE; i++) w[i] = weight(a, p, i);
    }
    /* Of a token `apart` nearer to the present than r tiles. */
    __device__ __forceinline__ float operator[](int apart) const { return w[TILE - 1 + apart]; }
};

/* e^{k - c} of a token and what c's rise to k scales the tokens before it by; one of them is 1. */
struct Entry {
    float own, fall;
    bool won; /* the new maximum */
    __device__ __forceinline__ Entry(float k, float &c) {
        won = k > c;
        const float e = power(-fabsf(k - c));
        own = won ? 1.0f : e, fall = won ? e : 1.0f;
        c = won ? k : c;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS) chunk_sums(Arguments a) {
    const Place p(a, a.chunks - 1); /* the end of the last is not needed */
    if (!p.here) return;
    State s = {0.0f, 0.0f, LOG_ZERO};
#pragma unroll 1
    for (int i = 0; i < TILES_PER_CHUNK; i++) {
        const Tokens x(a, p, first_tile(p.part) + i);
        const float c = x.top(s.o), aged = power(s.o - c);
        s = {s.p * aged, s.q * aged, c};
#pragma unroll
        for (int m = 0; m < TILE; m++) {
            const float e = power(x.k[m] - c);
            s.p += e * x.v[m], s.q += e;
        }
    }
    put(a.edges, s, p.b * (a.chunks + 1) + p.part, p.channel, a);
}

/* What the warps of a block that composes share: a warp has a stretch of the chunks, a lane a
 * channel. */
struct Stretch {
    Int b, channel, begin, end;
    int warp, lane, warps;
    bool here;
    __device__ __forceinline__ Stretch(const Arguments &a) {
        const Int groups = (a.width + WARP - 1) / WARP;
        warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
        const Int each = (a.chunks + warps - 1) / warps;
        b = blockIdx.x / groups, channel = blockIdx.x % groups * WARP + lane;
        begin = smaller(warp * each, a.chunks), end = smaller(begin + each, a.chunks);
        here = channel < a.width;
    }
};

/* Sums of the chunks become the states before them: each warp's stretch, the stretches before it,
 * and then chunk by chunk. */
extern "C" __global__ void __launch_bounds__(MAX_WARPS *WARP) compose(Arguments a) {
    __shared__ State totals[MAX_WARPS][WARP];
    const Stretch r(a);
    const Int row = r.b * (a.chunks + 1);
    State s = {0.0f, 0.0f, LOG_ZERO};
    if (r.here && r.warp + 1 < r.warps)
#pragma unroll 4
        for (Int i = r.begin; i < smaller(r.end, a.chunks - 1); i++)
            s = join(s, get(a.edges, row + i, r.channel, a));
    totals[r.warp][r.lane] = s;
    __syncthreads();
    if (!r.here) return;
    s = get(a.state, r.b, r.channel, a);
    for (int i = 0; i < r.warp; i++) s = join(s, totals[i][r.lane]);
#pragma unroll 4
    for (Int i = r.begin; i < r.end; i++) {
        State sums = {0.0f, 0.0f, LOG_ZERO};
        if (i + 1 < a.chunks) sums = get(a.edges, row + i, r.channel, a);
        put(a.edges, s, row + i, r.channel, a);
        s = join(s, sums);
    }
}

/* The last state: `s` of all tokens before a tile joined by those the caller does not keep. */
__device__ __forceinline__ void finish(const Arguments &a, const Place &p, State s, Int tile) {
    const Int first = a.before + tile * TILE;
#pragma unroll 1
    for (Int t = first < 0 ? 0 : first; t < a.tokens - a.window + 1; t++)
        s = join(s, {widen(*a.v.at(p.b, t, p.channel)), 1.0f, widen(*a.k.at(p.b, t, p.channel))});
    put(a.last, s, p.b, p.channel, a);
    if (a.edges) put(a.edges, s, p.b * (a.chunks + 1) + a.chunks, p.channel, a);
}

/* Through some chunks of queries forwards. BACK: for the gradients of the weights and, of each query,
 * G = dy/den over e^-c, c the largest key up to it, and H = G y; else for y and the last state. */
template <bool BACK> __device__ __forceinline__ void walk(const Arguments &a, Ring &ring, float (*dm)[THREADS]) {
    const Place p(a, walks_of(a));
    if (!p.here) return;
    const Int tiles = tiles_of(a), run = a.run * TILES_PER_CHUNK;
    const Int begin = p.part * run, end = smaller(begin + run, tiles);
    const float beyond = a.m[(Int)(NEAR + 1) * a.width + p.channel];
    State older = before(p.b, p.part * a.run, p.channel, a);
    float tops[SLOTS]; /* of the ring's tiles: their e^{k - top} and e^{k - top} v */
    float c0 = older.o, base = 0.0f, G_sum = 0.0f, H_sum = 0.0f, dm_here = 0.0f, dm_beyond = 0.0f;
    int slot = 0; /* of the oldest tile */
#pragma unroll 1
    for (int r = 0; r < TILES; r++) {
        const Tokens x(a, p, begin - TILES + r);
        float E[TILE], F[TILE];
        tops[r] = c0 = x.top(c0);
#pragma unroll
        for (int i = 0; i < TILE; i++) E[i] = power(x.k[i] - c0), F[i] = E[i] * x.v[i];
        keep(ring, r, E, F);
        if (BACK)
#pragma unroll
            for (int i = 0; i < TILE; i++) dm[r * TILE + i][threadIdx.x] = 0.0f;
    }
#pragma unroll 1
    for (Int tile = begin; tile < end; tile++) {
        const Tokens x(a, p, tile);
        float num[TILE], den[TILE];
        const float A = power(older.o - c0);
#pragma unroll
        for (int q = 0; q < TILE; q++) num[q] = beyond * A * older.p, den[q] = beyond * A * older.q;
        {
            Weights w(a, p);
#pragma unroll 1
            for (int r = 1; r <= TILES; r++) {
                const int at = slot_at(slot, r);
                float E[TILE], F[TILE];
                w.shift(a, p, r);
                fetch(E, F, ring, at, power(tops[at] - c0));
#pragma unroll
                for (int q = 0; q < TILE; q++)
#pragma unroll
                    for (int i = 0; i < TILE; i++) num[q] += w[q - i] * F[i], den[q] += w[q - i] * E[i];
            }
        }
        float E[TILE], F[TILE], G[TILE], H[TILE], m[TILE], to_m[TILE], c = c0, all = 1.0f;
        Weights::nearest(m, a, p);
#pragma unroll
        for (int i = 0; i < TILE; i++) to_m[i] = 0.0f;
#pragma unroll
        for (int q = 0; q < TILE; q++) {
            const Entry x_q(x.k[q], c);
            const Int t = tile * TILE + q, at = (p.b * queries_of(a) + t) * a.width + p.channel;
            const bool there = t < queries_of(a);
            all *= x_q.fall, num[q] *= all, den[q] *= all;
            E[q] = x_q.own, F[q] = x_q.own * x.v[q];
#pragma unroll
            for (int i = 0; i <= q; i++) {
                if (i < q) E[i] *= x_q.fall, F[i] *= x_q.fall;
                num[q] += m[q - i] * F[i], den[q] += m[q - i] * E[i];
            }
            const float inverse = __fdividef(1.0f, den[q]), y = num[q] * inverse;
            if (!BACK) {
                if (there) a.y[at] = narrow(y);
                continue;
            }
            G[q] = there ? widen(a.dy[at]) * inverse : 0.0f, H[q] = there ? G[q] * y : 0.0f;
            float *read = a.read + (p.b * queries_of(a) + t) * 2 * a.width + p.channel;
            if (there) read[0] = G[q], read[a.width] = H[q];
#pragma unroll
            for (int i = 0; i <= q; i++) to_m[q - i] += G[q] * F[i] - H[q] * E[i];
            G[q] *= all, H[q] *= all; /* from here on over e^-c0 */
        }
        if (BACK) {
            float pairs[2 * TILE - 1], G_here = 0.0f, H_here = 0.0f;
            dm_here += to_m[0];
#pragma unroll
            for (int i = 1; i < TILE; i++) pairs[i - 1] = to_m[i];
#pragma unroll 1
            for (int r = 1; r <= TILES; r++) {
                const int at = slot_at(slot, r);
                float e[TILE], f[TILE];
#pragma unroll
                for (int i = 0; i < TILE; i++) pairs[TILE - 1 + i] = 0.0f;
                fetch(e, f, ring, at, power(tops[at] - c0));
#pragma unroll
                for (int q = 0; q < TILE; q++)
#pragma unroll
                    for (int i = 0; i < TILE; i++) pairs[TILE - 1 + q - i] += G[q] * f[i] - H[q] * e[i];
#pragma unroll
                for (int i = 0; i < TILE; i++) dm[(r - 1) * TILE + i][threadIdx.x] += pairs[i];
#pragma unroll
                for (int i = 0; i < TILE - 1; i++) pairs[i] = pairs[TILE + i];
            }
#pragma unroll
            for (int i = 0; i < TILE; i++) G_here += G[i], H_here += H[i];
#pragma unroll
            for (int i = 0; i < TILE - 1; i++) dm_beyond += pairs[i];
            dm_beyond += A * (older.p * G_here - older.q * H_here);
            if (tile % TILES_PER_CHUNK == 0) base = older.o, G_sum = H_sum = 0.0f;
            const float scale = power(base - c0);
            G_sum += scale * G_here, H_sum += scale * H_here;
            if (tile % TILES_PER_CHUNK == TILES_PER_CHUNK - 1 || tile + 1 == tiles) {
                float *ahead = a.ahead + (p.b * a.chunks + tile / TILES_PER_CHUNK) * 2 * a.width + p.channel;
                ahead[0] = G_sum, ahead[a.width] = H_sum;
            }
        } else if (tile + 1 == tiles) {
            finish(a, p, older, tile - TILES);
        }
        /* The tile enters the ring; the one whose place it takes is older now. */
        State leaving = {0.0f, 0.0f, TILES ? tops[slot] : c};
        float e[TILE], f[TILE];
        if (TILES) fetch(e, f, ring, slot, 1.0f);
#pragma unroll
        for (int i = 0; i < TILE; i++) leaving.p += TILES ? f[i] : F[i], leaving.q += TILES ? e[i] : E[i];
        const float aged = power(older.o - leaving.o);
        older = {older.p * aged + leaving.p, older.q * aged + leaving.q, leaving.o};
        keep(ring, slot, E, F);
        tops[slot] = c0 = c;
        slot = next_slot(slot);
    }
    if (!BACK) return;
    float *to = a.dm + (p.b * walks_of(a) + p.part) * ROWS * a.width + p.channel;
    to[0] = dm_here, to[(Int)(NEAR + 1) * a.width] = dm_beyond;
#pragma unroll 1
    for (int i = 0; i < NEAR; i++) to[(Int)(i + 1) * a.width] = dm[i][threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(THREADS) outputs(Arguments a) {
    __shared__ Ring ring;
    walk<false>(a, ring, nullptr);
}
extern "C" __global__ void __launch_bounds__(THREADS) reads(Arguments a) {
    __shared__ Ring ring;
    __shared__ float dm[SLOTS * TILE][THREADS]; /* of the distances 1 to NEAR */
    walk<true>(a, ring, dm);
}

/* The gradient of the last state, where there is one: of p and q, and of o at constant p e^o and
 * q e^o, which belongs to the token that has the maximum. */
struct Outer {
    float P, Q, h, o;
    __device__ __forceinline__ Outer(Int b, Int channel, const Arguments &a) {
        const State after = get(a.edges, b * (a.chunks + 1) + a.chunks, channel, a);
        const State d = a.dlast ? get(a.dlast, b, channel, a) : State{0.0f, 0.0f, 0.0f};
        P = d.p, Q = d.q, h = d.o - after.p * d.p - after.q * d.q, o = after.o;
    }
};

/* Sums of G and H over all later queries, over e^-o. */
struct Future {
    float G, H, o;
};
__device__ __forceinline__ Future earlier(Future now, Future later) {
    const float e = power(now.o - later.o);
    return {now.G + e * later.G, now.H + e * later.H, now.o};
}
/* Backwards: `ahead` of each chunk becomes what its keys get from queries in the chunks after it. */
extern "C" __global__ void __launch_bounds__(MAX_WARPS *WARP) compose_back(Arguments a) {
    __shared__ Future totals[MAX_WARPS][WARP];
    const Stretch r(a);
    const Int row = r.b * (a.chunks + 1);
    const Int query_chunks = (tiles_of(a) + TILES_PER_CHUNK - 1) / TILES_PER_CHUNK;
    const float never = 3e38f; /* the maximum beyond the end: nothing comes from there */
    auto sums = [&](Int chunk) -> Future {
        const float *at = a.ahead + (r.b * a.chunks + chunk) * 2 * a.width + r.channel;
        const float o = get(a.edges, row + chunk, r.channel, a).o;
        const bool there = chunk < query_chunks;
        return {there ? at[0] : 0.0f, there ? at[a.width] : 0.0f, o};
    };
    Future f = {0.0f, 0.0f, never};
    if (r.here && r.warp)
#pragma unroll 4
        for (Int i = r.end - 1; i >= r.begin; i--) f = earlier(sums(i), f);
    totals[r.warp][r.lane] = f;
    __syncthreads();
    if (!r.here) return;
    f = {0.0f, 0.0f, never};
    for (int i = r.warps - 1; i > r.warp; i--)
        if (totals[i][r.lane].o < never) f = earlier(totals[i][r.lane], f);
#pragma unroll 4
    for (Int i = r.end - 1; i >= r.begin; i--) {
        const Future now = sums(i);
        float *to = a.ahead + (r.b * a.chunks + i) * 2 * a.width + r.channel;
        to[0] = f.G, to[a.width] = f.H;
        f = earlier(now, f);
    }
    if (r.warp) return;
    const State start = before(r.b, 0, r.channel, a);
    const Outer after(r.b, r.channel, a);
    const float beyond = a.m[(Int)(NEAR + 1) * a.width + r.channel], e = power(start.o - after.o);
    const float P = beyond * f.G + e * after.P, Q = e * after.Q - beyond * f.H;
    const float h = start.o == after.o ? after.h : 0.0f;
    put(a.dstate, {P, Q, start.p * P + start.q * Q + h}, r.b, r.channel, a);
}

/* G and H of a tile of queries. */
struct Reads {
    float G[TILE], H[TILE];
    __device__ __forceinline__ Reads(const Arguments &a, const Place &p, Int tile) {
#pragma unroll
        for (int i = 0; i < TILE; i++) {
            const Int t = tile * TILE + i;
            const bool there = 0 <= t && t < queries_of(a);
            const float *at = a.read + (p.b * queries_of(a) + t) * 2 * a.width + p.channel;
            G[i] = there ? at[0] : 0.0f, H[i] = there ? at[a.width] : 0.0f;
        }
    }
};

/* Through a chunk of keys backwards: what the queries after them give back. */
extern "C" __global__ void __launch_bounds__(THREADS) gradients(Arguments a) {
    __shared__ Ring ring; /* G and H of the TILES tiles after the present one, over e^-c before each */
    __shared__ float tops[TILES_PER_CHUNK + TILES + 1][THREADS]; /* the largest key before each tile */
    const Place p(a, a.chunks);
    if (!p.here) return;
    const Int first = first_tile(p.part);
    const float *sums = a.ahead + (p.b * a.chunks + p.part) * 2 * a.width + p.channel;
    const float beyond = a.m[(Int)(NEAR + 1) * a.width + p.channel];
    const Outer outer(p.b, p.channel, a);
    float c = before(p.b, p.part, p.channel, a).o;
    tops[0][threadIdx.x] = c;
#pragma unroll 1
    for (int i = 0; i < TILES_PER_CHUNK + TILES; i++) {
        const Tokens x(a, p, first + i);
        if (i >= TILES_PER_CHUNK) { /* the last slot is that of the first tile: they leave from the end */
            const Reads g(a, p, first + i);
            float G[TILE], H[TILE], all = 1.0f;
#pragma unroll
            for (int q = 0; q < TILE; q++) {
                all *= Entry(x.k[q], c).fall;
                G[q] = g.G[q] * all, H[q] = g.H[q] * all;
            }
            keep(ring, TILES - 1 - (i - TILES_PER_CHUNK), G, H);
        }
        c = x.top(c);
        tops[i + 1][threadIdx.x] = c;
    }
    float G_sum = sums[0], H_sum = sums[a.width]; /* over e^-(the largest key up to the tile) */
    int slot = 0; /* of the latest tile */
#pragma unroll 1
    for (int n = TILES_PER_CHUNK - 1; n >= 0; n--) {
        const Int tile = first + n;
        const Tokens x(a, p, tile);
        const float c0 = tops[n][threadIdx.x], end = tops[n + 1][threadIdx.x];
        float num[TILE], den[TILE];
#pragma unroll
        for (int i = 0; i < TILE; i++) num[i] = beyond * G_sum, den[i] = beyond * H_sum;
        Weights w(a, p);
#pragma unroll 1
        for (int r = 1; r <= TILES; r++) {
            float G[TILE], H[TILE];
            w.shift(a, p, r);
            fetch(G, H, ring, slot_at(slot, r), power(end - tops[n + r][threadIdx.x]));
#pragma unroll
            for (int i = 0; i < TILE; i++)
#pragma unroll
                for (int q = 0; q < TILE; q++) num[i] += w[q - i] * G[q], den[i] += w[q - i] * H[q];
        }
        Reads g(a, p, tile);
        float own[TILE], fall[TILE], m[TILE], all = 1.0f;
        bool won[TILE];
        Weights::nearest(m, a, p);
        c = c0;
#pragma unroll
        for (int i = 0; i < TILE; i++) {
            const Entry e(x.k[i], c);
            own[i] = e.own, fall[i] = e.fall, won[i] = e.won;
        }
#pragma unroll
        for (int i = TILE - 1; i >= 0; i--) {
            num[i] *= all, den[i] *= all;
            all *= fall[i];
#pragma unroll
            for (int q = i; q < TILE; q++) {
                num[i] += m[q - i] * g.G[q], den[i] += m[q - i] * g.H[q];
                g.G[q] *= fall[i], g.H[q] *= fall[i];
            }
            const Int t = a.before + tile * TILE + i, at = (p.b * a.tokens + t) * a.width + p.channel;
            const bool left = t < a.tokens - a.window + 1; /* part of the last state */
            const float e = left ? power(x.k[i] - outer.o) : 0.0f;
            const bool most = left && won[i] && x.k[i] == outer.o;
            const float k = own[i] * (num[i] * x.v[i] - den[i]) + e * (outer.P * x.v[i] + outer.Q);
            if (0 > t || t >= a.tokens) continue;
            a.dk[at] = narrow(k + (most ? outer.h : 0.0f));
            a.dv[at] = narrow(own[i] * num[i] + e * outer.P);
        }
        /* The tile enters the ring; the queries whose place it takes are beyond all windows now. */
        const float aged = power(c0 - end), scale = TILES ? power(c0 - tops[n + TILES][threadIdx.x]) : 1.0f;
        float G[TILE], H[TILE];
        if (TILES) fetch(G, H, ring, slot, scale);
        G_sum *= aged, H_sum *= aged;
#pragma unroll
        for (int i = 0; i < TILE; i++) G_sum += TILES ? G[i] : g.G[i], H_sum += TILES ? H[i] : g.H[i];
        keep(ring, slot, g.G, g.H);
        slot = next_slot(slot);
    }
}
