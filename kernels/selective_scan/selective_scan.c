/* Selective scan (Gu & Dao 2023, algorithm 2) forward and backward; README.md has the derivation.
 *
 * LANES channels in a register, one state index at a time over a chunk of CHUNK tokens, so that
 * all it touches stays in the first-level cache. A unit of work is GROUP channel blocks of one
 * batch row; it walks through time alone.
 */
#include "../common.h"
#include <stdlib.h>

enum {
    CHUNK = 32,         /* tokens between saved states: a multiple of every LANES */
    MANY = 4,           /* state indices side by side */
    BATCH = 4,          /* tokens side by side in softplus and silu */
    GROUP = 4,          /* channel blocks of a unit: neighbours share cache lines and pages */
    PARTIALS = 1 << 22, /* Reals of partial sums, about; TILE tokens of them at most */
    TILE = 1024
};
const Int lanes = LANES, chunk = CHUNK; /* the shape of `saved`, for the caller */

typedef struct {
    Int batch, tokens, width, states, threads;
} Sizes;

typedef struct {
    Rows x, dt, z, B, C;                  /* z.data may be null; so may D, dt_bias and state */
    Rows y, dy, dx, ddt, dz, dB, dC;
    Real *A, *D, *dt_bias, *state;        /* (d, n), (d), (d), (b, d, n) */
    Real *last, *saved;                   /* (b, d, n); chunk starts (b, blocks, chunks, n, LANES) */
    Real *dA, *dD, *dbias, *dstate;       /* (b, d, n), (b, d), (b, d), (b, d, n): added to */
} Arrays;

typedef struct {
    Sizes s;
    Arrays a;
    Int group, groups;       /* channel blocks in a unit; units in a batch row */
    Int tile, start, end;    /* its length; the tile of tokens the backward is in */
    Real *partial;           /* (units, 2, n, tile): dB and dC summed over a unit's channels */
} Job;

INLINE Int chunks_of(Int tokens) { return (tokens + CHUNK - 1) / CHUNK; }

INLINE Real *saved_chunk(const Job *j, Int b, Int block, Int index) {
    Int chunks = chunks_of(j->s.tokens);
    return j->a.saved + ((b * blocks_of(j->s.width) + block) * chunks + index) * j->s.states * LANES;
}

/* What a chunk of one channel block needs; the arrays are indexed by token. */
typedef struct {
    Vec step[CHUNK], u[CHUNK], y[CHUNK], dy[CHUNK], du[CHUNK], dstep[CHUNK];
    Vec slope[CHUNK], gate[CHUNK], dz[CHUNK];
    Vec decay[CHUNK * MANY], states[(CHUNK + 1) * MANY]; /* (t, many): states[0] is before token 0 */
    const Real *B, *C;
    Int B_row, C_row, steps;
    const Real *next; /* rows to bring into the cache meanwhile, one per token */
    Int next_row;
    int extreme; /* some step * A may leave the range of exp2 */
} Chunk;

/* Fetching goes a row at a time between arithmetic, not to clog the few line buffers, and to the
 * second-level cache: rows a power of two apart share the sets of the first. */
INLINE void aim(Chunk *k, Rows a, Int b, Int start, Int c) {
    int wanted = a.data && start >= 0;
    k->next = wanted ? row(a, b, start) + c : (const Real *)k;
    k->next_row = wanted ? a.row : 0;
}
INLINE void fetch(const Chunk *k, Int t) { __builtin_prefetch(k->next + t * k->next_row, 0, 2); }

