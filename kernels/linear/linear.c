/* Products of a few rows with up to four matrices of plain numbers; README.md says how. */
#include "linear.h"

const Int max_rows = 2; /* for more, a matrix product is faster */

typedef struct {
    Int rows, inputs, outputs[MANY], threads;
} Sizes;

typedef struct {
    Rows x, y[MANY];              /* (1, rows, inputs), (1, rows, outputs) */
    const Real *weight[MANY];     /* (outputs, inputs) */
    const uint16_t *narrow[MANY]; /* the same in bfloat16, in its place */
    const Real *bias[MANY];       /* (outputs), or null */
} Arrays;

static int run(Sizes s, Arrays a, Form *form) {
    Product of[MANY] = {};
    for (int m = 0; m < MANY; m++)
        of[m] = (Product){.rows = s.rows, .inputs = s.inputs, .outputs = s.outputs[m], .x = a.x,
                          .y = a.y[m], .weight = a.weight[m], .narrow = a.narrow[m],
                          .bias = a.bias[m]};
    return form(of, MANY, s.threads);
}

int real(Sizes s, Arrays a) { return run(s, a, real_products); }
int bfloat16(Sizes s, Arrays a) { return run(s, a, bfloat16_products); }
