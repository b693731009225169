/* WKV of RWKV-4 (Peng 2023, section 3.1.2) forward and backward; README.md has the derivation.
 *
 * LANES channels in a register, each walking through time alone. A unit of work is GROUP channel
 * blocks of one batch row, CHUNK tokens of each in turn.
 */
#include "../common.h"

enum {
    CHUNK = 32, /* tokens between saved states */
    MANY = 4,   /* tokens whose exponentials are taken side by side */
    GROUP = 4   /* channel blocks of a unit: neighbours share cache lines and pages */
};
const Int lanes = LANES, chunk = CHUNK; /* the shape of `saved`, for the caller */

typedef struct {
    Int batch, tokens, width, threads;
} Sizes;

typedef struct {
    Rows k, v, y, dy, dk, dv;
    Real *w, *u, *state;     /* (d), (d), (b, 3, d) */
    Real *last, *saved;      /* (b, 3, d); chunk starts (b, blocks, chunks, 4, LANES) or null */
    Real *dw, *du, *dstate;  /* (b, d), (b, d), (b, 3, d): dstate holds that of `last` before */
} Arrays;

BY_CHANNELS(1 << 14)

/* Numerator p e^{o + low} and denominator q e^{o + low}. While no k exceeds o it falls by w again
 * and again, and its rounding would err the same way each time: `low` is what o lost. */
typedef struct {
    Vec p, q, o, low;
} State;

INLINE State load_state(const Real *from, Int stride, Int count) {
    State s = {.p = load(from, count), .q = load(from + stride, count)};
    s.o = no_infinity(load(from + 2 * stride, count));
    return s;
}
INLINE Vec lowered(Vec v, Vec low) { /* v e^low = v (1 + low), also where v is infinite */
    Vec product = v + low * v;
    return choose(product == product, product, v);
}
INLINE void store_state(Real *to, State s, Int stride, Int count) {
    store(to, lowered(s.p, s.low), count);
    store(to + stride, lowered(s.q, s.low), count);
    store(to + 2 * stride, s.o, count);
}
INLINE Real *saved_chunk(const Job *j, Int b, Int block, Int index) {
    Int chunks = ceil_div(j->s.tokens, CHUNK);
    return j->a.saved + ((b * blocks_of(j->s.width) + block) * chunks + index) * 4 * LANES;
}

/* What multiplies past and present of each token: A, B where it is read, a, b where it is written.
 * Of each pair one is 1 and the other an exponential. */
typedef struct {
    Vec A[MANY], B[MANY], a[MANY], b[MANY];
    Mask won[MANY]; /* the new maximum is k */
} Weights;

INLINE void weigh(Weights *x, State *s, const Vec *k, Vec w, Vec u, int many) {
    Vec d[2 * MANY], e[2 * MANY], o = s->o, low = s->low;
    ALL(m, many) {
        Vec step = w - low, aged = o - step;
        Vec key = choose(aged == aged, no_infinity(k[m]), aged), next = larger(key, aged);
        Vec fall = (o - next) - step;
        x->won[m] = ~(key <= aged); /* NaN wins, and stays */
        d[m] = (no_infinity(k[m] + u) - o) - low;
        d[many + m] = blend(x->won[m], fall, (key - next) - fall);
        low = (Vec)((Mask)fall & ~x->won[m]);
        o = next;
    }
    s->o = o, s->low = low;
    exp_minus_abs(e, d, 2 * many);
    ALL(m, many) {
        x->A[m] = if_negative(d[m], splat(1), e[m]);
        x->B[m] = if_negative(d[m], e[m], splat(1));
        x->a[m] = blend(x->won[m], e[many + m], splat(1));
        x->b[m] = blend(x->won[m], splat(1), e[many + m]);
    }
}