/* h <- exp(step A) h + u B over the chunk, and y += C h, for the `many` state indices from i on. */
INLINE void sweep(Chunk *k, Int i, int many, Vec *state, const Vec *rate, int output, int keep,
                  int clamp) {
    Vec h[MANY], A2[MANY], decay[MANY];
    ALL(m, many) h[m] = state[m], A2[m] = rate[m];
    if (keep) ALL(m, many) k->states[m] = h[m];
    for (Int t = 0; t < k->steps; t++) {
        const Real *B = k->B + t * k->B_row + i, *C = k->C + t * k->C_row + i;
        fetch(k, t);
        exp2_products(decay, k->step[t], A2, many, clamp);
        ALL(m, many) h[m] = decay[m] * h[m] + k->u[t] * B[m];
        if (output) {
            Vec y = k->y[t];
            ALL(m, many) y += C[m] * h[m];
            k->y[t] = y;
        }
        if (keep) ALL(m, many) k->decay[t * many + m] = decay[m];
        if (keep) ALL(m, many) k->states[(t + 1) * many + m] = h[m];
    }
    ALL(m, many) state[m] = h[m];
}
INLINE void sweep_as_needed(Chunk *k, Int i, int many, Vec *h, const Vec *A2, int output,
                            int keep) {
    if (k->extreme || many == 1) sweep(k, i, many, h, A2, 1, keep, 1); /* 1: the few left over */
    else if (output) sweep(k, i, many, h, A2, 1, keep, 0);
    else sweep(k, i, many, h, A2, 0, keep, 0);
}

/* Loads a chunk of the block at channel c: step, u, y = D x; `steepest` = max |A2|.
 * BATCH tokens at once; past the last token it repeats that one. */
static void begin(Chunk *k, const Job *j, Int b, Int c, Int start, Int steps, Real steepest,
                  int slope) {
    const Arrays *a = &j->a;
    const Real *x = row(a->x, b, start) + c, *dt = row(a->dt, b, start) + c;
    Int count = j->s.width - c;
    Vec bias = a->dt_bias ? load(a->dt_bias + c, count) : splat(0);
    Vec D = a->D ? load(a->D + c, count) : splat(0), largest = splat(0), v[BATCH];
    for (Int t = 0; t < steps; t += BATCH) {
        ALL(m, BATCH) v[m] = load(dt + min_int(t + m, steps - 1) * a->dt.row, count) + bias;
        softplus(k->step + t, slope ? k->slope + t : 0, v, BATCH);
        ALL(m, BATCH) largest = larger(largest, k->step[t + m]);
        ALL(m, BATCH) v[m] = load(x + min_int(t + m, steps - 1) * a->x.row, count);
        ALL(m, BATCH) k->u[t + m] = k->step[t + m] * v[m];
        ALL(m, BATCH) k->y[t + m] = D * v[m];
    }
    Real most = 0;
    for (int i = 0; i < LANES; i++) most = largest[i] > most ? largest[i] : most;
    k->extreme = most * steepest > (Real)-LOWEST;
    k->B = row(a->B, b, start), k->C = row(a->C, b, start);
    k->B_row = a->B.row, k->C_row = a->C.row, k->steps = steps;
}
/* gate = silu(z), and its derivative unless `slope` is null */
static void open_gate(Vec *gate, Vec *slope, const Job *j, Int b, Int c, Int start, Int steps) {
    const Real *z = row(j->a.z, b, start) + c;
    Vec v[BATCH];
    for (Int t = 0; t < steps; t += BATCH) {
        ALL(m, BATCH) v[m] = load(z + min_int(t + m, steps - 1) * j->a.z.row, j->s.width - c);
        silu(gate + t, slope ? slope + t : 0, v, BATCH);
    }
}
INLINE Real steepest(const Vec *A2, Int n) {
    Real most = 0;
    for (Int i = 0; i < n; i++)
        for (int l = 0; l < LANES; l++) most = fabs(A2[i][l]) > most ? fabs(A2[i][l]) : most;
    return most;
}

