// A depthwise causal convolution with state and nothing else (see reference/conv.py).
//
// A task is one sequence times one vector of channels; it owns the slots' channels that it touches.
#include "spans.h"

using namespace braid;

extern "C" {

int64_t braid_conv_desc_size() { return sizeof(Conv); }

int64_t braid_short_conv(const Conv* c, int64_t num_slots, const void* x, int64_t x_stride, int32_t x_dtype, const int32_t* cu,
                         int64_t batch, const int32_t* state_in, const int32_t* state_out, int64_t tokens, void* out,
                         int64_t out_stride, int32_t out_dtype) {
    const Spans s{cu, state_in, state_out, batch, tokens};
    const int64_t failed = check_spans(s, num_slots);
    if (failed) return failed;
    const int blocks = round_up(c->channels, VL) / VL;
    parallel(batch * blocks, (double)tokens * c->channels * c->width, [&](int64_t i) {
        const int b = (int)(i / blocks), column = (int)(i % blocks) * VL;
        const int lanes = c->channels - column < VL ? c->channels - column : VL;
        convolve_lanes(*c, s, b, cu[b], cu[b + 1], true, x, x_stride, x_dtype, column, lanes, nullptr, [&](int t, vf y) {
            const int64_t at = t * out_stride + column;
            if (out_dtype == F32) store_part((float*)out + at, y, lanes);
            else store_part((bf16*)out + at, y, lanes);
        });
    });
    return OK;
}

}  // extern "C"
