/* Selective scan (Gu & Dao 2023, algorithm 2) forward and backward; README.md has the derivation.
 *
 * LANES channels (a block) in a register, MANY state indices at a time over a chunk of CHUNK tokens,
 * so that all it touches stays in the first-level cache. A unit of work is up to GROUP neighbouring
 * blocks of one batch row; it walks through time alone.
 */
#include "../common.h"
#include <stdlib.h>

enum {
    CHUNK = 16,         /* tokens between saved states: a multiple of every LANES */
    MANY = 4,           /* state indices side by side */
    BATCH = 4,          /* tokens side by side in softplus and silu */
    GROUP = 16,         /* blocks of a unit at most, */
    MAX_STATES = 1024,  /* with so many state indices in all, or of one: they lie on the stack */
    STRETCH = 32,       /* chunks between additions to the totals of dA, dD, dbias */
    PARTIALS = 1 << 23  /* Reals of partial sums, about */
};
const Int lanes = LANES, chunk = CHUNK, max_states = MAX_STATES; /* for the caller */

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
    Int group, groups;       /* blocks in a unit; units in a batch row */
    Int tile, start, end;    /* its length; the tile of tokens the backward is in */
    Real *partial;           /* (units, chunks, 2, n, CHUNK): dB, dC summed over a unit's channels */
} Job;

INLINE Int chunks_of(Int tokens) { return ceil_div(tokens, CHUNK); }

INLINE Real *saved_chunk(const Job *j, Int b, Int block, Int index) {
    Int chunks = chunks_of(j->s.tokens);
    return j->a.saved + ((b * blocks_of(j->s.width) + block) * chunks + index) * j->s.states * LANES;
}

/* What a chunk of one channel block needs, by token. */
typedef struct {
    Vec step[CHUNK], u[CHUNK], y[CHUNK], dy[CHUNK], du[CHUNK], dstep[CHUNK];
    Vec slope[CHUNK], gate[CHUNK], dz[CHUNK];
    Real longest; /* step */
    const Real *B, *C;
    Int B_row, C_row, steps;
    const Real *next; /* rows to bring into the cache meanwhile, one per token */
    Int next_row;
} Chunk;

/* What the backward keeps of `many` state indices over a chunk, (t, many): what the sweep saw of
 * one block (states[0] is before token 0), and dB and dC, still by lane, of all blocks so far. */
typedef struct {
    Vec decay[CHUNK * MANY], states[(CHUNK + 1) * MANY], dB[CHUNK * MANY], dC[CHUNK * MANY];
} Tape;

/* Fetching goes a row at a time between arithmetic, not to clog the few line buffers, and to the
 * second-level cache: rows a power of two apart share the sets of the first. */
INLINE void aim(Chunk *k, Rows a, Int b, Int start, Int c) {
    int wanted = a.data && start >= 0;
    k->next = wanted ? row(a, b, start) + c : (const Real *)k;
    k->next_row = wanted ? a.row : 0;
}
INLINE void fetch(const Chunk *k, Int t) { __builtin_prefetch(k->next + t * k->next_row, 0, 2); }

/* h <- exp(step A) h + u B over the chunk, for the `many` state indices from i on; y += C h, and
 * decays and states to the tape, where they are needed. */
INLINE void sweep(Chunk *k, Int i, int many, Vec *state, const Vec *rate, int output, Tape *tape,
                  Range range) {
    Vec h[MANY], A2[MANY], decay[MANY];
    ALL(m, many) h[m] = state[m], A2[m] = rate[m];
    if (tape) ALL(m, many) tape->states[m] = h[m];
    for (Int t = 0; t < k->steps; t++) {
        const Real *B = k->B + t * k->B_row + i, *C = k->C + t * k->C_row + i;
        fetch(k, t);
        exp2_products(decay, k->step[t], A2, many, range);
        ALL(m, many) h[m] = decay[m] * h[m] + k->u[t] * B[m];
        if (output) {
            Vec y = k->y[t];
            ALL(m, many) y += C[m] * h[m];
            k->y[t] = y;
        }
        if (tape) ALL(m, many) tape->decay[t * many + m] = decay[m];
        if (tape) ALL(m, many) tape->states[(t + 1) * many + m] = h[m];
    }
    ALL(m, many) state[m] = h[m];
}
/* `steepest` bounds |A2|. */
INLINE void sweep_as_needed(Chunk *k, Int i, int many, Vec *h, const Vec *A2, Real steepest,
                            int output, Tape *tape) {
    Real most = k->longest * steepest;
    if (many == 1 || !(most <= (Real)-LOWEST)) sweep(k, i, many, h, A2, 1, tape, ANY);
    else if (most > (Real)MILDEST) sweep(k, i, many, h, A2, 1, tape, NORMAL);
    else if (output) sweep(k, i, many, h, A2, 1, tape, MILD);
    else sweep(k, i, many, h, A2, 0, tape, MILD);
}