static void forward_unit(const void *job, Int unit) {
    const Job *j = job;
    const Sizes s = j->s;
    const Arrays *a = &j->a;
    Int b = unit / j->groups, first = unit % j->groups * j->group, n = s.states;
    Int blocks = min_int(j->group, blocks_of(s.width) - first);
    Vec h[blocks * n], A2[blocks * n];
    Real steep[blocks];
    Chunk k;
    for (Int block = 0; block < blocks; block++) {
        Int c = (first + block) * LANES, count = s.width - c;
        for (Int i = 0; i < n; i++) {
            Int at = block * n + i;
            A2[at] = load_strided(a->A + c * n + i, n, count) * (Real)LOG2E;
            h[at] = splat(0);
            if (a->state) h[at] = load_strided(a->state + (b * s.width + c) * n + i, n, count);
        }
        steep[block] = steepest(A2 + block * n, n);
    }
    for (Int start = 0; start < s.tokens; start += CHUNK)
        for (Int block = 0; block < blocks; block++) {
            Int c = (first + block) * LANES, count = s.width - c, i = 0;
            Vec *hb = h + block * n, *A2b = A2 + block * n;
            begin(&k, j, b, c, start, min_int(CHUNK, s.tokens - start), steep[block], 0);
            if (a->saved)
                memcpy(saved_chunk(j, b, first + block, start / CHUNK), hb, n * sizeof *hb);
            Rows next[] = {a->x, a->dt, a->z, a->y};
            for (Int pass = 0; i < n; pass++) {
                aim(&k, pass < 4 ? next[pass] : (Rows){0}, b, start + CHUNK, c);
                Int many = i + MANY <= n ? MANY : 1;
                if (many == MANY) sweep_as_needed(&k, i, MANY, hb + i, A2b + i, 1, 0);
                else sweep_as_needed(&k, i, 1, hb + i, A2b + i, 1, 0);
                i += many;
            }
            if (a->z.data) open_gate(k.gate, 0, j, b, c, start, k.steps);
            for (Int t = 0; t < k.steps; t++) {
                Vec y = a->z.data ? k.y[t] * k.gate[t] : k.y[t];
                store(row(a->y, b, start + t) + c, y, count);
            }
        }
    for (Int block = 0; block < blocks; block++)
        for (Int i = 0; i < n; i++) {
            Int c = (first + block) * LANES;
            store_strided(a->last + (b * s.width + c) * n + i, h[block * n + i], n, s.width - c);
        }
}

/* The backward of `many` state indices over a chunk, in reverse. q is dL/dh from the future.
 * Leaves dL/dh of every token where its decay was. */
INLINE void reverse(Chunk *k, Int i, int many, Vec *future, const Vec *rate, Vec *dA) {
    Vec q[MANY], A[MANY], sum[MANY], g[MANY], w[MANY];
    ALL(m, many) q[m] = future[m], A[m] = rate[m], sum[m] = splat(0);
    for (Int t = k->steps - 1; t >= 0; t--) {
        const Real *B = k->B + t * k->B_row + i, *C = k->C + t * k->C_row + i;
        Vec du = k->du[t], dstep = k->dstep[t];
        fetch(k, t);
        ALL(m, many) g[m] = q[m] + k->dy[t] * C[m];
        ALL(m, many) q[m] = g[m] * k->decay[t * many + m];
        ALL(m, many) w[m] = q[m] * k->states[t * many + m];
        ALL(m, many) du += g[m] * B[m];
        ALL(m, many) sum[m] += w[m] * k->step[t];
        ALL(m, many) dstep += w[m] * A[m];
        ALL(m, many) k->decay[t * many + m] = g[m];
        k->du[t] = du, k->dstep[t] = dstep;
    }
    ALL(m, many) future[m] = q[m], dA[m] += sum[m];
}
/* dB_t = sum over channels of dL/dh u, dC_t = sum over channels of dy h: into partial sums. */
static void add_channels(const Chunk *k, int many, Real *dB, Real *dC, Int tile) {
    for (int m = 0; m < many; m++)
        for (Int start = 0; start < k->steps; start += LANES) {
            Vec rows[LANES];
            Real *to = dB + m * tile + start;
#pragma GCC unroll 16
            for (int t = 0; t < LANES; t++)
                rows[t] = k->decay[(start + t) * many + m] * k->u[start + t];
            store(to, load(to, LANES) + row_sums(rows), LANES);
            to = dC + m * tile + start;
#pragma GCC unroll 16
            for (int t = 0; t < LANES; t++)
                rows[t] = k->states[(start + t + 1) * many + m] * k->dy[start + t];
            store(to, load(to, LANES) + row_sums(rows), LANES);
        }
}

