/* The gated linear recurrence h_t = a_t h_{t-1} + u_t forward and backward; README.md derives it.
 *
 * A unit of work is a strip of neighbouring channels of one batch row, walked through time token by
 * token: a row of memory after the other, with what passes between tokens in the first-level cache.
 */
#include "../common.h"

typedef struct {
    Int batch, tokens, width, threads;
} Sizes;

typedef struct {
    Rows a, u, h, dh, da, du;
    Real *state, *last, *dstate; /* (b, d): h before and after all tokens, and the gradient */
} Arrays;

typedef struct {
    Sizes s;
    Arrays a;
    Int group, groups; /* channel blocks in a unit; units in a batch row */
    Int ahead;         /* tokens between a row and the one fetched meanwhile */
} Job;

enum {
    GROUP = 4,  /* channel blocks that a strip has at least, where there are enough */
    AHEAD = 192 /* channel blocks from what is read to what is fetched */
};

/* The channels of a unit: from `first` on, to but not including `end`. */
typedef struct {
    Int b, first, end;
} Strip;
INLINE Strip strip(const Job *j, Int unit) {
    Int b = unit / j->groups, first = unit % j->groups * j->group * LANES;
    return (Strip){b, first, min_int(first + j->group * LANES, j->s.width)};
}

/* Rows to come, a line at a time between arithmetic; past the end of time the last once more. */
INLINE void fetch(const Real *at) { __builtin_prefetch(at, 0, 2); }

/* `last` carries h: the state before, at the end the state after. */
static void forward_unit(const void *job, Int unit) {
    const Job *j = job;
    const Arrays *a = &j->a;
    Strip x = strip(j, unit);
    Real *carried = a->last + x.b * j->s.width;
    for (Int t = 0; t < j->s.tokens; t++) {
        const Real *decay = row(a->a, x.b, t), *u = row(a->u, x.b, t);
        Real *to = row(a->h, x.b, t);
        Int later = min_int(t + j->ahead, j->s.tokens - 1);
        const Real *decay_later = row(a->a, x.b, later), *u_later = row(a->u, x.b, later);
        const Real *to_later = row(a->h, x.b, later);
        for (Int c = x.first; c < x.end; c += LANES) {
            Int count = x.end - c;
            fetch(decay_later + c), fetch(u_later + c), fetch(to_later + c);
            Vec h = load(decay + c, count) * load(carried + c, count) + load(u + c, count);
            store(carried + c, h, count);
            store(to + c, h, count);
        }
    }
}

/* `dstate` carries what later tokens send back, a_{t+1} g_{t+1}: first the gradient of the state after,
 * at the end that of the state before.
 * Channels go downwards too, so that memory is read in one direction. */
static void backward_unit(const void *job, Int unit) {
    const Job *j = job;
    const Arrays *a = &j->a;
    Strip x = strip(j, unit);
    Real *carried = a->dstate + x.b * j->s.width;
    for (Int t = j->s.tokens - 1; t >= 0; t--) {
        const Real *before = t ? row(a->h, x.b, t - 1) : a->state + x.b * j->s.width;
        const Real *decay = row(a->a, x.b, t), *dh = row(a->dh, x.b, t);
        Real *da = row(a->da, x.b, t), *du = row(a->du, x.b, t);
        Int next = t < j->ahead ? 0 : t - j->ahead;
        const Real *decay_next = row(a->a, x.b, next), *dh_next = row(a->dh, x.b, next);
        const Real *before_next = row(a->h, x.b, next);
        const Real *da_next = row(a->da, x.b, next), *du_next = row(a->du, x.b, next);
        for (Int c = x.first + (x.end - x.first - 1) / LANES * LANES; c >= x.first; c -= LANES) {
            Int count = x.end - c;
            fetch(decay_next + c), fetch(dh_next + c), fetch(before_next + c);
            fetch(da_next + c), fetch(du_next + c);
            Vec g = load(dh + c, count) + load(carried + c, count);
            store(carried + c, load(decay + c, count) * g, count);
            store(da + c, g * load(before + c, count), count);
            store(du + c, g, count);
        }
    }
}

static Int greatest_common_divisor(Int a, Int b) { return b ? greatest_common_divisor(b, a % b) : a; }

/* As many strips to a batch row as give every thread the same share, but none too narrow. */
static void run(Sizes s, Arrays a, Work *work) {
    Int blocks = blocks_of(s.width), strips = s.threads / greatest_common_divisor(s.threads, s.batch);
    Int even = ceil_div(blocks, strips), least = min_int(s.batch * blocks / s.threads, GROUP);
    Int group = even > least ? even : least;
    Job job = {s, a, group, ceil_div(blocks, group), 1 + (AHEAD - 1) / group};
    Int threads = s.batch * s.tokens * s.width < 1 << 14 ? 1 : s.threads;
    parallel_for(threads, s.batch * job.groups, work, &job);
}
ENTRY(forward)
ENTRY(backward)
