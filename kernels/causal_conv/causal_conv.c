/* Depthwise causal convolution with bias and silu, forward and backward; README.md derives it.
 *
 * A unit of work is TOKENS tokens of one batch row by WIDE vectors of channels, read row by row.
 */
#include "../common.h"

enum {
    TOKENS = 512,
    WIDE = 16,
    MANY = 4, /* vectors side by side; divides WIDE */
    MAX_WINDOW = 8  /* the widest window */
};

const Int segment = TOKENS, max_window = MAX_WINDOW; /* the shape of dweight, for the caller */

typedef struct {
    Int batch, tokens, width, window, silu, threads;
} Sizes;

typedef struct {
    Rows x, state;           /* (b, t, d); (b, window - 1, d): the inputs before the first */
    Rows y, last, dy, dx, dstate;
    Real *weight, *bias;     /* (d, window), the last column weighs the present; (d) or null */
    Real *dweight, *dbias;   /* (b, segments, window, d), (b, segments, d) */
} Arrays;

typedef struct {
    Sizes s;
    Arrays a;
    Int segments, tiles;
} Job;

typedef struct {
    Int b, segment, start, end, channel, count; /* of one unit */
} Place;

INLINE Place place(const Job *j, Int unit) {
    Int tile = unit % j->tiles, index = unit / j->tiles % j->segments, c = tile * WIDE * LANES;
    return (Place){unit / j->tiles / j->segments, index, index * TOKENS,
                   min_int((index + 1) * TOKENS, j->s.tokens), c,
                   min_int(WIDE * LANES, j->s.width - c)};
}
/* Row t of the state followed by the sequence; t >= 1 - window. */
INLINE Real *input(const Sizes *s, Rows x, Rows state, Int b, Int t) {
    return t < 0 ? row(state, b, t + s->window - 1) : row(x, b, t);
}

typedef struct {
    Vec weight[WIDE][MAX_WINDOW], bias[WIDE];
} Filter;

INLINE void load_filter(Filter *f, const Job *j, Place p) {
    memset(f, 0, sizeof *f);
    for (Int i = 0, c = p.channel; c < p.channel + p.count; i++, c += LANES) {
        load_columns(f->weight[i], j->a.weight + c * j->s.window, j->s.window, j->s.width - c);
        if (j->a.bias) f->bias[i] = load(j->a.bias + c, j->s.width - c);
    }
}
/* bias + sum_k weight_k x_{t - window + 1 + k}, before the activation, of the MANY vectors from i on;
 * theirs are the channels from c on, of which `left` are there. */
INLINE void convolve(const Filter *f, Real *const *inputs, Int window, Int i, Int c, Int left,
                     Vec *sum) {
    ALL(m, MANY) sum[m] = f->bias[i + m];
    for (Int k = 0; k < window; k++)
        ALL(m, MANY) sum[m] += f->weight[i + m][k] * load(inputs[k] + c + m * LANES, left - m * LANES);
}

static void forward_unit(const void *job, Int unit) {
    const Job *j = job;
    const Place p = place(j, unit);
    const Int window = j->s.window;
    Real *inputs[MAX_WINDOW];
    Vec sum[MANY];
    Filter f;
    load_filter(&f, j, p);
    for (Int t = p.start; t < p.end; t++) {
        Real *y = row(j->a.y, p.b, t);
        for (Int k = 0; k < window; k++)
            inputs[k] = input(&j->s, j->a.x, j->a.state, p.b, t - window + 1 + k);
        for (Int i = 0, c = p.channel; c < p.channel + p.count; i += MANY, c += MANY * LANES) {
            convolve(&f, inputs, window, i, c, j->s.width - c, sum);
            if (j->s.silu) silu(sum, 0, sum, MANY);
            ALL(m, MANY) store(y + c + m * LANES, sum[m], j->s.width - c - m * LANES);
        }
    }
    for (Int k = 0; k < window - 1 && p.end == j->s.tokens; k++) {
        const Real *x = input(&j->s, j->a.x, j->a.state, p.b, p.end - window + 1 + k);
        memcpy(row(j->a.last, p.b, k) + p.channel, x + p.channel, p.count * sizeof *x);
    }
}

/* dx_s = sum_i weight_{window - 1 - i} dsum_{s + i}: finished window - 1 tokens later, so the last
 * `window` rows of dsum go round in a ring. The rows after the segment are computed here again. */
static void backward_unit(const void *job, Int unit) {
    const Job *j = job;
    const Place p = place(j, unit);
    const Int window = j->s.window;
    const Sizes *s = &j->s;
    const Arrays *a = &j->a;
    Real *inputs[MAX_WINDOW];
    Vec ring[MAX_WINDOW][WIDE] = {}, *past[MAX_WINDOW], sum[MANY], slope[MANY];
    Vec dweight[MAX_WINDOW][WIDE] = {}, dbias[WIDE] = {};
    Filter f;
    load_filter(&f, j, p);
    for (Int t = p.start; t < p.end + window - 1; t++) {
        Int done = t - window + 1; /* dx of this token is complete now */
        int inside = t < s->tokens, mine = t < p.end, complete = !p.start || done >= p.start;
        Real *dx = complete ? input(s, a->dx, a->dstate, p.b, done) : 0;
        const Real *dy = row(a->dy, p.b, t);
        /* of the rows t - k there are, from the first of the sequence to its last */
        Int nearest = inside ? 0 : t - s->tokens + 1, farthest = min_int(window - 1, t - p.start);
        for (Int k = 0; k < window; k++) {
            past[k] = ring[(t - k + window) % window];
            if (inside) inputs[k] = input(s, a->x, a->state, p.b, done + k);
        }
        for (Int i = 0, c = p.channel; c < p.channel + p.count; i += MANY, c += MANY * LANES) {
            Int left = s->width - c;
            Vec *dsum = past[0] + i;
            ALL(m, MANY) dsum[m] = inside ? load(dy + c + m * LANES, left - m * LANES) : splat(0);
            if (inside && s->silu) {
                convolve(&f, inputs, window, i, c, left, sum);
                silu(sum, slope, sum, MANY);
                ALL(m, MANY) dsum[m] *= slope[m];
            }
            if (mine) ALL(m, MANY) dbias[i + m] += dsum[m];
            for (Int k = 0; k < window && mine; k++)
                ALL(m, MANY)
                dweight[k][i + m] += dsum[m] * load(inputs[k] + c + m * LANES, left - m * LANES);
            if (!complete) continue;
            ALL(m, MANY) sum[m] = splat(0);
            for (Int k = nearest; k <= farthest; k++)
                ALL(m, MANY) sum[m] += f.weight[i + m][k] * past[k][i + m];
            ALL(m, MANY) store(dx + c + m * LANES, sum[m], left - m * LANES);
        }
    }
    Int at = p.b * j->segments + p.segment;
    for (Int i = 0, c = p.channel; c < p.channel + p.count; i++, c += LANES) {
        store(a->dbias + at * s->width + c, dbias[i], s->width - c);
        for (Int k = 0; k < window; k++)
            store(a->dweight + (at * window + k) * s->width + c, dweight[k][i], s->width - c);
    }
}

static void run(Sizes s, Arrays a, Work *work) {
    Job job = {s, a, ceil_div(s.tokens, TOKENS), ceil_div(blocks_of(s.width), WIDE)};
    Int threads = s.batch * s.tokens * s.width < 1 << 15 ? 1 : s.threads;
    parallel_for(threads, s.batch * job.segments * job.tiles, work, &job);
}
ENTRY(forward)
ENTRY(backward)
