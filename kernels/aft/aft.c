/* The average of AFT-conv (Zhai 2021, section 3.2) forward and backward; README.md derives it.
 *
 * LANES channels in a register, each walking through time alone. A unit of work is GROUP channel
 * blocks of one batch row, CHUNK queries of each in turn. Keys e^{k - c} of the window lie in an
 * array; c is the largest k so far, and where it rises they are scaled down.
 */
#include "../common.h"

enum {
    CHUNK = 32, /* queries between saved states */
    MANY = 4,   /* queries side by side while c stays; divides CHUNK */
    GROUP = 4,  /* channel blocks of a unit: neighbours share cache lines and pages */
    MAX_WINDOW = 128  /* the longest window, CHUNK or more */
};
const Int lanes = LANES, chunk = CHUNK, max_window = MAX_WINDOW; /* for the caller */

/* `tokens` keys, of which the first `before` are no queries; the window's length. */
typedef struct {
    Int batch, tokens, before, width, window, threads;
} Sizes;

typedef struct {
    Rows k, v, y, dy, dk, dv;
    Real *m, *state;    /* (window + 1, d), the last row for what is older; (b, 3, d) */
    Real *last, *saved; /* (b, 3, d); chunk starts (b, blocks, chunks, 3, LANES) or null */
    Real *dm, *dstate;  /* (b, window + 1, d), (b, 3, d): dstate holds that of `last` before */
} Arrays;

BY_CHANNELS(1 << 12)

typedef struct {
    Vec p, q, o; /* of the tokens older than the window: numerator p e^o, denominator q e^o */
} State;

INLINE State load_state(const Real *from, Int stride, Int count) {
    return (State){load(from, count), load(from + stride, count),
                   no_infinity(load(from + 2 * stride, count))};
}
INLINE void store_state(Real *to, State s, Int stride, Int count) {
    store(to, s.p, count), store(to + stride, s.q, count), store(to + 2 * stride, s.o, count);
}
INLINE Real *saved_chunk(const Job *j, Int b, Int block, Int index) {
    Int chunks = ceil_div(j->s.tokens - j->s.before, CHUNK);
    return j->a.saved + ((b * blocks_of(j->s.width) + block) * chunks + index) * 3 * LANES;
}
INLINE int any(Mask a) {
    Bits found = 0;
    for (int i = 0; i < LANES; i++) found |= a[i];
    return found != 0;
}

/* A chunk of queries from `start` on; keys and their window at [window - 1 + i] for query i. */
typedef struct {
    const Job *j;
    Int b, channel, count, start, steps, window;
    Vec m[MAX_WINDOW + 1], E[MAX_WINDOW + CHUNK], F[MAX_WINDOW + CHUNK]; /* e^{k - c} and e^{k - c} v */
    Vec c;
    State older;
} Window;

INLINE Vec key(const Window *x, Int i) {
    return no_infinity(load(row(x->j->a.k, x->b, i) + x->channel, x->count));
}
INLINE Vec value(const Window *x, Int i) {
    return load(row(x->j->a.v, x->b, i) + x->channel, x->count);
}

/* The window before the first query; keys there are none of weigh nothing. */
static void begin(Window *x, const Job *j, Int b, Int block, Int start, State older) {
    Int near = j->s.window - 1, first = start - near;
    x->j = j, x->b = b, x->channel = block * LANES, x->count = j->s.width - x->channel;
    x->start = start, x->steps = min_int(CHUNK, j->s.tokens - start), x->window = j->s.window;
    for (Int i = 0; i <= x->window; i++)
        x->m[i] = load(j->a.m + i * j->s.width + x->channel, x->count);
    x->older = older, x->c = older.o;
    for (Int i = 0; i < near; i++) {
        if (first + i < 0) continue;
        x->E[i] = key(x, first + i);
        x->c = larger(x->c, x->E[i]);
    }
    for (Int i = 0; i < near; i += MANY) {
        Vec e[MANY];
        ALL(m, MANY) e[m] = x->E[i + m] - x->c; /* past the last: overwritten later */
        exp_minus_abs(e, e, MANY);
        ALL(m, MANY) {
            int there = i + m < near && first + i + m >= 0;
            x->E[i + m] = there ? e[m] : splat(0);
            x->F[i + m] = there ? e[m] * value(x, first + i + m) : splat(0);
        }
    }
}

