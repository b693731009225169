/* Rotary positions of the heads of every token; README.md derives them. */
#include "../common.h"

enum {
    TOKENS = 128,
    MANY = 2 /* arrays that the same angles rotate */
};

typedef struct {
    Int batch, tokens, heads[MANY], width, half, threads;
} Sizes;

typedef struct {
    Rows x[MANY], y[MANY]; /* (b, t, heads width) */
    Rows cos, sin;         /* (b, t, half) */
} Arrays;

BY_SEGMENTS((s.heads[0] + s.heads[1]) * s.width)

static void forward_unit(const void *job, Int unit) {
    const Job *j = job;
    const Segment seg = segment_of(j, unit);
    const Int b = seg.b, start = seg.start, end = seg.end, half = j->s.half, d = j->s.width;
    for (Int t = start; t < end; t++) {
        const Real *cos = row(j->a.cos, b, t), *sin = row(j->a.sin, b, t);
        for (int n = 0; n < MANY; n++)
            for (Int h = 0; h < j->s.heads[n]; h++) {
                const Real *x = row(j->a.x[n], b, t) + h * d;
                Real *y = row(j->a.y[n], b, t) + h * d;
                for (Int i = 0; i < half; i += LANES) {
                    Int count = half - i;
                    Vec x1 = load(x + i, count), x2 = load(x + half + i, count);
                    Vec c = load(cos + i, count), s = load(sin + i, count);
                    store(y + i, x1 * c - x2 * s, count);
                    store(y + half + i, x1 * s + x2 * c, count);
                }
                if (2 * half < d) memcpy(y + 2 * half, x + 2 * half, (d - 2 * half) * sizeof *y);
            }
    }
}

ENTRY(forward)