/* Loads a chunk of the block at channel c: step, u, y = D x.
 * BATCH tokens at once; past the last token it repeats that one. */
ONCE void begin(Chunk *k, const Job *j, Int b, Int c, Int start, Int steps, int slope) {
    const Arrays *a = &j->a;
    const Real *x = row(a->x, b, start) + c, *dt = row(a->dt, b, start) + c;
    Int count = j->s.width - c;
    Vec bias = a->dt_bias ? load(a->dt_bias + c, count) : splat(0);
    Vec D = a->D ? load(a->D + c, count) : splat(0), largest = splat(0), v[BATCH];
    Vec flaw = splat(0); /* NaN where some step is not finite */
    for (Int t = 0; t < steps; t += BATCH) {
        ALL(m, BATCH) v[m] = load(dt + min_int(t + m, steps - 1) * a->dt.row, count) + bias;
        softplus(k->step + t, slope ? k->slope + t : 0, v, BATCH);
        ALL(m, BATCH) largest = larger(largest, k->step[t + m]);
        ALL(m, BATCH) flaw += k->step[t + m] - k->step[t + m];
        ALL(m, BATCH) v[m] = load(x + min_int(t + m, steps - 1) * a->x.row, count);
        ALL(m, BATCH) k->u[t + m] = k->step[t + m] * v[m];
        ALL(m, BATCH) k->y[t + m] = a->D ? D * v[m] : splat(0);
    }
    k->longest = largest_lane(choose(flaw == 0, largest, splat(INFINITY)));
    k->B = row(a->B, b, start), k->C = row(a->C, b, start);
    k->B_row = a->B.row, k->C_row = a->C.row, k->steps = steps;
}
/* gate = silu(z), and its derivative unless `slope` is null */
ONCE void open_gate(Vec *gate, Vec *slope, const Job *j, Int b, Int c, Int start, Int steps) {
    const Real *z = row(j->a.z, b, start) + c;
    Vec v[BATCH];
    for (Int t = 0; t < steps; t += BATCH) {
        ALL(m, BATCH) v[m] = load(z + min_int(t + m, steps - 1) * j->a.z.row, j->s.width - c);
        silu(gate + t, slope ? slope + t : 0, v, BATCH);
    }
}
/* max |A2| over every MANY state indices; where some state grows or is NaN, beyond all bounds */
ONCE void steepness(Real *steepest, const Vec *A2, Int n) {
    for (Int i = 0; i + MANY <= n; i += MANY) {
        Vec most = splat(0);
        ALL(m, MANY) most = larger(most, choose(A2[i + m] <= 0, -A2[i + m], splat(INFINITY)));
        steepest[i / MANY] = largest_lane(most);
    }
}

