/* Softmax attention of one query per text over any number of keys, forward; README.md says how. */
#include "decode_attention.h"

const Int chunk = CHUNK;
const Int max_heads = MAX_HEADS;
const Int parts = PARTS;

typedef struct {
    Int batch, keys, heads, kv_heads, width, value_width, threads;
} Sizes;

typedef struct {
    Rows q, k, v; /* (b, 1 or keys, heads or kv_heads width) */
    Rows out, lse;
    Real *partial; /* (b, chunks, heads, value_width + parts) */
    Real *scale;   /* (1) */
} Arrays;

int forward(Sizes s, Arrays a) {
    attend((Attention){s.batch, s.keys, s.heads, s.kv_heads, s.width, s.value_width, a.q, a.k, a.v,
                       a.out, a.lse, a.partial, *a.scale, 0, 0},
           s.threads);
    return 0;
}
