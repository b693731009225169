/* Softmax attention of one query per text over any number of keys, forward; README.md says how. */
#pragma once
#include "../bfloat16.h"

enum {
    CHUNK = 128,    /* keys of a unit of work */
    MAX_HEADS = 128,
    PARTS = 2,      /* of a partial result besides its output: largest score, sum of weights */
    QUERIES = 4,    /* that share a pass over the values */
    COLUMNS = 4     /* vectors of channels in it */
};

typedef struct {
    Int batch, keys, heads, kv_heads, width, value_width;
    Rows q, k, v;  /* (b, 1 or keys, heads or kv_heads width) */
    Rows out, lse; /* lse may be null */
    Real *partial; /* (b, chunks, heads, value_width + PARTS) */
    Real scale;
    int narrow; /* whether k and v are in bfloat16 */
    Int chunks; /* of the keys; `attend` counts them */
} Attention;

/* Channels of keys or values from place `at` on. */
INLINE Vec cached(const Real *from, Int at, Int count, int narrow) {
    return narrow ? widened((const uint16_t *)from + at, count) : load(from + at, count);
}
INLINE Int place(Rows a, Int b, Int t) { return b * a.batch + t * a.row; }

INLINE Real largest(Vec v) { /* of the lanes; NaN does not count */
    SPREAD((&v), larger, 1)
    return v[0];
}
INLINE Real exponential(Real below) {
    Vec result, one = splat(below);
    exp2_products(&result, splat((Real)LOG2E), &one, 1, ANY);
    return result[0];
}

/* Fetches the keys of the next scores and the values of these: heads lie side by side, so that one
 * head alone is read in pieces too short for the processor to fetch ahead by itself. */
INLINE void fetch(const Attention *j, Int b, Int first, Int end, int narrow) {
    const Int size = narrow ? sizeof(uint16_t) : sizeof(Real);
    const Int wide = size * j->kv_heads * j->width, values = size * j->kv_heads * j->value_width;
    const char *k = (const char *)j->k.data, *v = (const char *)j->v.data;
    for (Int i = first; i < min_int(first + LANES, end); i++)
        for (Int c = 0; c < values; c += 64) __builtin_prefetch(v + size * place(j->v, b, i) + c, 0, 2);
    for (Int i = first + LANES; i < min_int(first + 2 * LANES, j->keys); i++)
        for (Int c = 0; c < wide; c += 64) __builtin_prefetch(k + size * place(j->k, b, i) + c, 0, 2);
}

/* Scores of LANES keys from the first on, `count` of them there, for one query of d channels. */
INLINE Vec scores(const Real *q, Rows k, Int b, Int first, Int count, Int offset, Int d, int narrow) {
    Int keys[LANES];
    Vec sums[LANES] = {};
    for (int i = 0; i < LANES; i++) keys[i] = place(k, b, first + min_int(i, count - 1)) + offset;
    for (Int c = 0; c < d; c += LANES) {
        Vec x = load(q + c, d - c);
        ALL(i, LANES) sums[i] += x * cached(k.data, keys[i] + c, d - c, narrow);
    }
    return row_sums(sums);
}

/* Adds weights times values, of `many` queries and `columns` vectors of channels from c on. */
INLINE void weigh(const Attention *j, Int b, Int first, Int count, Int g, Int c, Real *const *out,
                  const Real (*weights)[CHUNK], int many, int columns, int narrow) {
    const Int e = j->value_width;
    Vec sums[QUERIES][COLUMNS] = {};
    for (Int i = 0; i < count; i++) {
        const Int from = place(j->v, b, first + i) + g * e + c;
        Vec v[COLUMNS];
        ALL(n, columns) v[n] = cached(j->v.data, from + n * LANES, e - c - n * LANES, narrow);
        ALL(m, many) ALL(n, columns) sums[m][n] += weights[m][i] * v[n];
    }
    ALL(m, many) ALL(n, columns) store(out[m] + c + n * LANES, sums[m][n], e - c - n * LANES);
}
#define WEIGH(name, many, columns, narrow)                                                       \
    ONCE void name##_##many##_##columns(const Attention *j, Int b, Int first, Int count, Int g, Int c, \
                                        Real *const *out, const Real (*weights)[CHUNK]) {        \
        weigh(j, b, first, count, g, c, out, weights, many, columns, narrow);                    \
    }
#define WEIGHS(name, narrow)                                                                     \
    WEIGH(name, 1, 1, narrow) WEIGH(name, 1, 4, narrow) WEIGH(name, 2, 1, narrow)                \
    WEIGH(name, 2, 4, narrow) WEIGH(name, 3, 1, narrow) WEIGH(name, 3, 4, narrow)                \
    WEIGH(name, 4, 1, narrow) WEIGH(name, 4, 4, narrow)