static void forward_unit(const void *job, Int unit) {
    const Job *j = job;
    const Sizes s = j->s;
    const Arrays *a = &j->a;
    Int b = unit / j->groups, first = unit % j->groups * j->group, n = s.states;
    Int blocks = min_int(j->group, blocks_of(s.width) - first);
    Int all = blocks * n + !n; /* an array has at least one element */
    Vec h[all], A2[all];
    Real steepest[all];
    Chunk k;
    for (Int block = 0; block < blocks; block++) {
        Int c = (first + block) * LANES, count = s.width - c;
        Vec *hb = h + block * n, *A2b = A2 + block * n;
        load_columns(A2b, a->A + c * n, n, count);
        if (a->state) load_columns(hb, a->state + (b * s.width + c) * n, n, count);
        else memset(hb, 0, n * sizeof *hb);
        for (Int i = 0; i < n; i++) A2b[i] *= (Real)LOG2E;
        steepness(steepest + block * n, A2b, n);
    }
    for (Int start = 0; start < s.tokens; start += CHUNK)
        for (Int block = 0; block < blocks; block++) {
            Int c = (first + block) * LANES, count = s.width - c, i = 0;
            Vec *hb = h + block * n, *A2b = A2 + block * n;
            const Real *steep = steepest + block * n;
            begin(&k, j, b, c, start, min_int(CHUNK, s.tokens - start), 0);
            if (a->saved)
                memcpy(saved_chunk(j, b, first + block, start / CHUNK), hb, n * sizeof *hb);
            Rows next[] = {a->x, a->dt, a->z, a->y};
            for (Int pass = 0; i < n; pass++) {
                aim(&k, next[pass % 4], b, start + CHUNK, c);
                Int many = i + MANY <= n ? MANY : 1;
                if (many == MANY) sweep_as_needed(&k, i, MANY, hb + i, A2b + i, steep[pass], 1, 0);
                else sweep_as_needed(&k, i, 1, hb + i, A2b + i, INFINITY, 1, 0);
                i += many;
            }
            if (a->z.data) open_gate(k.gate, 0, j, b, c, start, k.steps);
            for (Int t = 0; t < k.steps; t++) {
                Vec y = a->z.data ? k.y[t] * k.gate[t] : k.y[t];
                store(row(a->y, b, start + t) + c, y, count);
            }
        }
    for (Int block = 0; block < blocks; block++) {
        Int c = (first + block) * LANES;
        store_columns(a->last + (b * s.width + c) * n, h + block * n, n, s.width - c);
    }
}

/* The backward of `many` state indices over a chunk, in reverse. q is dL/dh from the future. */
INLINE void reverse(Chunk *k, Tape *tape, Int i, int many, Vec *future, const Vec *rate, Vec *dA) {
    Vec q[MANY], A[MANY], sum[MANY], w[MANY], h[MANY];
    ALL(m, many) q[m] = future[m], A[m] = rate[m], sum[m] = splat(0);
    ALL(m, many) h[m] = tape->states[k->steps * many + m];
    for (Int t = k->steps - 1; t >= 0; t--) {
        const Real *B = k->B + t * k->B_row + i, *C = k->C + t * k->C_row + i;
        const Vec dy = k->dy[t], u = k->u[t], step = k->step[t];
        Vec du = k->du[t], dstep = k->dstep[t];
        fetch(k, t);
        ALL(m, many) q[m] += dy * C[m]; /* dL/dh */
        ALL(m, many) tape->dC[t * many + m] += h[m] * dy;
        ALL(m, many) tape->dB[t * many + m] += q[m] * u;
        ALL(m, many) du += q[m] * B[m];
        ALL(m, many) q[m] *= tape->decay[t * many + m];
        ALL(m, many) h[m] = tape->states[t * many + m];
        ALL(m, many) w[m] = q[m] * h[m];
        ALL(m, many) sum[m] += w[m] * step;
        ALL(m, many) dstep += w[m] * A[m];
        k->du[t] = du, k->dstep[t] = dstep;
    }
    ALL(m, many) future[m] = q[m], dA[m] += sum[m];
}
/* Sums over the lanes: (CHUNK, many) vectors to (many, CHUNK) Reals. Leaves zeros behind. */
ONCE void add_lanes(Vec *from, int many, Real *to) {
    for (int m = 0; m < many; m++)
        for (Int start = 0; start < CHUNK; start += LANES) {
            Vec rows[LANES];
#pragma GCC unroll 16
            for (int t = 0; t < LANES; t++) {
                rows[t] = from[(start + t) * many + m];
                from[(start + t) * many + m] = splat(0);
            }
            store(to + m * CHUNK + start, row_sums(rows), LANES);
        }
}

/* What walks back through time with a channel block, and what does not change. */
typedef struct {
    Vec *A, *A2, *q, *dA; /* (n) */
    Real *steepest;       /* (n / MANY) */
    Vec dD, dbias;
} Block;

