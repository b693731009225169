/* Two partial attention results into one, forward and backward; README.md derives them. */
#include "../common.h"

enum { TOKENS = 128 };

typedef struct {
    Int batch, tokens, heads, width, threads;
} Sizes;

typedef struct {
    Rows o1, o2, out, dout, do1, do2;         /* (b, t, heads width) */
    Rows lse1, lse2, lse, dlse, dlse1, dlse2; /* (b, t, heads) */
} Arrays;

BY_SEGMENTS(s.heads * s.width)

/* 0 of what a softmax is over, NaN of infinity and NaN. */
INLINE Vec flaw(Vec lse) { return choose(lse == splat(-INFINITY), splat(0), lse - lse); }

/* The weights e^(lse_p - lse) of LANES heads, 0 where the part sees nothing, and the merged lse. */
INLINE Vec weights(Vec lse1, Vec lse2, Vec *w1, Vec *w2) {
    const Vec nothing = splat(-INFINITY);
    Vec top = larger(lse1, lse2), e, more;
    Vec apart = choose(top == nothing, splat(0), lse2 - lse1); /* not inf - inf */
    apart += flaw(lse1) + flaw(lse2);
    Vec below = negative(apart);
    exp_minus_abs(&e, &apart, 1);
    softplus(&more, 0, &below, 1); /* log(1 + e) */
    *w1 = choose(lse1 == nothing, splat(0), if_negative(apart, splat(1), e) / (1 + e));
    *w2 = choose(lse2 == nothing, splat(0), if_negative(apart, e, splat(1)) / (1 + e));
    return top + more;
}

static void forward_unit(const void *job, Int unit) {
    const Job *j = job;
    const Arrays *a = &j->a;
    const Segment seg = segment_of(j, unit);
    const Int b = seg.b, start = seg.start, end = seg.end, heads = j->s.heads, d = j->s.width;
    for (Int t = start; t < end; t++)
        for (Int first = 0; first < heads; first += LANES) {
            const Int count = heads - first;
            Vec w1, w2;
            Vec lse1 = load(row(a->lse1, b, t) + first, count);
            Vec lse2 = load(row(a->lse2, b, t) + first, count);
            store(row(a->lse, b, t) + first, weights(lse1, lse2, &w1, &w2), count);
            for (Int h = 0; h < min_int(LANES, count); h++) {
                const Int at = (first + h) * d;
                const Real *o1 = row(a->o1, b, t) + at, *o2 = row(a->o2, b, t) + at;
                Real *out = row(a->out, b, t) + at;
                for (Int c = 0; c < d; c += LANES)
                    store(out + c, load(o1 + c, d - c) * w1[h] + load(o2 + c, d - c) * w2[h], d - c);
            }
        }
}

static void backward_unit(const void *job, Int unit) {
    const Job *j = job;
    const Arrays *a = &j->a;
    const Segment seg = segment_of(j, unit);
    const Int b = seg.b, start = seg.start, end = seg.end, heads = j->s.heads, d = j->s.width;
    for (Int t = start; t < end; t++)
        for (Int first = 0; first < heads; first += LANES) {
            const Int count = heads - first;
            Vec w1, w2, along[LANES] = {};
            Vec lse1 = load(row(a->lse1, b, t) + first, count);
            Vec lse2 = load(row(a->lse2, b, t) + first, count);
            weights(lse1, lse2, &w1, &w2);
            for (Int h = 0; h < min_int(LANES, count); h++) {
                const Int at = (first + h) * d;
                const Real *o1 = row(a->o1, b, t) + at, *o2 = row(a->o2, b, t) + at;
                const Real *dout = row(a->dout, b, t) + at;
                Real *do1 = row(a->do1, b, t) + at, *do2 = row(a->do2, b, t) + at;
                for (Int c = 0; c < d; c += LANES) {
                    Vec g = load(dout + c, d - c);
                    along[h] += g * (load(o1 + c, d - c) - load(o2 + c, d - c));
                    store(do1 + c, g * w1[h], d - c);
                    store(do2 + c, g * w2[h], d - c);
                }
            }
            Vec pull = row_sums(along) * w1 * w2;
            Vec dlse = a->dlse.data ? load(row(a->dlse, b, t) + first, count) : splat(0);
            store(row(a->dlse1, b, t) + first, w1 * dlse + pull, count);
            store(row(a->dlse2, b, t) + first, w2 * dlse - pull, count);
        }
}

ENTRY(forward)
ENTRY(backward)