/* Rows of a later or an earlier chunk, a line at a time between arithmetic. */
INLINE void fetch(Rows a, Int b, Int t, Int c, Int tokens) {
    if (t >= 0 && t < tokens) __builtin_prefetch(row(a, b, t) + c, 0, 2);
}

INLINE void forward_tokens(const Job *j, Int b, Int t, Int c, State *s, Vec w, Vec u, int many) {
    const Arrays *a = &j->a;
    Int count = j->s.width - c;
    Vec k[MANY], v[MANY];
    Weights x;
    ALL(m, many) {
        k[m] = load(row(a->k, b, t + m) + c, count);
        v[m] = load(row(a->v, b, t + m) + c, count);
        fetch(a->k, b, t + m + CHUNK, c, j->s.tokens);
        fetch(a->v, b, t + m + CHUNK, c, j->s.tokens);
        fetch(a->y, b, t + m + CHUNK, c, j->s.tokens);
    }
    weigh(&x, s, k, w, u, many);
    ALL(m, many) {
        Vec y = (x.A[m] * s->p + x.B[m] * v[m]) / (x.A[m] * s->q + x.B[m]);
        store(row(a->y, b, t + m) + c, y, count);
        s->p = x.a[m] * s->p + x.b[m] * v[m];
        s->q = x.a[m] * s->q + x.b[m];
    }
}

static void forward_unit(const void *job, Int unit) {
    const Job *j = job;
    const Arrays *a = &j->a;
    const Group group = group_of(j, unit);
    Int b = group.b, first = group.first, blocks = group.blocks, d = j->s.width;
    State s[GROUP];
    for (Int i = 0; i < blocks; i++) {
        Int c = (first + i) * LANES;
        s[i] = load_state(a->state + b * 3 * d + c, d, d - c);
    }
    for (Int start = 0; start < j->s.tokens; start += CHUNK) {
        Int end = min_int(start + CHUNK, j->s.tokens), t;
        for (Int i = 0; i < blocks; i++) {
            Int c = (first + i) * LANES;
            Vec w = load(a->w + c, d - c), u = load(a->u + c, d - c);
            if (a->saved) memcpy(saved_chunk(j, b, first + i, start / CHUNK), &s[i], sizeof *s);
            for (t = start; t + MANY <= end; t += MANY)
                forward_tokens(j, b, t, c, &s[i], w, u, MANY);
            for (; t < end; t++) forward_tokens(j, b, t, c, &s[i], w, u, 1);
        }
    }
    for (Int i = 0; i < blocks; i++) {
        Int c = (first + i) * LANES;
        store_state(a->last + b * 3 * d + c, s[i], d, d - c);
    }
}

/* A chunk as the backward needs it, by token. */
typedef struct {
    Vec p[CHUNK], q[CHUNK], a[CHUNK], b[CHUNK]; /* before the token; its weights */
    Vec y[CHUNK], past[CHUNK], here[CHUNK];     /* dy/den A and dy/den B */
    Mask won[CHUNK];
} Chunk;

INLINE void sweep_tokens(Chunk *h, const Job *j, Int b, Int start, Int i, Int c, State *s, Vec w,
                         Vec u, int many) {
    const Arrays *a = &j->a;
    Int count = j->s.width - c, t = start + i;
    Vec k[MANY], v[MANY], dy[MANY];
    Weights x;
    ALL(m, many) {
        k[m] = load(row(a->k, b, t + m) + c, count);
        v[m] = load(row(a->v, b, t + m) + c, count);
        dy[m] = load(row(a->dy, b, t + m) + c, count);
        fetch(a->k, b, t + m - CHUNK, c, j->s.tokens);
        fetch(a->v, b, t + m - CHUNK, c, j->s.tokens);
        fetch(a->dy, b, t + m - CHUNK, c, j->s.tokens);
    }
    weigh(&x, s, k, w, u, many);
    ALL(m, many) {
        Vec inverse = 1 / (x.A[m] * s->q + x.B[m]), g = dy[m] * inverse;
        h->p[i + m] = s->p, h->q[i + m] = s->q;
        h->a[i + m] = x.a[m], h->b[i + m] = x.b[m], h->won[i + m] = x.won[m];
        h->y[i + m] = (x.A[m] * s->p + x.B[m] * v[m]) * inverse;
        h->past[i + m] = g * x.A[m], h->here[i + m] = g * x.B[m];
        s->p = x.a[m] * s->p + x.b[m] * v[m];
        s->q = x.a[m] * s->q + x.b[m];
    }
}