/* What `many` queries find: the state of the older tokens and its weight A, and how the token that
 * leaves the window afterwards joins them: older <- a older + b (v, 1). */
typedef struct {
    State older[MANY];
    Vec own[MANY], fall[MANY], A[MANY], a[MANY], b[MANY], num[MANY], den[MANY];
    Mask won[MANY]; /* the leaving token is the older ones' new maximum */
} Found;

/* Queries i .. of the chunk: their own keys enter the window; c rises at most for one at a time. */
INLINE void look(Window *x, Found *f, Int i, Vec c, int many) {
    Int t = x->start + i, at = x->window - 1 + i, leaving = t - x->window + 1;
    Vec d[2 * MANY], e[2 * MANY], out[MANY], o = x->older.o;
    State s = x->older;
    ALL(m, many) f->fall[m] = splat(1);
    if (many == 1) {
        f->fall[0] = x->c - c;
        exp_minus_abs(f->fall, f->fall, 1);
        for (Int n = i; n < at; n++) x->E[n] *= f->fall[0], x->F[n] *= f->fall[0];
    }
    x->c = c;
    ALL(m, many) {
        int leaves = leaving + m >= 0;
        Vec k = leaves ? key(x, leaving + m) : o;
        d[m] = key(x, t + m) - c;
        d[many + m] = o - c;
        out[m] = k - o;
        f->won[m] = k > o;
        o = larger(o, k);
    }
    exp_minus_abs(e, d, 2 * many);
    exp_minus_abs(out, out, many);
    ALL(m, many) {
        int leaves = leaving + m >= 0;
        Vec v = leaves ? value(x, leaving + m) : splat(0);
        f->own[m] = x->E[at + m] = e[m];
        x->F[at + m] = e[m] * value(x, t + m);
        f->A[m] = e[many + m];
        f->a[m] = blend(f->won[m], out[m], splat(1));
        f->b[m] = leaves ? blend(f->won[m], splat(1), out[m]) : splat(0);
        f->older[m] = s;
        s.p = f->a[m] * s.p + f->b[m] * v;
        s.q = f->a[m] * s.q + f->b[m];
    }
    s.o = o;
    x->older = s;
    ALL(m, many) f->num[m] = x->m[x->window] * f->A[m] * f->older[m].p;
    ALL(m, many) f->den[m] = x->m[x->window] * f->A[m] * f->older[m].q;
    for (Int n = 0; n < x->window; n++) {
        Vec w = x->m[n];
        ALL(m, many) f->num[m] += w * x->F[at + m - n];
        ALL(m, many) f->den[m] += w * x->E[at + m - n];
    }
}

/* As many as `together` says. Both sweeps call it, not to be compiled for each. */
ONCE void look_together(Window *x, Found *f, Int i, Vec c, int many) {
    if (many == MANY) look(x, f, i, c, MANY);
    else look(x, f, i, c, 1);
}

/* How many of the queries from i on can go side by side, and c after them. */
INLINE int together(const Window *x, Int i, Vec *c) {
    if (i + MANY <= x->steps) {
        Vec top = x->c;
        ALL(m, MANY) top = larger(top, key(x, x->start + i + m));
        if (!any(top > x->c)) {
            *c = x->c;
            return MANY;
        }
    }
    *c = larger(x->c, key(x, x->start + i));
    return 1;
}