static void begin_backward(Chunk *k, const Job *j, Int b, Int c, Int start) {
    const Arrays *a = &j->a;
    Int count = j->s.width - c, steps = min_int(CHUNK, j->end - start);
    int gated = a->z.data != 0;
    begin(k, j, b, c, start, steps, 1);
    if (gated) open_gate(k->gate, k->dz, j, b, c, start, steps);
    for (Int t = 0; t < steps; t++) {
        k->dy[t] = load(row(a->dy, b, start + t) + c, count);
        if (gated) {
            k->dz[t] *= k->dy[t];
            k->dy[t] *= k->gate[t];
        }
        k->du[t] = k->dstep[t] = splat(0);
    }
}
static void end_backward(const Chunk *k, const Job *j, Int b, Int c, Int start, Block *block) {
    const Arrays *a = &j->a;
    Int count = j->s.width - c;
    Vec D = a->D ? load(a->D + c, count) : splat(0), sum_D = splat(0), sum_bias = splat(0);
    for (Int t = 0; t < k->steps; t++) {
        Vec x = load(row(a->x, b, start + t) + c, count);
        Vec ddt = (k->dstep[t] + k->du[t] * x) * k->slope[t];
        store(row(a->ddt, b, start + t) + c, ddt, count);
        store(row(a->dx, b, start + t) + c, k->du[t] * k->step[t] + k->dy[t] * D, count);
        if (a->z.data) store(row(a->dz, b, start + t) + c, k->dz[t] * k->y[t], count);
        sum_D += k->dy[t] * x;
        sum_bias += ddt;
    }
    block->dD += sum_D;
    block->dbias += sum_bias;
}
/* To the totals, now and then: rounding grows with the number of terms of a sum. */
static void add_to_totals(Block *block, const Job *j, Int b, Int c) {
    Int n = j->s.states, count = j->s.width - c, at = b * j->s.width + c;
    Real *dD = j->a.dD + at, *dbias = j->a.dbias + at;
    Vec total[n + !n]; /* an array has at least one element */
    load_columns(total, j->a.dA + at * n, n, count);
    for (Int i = 0; i < n; i++) total[i] += block->dA[i], block->dA[i] = splat(0);
    store_columns(j->a.dA + at * n, total, n, count);
    store(dD, load(dD, count) + block->dD, count);
    store(dbias, load(dbias, count) + block->dbias, count);
    block->dD = block->dbias = splat(0);
}
/* One block after the other for `many` state indices, so that dB and dC add up in the cache. */
INLINE void backward_states(const Job *j, Int b, Int first, Int blocks, Int start, Int i, int many,
                            Chunk *chunks, Block *block, Tape *tape, Real *partial) {
    const Arrays *a = &j->a;
    const Rows inputs[] = {a->x, a->dt, a->dy, a->z}, outputs[] = {a->dx, a->ddt, a->dz, {0}};
    Int n = j->s.states, pass = i / MANY;
    for (Int v = 0; v < blocks; v++) {
        Chunk *k = chunks + v;
        Int c = (first + v) * LANES;
        const Real *saved = saved_chunk(j, b, first + v, start / CHUNK) + i * LANES;
        Vec h[MANY];
        for (int m = 0; m < many; m++) h[m] = load(saved + m * LANES, LANES);
        aim(k, inputs[pass % 4], b, start - CHUNK, c);
        sweep_as_needed(k, i, many, h, block[v].A2 + i, block[v].steepest[pass], a->z.data != 0, tape);
        aim(k, outputs[pass % 4], b, start - CHUNK, c);
        if (pass % 4 == 3 && start) k->next = saved - i * LANES - n * LANES, k->next_row = LANES;
        reverse(k, tape, i, many, block[v].q + i, block[v].A + i, block[v].dA + i);
    }
    add_lanes(tape->dB, many, partial + i * CHUNK);
    add_lanes(tape->dC, many, partial + (n + i) * CHUNK);
}

