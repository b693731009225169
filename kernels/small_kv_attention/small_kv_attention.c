/* Softmax attention of many queries over a few keys, forward; README.md says how. */
#include "../common.h"

enum { TOKENS = 128, MAX_WIDTH = 256, SIDE_BY_SIDE = 8 };

const Int max_keys = LANES;
const Int max_width = MAX_WIDTH; /* channels of a head */

typedef struct {
    Int batch, tokens, keys, heads, width, value_width, threads;
} Sizes;

typedef struct {
    Rows q, k, v, out; /* (b, t or keys, heads width) */
    Rows lse;          /* (b, t, heads) */
    Real *scale;       /* (1) */
} Arrays;

BY_SEGMENTS(s.heads * s.width)

/* The lse of scores that are infinite at most: the `top` of them, or NaN where some are NaN. */
ONCE __attribute__((cold)) Real infinite(Vec scores, Real top) {
    for (int i = 0; i < LANES; i++)
        if (scores[i] != scores[i]) return scores[i];
    return top;
}

/* One head of `many` tokens from t on; lanes are keys. */
INLINE void tokens(const Job *j, Int b, Int t, Int h, const Vec *keys, Mask there, int many) {
    const Arrays *a = &j->a;
    const Int d = j->s.width, e = j->s.value_width;
    const Real *q[SIDE_BY_SIDE];
    Vec scores[SIDE_BY_SIDE] = {}, top[SIDE_BY_SIDE];
    Vec below[SIDE_BY_SIDE], weights[SIDE_BY_SIDE], sum[SIDE_BY_SIDE];
    ALL(m, many) q[m] = row(a->q, b, t + m) + h * d;
    for (Int c = 0; c < d; c++) ALL(m, many) scores[m] += q[m][c] * keys[c];
    ALL(m, many) scores[m] = choose(there, scores[m], splat(-INFINITY));
    ALL(m, many) top[m] = scores[m];
    SPREAD(top, larger, many)
    ALL(m, many) below[m] = scores[m] - top[m];
    exp2_products(weights, splat((Real)LOG2E), below, many, ANY);
    ALL(m, many) sum[m] = weights[m] = choose(there, weights[m], splat(0));
    SPREAD(sum, plus, many)
    ALL(m, many) {
        Real lse = top[m][0] + (sizeof(Real) == 8 ? log(sum[m][0]) : logf(sum[m][0]));
        row(a->lse, b, t + m)[h] = lse == lse ? lse : infinite(scores[m], top[m][0]);
        weights[m] /= sum[m];
    }
    for (Int c = 0; c < e; c += LANES) {
        Vec out[SIDE_BY_SIDE] = {};
        for (Int i = 0; i < j->s.keys; i++) {
            Vec v = load(row(a->v, b, i) + h * e + c, e - c);
            ALL(m, many) out[m] += weights[m][i] * v;
        }
        ALL(m, many) store(row(a->out, b, t + m) + h * e + c, out[m], e - c);
    }
}

static void forward_unit(const void *job, Int unit) {
    const Job *j = job;
    const Segment seg = segment_of(j, unit);
    const Int b = seg.b, start = seg.start, end = seg.end, n = j->s.keys, d = j->s.width;
    Vec keys[MAX_WIDTH] = {};
    Mask there = {};
    for (Int i = 0; i < n; i++) there[i] = -1;
    for (Int h = 0; h < j->s.heads; h++) {
        for (Int i = 0; i < n; i++)
            for (Int c = 0; c < d; c++) keys[c][i] = row(j->a.k, b, i)[h * d + c] * *j->a.scale;
        Int t = start;
        for (; t + SIDE_BY_SIDE <= end; t += SIDE_BY_SIDE) tokens(j, b, t, h, keys, there, SIDE_BY_SIDE);
        for (; t < end; t++) tokens(j, b, t, h, keys, there, 1);
    }
}

ENTRY(forward)
