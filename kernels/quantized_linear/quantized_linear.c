/* Products of a few rows with up to four matrices that are kept in 8 or 4 bits. */
#include "quantized_linear.h"

const Int max_rows = 64; /* for more, restoring the matrix once is cheaper */

typedef struct {
    Int rows, inputs, bytes, scales, outputs[MANY], threads;
} Sizes;

typedef struct {
    Rows x, y[MANY];              /* (1, rows, inputs), (1, rows, outputs) */
    const int8_t *bits[MANY];     /* (outputs, inputs) of 8 bits, (outputs, inputs / 2) of 4 */
    const uint16_t *scales[MANY]; /* bfloat16: (outputs, 1), or (outputs, 2 inputs / GROUP) */
} Arrays;

static int run(Sizes s, Arrays a, Form *form) {
    Product of[MANY] = {};
    for (int m = 0; m < MANY; m++)
        of[m] = (Product){.rows = s.rows, .inputs = s.inputs, .outputs = s.outputs[m], .x = a.x,
                          .y = a.y[m], .bits = a.bits[m], .scales = a.scales[m]};
    return form(of, MANY, s.threads);
}

int int8(Sizes s, Arrays a) { return run(s, a, int8_products); }
int int4(Sizes s, Arrays a) { return run(s, a, int4_products); }
