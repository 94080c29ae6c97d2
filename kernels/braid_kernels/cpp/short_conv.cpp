// A depthwise causal convolution with state and nothing else (see reference/conv.py).
//
// A task is one sequence times one group of channels; it owns the slots' channels that it touches.
#include "spans.h"

using namespace braid;

static constexpr int GROUP = 128;  // channels

extern "C" {

int64_t braid_conv_desc_size() { return sizeof(Conv); }

int64_t braid_short_conv(const Conv* c, int64_t num_slots, const void* x, int64_t x_stride, int32_t x_dtype, const int32_t* cu,
                         int64_t batch, const int32_t* state_in, const int32_t* state_out, int64_t tokens, void* out,
                         int64_t out_stride, int32_t out_dtype) {
    const Spans s{cu, state_in, state_out, batch, tokens};
    const int64_t failed = check_spans(s, num_slots);
    if (failed) return failed;
    const int groups = round_up(c->channels, GROUP) / GROUP;
    parallel(batch * groups, (double)tokens * c->channels * c->width, [&](int64_t i) {
        const int b = (int)(i / groups), begin = (int)(i % groups) * GROUP;
        for (int column = begin; column < begin + GROUP && column < c->channels; column += VL) {
            const int lanes = c->channels - column < VL ? c->channels - column : VL;
            convolve_lanes(*c, s, b, cu[b], cu[b + 1], true, x, x_stride, x_dtype, column, lanes, nullptr,
                           [&](int t, vf y) { store_row(out, out_dtype, t * out_stride + column, y, lanes); });
        }
    });
    return OK;
}

}  // extern "C"
