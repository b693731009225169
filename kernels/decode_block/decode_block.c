/* One token through half of a block, onto + norm'(f(norm(x))); README.md says how. */
#include "../decode_attention/decode_attention.h"
#include "../quantized_linear/quantized_linear.h"

typedef enum { RMS, RMS_OFFSET, LAYER } Norm;
typedef enum { SILU, GELU, GELU_TANH } Activation;
static Form *const FORMS[] = {real_products, bfloat16_products, int8_products, int4_products};

const Int max_heads = MAX_HEADS;

typedef struct {
    Int form, bytes, scales; /* its place in FORMS; columns of its bits and of their scales */
} Kept;

typedef struct {
    Int width, inner, outputs[MANY]; /* of x; of what W_last reads; of the matrices that read x */
    Kept first, last, selection, step; /* those that read x; W_last; W_x and W_dt */
    Int norm, post_norm, head_norm, activation; /* of the latter one more, 0 without */
    Int heads, kv_heads, head_width, pairs, keys;
    Int states, rank, taps;
    Int narrow; /* whether all but `numbers`, cos, sin, h and scales are in bfloat16 */
    Int threads;
} Sizes;

typedef struct { /* plain numbers, or bits and their scales; the bias may be null */
    const Real *weight, *bias;
    const int8_t *bits;
    const uint16_t *scale;
} Matrix;

typedef struct { /* any of the vectors may be null */
    Matrix first[MANY], last, selection, step;
    const Real *x, *onto;
    Real *y;
    const Real *norm_weight, *norm_bias, *post_weight, *post_bias, *q_norm, *k_norm;
    const Real *numbers; /* as below: what is under the roots of the norms, the scores' scale */
    const Real *cos, *sin; /* (pairs) */
    Real *k, *v;           /* (keys, kv_heads, head_width), the last of which is written here */
    const Real *conv_weight, *conv_bias, *A_log, *D; /* (inner, taps or states), or (inner) */
    const Real *conv, *h;                            /* (taps - 1, inner), (inner, states) */
    Real *conv_after, *h_after;
} Arrays;
enum { EPS, POST_EPS, HEAD_EPS, SCALE, SELECTION_EPS };

INLINE Real root(Real x) { return sizeof(Real) == 8 ? sqrt(x) : sqrtf(x); }
INLINE Vec weight_or(const Real *w, Int c, Int count, Real absent) {
    return w ? load(w + c, count) : splat(absent);
}

/* y may be x. */
static void normalise(Real *y, const Real *x, const Real *w, const Real *b, Int n, Real eps, Int norm) {
    Vec sum = {}, squares = {};
    Real mean = 0;
    if (norm == LAYER) {
        for (Int c = 0; c < n; c += LANES) sum += load(x + c, n - c);
        mean = total(sum) / n;
    }
    for (Int c = 0; c < n; c += LANES) {
        Vec v = load(x + c, n - c) - mean;
        for (Int lane = n - c; lane < LANES; lane++) v[lane] = 0;
        squares += v * v;
    }
    const Real scale = 1 / root(total(squares) / n + eps);
    for (Int c = 0; c < n; c += LANES) {
        Vec factor = weight_or(w, c, n - c, norm == RMS_OFFSET ? 0 : 1);
        if (norm == RMS_OFFSET) factor += 1;
        store(y + c, (load(x + c, n - c) - mean) * scale * factor + weight_or(b, c, n - c, 0), n - c);
    }
}

INLINE Vec sigmoid(Vec v) {
    Vec e;
    exp_minus_abs(&e, &v, 1);
    return if_negative(v, e, splat(1)) / (1 + e);
}
INLINE Vec activated(Vec v, Int activation) {
    if (activation == SILU) return v * sigmoid(v);
    if (activation == GELU_TANH) /* (1 + tanh u) / 2 is the sigmoid of 2 u */
        return v * sigmoid((Real)1.5957691216057307117597842397375 * (v + (Real)0.044715 * v * v * v));
    Vec result;
    for (int i = 0; i < LANES; i++) {
        const Real u = v[i] * (Real)0.70710678118654752440084436210485;
        result[i] = v[i] * (Real)0.5 * (1 + (sizeof(Real) == 8 ? erf(u) : erff(u)));
    }
    return result;
}