static void backward_chunk(const Job *j, Int b, Int block, Int start, Real steep, Vec *q, Vec *dA,
                           const Vec *A, Vec *dD, Vec *dbias, Real *partial) {
    const Sizes s = j->s;
    const Arrays *a = &j->a;
    Int n = s.states, c = block * LANES, count = s.width - c, steps = min_int(CHUNK, j->end - start);
    Vec D = a->D ? load(a->D + c, count) : splat(0), sum_D = splat(0), sum_bias = splat(0);
    int gated = a->z.data != 0;
    Chunk k;
    begin(&k, j, b, c, start, steps, steep, 1);
    if (gated) open_gate(k.gate, k.dz, j, b, c, start, steps);
    for (Int t = 0; t < steps; t++) {
        k.dy[t] = load(row(a->dy, b, start + t) + c, count);
        if (gated) {
            k.dz[t] *= k.dy[t];
            k.dy[t] *= k.gate[t];
        }
        k.du[t] = k.dstep[t] = splat(0);
    }
    for (Int t = steps; t < CHUNK; t++) k.u[t] = k.dy[t] = splat(0);
    if (steps < CHUNK) memset(k.decay, 0, sizeof k.decay), memset(k.states, 0, sizeof k.states);
    const Real *saved = saved_chunk(j, b, block, start / CHUNK);
    Real *dB = partial + start - j->start, *dC = dB + n * j->tile;
    Rows inputs[] = {a->x, a->dt, a->dy, a->z}, outputs[] = {a->dx, a->ddt, a->dz, {0}};
    for (Int i = 0, pass = 0; i < n; pass++) {
        Int many = i + MANY <= n ? MANY : 1;
        Vec h[MANY], A2[MANY];
        for (int m = 0; m < many; m++) {
            h[m] = load(saved + (i + m) * LANES, LANES);
            A2[m] = A[i + m] * (Real)LOG2E;
        }
        aim(&k, pass < 4 ? inputs[pass] : (Rows){0}, b, start - CHUNK, c);
        if (many == MANY) sweep_as_needed(&k, i, MANY, h, A2, gated, 1);
        else sweep_as_needed(&k, i, 1, h, A2, gated, 1);
        aim(&k, pass < 4 ? outputs[pass] : (Rows){0}, b, start - CHUNK, c);
        if (many == MANY) reverse(&k, i, MANY, q + i, A + i, dA + i);
        else reverse(&k, i, 1, q + i, A + i, dA + i);
        add_channels(&k, many, dB + i * j->tile, dC + i * j->tile, j->tile);
        i += many;
    }
    for (Int t = 0; t < steps; t++) {
        Vec x = load(row(a->x, b, start + t) + c, count);
        Vec ddt = (k.dstep[t] + k.du[t] * x) * k.slope[t];
        store(row(a->ddt, b, start + t) + c, ddt, count);
        store(row(a->dx, b, start + t) + c, k.du[t] * k.step[t] + k.dy[t] * D, count);
        if (gated) store(row(a->dz, b, start + t) + c, k.dz[t] * k.y[t], count);
        sum_D += k.dy[t] * x;
        sum_bias += ddt;
    }
    *dD += sum_D;
    *dbias += sum_bias;
}

