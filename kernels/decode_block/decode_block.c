/* One token through half of a block, onto + norm'(f(norm(x))); README.md says how. */
#include "../decode_attention/decode_attention.h"
#include "../quantized_linear/quantized_linear.h"

typedef enum { RMS, RMS_OFFSET, LAYER } Norm;
typedef enum { SILU, GELU, GELU_TANH } Activation;
static Form *const FORMS[] = {real_products, bfloat16_products, int8_products, int4_products};

const Int max_heads = MAX_HEADS;

typedef struct {
    Int width, inner, outputs[MANY]; /* of x; of what W_last reads; of the matrices that read x */
    Int form, bytes, scales, last_form, last_bytes, last_scales;
    Int norm, post_norm, head_norm, activation; /* of the latter one more, 0 without */
    Int heads, kv_heads, head_width, pairs, keys;
    Int threads;
} Sizes;

typedef struct { /* any of the weights may be null but those of the matrices themselves */
    const Real *weight[MANY], *bias[MANY];
    const int8_t *bits[MANY];
    const uint16_t *scale[MANY];
    const Real *last_weight, *last_bias;
    const int8_t *last_bits;
    const uint16_t *last_scale;
    const Real *x, *onto;
    Real *y;
    const Real *norm_weight, *norm_bias, *post_weight, *post_bias, *q_norm, *k_norm;
    const Real *numbers; /* of the norms: eps; that of post_norm; that of heads; of the scores: scale */
    const Real *cos, *sin; /* (pairs) */
    Real *k, *v;           /* (keys, kv_heads, head_width), the last of which is written here */
} Arrays;
enum { EPS, POST_EPS, HEAD_EPS, SCALE };

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

/* The products of norm(x) with up to MANY matrices, to places behind one another. */
static int project(const Sizes *s, const Arrays *a, Real *u, Real *to) {
    Product of[MANY] = {};
    int many = 0;
    normalise(u, a->x, a->norm_weight, a->norm_bias, s->width, a->numbers[EPS], s->norm);
    for (; many < MANY && s->outputs[many]; to += s->outputs[many++])
        of[many] = (Product){1, s->width, s->outputs[many], one_row(u), one_row(to),
                             a->weight[many], 0, a->bits[many], a->scale[many],
                             a->bias[many], 0};
    return FORMS[s->form](of, many, s->threads);
}

/* y = onto + norm'(W_last z + b_last) */
static int add(const Sizes *s, const Arrays *a, Real *z, Real *u) {
    const Int n = s->width;
    Product last = {1, s->inner, n, one_row(z), one_row(u), a->last_weight, 0,
                    a->last_bits, a->last_scale, a->last_bias, 0};
    if (FORMS[s->last_form](&last, 1, s->threads)) return 1;
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

/* W_last softmax(q k^T) v: matrices 0, 1, 2 are those of q, k and v, 3 that of the output's gate. */
static int attended(const Sizes *s, const Arrays *a, Real *u, Real *q) {
    const Int d = s->head_width, h = s->heads, g = s->kv_heads, last = (s->keys - 1) * g * d;
    Real *k = q + h * d, *v = k + g * d, *gate = v + g * d, *out = gate + s->outputs[3], *partial = out + h * d;
    if (project(s, a, u, q)) return 1;
    prepare(s, a, q, q, h, a->q_norm);
    prepare(s, a, a->k + last, k, g, a->k_norm);
    memcpy(a->v + last, v, g * d * sizeof *v);
    attend((Attention){1, s->keys, h, g, d, d, one_row(q), {a->k, 0, g * d}, {a->v, 0, g * d},
                       one_row(out), {}, partial, a->numbers[SCALE], 0},
           s->threads);
    if (s->outputs[3])
        for (Int c = 0; c < h * d; c += LANES)
            store(out + c, load(out + c, h * d - c) * sigmoid(load(gate + c, h * d - c)), h * d - c);
    return add(s, a, out, u);
}

typedef int Half(const Sizes *s, const Arrays *a, Real *u, Real *rest);

static int run(Sizes s, Arrays a, Half *half) {
    Int numbers = s.width + s.heads * s.head_width;
    for (int m = 0; m < MANY; m++) numbers += s.outputs[m];
    numbers += ceil_div(s.keys, CHUNK) * s.heads * (s.head_width + PARTS);
    Real *u = malloc(numbers * sizeof *u);
    if (!u) return 1;
    const unsigned before = flush_denormals();
    const int failed = half(&s, &a, u, u + s.width);
    restore_denormals(before);
    free(u);
    return failed;
}

int feed_forward(Sizes s, Arrays a) { return run(s, a, fed_forward); }
int attention(Sizes s, Arrays a) { return run(s, a, attended); }