INLINE Rows one_row(Real *at) { return (Rows){at, 0, 0}; }

INLINE Product product(const Matrix *m, Int inputs, Int outputs, Real *x, Real *y) {
    return (Product){1, inputs, outputs, one_row(x), one_row(y), m->weight,
                     (const uint16_t *)m->weight, m->bits, m->scale, m->bias, 0};
}

/* The products of norm(x) with up to MANY matrices, to places behind one another. */
static int project(const Sizes *s, const Arrays *a, Real *u, Real *to) {
    Product of[MANY] = {};
    int many = 0;
    normalise(u, a->x, a->norm_weight, a->norm_bias, s->width, a->numbers[EPS], s->norm);
    for (; many < MANY && s->outputs[many]; to += s->outputs[many++])
        of[many] = product(&a->first[many], s->width, s->outputs[many], u, to);
    return FORMS[s->first.form](of, many, s->threads);
}

/* y = onto + norm'(W_last z + b_last) */
static int add(const Sizes *s, const Arrays *a, Real *z, Real *u) {
    const Int n = s->width;
    Product last = product(&a->last, s->inner, n, z, u);
    if (FORMS[s->last.form](&last, 1, s->threads)) return 1;
    if (s->post_norm)
        normalise(u, u, a->post_weight, a->post_bias, n, a->numbers[POST_EPS], s->post_norm - 1);
    for (Int c = 0; c < n; c += LANES) store(a->y + c, load(a->onto + c, n - c) + load(u + c, n - c), n - c);
    return 0;
}

/* W_last (f(gate) * up), or W_last f(up) without a gate: matrix 0 is `up`, 1 the gate. */
static int fed_forward(const Sizes *s, const Arrays *a, Real *u, Real *up) {
    const Int n = s->outputs[0];
    if (project(s, a, u, up)) return 1;
    if (!s->outputs[1])
        for (Int c = 0; c < n; c += LANES)
            store(up + c, activated(load(up + c, n - c), s->activation), n - c);
    else
        for (Int c = 0; c < n; c += LANES) {
            Vec gate = load(up + n + c, n - c);
            store(up + c, activated(gate, s->activation) * load(up + c, n - c), n - c);
        }
    return add(s, a, up, u);
}

/* Normalises and rotates every head, from x to y, which may be x. */
static void prepare(const Sizes *s, const Arrays *a, Real *y, const Real *x, Int heads, const Real *norm) {
    const Int d = s->head_width, half = s->pairs;
    for (Int h = 0; h < heads; h++, x += d, y += d) {
        if (norm) normalise(y, x, norm, 0, d, a->numbers[HEAD_EPS], s->head_norm - 1);
        else if (y != x) memcpy(y, x, d * sizeof *y);
        for (Int i = 0; i < half; i += LANES) {
            const Int count = half - i;
            Vec x1 = load(y + i, count), x2 = load(y + half + i, count);
            Vec c = load(a->cos + i, count), w = load(a->sin + i, count);
            store(y + i, x1 * c - x2 * w, count);
            store(y + half + i, x1 * w + x2 * c, count);
        }
    }
}

/* Numbers to place `at` of an array that is kept. */
static void keep(const Sizes *s, Real *to, Int at, const Real *from, Int count) {
    if (s->narrow) store_narrowed((uint16_t *)to + at, from, count);
    else memcpy(to + at, from, count * sizeof *to);
}