static void backward_unit(const void *job, Int unit) {
    const Job *j = job;
    const Sizes s = j->s;
    const Arrays *a = &j->a;
    Int b = unit / j->groups, first = unit % j->groups * j->group, n = s.states;
    Int blocks = min_int(j->group, blocks_of(s.width) - first);
    Int all = blocks * n + !n;
    Vec A[all], A2[all], q[all], dA[all];
    Real steepest[all];
    Block block[blocks];
    Chunk chunks[blocks];
    Tape tape;
    memset(tape.dB, 0, sizeof tape.dB), memset(tape.dC, 0, sizeof tape.dC);
    for (Int v = 0; v < blocks; v++) {
        Int c = (first + v) * LANES, count = s.width - c, at = b * s.width + c;
        load_columns(A + v * n, a->A + c * n, n, count);
        load_columns(q + v * n, a->dstate + at * n, n, count);
        for (Int i = v * n; i < (v + 1) * n; i++) {
            A2[i] = A[i] * (Real)LOG2E;
            dA[i] = splat(0);
        }
        steepness(steepest + v * n, A2 + v * n, n);
        block[v] = (Block){A + v * n, A2 + v * n, q + v * n, dA + v * n, steepest + v * n,
                           splat(0), splat(0)};
    }
    for (Int at = chunks_of(j->end - j->start) - 1; at >= 0; at--) {
        Int start = j->start + at * CHUNK, i = 0;
        Real *partial = j->partial + (unit * (j->tile / CHUNK) + at) * 2 * n * CHUNK;
        for (Int v = 0; v < blocks; v++)
            begin_backward(chunks + v, j, b, (first + v) * LANES, start);
        for (; i + MANY <= n; i += MANY)
            backward_states(j, b, first, blocks, start, i, MANY, chunks, block, &tape, partial);
        for (; i < n; i++)
            backward_states(j, b, first, blocks, start, i, 1, chunks, block, &tape, partial);
        for (Int v = 0; v < blocks; v++) {
            Int c = (first + v) * LANES;
            end_backward(chunks + v, j, b, c, start, block + v);
            if (at % STRETCH == 0) add_to_totals(block + v, j, b, c);
        }
    }
    for (Int v = 0; v < blocks; v++) {
        Int c = (first + v) * LANES;
        store_columns(a->dstate + (b * s.width + c) * n, q + v * n, n, s.width - c);
    }
}

/* dB and dC of a chunk: the sum over a batch row's units, in their order. */
static void reduce_unit(const void *job, Int unit) {
    const Job *j = job;
    Int n = j->s.states, chunks = chunks_of(j->end - j->start), b = unit / chunks;
    Int at = unit % chunks, start = j->start + at * CHUNK;
    for (Int i = 0; i < 2 * n; i++)
        for (Int t = 0; t < CHUNK; t += LANES) {
            Vec sum = splat(0);
            for (Int g = 0; g < j->groups; g++)
                sum += load(j->partial + (((b * j->groups + g) * (j->tile / CHUNK) + at) * 2 * n + i)
                            * CHUNK + t, LANES);
            Rows to = i < n ? j->a.dB : j->a.dC;
            store_strided(row(to, b, start + t) + i % n, sum, to.row, j->end - start - t);
        }
}

/* Neighbouring blocks share pages of memory, and dB and dC are folded over lanes once per unit: a
 * unit of g blocks was seen to take as long as g + 1.5 would without. */
INLINE Job plan(Sizes s, Arrays a) {
    if (s.batch * s.tokens * s.width * s.states < 1 << 15) s.threads = 1;
    Job job = {s, a};
    Int blocks = blocks_of(s.width), least = INT64_MAX;
    for (Int g = 1; g <= min_int(blocks, GROUP) && (g == 1 || g * s.states <= MAX_STATES); g++) {
        Int groups = ceil_div(blocks, g), rounds = ceil_div(s.batch * groups, s.threads);
        if (rounds * (2 * g + 3) > least) continue;
        least = rounds * (2 * g + 3);
        job.group = g, job.groups = groups;
    }
    return job;
}

int forward(Sizes s, Arrays a) {
    Job job = plan(s, a);
    parallel_for(job.s.threads, s.batch * job.groups, forward_unit, &job);
    return 0;
}

/* Both return 0, or 1 where memory for the partial sums is refused. */
int backward(Sizes s, Arrays a) {
    Job job = plan(s, a);
    Int units = s.batch * job.groups, chunks = chunks_of(s.tokens);
    Int sums = units * 2 * s.states * CHUNK; /* of a chunk; none without channels or states */
    Int room = sums ? PARTIALS / sums : chunks;
    job.tile = (room < 1 ? 1 : min_int(room, chunks)) * CHUNK;
    job.partial = malloc((sums * (job.tile / CHUNK) + 1) * sizeof(Real));
    if (!job.partial) return 1;
    for (job.end = s.tokens; job.end > 0; job.end = job.start) {
        job.start = (job.end - 1) / job.tile * job.tile;
        parallel_for(job.s.threads, units, backward_unit, &job);
        parallel_for(job.s.threads, s.batch * chunks_of(job.end - job.start), reduce_unit, &job);
    }
    free(job.partial);
    return 0;
}