/* What reaches a state from later tokens: dL/dp, dL/dq, and `o`, dL/do at constant p e^o, q e^o. */
typedef State Future;

static void backward_chunk(const Job *j, Int b, Int block, Int start, Future *f, Vec *dw, Vec *du) {
    const Arrays *a = &j->a;
    Int c = block * LANES, count = j->s.width - c, steps = min_int(CHUNK, j->s.tokens - start), t;
    Vec w = load(a->w + c, count), u = load(a->u + c, count), sum_w = {}, sum_u = {};
    State s;
    memcpy(&s, saved_chunk(j, b, block, start / CHUNK), sizeof s);
    Chunk h;
    for (t = 0; t + MANY <= steps; t += MANY)
        sweep_tokens(&h, j, b, start, t, c, &s, w, u, MANY);
    for (; t < steps; t++) sweep_tokens(&h, j, b, start, t, c, &s, w, u, 1);
    Future g = *f;
    if (start + steps == j->s.tokens) g.o -= s.p * g.p + s.q * g.q;
    for (t = steps - 1; t >= 0; t--) {
        Vec v = load(row(a->v, b, start + t) + c, count), mine = h.here[t] * (v - h.y[t]);
        Vec to_k = (Vec)((Mask)g.o & h.won[t]);
        Vec dk = h.b[t] * (g.p * v + g.q) + mine + to_k;
        store(row(a->dk, b, start + t) + c, dk, count);
        store(row(a->dv, b, start + t) + c, h.b[t] * g.p + h.here[t], count);
        fetch(a->dk, b, start + t - CHUNK, c, j->s.tokens);
        fetch(a->dv, b, start + t - CHUNK, c, j->s.tokens);
        g.o = (Vec)((Mask)g.o & ~h.won[t]);
        sum_u += mine;
        sum_w += h.a[t] * (g.p * h.p[t] + g.q * h.q[t]) + g.o;
        g.p = h.a[t] * g.p + h.past[t];
        g.q = h.a[t] * g.q - h.past[t] * h.y[t];
    }
    if (start == 0) g.o += h.p[0] * g.p + h.q[0] * g.q;
    *f = g;
    *dw -= sum_w;
    *du += sum_u;
}

static void backward_unit(const void *job, Int unit) {
    const Job *j = job;
    const Arrays *a = &j->a;
    const Group group = group_of(j, unit);
    Int b = group.b, first = group.first, blocks = group.blocks, d = j->s.width;
    Future f[GROUP];
    Vec dw[GROUP] = {}, du[GROUP] = {};
    for (Int i = 0; i < blocks; i++) {
        Int c = (first + i) * LANES;
        f[i] = load_state(a->dstate + b * 3 * d + c, d, d - c);
    }
    for (Int start = (j->s.tokens - 1) / CHUNK * CHUNK; start >= 0; start -= CHUNK)
        for (Int i = 0; i < blocks; i++)
            backward_chunk(j, b, first + i, start, &f[i], &dw[i], &du[i]);
    for (Int i = 0; i < blocks; i++) {
        Int c = (first + i) * LANES;
        store_state(a->dstate + b * 3 * d + c, f[i], d, d - c);
        store(a->dw + b * d + c, dw[i], d - c);
        store(a->du + b * d + c, du[i], d - c);
    }
}

ENTRY(forward)
ENTRY(backward)