#define ALL_WEIGHS(name)                                                                         \
    {{name##_1_1, name##_1_4}, {name##_2_1, name##_2_4},                                         \
     {name##_3_1, name##_3_4}, {name##_4_1, name##_4_4}}
WEIGHS(weigh_real, 0)
WEIGHS(weigh_narrow, 1)
typedef void Weigh(const Attention *, Int, Int, Int, Int, Int, Real *const *, const Real (*)[CHUNK]);
static Weigh *const WEIGH_BY[2][QUERIES][2] = {ALL_WEIGHS(weigh_real), ALL_WEIGHS(weigh_narrow)};

/* All heads over one chunk of keys. */
INLINE void attend_chunk(const Attention *j, Int unit, int narrow) {
    const Int b = unit / j->chunks, first = unit % j->chunks * CHUNK, h = j->heads;
    const Int count = min_int(CHUNK, j->keys - first), d = j->width, e = j->value_width;
    const Int shared = h / j->kv_heads;
    Real *partial = j->partial + unit * h * (e + PARTS);
    Real weights[MAX_HEADS][CHUNK] __attribute__((aligned(BYTES)));
    for (Int i = 0; i < count; i += LANES) {
        fetch(j, b, first + i, first + count, narrow);
        for (Int n = 0; n < h; n++) {
            const Real *q = row(j->q, b, 0) + n * d;
            Vec s = scores(q, j->k, b, first + i, count - i, n / shared * d, d, narrow);
            s *= j->scale;
            if (count - i < LANES)
                for (Int lane = count - i; lane < LANES; lane++) s[lane] = -INFINITY;
            store(weights[n] + i, s, LANES);
        }
    }
    for (Int n = 0; n < h; n++) {
        Vec top = splat(-INFINITY), sum = {};
        for (Int i = 0; i < count; i += LANES) top = larger(load(weights[n] + i, LANES), top);
        Real most = largest(top);
        for (Int i = 0; i < count; i += LANES) {
            Vec below = load(weights[n] + i, LANES) - most, weight;
            exp2_products(&weight, splat((Real)LOG2E), &below, 1, ANY);
            store(weights[n] + i, weight, LANES);
            for (Int lane = count - i; lane < LANES; lane++) weight[lane] = 0;
            sum += weight;
        }
        partial[n * (e + PARTS) + e] = most;
        partial[n * (e + PARTS) + e + 1] = total(sum);
    }
    for (Int g = 0; g < j->kv_heads; g++)
        for (Int n = g * shared; n < (g + 1) * shared; n += QUERIES) {
            const Int many = min_int(QUERIES, (g + 1) * shared - n);
            Real *out[QUERIES];
            for (Int m = 0; m < many; m++) out[m] = partial + (n + m) * (e + PARTS);
            Int c = 0;
            for (; c + COLUMNS * LANES <= e; c += COLUMNS * LANES)
                WEIGH_BY[narrow][many - 1][1](j, b, first, count, g, c, out, weights + n);
            for (; c < e; c += LANES) WEIGH_BY[narrow][many - 1][0](j, b, first, count, g, c, out, weights + n);
        }
}

static void chunk_unit(const void *job, Int unit) {
    const Attention *j = job;
    if (j->narrow) attend_chunk(j, unit, 1);
    else attend_chunk(j, unit, 0);
}

/* The partial results of one text, merged as `zoo.ops.merge` does. */
static void merge_unit(const void *job, Int b) {
    const Attention *j = job;
    const Int e = j->value_width, h = j->heads, step = h * (e + PARTS);
    for (Int n = 0; n < h; n++) {
        Real *from = j->partial + b * j->chunks * step + n * (e + PARTS);
        Real *out = row(j->out, b, 0) + n * e, top = -INFINITY, sum = 0;
        for (Int i = 0; i < j->chunks; i++)
            if (!(from[i * step + e] <= top)) top = from[i * step + e];
        for (Int i = 0; i < j->chunks; i++) {
            Real *factor = &from[i * step + e];
            *factor = exponential(*factor - top);
            sum += *factor * from[i * step + e + 1];
        }
        for (Int c = 0; c < e; c += LANES) {
            Vec all = {};
            for (Int i = 0; i < j->chunks; i++)
                all += load(from + i * step + c, e - c) * from[i * step + e];
            store(out + c, all / sum, e - c);
        }
        if (j->lse.data) row(j->lse, b, 0)[n] = top + (sizeof(Real) == 8 ? log(sum) : logf(sum));
    }
}

static void attend(Attention a, Int threads) {
    a.chunks = ceil_div(a.keys, CHUNK);
    threads = a.batch * a.keys * a.heads * a.width < 1 << 16 ? 1 : threads;
    parallel_for(threads, a.batch * a.chunks, chunk_unit, &a);
    parallel_for(a.chunks < 64 ? 1 : threads, a.batch, merge_unit, &a);
}
