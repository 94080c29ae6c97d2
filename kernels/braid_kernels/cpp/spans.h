// What the linear kernels share: the checks of spans and slots, and a depthwise causal convolution over one
// sequence, one vector of channels at a time (linear.cpp has its own, cut by heads).
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
    static thread_local std::vector<uint64_t> taken;
    taken.assign((num_slots + 63) / 64, 0);
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

// A pool keeps each channel's `count` values together; the kernels want the channels in the lanes. `lanes`
// channels from element `at` on <-> rows [count, VL], by way of `flat` [count * VL + VL].
static inline void load_lanes_of(const void* pool, int32_t dtype, int64_t at, int count, int lanes, float* flat, float* rows) {
    widen_row(pool, dtype, at, flat, lanes * count);
    for (int j = 0; j < count; j++) {
        for (int i = 0; i < lanes; i++) rows[j * VL + i] = flat[i * count + j];
        for (int i = lanes; i < VL; i++) rows[j * VL + i] = 0.0f;
    }
}
static inline void store_lanes_of(const float* rows, int count, int lanes, float* flat, void* pool, int32_t dtype, int64_t at) {
    for (int i = 0; i < lanes; i++)
        for (int j = 0; j < count; j++) flat[i * count + j] = rows[j * VL + i];
    narrow_row(flat, pool, dtype, at, lanes * count);
}

// Rows [begin, end) of sequence b, channels [column, column + lanes): emit(t, bias + sum_j weight[j] x[t + j - past]).
// The past inputs come from the sequence's slot (first: the span begins here) or from `carry` [width - 1, VL],
// where they are left behind.
template <class F>
void convolve_lanes(const Conv& c, const Spans& s, int b, int begin, int end, bool first, const void* x, int64_t x_stride,
                    int32_t x_dtype, int column, int lanes, float* carry, F&& emit) {
    const int past = c.width - 1;
    const int64_t at = (int64_t)column * past, slot = s.state_in[b];
    float rows[MAX_CONV_WIDTH * VL] = {}, flat[MAX_CONV_WIDTH * VL];
    if (!first) std::memcpy(rows, carry, sizeof(float) * past * VL);
    else if (slot >= 0) load_lanes_of(c.pool, c.pool_dtype, slot * c.pool_stride + at, past, lanes, flat, rows);
    vf window[MAX_CONV_WIDTH];
    for (int j = 0; j < past; j++) window[j] = load(rows + j * VL);
    const vf bias = c.bias ? load(c.bias + column) : vf{};
    for (int t = begin; t < end; t++) {
        const int64_t from = t * x_stride + column;
        if (lanes == VL) window[past] = x_dtype == F32 ? load_as((const float*)x + from) : load_as((const bf16*)x + from);
        else window[past] = x_dtype == F32 ? load_part((const float*)x + from, lanes) : load_part((const bf16*)x + from, lanes);
        vf sum = bias;
        for (int j = 0; j < c.width; j++) sum = fmadd(load(c.weight + (int64_t)j * c.channels + column), window[j], sum);
        emit(t, sum);
        for (int j = 0; j < past; j++) window[j] = window[j + 1];
        const int64_t out = s.state_out[t];
        if (out < 0) continue;
        for (int j = 0; j < past; j++) store(rows + j * VL, window[j]);
        store_lanes_of(rows, past, lanes, flat, c.pool, c.pool_dtype, out * c.pool_stride + at);
    }
    if (carry)
        for (int j = 0; j < past; j++) store(carry + j * VL, window[j]);
}

// y's first `lanes` lanes.
static inline void store_row(void* out, int32_t dtype, int64_t at, vf y, int lanes) {
    if (lanes == VL) {
        if (dtype == F32) store_as((float*)out + at, y);
        else store_as((bf16*)out + at, y);
    } else {
        if (dtype == F32) store_part((float*)out + at, y, lanes);
        else store_part((bf16*)out + at, y, lanes);
    }
}

}  // namespace braid