static void forward_unit(const void *job, Int unit) {
    const Job *j = job;
    const Arrays *a = &j->a;
    const Group group = group_of(j, unit);
    Int b = group.b, first = group.first, blocks = group.blocks, d = j->s.width;
    State s[GROUP];
    Window x;
    for (Int g = 0; g < blocks; g++) {
        Int c = (first + g) * LANES;
        s[g] = load_state(a->state + b * 3 * d + c, d, d - c);
    }
    for (Int start = j->s.before; start < j->s.tokens; start += CHUNK)
        for (Int g = 0; g < blocks; g++) {
            Int index = (start - j->s.before) / CHUNK;
            if (a->saved) memcpy(saved_chunk(j, b, first + g, index), &s[g], sizeof *s);
            begin(&x, j, b, first + g, start, s[g]);
            for (Int i = 0; i < x.steps;) {
                Found f;
                Vec c;
                int many = together(&x, i, &c);
                look_together(&x, &f, i, c, many);
                for (Int m = 0; m < many; m++)
                    store(row(a->y, b, start - j->s.before + i + m) + x.channel,
                          f.num[m] / f.den[m], x.count);
                i += many;
            }
            s[g] = x.older;
        }
    for (Int g = 0; g < blocks; g++) {
        Int c = (first + g) * LANES;
        store_state(a->last + b * 3 * d + c, s[g], d, d - c);
    }
}

/* What comes back from later queries, of one channel block. G is dy/den and H that times y, of the
 * queries from the present one on, over e^{-c} of the present; P, Q and `o` are dL/dp, dL/dq and
 * dL/do (at constant p e^o, q e^o) of the older tokens' state. */
typedef struct {
    Vec G[2 * MAX_WINDOW], H[2 * MAX_WINDOW], dm[MAX_WINDOW + 1], P, Q, o;
} Future;

/* What the forward sweep of a chunk leaves for the reverse one. */
typedef struct {
    Vec own[CHUNK], fall[CHUNK], A[CHUNK], a[CHUNK], b[CHUNK], p[CHUNK], q[CHUNK];
    Mask won[CHUNK];
    Vec dm[MAX_WINDOW + 1];
} Past;

/* dy/den, and what the weights m get from it. */
INLINE void weigh(const Window *x, const Found *f, Future *u, Past *h, Int i, int many) {
    Int at = x->window - 1 + i;
    Vec G[MANY], H[MANY], sum = {};
    ALL(m, many) {
        Vec inverse = 1 / f->den[m];
        Int t = x->start - x->j->s.before + i + m;
        G[m] = load(row(x->j->a.dy, x->b, t) + x->channel, x->count) * inverse;
        H[m] = G[m] * f->num[m] * inverse;
        sum += f->A[m] * (G[m] * f->older[m].p - H[m] * f->older[m].q);
        u->G[i + m] = G[m], u->H[i + m] = H[m];
        h->own[i + m] = f->own[m], h->fall[i + m] = f->fall[m], h->A[i + m] = f->A[m];
        h->a[i + m] = f->a[m], h->b[i + m] = f->b[m], h->won[i + m] = f->won[m];
        h->p[i + m] = f->older[m].p, h->q[i + m] = f->older[m].q;
    }
    h->dm[x->window] += sum;
    for (Int n = 0; n < x->window; n++) {
        sum = h->dm[n];
        ALL(m, many) sum += G[m] * x->F[at + m - n];
        ALL(m, many) sum -= H[m] * x->E[at + m - n];
        h->dm[n] = sum;
    }
}

/* The keys i, i - 1 .. of the chunk get what the queries that saw them in their window give back.
 * Those that left it later hold already what came by the older tokens' state. */
INLINE void give(const Window *x, const Future *u, const Vec *own, Int i, int many) {
    const Arrays *a = &x->j->a;
    Vec num[MANY] = {}, den[MANY] = {};
    for (Int n = 0; n < x->window; n++) {
        Vec w = x->m[n];
        ALL(m, many) num[m] += w * u->G[i - m + n];
        ALL(m, many) den[m] += w * u->H[i - m + n];
    }
    ALL(m, many) {
        Int t = x->start + i - m;
        Real *dk = row(a->dk, x->b, t) + x->channel, *dv = row(a->dv, x->b, t) + x->channel;
        Vec k = own[-m] * (num[m] * value(x, t) - den[m]), v = own[-m] * num[m];
        if (t + x->window <= x->j->s.tokens) k += load(dk, x->count), v += load(dv, x->count);
        store(dk, k, x->count);
        store(dv, v, x->count);
    }
}

