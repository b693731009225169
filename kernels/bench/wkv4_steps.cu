/* WKV-4 as its published kernel does it: a thread is a channel and steps through time. The measure
 * of kernels/wkv4/wkv4.cu in gpu_check.py; forward only. */
#include "../common.cuh"

struct Arguments {
    Int tokens, width;
    Rows k, v;
    Element *y;
    float *w, *u;
};

extern "C" __global__ void step_through_time(Arguments a) {
    const Int channel = (Int)blockIdx.x * blockDim.x + threadIdx.x, b = blockIdx.z;
    if (channel >= a.width) return;
    const float w = a.w[channel], u = a.u[channel];
    float p = 0.0f, q = 0.0f, o = -1e38f;
    for (Int t = 0; t < a.tokens; t++) {
        const float k = widen(*a.k.at(b, t, channel)), v = widen(*a.v.at(b, t, channel));
        float top = fmaxf(o, u + k);
        float past = exp2f((o - top) * LOG2E), here = exp2f((u + k - top) * LOG2E);
        a.y[(b * a.tokens + t) * a.width + channel] =
            narrow(__fdividef(past * p + here * v, past * q + here));
        top = fmaxf(o - w, k);
        past = exp2f((o - w - top) * LOG2E), here = exp2f((k - top) * LOG2E);
        p = past * p + here * v, q = past * q + here, o = top;
    }
}
