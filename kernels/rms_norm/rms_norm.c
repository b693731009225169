/* Root mean square layer normalisation, forward and backward; README.md derives it.
 *
 * A unit of work is TOKENS tokens of one batch row, LANES of them at a time: their sums over the
 * width become one vector, so that roots and quotients are taken for all of them at once.
 */
#include "../common.h"

enum { TOKENS = 256 };

const Int segment = TOKENS; /* the shape of dweight, for the caller */

typedef struct {
    Int batch, tokens, width, threads;
} Sizes;

typedef struct {
    Rows x, y, dy, dx;
    Real *weight, *eps; /* (d), (1) */
    Real *dweight;      /* (b, segments, d) */
} Arrays;

BY_SEGMENTS(s.width)

/* 1 / sqrt(mean of squares + eps) of each of `count` tokens from t on, in its lane. */
INLINE Vec scales(const Job *j, Int b, Int t, Int count) {
    Vec squares[LANES] = {};
    for (Int i = 0; i < count; i++)
        for (Int c = 0; c < j->s.width; c += LANES) {
            Vec x = load(row(j->a.x, b, t + i) + c, j->s.width - c);
            squares[i] += x * x;
        }
    Vec mean = row_sums(squares) / (Real)j->s.width + *j->a.eps, scale;
    for (int i = 0; i < LANES; i++) scale[i] = 1 / (sizeof(Real) == 8 ? sqrt(mean[i]) : sqrtf(mean[i]));
    return scale;
}

static void forward_unit(const void *job, Int unit) {
    const Job *j = job;
    const Segment seg = segment_of(j, unit);
    const Int b = seg.b, start = seg.start, end = seg.end, d = j->s.width;
    for (Int t = start; t < end; t += LANES) {
        Int count = min_int(LANES, end - t);
        Vec scale = scales(j, b, t, count);
        for (Int i = 0; i < count; i++) {
            const Real *x = row(j->a.x, b, t + i);
            Real *y = row(j->a.y, b, t + i);
            for (Int c = 0; c < d; c += LANES)
                store(y + c, load(x + c, d - c) * scale[i] * load(j->a.weight + c, d - c), d - c);
        }
    }
}

static void backward_unit(const void *job, Int unit) {
    const Job *j = job;
    const Segment seg = segment_of(j, unit);
    const Int b = seg.b, start = seg.start, end = seg.end, d = j->s.width;
    Real *dweight = j->a.dweight + unit * d;
    memset(dweight, 0, d * sizeof *dweight);
    for (Int t = start; t < end; t += LANES) {
        Int count = min_int(LANES, end - t);
        Vec scale = scales(j, b, t, count), along[LANES] = {};
        for (Int i = 0; i < count; i++)
            for (Int c = 0; c < d; c += LANES)
                along[i] += load(row(j->a.x, b, t + i) + c, d - c) * load(j->a.weight + c, d - c)
                          * load(row(j->a.dy, b, t + i) + c, d - c);
        Vec pull = row_sums(along) * scale * scale * scale / (Real)d;
        for (Int i = 0; i < count; i++) {
            const Real *x_i = row(j->a.x, b, t + i), *dy_i = row(j->a.dy, b, t + i);
            Real *dx = row(j->a.dx, b, t + i);
            for (Int c = 0; c < d; c += LANES) {
                Vec x = load(x_i + c, d - c), dy = load(dy_i + c, d - c) * scale[i];
                store(dx + c, dy * load(j->a.weight + c, d - c) - x * pull[i], d - c);
                store(dweight + c, load(dweight + c, d - c) + dy * x, d - c);
            }
        }
    }
}

ENTRY(forward)
ENTRY(backward)