/* W_last softmax(q k^T) v: matrices 0, 1, 2 are those of q, k and v, 3 that of the output's gate. */
static int attended(const Sizes *s, const Arrays *a, Real *u, Real *q) {
    const Int d = s->head_width, h = s->heads, g = s->kv_heads, last = (s->keys - 1) * g * d;
    Real *k = q + h * d, *v = k + g * d, *gate = v + g * d, *out = gate + s->outputs[3], *partial = out + h * d;
    if (project(s, a, u, q)) return 1;
    prepare(s, a, q, q, h, a->q_norm);
    prepare(s, a, k, k, g, a->k_norm);
    keep(s, a->k, last, k, g * d);
    keep(s, a->v, last, v, g * d);
    attend((Attention){1, s->keys, h, g, d, d, one_row(q), {a->k, 0, g * d}, {a->v, 0, g * d},
                       one_row(out), {}, partial, a->numbers[SCALE], s->narrow, 0},
           s->threads);
    if (s->outputs[3])
        for (Int c = 0; c < h * d; c += LANES)
            store(out + c, load(out + c, h * d - c) * sigmoid(load(gate + c, h * d - c)), h * d - c);
    return add(s, a, out, u);
}

/* y = silu(w * (the last taps inputs) + b), channel by channel, and the inputs to come back to. */
static void convolve(const Sizes *s, const Arrays *a, Real *y, const Real *x) {
    const Int n = s->inner, kept = s->taps - 1;
    for (Int c = 0; c < n; c++) {
        const Real *w = a->conv_weight + c * s->taps;
        Real sum = a->conv_bias ? a->conv_bias[c] : 0;
        for (Int i = 0; i < kept; i++) sum += w[i] * a->conv[i * n + c];
        y[c] = sum + w[kept] * x[c];
    }
    for (Int c = 0; c < n; c += LANES) store(y + c, activated(load(y + c, n - c), SILU), n - c);
    memcpy(a->conv_after, a->conv + n, (kept - 1) * n * sizeof *x);
    memcpy(a->conv_after + (kept - 1) * n, x, n * sizeof *x);
}

/* One channel: h' = exp(dt A) h + dt B x with A = -exp(A_log), and the sum of C h' by lanes. */
INLINE Vec remember(const Sizes *s, const Arrays *a, Int c, Real dt, Real x, const Real *B, const Real *C) {
    const Int n = s->states;
    const Vec log2e = splat((Real)LOG2E);
    Vec sum = {};
    for (Int i = 0; i < n; i += LANES) {
        Vec rate = load(a->A_log + c * n + i, n - i), decay;
        exp2_products(&rate, log2e, &rate, 1, ANY);
        rate *= -dt;
        exp2_products(&decay, log2e, &rate, 1, ANY);
        Vec h = decay * load(a->h + c * n + i, n - i) + dt * x * load(B + i, n - i);
        store(a->h_after + c * n + i, h, n - i);
        sum += h * load(C + i, n - i);
    }
    return sum;
}

/* u <- (C h' + D u) silu(z), where dt is still without its softplus. */
static void scan(const Sizes *s, const Arrays *a, Real *u, const Real *dt, const Real *B, const Real *C,
                 const Real *z) {
    const Int n = s->inner;
    for (Int c = 0; c < n; c += LANES) {
        Vec step = load(dt + c, n - c), x = load(u + c, n - c), sums[LANES] = {};
        softplus(&step, 0, &step, 1);
        for (Int i = 0; i < min_int(LANES, n - c); i++) sums[i] = remember(s, a, c + i, step[i], x[i], B, C);
        Vec y = row_sums(sums) + load(a->D + c, n - c) * x;
        store(u + c, y * activated(load(z + c, n - c), SILU), n - c);
    }
}