static void backward_unit(const void *job, Int unit) {
    const Job *j = job;
    const Sizes s = j->s;
    const Arrays *a = &j->a;
    Int b = unit / j->groups, first = unit % j->groups * j->group, n = s.states;
    Int last = min_int(first + j->group, blocks_of(s.width)), blocks = last - first;
    Vec A[blocks * n], q[blocks * n], dA[blocks * n], dD[blocks], dbias[blocks];
    Real steep[blocks];
    Real *partial = j->partial + unit * 2 * n * j->tile;
    memset(partial, 0, 2 * n * j->tile * sizeof *partial);
    for (Int k = 0; k < blocks; k++) {
        Int c = (first + k) * LANES, count = s.width - c;
        dD[k] = dbias[k] = splat(0);
        for (Int i = 0; i < n; i++) {
            A[k * n + i] = load_strided(a->A + c * n + i, n, count);
            q[k * n + i] = load_strided(a->dstate + (b * s.width + c) * n + i, n, count);
            dA[k * n + i] = splat(0);
        }
        steep[k] = steepest(A + k * n, n) * (Real)LOG2E;
    }
    for (Int start = j->start + (j->end - j->start - 1) / CHUNK * CHUNK; start >= j->start;
         start -= CHUNK)
        for (Int k = 0; k < blocks; k++)
            backward_chunk(j, b, first + k, start, steep[k], q + k * n, dA + k * n, A + k * n, &dD[k],
                           &dbias[k], partial);
    for (Int k = 0; k < blocks; k++) {
        Int c = (first + k) * LANES, count = s.width - c, at = b * s.width + c;
        for (Int i = 0; i < n; i++) {
            Real *total = a->dA + at * n + i;
            store_strided(total, dA[k * n + i] + load_strided(total, n, count), n, count);
            store_strided(a->dstate + at * n + i, q[k * n + i], n, count);
        }
        store(a->dD + at, load(a->dD + at, count) + dD[k], count);
        store(a->dbias + at, load(a->dbias + at, count) + dbias[k], count);
    }
}

/* dB and dC of LANES tokens: the sum over a batch row's units, in their order. */
static void reduce_unit(const void *job, Int unit) {
    const Job *j = job;
    Int n = j->s.states, length = j->end - j->start, pieces = (length + LANES - 1) / LANES;
    Int b = unit / pieces, t = unit % pieces * LANES, count = length - t;
    for (Int i = 0; i < 2 * n; i++) {
        Vec sum = splat(0);
        for (Int g = 0; g < j->groups; g++)
            sum += load(j->partial + ((b * j->groups + g) * 2 * n + i) * j->tile + t, LANES);
        Rows to = i < n ? j->a.dB : j->a.dC;
        store_strided(row(to, b, j->start + t) + i % n, sum, to.row, count);
    }
}

INLINE Job plan(Sizes s, Arrays a) {
    Int blocks = blocks_of(s.width), spread = s.batch * blocks / s.threads;
    Int group = spread < 1 ? 1 : min_int(spread, GROUP);
    if (s.batch * s.tokens * s.width * s.states < 1 << 15) s.threads = 1;
    return (Job){s, a, group, (blocks + group - 1) / group, 0, 0, 0, 0};
}

int forward(Sizes s, Arrays a) {
    Job job = plan(s, a);
    parallel_for(job.s.threads, s.batch * job.groups, forward_unit, &job);
    return 0;
}

/* Both return 0, or 1 where memory for the partial sums is refused. */
int backward(Sizes s, Arrays a) {
    Job job = plan(s, a);
    Int units = s.batch * job.groups;
    Int room = PARTIALS / (units * 2 * s.states), most = min_int(TILE, s.tokens + CHUNK - 1);
    job.tile = (room < CHUNK ? CHUNK : min_int(room, most)) / CHUNK * CHUNK;
    job.partial = malloc(units * 2 * s.states * job.tile * sizeof(Real));
    if (!job.partial) return 1;
    for (job.end = s.tokens; job.end > 0; job.end = job.start) {
        job.start = (job.end - 1) / job.tile * job.tile;
        Int pieces = (job.end - job.start + LANES - 1) / LANES;
        parallel_for(job.s.threads, units, backward_unit, &job);
        parallel_for(job.s.threads, s.batch * pieces, reduce_unit, &job);
    }
    free(job.partial);
    return 0;
}