/* The older tokens' state before query i, and the token that joined it after. */
INLINE void leave(const Window *x, Future *u, const Past *h, Int i) {
    const Arrays *a = &x->j->a;
    Int t = x->start + i - x->window + 1;
    if (t >= 0) {
        Vec k = h->b[i] * (u->P * value(x, t) + u->Q) + (Vec)((Mask)u->o & h->won[i]);
        store(row(a->dk, x->b, t) + x->channel, k, x->count);
        store(row(a->dv, x->b, t) + x->channel, h->b[i] * u->P, x->count);
    }
    u->o = (Vec)((Mask)u->o & ~h->won[i]);
    u->P = h->a[i] * u->P + x->m[x->window] * h->A[i] * u->G[i];
    u->Q = h->a[i] * u->Q - x->m[x->window] * h->A[i] * u->H[i];
}

static void backward_chunk(const Job *j, Int b, Int block, Int start, Future *u) {
    Int near = j->s.window - 1, i;
    State older;
    Window x;
    Past h;
    memset(h.dm, 0, (near + 2) * sizeof *h.dm);
    memcpy(&older, saved_chunk(j, b, block, (start - j->s.before) / CHUNK), sizeof older);
    begin(&x, j, b, block, start, older);
    memmove(u->G + x.steps, u->G, near * sizeof *u->G);
    memmove(u->H + x.steps, u->H, near * sizeof *u->H);
    for (i = 0; i < x.steps;) {
        Found f;
        Vec c;
        int many = together(&x, i, &c);
        look_together(&x, &f, i, c, many);
        if (many == MANY) weigh(&x, &f, u, &h, i, MANY);
        else weigh(&x, &f, u, &h, i, 1);
        i += many;
    }
    for (i = 0; i < near + 2; i++) u->dm[i] += h.dm[i];
    if (start + x.steps == j->s.tokens) u->o -= x.older.p * u->P + x.older.q * u->Q;
    for (i = x.steps - 1; i >= 0;) {
        int many = i >= MANY - 1 ? MANY : 1;
        for (int m = 0; m < many; m++)
            if (any(h.fall[i - m] < 1)) many = 1;
        for (int m = 0; m < many; m++) leave(&x, u, &h, i - m);
        if (many == MANY) give(&x, u, h.own + i, i, MANY);
        else give(&x, u, h.own + i, i, 1);
        if (many == 1)
            for (Int n = i; n <= i + near; n++) u->G[n] *= h.fall[i], u->H[n] *= h.fall[i];
        i -= many;
    }
    if (start > j->s.before) return;
    u->o += h.p[0] * u->P + h.q[0] * u->Q;
    begin(&x, j, b, block, start, older); /* for the keys before the first query: e^{k - c} anew */
    memmove(u->G + near, u->G, near * sizeof *u->G), memset(u->G, 0, near * sizeof *u->G);
    memmove(u->H + near, u->H, near * sizeof *u->H), memset(u->H, 0, near * sizeof *u->H);
    x.start -= near;
    for (i = near - 1; i >= 0 && x.start + i >= 0; i--) give(&x, u, x.E + i, i, 1);
}

static void backward_unit(const void *job, Int unit) {
    const Job *j = job;
    const Arrays *a = &j->a;
    const Group group = group_of(j, unit);
    Int b = group.b, first = group.first, blocks = group.blocks, d = j->s.width;
    Int queries = j->s.tokens - j->s.before;
    Future u[GROUP];
    memset(u, 0, sizeof u);
    for (Int g = 0; g < blocks; g++) {
        Int c = (first + g) * LANES;
        State s = load_state(a->dstate + b * 3 * d + c, d, d - c);
        u[g].P = s.p, u[g].Q = s.q, u[g].o = s.o;
    }
    for (Int at = (queries - 1) / CHUNK * CHUNK; at >= 0; at -= CHUNK)
        for (Int g = 0; g < blocks; g++)
            backward_chunk(j, b, first + g, j->s.before + at, &u[g]);
    for (Int g = 0; g < blocks; g++) {
        Int c = (first + g) * LANES;
        State s = {u[g].P, u[g].Q, u[g].o};
        store_state(a->dstate + b * 3 * d + c, s, d, d - c);
        for (Int n = 0; n <= j->s.window; n++)
            store(a->dm + (b * (j->s.window + 1) + n) * d + c, u[g].dm[n], d - c);
    }
}

ENTRY(forward)
ENTRY(backward)