/* W_last ((C h + D u) silu(z)): matrix 0 makes u, before its convolution, and z. */
static int selective(const Sizes *s, const Arrays *a, Real *norm_x, Real *uz) {
    const Int n = s->inner, parts[] = {s->rank, s->states, s->states}, low = s->rank + 2 * s->states;
    Real *z = uz + n, *u = z + n, *dt = u + n, *selected = dt + n, *B = selected + s->rank, *C = B + s->states;
    Product selection = product(&a->selection, n, low, u, selected);
    Product step = product(&a->step, s->rank, n, selected, dt);
    if (project(s, a, norm_x, uz)) return 1;
    convolve(s, a, u, uz);
    if (FORMS[s->selection.form](&selection, 1, s->threads)) return 1;
    if (a->numbers[SELECTION_EPS] > 0) {
        Real *part = selected;
        for (int i = 0; i < 3; part += parts[i++])
            normalise(part, part, 0, 0, parts[i], a->numbers[SELECTION_EPS], RMS);
    }
    if (FORMS[s->step.form](&step, 1, s->threads)) return 1;
    scan(s, a, u, dt, B, C, z);
    return add(s, a, u, norm_x);
}

typedef int Half(const Sizes *s, const Arrays *a, Real *u, Real *rest);

static int run_wide(Sizes s, Arrays a, Half *half) {
    Int numbers = s.width + s.heads * s.head_width;
    for (int m = 0; m < MANY; m++) numbers += s.outputs[m];
    numbers += ceil_div(s.keys, CHUNK) * s.heads * (s.head_width + PARTS);
    if (s.states) numbers += 2 * s.inner + s.rank + 2 * s.states;
    Real *u = malloc(numbers * sizeof *u);
    if (!u) return 1;
    const unsigned before = flush_denormals();
    const int failed = half(&s, &a, u, u + s.width);
    restore_denormals(before);
    free(u);
    return failed;
}

typedef struct {
    const Real **of;
    Int count;
} Vector;

/* Vectors in bfloat16 are widened first, and what is made of them is narrowed behind. */
static int run(Sizes s, Arrays a, Half *half) {
    if (!s.narrow) return run_wide(s, a, half);
    const Int w = s.width, inner = s.inner, before = s.taps ? (s.taps - 1) * inner : 0;
    Vector of[] = {{&a.x, w}, {&a.onto, w}, {&a.norm_weight, w}, {&a.norm_bias, w}, {&a.post_weight, w},
                   {&a.post_bias, w}, {&a.q_norm, s.head_width}, {&a.k_norm, s.head_width},
                   {&a.conv_weight, inner * s.taps}, {&a.conv_bias, inner}, {&a.A_log, inner * s.states},
                   {&a.D, inner}, {&a.conv, before}, {&a.last.bias, w},
                   {&a.selection.bias, s.rank + 2 * s.states}, {&a.step.bias, inner},
                   {&a.first[0].bias, s.outputs[0]}, {&a.first[1].bias, s.outputs[1]},
                   {&a.first[2].bias, s.outputs[2]}, {&a.first[3].bias, s.outputs[3]}};
    enum { VECTORS = sizeof of / sizeof *of };
    Real *const y = a.y, *const conv_after = a.conv_after;
    Int numbers = w + before;
    for (int i = 0; i < VECTORS; i++) numbers += *of[i].of ? of[i].count : 0;
    Real *const wide = malloc(numbers * sizeof *wide), *to = wide + w + before;
    if (!wide) return 1;
    for (int i = 0; i < VECTORS; i++)
        if (*of[i].of) {
            const uint16_t *from = (const uint16_t *)*of[i].of;
            const Int n = of[i].count;
            for (Int c = 0; c < n; c += LANES) store(to + c, widened(from + c, n - c), n - c);
            *of[i].of = to;
            to += n;
        }
    a.y = wide;
    a.conv_after = wide + w;
    const int failed = run_wide(s, a, half);
    if (!failed) {
        store_narrowed((uint16_t *)y, a.y, w);
        if (conv_after) store_narrowed((uint16_t *)conv_after, a.conv_after, before);
    }
    free(wide);
    return failed;
}

int feed_forward(Sizes s, Arrays a) { return run(s, a, fed_forward); }
int attention(Sizes s, Arrays a) { return run(s, a, attended); }
int selective_state(Sizes s, Arrays a) { return run(s, a, selective); }
