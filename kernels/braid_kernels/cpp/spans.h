// What the kernels with a convolution of their own share: the checks of spans and slots, and a depthwise
// causal convolution over one sequence, one vector of channels at a time.
#pragma once

#include <vector>

#include "common.h"

namespace braid {

struct Spans {
    const int32_t *cu, *state_in, *state_out;
    int64_t batch, tokens;
};

// Spans must tile the rows; written slots must be distinct and disjoint from those read.
static inline int64_t check_spans(const Spans& s, int64_t num_slots) {
    if (s.cu[0] != 0) return failure(SPANS, 0);
    for (int64_t b = 0; b < s.batch; b++)
        if (s.cu[b + 1] < s.cu[b]) return failure(SPANS, b + 1);
    if (s.cu[s.batch] != s.tokens) return failure(SPANS, s.batch);
    std::vector<uint64_t> taken((num_slots + 63) / 64, 0);
    for (int64_t b = 0; b < s.batch; b++) {
        const int64_t slot = s.state_in[b];
        if (slot < -1 || slot >= num_slots) return failure(STATE_IN, b);
        if (slot >= 0) taken[slot / 64] |= 1ull << slot % 64;
    }
    for (int64_t t = 0; t < s.tokens; t++) {
        const int64_t slot = s.state_out[t];
        if (slot == -1) continue;
        if (slot < -1 || slot >= num_slots) return failure(STATE_OUT, t);
        if (taken[slot / 64] >> slot % 64 & 1) return failure(STATE_SHARED, t);
        taken[slot / 64] |= 1ull << slot % 64;
    }
    return OK;
}

// Mirrored field by field in native/tensors.py.
struct Conv {
    int32_t channels, width;
    int32_t pool_dtype, spare;
    int64_t pool_stride;   // elements between slots
    void* pool;            // [slots, channels, width - 1]
    const float* weight;   // [width, channels], padded by one vector
    const float* bias;     // [channels], padded by one vector, or null
};

constexpr int MAX_CONV_WIDTH = 16;

// n values that lie `step` apart in a pool, as lanes; and back.
static inline vf gather(const void* base, int32_t dtype, int64_t at, int64_t step, int n) {
    float lanes[VL] = {};
    for (int i = 0; i < n; i++) lanes[i] = element(base, dtype, at + i * step);
    return load(lanes);
}
static inline void scatter(vf x, void* base, int32_t dtype, int64_t at, int64_t step, int n) {
    float lanes[VL];
    store(lanes, x);
    for (int i = 0; i < n; i++) {
        if (dtype == F32) from_float(lanes[i], (float*)base + at + i * step);
        else from_float(lanes[i], (bf16*)base + at + i * step);
    }
}

// Rows [begin, end) of sequence b, channels [column, column + lanes): emit(t, bias + sum_j weight[j] x[t + j - past]).
// The past inputs come from the sequence's slot (first: the span begins here) or from `carry` [width - 1, VL],
// where they are left behind.
template <class F>
void convolve_lanes(const Conv& c, const Spans& s, int b, int begin, int end, bool first, const void* x, int64_t x_stride,
                    int32_t x_dtype, int column, int lanes, float* carry, F&& emit) {
    const int past = c.width - 1;
    const int64_t column_at = (int64_t)column * past;
    vf window[MAX_CONV_WIDTH];
    const int64_t slot = s.state_in[b];
    for (int j = 0; j < past; j++) {
        if (!first) window[j] = load(carry + j * VL);
        else window[j] = slot < 0 ? vf{} : gather(c.pool, c.pool_dtype, slot * c.pool_stride + column_at + j, past, lanes);
    }
    const vf bias = c.bias ? load(c.bias + column) : vf{};
    for (int t = begin; t < end; t++) {
        const int64_t at = t * x_stride + column;
        if (lanes == VL) window[past] = x_dtype == F32 ? load_as((const float*)x + at) : load_as((const bf16*)x + at);
        else window[past] = x_dtype == F32 ? load_part((const float*)x + at, lanes) : load_part((const bf16*)x + at, lanes);
        vf sum = bias;
        for (int j = 0; j < c.width; j++) sum = fmadd(load(c.weight + (int64_t)j * c.channels + column), window[j], sum);
        emit(t, sum);
        for (int j = 0; j < past; j++) window[j] = window[j + 1];
        const int64_t out = s.state_out[t];
        if (out >= 0)
            for (int j = 0; j < past; j++) scatter(window[j], c.pool, c.pool_dtype, out * c.pool_stride + column_at + j, past, lanes);
    }
    if (carry)
        for (int j = 0; j < past; j++) store(carry + j * VL, window[j]);
}

}  // namespace braid
