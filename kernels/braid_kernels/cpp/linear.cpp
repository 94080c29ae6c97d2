// Linear attention: convolution, activation, norms, gates and the recurrence of one layer in one call.
//
//     S <- Diag(alpha_t) S;  u = beta_t (v_t - delta S^T k_t);  S <- S + k_t u^T;
//     o_t = scale S^T q_t (+ D v_t)                      (see reference/recurrence.py)
//
// A task is one sequence times one block of value heads that share a key head; it owns everything it
// touches (the slots written in a step are distinct and disjoint from those read), so tasks need no
// locks and a sequence's result does not depend on its company. Within a task, tokens go in chunks of
// CHUNK: first the inputs of the chunk (convolution .. gates) into private float rows, then, head by head
// and column tile by column tile, the recurrence over the chunk with the tile of S in the L1 cache.
//
// The delta rule needs S^T k before u is known and the rank-one update after. One pass over S does the
// update of token t-1 and the dot products of token t; o = scale (q^T(alpha S) + (q.k) u) then needs no
// second pass. The order "fma(k, u, s), then times alpha" is the same on every path (single token, chunk
// edge, written version), so a state is bitwise the same however the sequence was cut into steps.
#include <cmath>
#include <new>

#include "spans.h"

using namespace braid;

namespace {

constexpr int CHUNK = 32;
constexpr int HEADS = 8;                                 // value heads per task, at most
constexpr int SINGLE_VECTORS = VL == 16 ? 8 : 4;         // tile width of the single-token path
constexpr int TILE_VECTORS = VL == 16 ? 4 : 2;           // tile width of the chunk path

enum Decay : int32_t { CONSTANT = 0, SOFTPLUS_HEAD = 1, SOFTPLUS_CHANNEL = 2, BOUNDED_CHANNEL = 3, TIME_STEP = 4 };
enum Beta : int32_t { ONE = 0, SIGMOID = 1, STEP = 2 };

}  // namespace

// Mirrored field by field in native/linear.py.
struct LinearDesc {
    int32_t delta, l2, silu, decay, beta;
    int32_t conv_width;                        // 0: no convolution
    int32_t k_heads, v_heads, dk, dv;
    int32_t q_input, q_column, k_input, k_column, v_input, v_column, gate_input, beta_input;
    int32_t channels;                          // of the convolution
    int32_t state_dtype, conv_dtype, spare;
    float scale, beta_scale, gate_bound, dt_min, dt_max, spare_f;
    int64_t num_slots, state_stride, conv_stride;  // strides in elements
    void *state, *conv;
    const float *conv_weight;                  // [K, C], padded by one vector
    const float *conv_bias;                    // [C], padded by one vector, or null
    const float *rate;                         // [Hv]: e^A_log; CONSTANT: alpha itself
    const float *dt_bias;                      // [Hv] or [Hv * dk]
    const float *skip;                         // D [Hv] or null
};

static inline bool per_channel(const LinearDesc& d) { return d.decay == SOFTPLUS_CHANNEL || d.decay == BOUNDED_CHANNEL; }

struct Input {
    const void* data;
    int64_t stride;  // elements between rows
    int32_t dtype;
};

namespace {

struct Call {
    const LinearDesc* d;
    Input in[3];
    const int32_t *cu, *state_in, *state_out;
    int64_t batch, tokens;
    void* out;
    int64_t out_stride;
    int32_t out_dtype;
    int group, block, blocks_per_group;  // value heads per key head, per task; tasks per key head
    int dkp, dvp;                        // dk, dv rounded up to whole vectors
};

// One task's private memory; every row is zero-padded to whole vectors.
struct Rows {
    float *window;       // [K-1 + CHUNK, widest segment]: raw inputs around the chunk
    float *carry;        // [segments][K-1, width]: the last inputs of the previous chunk
    float *q, *k;        // [CHUNK, dkp]
    float *v;            // [heads][CHUNK, dvp]
    float *o;            // [CHUNK, dvp]
    float *u;            // [dvp]
    float *alpha;        // [heads][CHUNK] or, per channel, [CHUNK, dkp]
    float *beta;         // [heads][CHUNK]
    float *qk;           // [CHUNK]; single tokens: [key heads]
    float *S;            // [heads][tiles][dk, tile]
};

struct Task {
    const Call& c;
    int sequence, begin, end;
    int key_head, head, heads;  // first value head, how many
    bool owns_qk;               // writes the shared q/k part of the convolution state
    Rows r;
};

// Carves the buffers, in the order of the fields of Rows, out of one scratch block.
Rows carve(const size_t (&sizes)[11]) {
    size_t total = 0;
    for (size_t n : sizes) total += (n + 15) / 16 * 16;
    float* at = scratch(total);
    float* field[11];
    for (int i = 0; i < 11; i++) {
        field[i] = at;
        at += (sizes[i] + 15) / 16 * 16;
    }
    return Rows{field[0], field[1], field[2], field[3], field[4], field[5], field[6], field[7], field[8], field[9], field[10]};
}

Rows lay_out(const Call& c, int heads) {
    const LinearDesc& d = *c.d;
    const size_t past = d.conv_width ? d.conv_width - 1 : 0, rows = round_up(CHUNK, VL);
    const size_t widest = c.dkp > c.dvp ? c.dkp : c.dvp, dkp = c.dkp, dvp = c.dvp;
    return carve({(past + rows) * widest, past * (2 * dkp + heads * dvp), rows * dkp, rows * dkp, rows * heads * dvp, rows * dvp,
                  dvp, per_channel(d) ? rows * dkp : rows * heads, rows * heads, rows, heads * d.dk * dvp});
}

// For one token: rows are heads, and there is no private state.
Rows lay_out_single(const Call& c, int key_heads, int heads) {
    const size_t past = c.d->conv_width ? c.d->conv_width - 1 : 0, gates = round_up(heads, VL);
    const size_t dkp = c.dkp, dvp = c.dvp, k = key_heads * dkp, v = heads * dvp;
    return carve({(past + 1) * (k > v ? k : v), 0, k, k, v, dvp, dkp, gates, gates, (size_t)key_heads, 0});
}

// ---- inputs of a chunk ----

template <class T> void load_history(const T* conv, float* rows, int past, int width, int stride) {
    for (int c = 0; c < width; c++)
        for (int j = 0; j < past; j++) rows[j * stride + c] = to_float(conv[c * past + j]);
}
template <class T> void save_history(T* conv, const float* rows, int past, int width, int stride) {
    for (int c = 0; c < width; c++)
        for (int j = 0; j < past; j++) from_float(rows[j * stride + c], conv + c * past + j);
}
template <class T> void load_history3(const T* __restrict conv, float* __restrict rows, int width, int stride) {
    float *a = rows, *b = rows + stride, *c = rows + 2 * stride;
    for (int i = 0; i < width; i++) {
        a[i] = to_float(conv[3 * i]);
        b[i] = to_float(conv[3 * i + 1]);
        c[i] = to_float(conv[3 * i + 2]);
    }
}
template <class T> void save_history3(T* __restrict conv, const float* __restrict rows, int width, int stride) {
    const float *a = rows, *b = rows + stride, *c = rows + 2 * stride;
    for (int i = 0; i < width; i++) {
        from_float(a[i], conv + 3 * i);
        from_float(b[i], conv + 3 * i + 1);
        from_float(c[i], conv + 3 * i + 2);
    }
}
template <class T> void history_in(const T* conv, float* rows, int past, int width, int stride) {
    if (past == 3) load_history3(conv, rows, width, stride);
    else load_history(conv, rows, past, width, stride);
}
template <class T> void history_out(T* conv, const float* rows, int past, int width, int stride) {
    if (past == 3) save_history3(conv, rows, width, stride);
    else save_history(conv, rows, past, width, stride);
}

// dst[t] = silu(bias + sum_j weight[j] window[t + j]) for one segment of channels.
template <int TAPS> void convolve(const LinearDesc& d, const float* window, float* dst, int n, int column, int width, int stride) {
    const int taps = TAPS ? TAPS : d.conv_width;
    for (int c = 0; c < width; c += VL) {
        vf bias = d.conv_bias ? load(d.conv_bias + column + c) : vf{};
        for (int t = 0; t < n; t++) {
            vf acc = bias;
            for (int j = 0; j < taps; j++)
                acc = fmadd(load(d.conv_weight + (int64_t)j * d.channels + column + c), load(window + (t + j) * stride + c), acc);
            store(dst + t * stride + c, vsilu(acc));
        }
    }
}

// One segment (a head's q, k or v) of chunk rows [row, row + n): input -> convolution -> SiLU -> dst.
void prepare_segment(Task& k, int row, int n, const Input& in, int column, int width, int stride, float* carry, float* dst, bool owns) {
    const Call& c = k.c;
    const LinearDesc& d = *c.d;
    if (!d.conv_width) {
        for (int t = 0; t < n; t++) widen_row(in.data, in.dtype, (row + t) * in.stride + column, dst + t * stride, width);
        if (d.silu)
            for (int i = 0; i < n * stride; i += VL) store(dst + i, vsilu(load(dst + i)));
        return;
    }
    const int past = d.conv_width - 1;
    float* window = k.r.window;
    if (row == k.begin) {
        const int slot = c.state_in[k.sequence];
        std::memset(window, 0, sizeof(float) * past * stride);
        const int64_t at = slot * d.conv_stride + (int64_t)column * past;
        if (slot >= 0 && d.conv_dtype == F32) history_in((const float*)d.conv + at, window, past, width, stride);
        else if (slot >= 0) history_in((const bf16*)d.conv + at, window, past, width, stride);
    } else {
        std::memcpy(window, carry, sizeof(float) * past * stride);
    }
    for (int t = 0; t < n; t++)
        widen_row(in.data, in.dtype, (row + t) * in.stride + column, window + (past + t) * stride, width);
    if (d.conv_width == 4) convolve<4>(d, window, dst, n, column, width, stride);
    else convolve<0>(d, window, dst, n, column, width, stride);
    if (width < stride)  // the last vector ran into the neighbouring channels' weights
        for (int t = 0; t < n; t++) std::memset(dst + t * stride + width, 0, sizeof(float) * (stride - width));
    if (owns) {
        for (int t = 0; t < n; t++) {
            const int slot = c.state_out[row + t];
            if (slot < 0) continue;
            const int64_t at = slot * d.conv_stride + (int64_t)column * past;
            if (d.conv_dtype == F32) history_out((float*)d.conv + at, window + (t + 1) * stride, past, width, stride);
            else history_out((bf16*)d.conv + at, window + (t + 1) * stride, past, width, stride);
        }
    }
    if (row + n < k.end) std::memcpy(carry, window + n * stride, sizeof(float) * past * stride);
}

void l2_normalise(float* rows, int n, int stride) {
    for (int t = 0; t < n; t++) {
        float* x = rows + t * stride;
        vf sum{};
        for (int i = 0; i < stride; i += VL) { vf e = load(x + i); sum = fmadd(e, e, sum); }
        vf factor = splat(1.0f / std::sqrt(hsum(sum) + 1e-6f));
        for (int i = 0; i < stride; i += VL) store(x + i, load(x + i) * factor);
    }
}

void dot_rows(const float* a, const float* b, int n, int stride, float* dst) {
    for (int t = 0; t < n; t++) {
        vf sum{};
        for (int i = 0; i < stride; i += VL) sum = fmadd(load(a + t * stride + i), load(b + t * stride + i), sum);
        dst[t] = hsum(sum);
    }
}

// Column `column` of rows [row, row + n), zero-padded to whole vectors.
void gather_column(const Input& in, int row, int n, int column, float* dst) {
    for (int t = 0; t < n; t++) dst[t] = element(in.data, in.dtype, (row + t) * in.stride + column);
    for (int t = n; t < round_up(n, VL); t++) dst[t] = 0.0f;
}

vf clamp_step(const LinearDesc& d, vf dt) {
    dt = select(dt < d.dt_min, splat(d.dt_min), dt);
    return select(dt > d.dt_max, splat(d.dt_max), dt);
}

// alpha of one head's channels of one row, [dkp].
void channel_gates(const Call& c, int row, int head, float* alpha) {
    const LinearDesc& d = *c.d;
    const Input& in = c.in[d.gate_input];
    widen_row(in.data, in.dtype, row * in.stride + (int64_t)head * d.dk, alpha, d.dk);
    for (int i = 0; i < c.dkp; i += VL) {
        const vf x = load(alpha + i) + load(d.dt_bias + head * d.dk + i);  // dt_bias is padded by one vector
        const vf g = d.decay == BOUNDED_CHANNEL ? d.gate_bound * vsigmoid(d.rate[head] * x) : -d.rate[head] * vsoftplus(x);
        store(alpha + i, vexp(g));
    }
}

// alpha and beta of one value head; alpha per head in [n], or per channel in [n, dkp].
void gates(Task& k, int row, int n, int h) {
    const Call& c = k.c;
    const LinearDesc& d = *c.d;
    const int head = k.head + h, rows = round_up(n, VL), pitch = round_up(CHUNK, VL);
    float* alpha = k.r.alpha + h * pitch;
    float* beta = k.r.beta + h * pitch;
    if (d.beta == SIGMOID) {
        gather_column(c.in[d.beta_input], row, n, head, beta);
        for (int i = 0; i < rows; i += VL) store(beta + i, d.beta_scale * vsigmoid(load(beta + i)));
    } else if (d.beta == ONE) {
        for (int i = 0; i < rows; i += VL) store(beta + i, splat(1.0f));
    }
    switch (d.decay) {
        case CONSTANT:
            for (int i = 0; i < rows; i += VL) store(alpha + i, splat(d.rate[head]));
            break;
        case SOFTPLUS_HEAD:
            gather_column(c.in[d.gate_input], row, n, head, alpha);
            for (int i = 0; i < rows; i += VL)
                store(alpha + i, vexp(-d.rate[head] * vsoftplus(load(alpha + i) + d.dt_bias[head])));
            break;
        case TIME_STEP:
            gather_column(c.in[d.gate_input], row, n, head, beta);
            for (int i = 0; i < rows; i += VL) {
                const vf dt = clamp_step(d, vsoftplus(load(beta + i) + d.dt_bias[head]));
                store(beta + i, dt);
                store(alpha + i, vexp(-d.rate[head] * dt));
            }
            break;
        default:  // per channel; one head per task (h == 0)
            for (int t = 0; t < n; t++) channel_gates(c, row + t, head, k.r.alpha + t * c.dkp);
    }
}

void prepare_chunk(Task& k, int row, int n) {
    const Call& c = k.c;
    const LinearDesc& d = *c.d;
    const int past = d.conv_width ? d.conv_width - 1 : 0;
    float* carry = k.r.carry;
    prepare_segment(k, row, n, c.in[d.q_input], d.q_column + k.key_head * d.dk, d.dk, c.dkp, carry, k.r.q, k.owns_qk);
    carry += past * c.dkp;
    prepare_segment(k, row, n, c.in[d.k_input], d.k_column + k.key_head * d.dk, d.dk, c.dkp, carry, k.r.k, k.owns_qk);
    carry += past * c.dkp;
    if (d.l2) {
        l2_normalise(k.r.q, n, c.dkp);
        l2_normalise(k.r.k, n, c.dkp);
    }
    for (int h = 0; h < k.heads; h++, carry += past * c.dvp) {
        prepare_segment(k, row, n, c.in[d.v_input], d.v_column + (k.head + h) * d.dv, d.dv, c.dvp, carry,
                        k.r.v + h * round_up(CHUNK, VL) * c.dvp, true);
        gates(k, row, n, h);
    }
    if (d.delta) dot_rows(k.r.q, k.r.k, n, c.dkp, k.r.qk);
}

// ---- the recurrence ----

// alpha and beta of `heads` neighbouring value heads of one row, heads in the lanes (the same operations
// as `gates`, so the same bits).
void row_gates(const Call& c, int row, int head, int heads, float* alpha, float* beta) {
    const LinearDesc& d = *c.d;
    const Input &g = c.in[d.gate_input], &b = c.in[d.beta_input];
    if (d.beta == SIGMOID) widen_row(b.data, b.dtype, row * b.stride + head, beta, heads);
    if (d.decay == SOFTPLUS_HEAD || d.decay == TIME_STEP) widen_row(g.data, g.dtype, row * g.stride + head, alpha, heads);
    for (int i = 0; i < heads; i += VL) {
        if (d.beta == SIGMOID) store(beta + i, d.beta_scale * vsigmoid(load(beta + i)));
        else if (d.beta == ONE) store(beta + i, splat(1.0f));
        const vf rate = load(d.rate + head + i);
        if (d.decay == CONSTANT) store(alpha + i, rate);
        if (d.decay == SOFTPLUS_HEAD) store(alpha + i, vexp(-rate * vsoftplus(load(alpha + i) + load(d.dt_bias + head + i))));
        if (d.decay == TIME_STEP) {
            const vf dt = clamp_step(d, vsoftplus(load(alpha + i) + load(d.dt_bias + head + i)));
            store(beta + i, dt);
            store(alpha + i, vexp(-rate * dt));
        }
    }
}

// What one token brings to one head; v and o point at the tile's first column.
struct Token {
    const float *q, *k, *v, *alpha;  // alpha: one value, or one per channel
    float *o;
    float beta, qk, scale, skip;
};

// One token straight from slot to slot, without private state. src may repeat one zero row (stride 0);
// dst may be null. lanes: valid lanes of the (then only) vector of a PART tile.
template <class ST, int NV, bool PART, bool CHANNEL>
void delta_single(const ST* src, int64_t src_stride, ST* dst, int64_t dst_stride, int dk, int lanes, const Token& x) {
    vf kS[NV] = {}, qS[NV] = {}, u[NV];
    const vf a0 = splat(x.alpha[0]);
    for (int i = 0; i < dk; i++) {
        const vf a = CHANNEL ? splat(x.alpha[i]) : a0, k = splat(x.k[i]), q = splat(x.q[i]);
        BRAID_UNROLL
        for (int n = 0; n < NV; n++) {
            vf s = a * load_lanes<PART>(src + i * src_stride + n * VL, lanes);
            kS[n] = fmadd(k, s, kS[n]);
            qS[n] = fmadd(q, s, qS[n]);
        }
    }
    BRAID_UNROLL
    for (int n = 0; n < NV; n++) {
        u[n] = x.beta * (load(x.v + n * VL) - kS[n]);
        store(x.o + n * VL, x.scale * fmadd(splat(x.qk), u[n], qS[n]));
    }
    if (!dst) return;
    for (int i = 0; i < dk; i++) {
        const vf a = CHANNEL ? splat(x.alpha[i]) : a0, k = splat(x.k[i]);
        BRAID_UNROLL
        for (int n = 0; n < NV; n++) {
            vf s = a * load_lanes<PART>(src + i * src_stride + n * VL, lanes);
            store_lanes<PART>(dst + i * dst_stride + n * VL, fmadd(k, u[n], s), lanes);
        }
    }
}

template <class ST, int NV, bool PART>
void plain_single(const ST* src, int64_t src_stride, ST* dst, int64_t dst_stride, int dk, int lanes, const Token& x) {
    vf acc[NV] = {}, u[NV];
    const vf a = splat(x.alpha[0]);
    BRAID_UNROLL
    for (int n = 0; n < NV; n++) u[n] = x.beta * load(x.v + n * VL);
    for (int i = 0; i < dk; i++) {
        const vf k = splat(x.k[i]), q = splat(x.q[i]);
        BRAID_UNROLL
        for (int n = 0; n < NV; n++) {
            vf s = fmadd(k, u[n], a * load_lanes<PART>(src + i * src_stride + n * VL, lanes));
            acc[n] = fmadd(q, s, acc[n]);
            if (dst) store_lanes<PART>(dst + i * dst_stride + n * VL, s, lanes);
        }
    }
    BRAID_UNROLL
    for (int n = 0; n < NV; n++) store(x.o + n * VL, fmadd(splat(x.skip), load(x.v + n * VL), x.scale * acc[n]));
}

template <class ST, int NV, bool PART>
void single(const LinearDesc& d, const ST* src, int64_t src_stride, ST* dst, int lanes, const Token& x) {
    const bool channel = per_channel(d);
    if (!d.delta) plain_single<ST, NV, PART>(src, src_stride, dst, d.dv, d.dk, lanes, x);
    else if (channel) delta_single<ST, NV, PART, true>(src, src_stride, dst, d.dv, d.dk, lanes, x);
    else delta_single<ST, NV, PART, false>(src, src_stride, dst, d.dv, d.dk, lanes, x);
}

template <class ST> void single_head(const Call& c, int sequence, int head_index, Token x) {
    static const ST zeros[SINGLE_VECTORS * VL] = {};
    const LinearDesc& d = *c.d;
    const int in = c.state_in[sequence], out = c.state_out[c.cu[sequence]];
    const int64_t head = (int64_t)head_index * d.dk * d.dv;
    const ST* src = in >= 0 ? (const ST*)d.state + in * d.state_stride + head : zeros;
    ST* dst = out >= 0 ? (ST*)d.state + out * d.state_stride + head : nullptr;
    const int64_t src_stride = in >= 0 ? d.dv : 0;
    const float* v = x.v;
    float* o = x.o;
    int column = 0;
    auto at = [&](int width) {
        const ST* s = in >= 0 ? src + column : src;
        ST* t = dst ? dst + column : nullptr;
        x.v = v + column;
        x.o = o + column;
        column += width;
        return std::pair<const ST*, ST*>(s, t);
    };
    while (column + SINGLE_VECTORS * VL <= d.dv) { auto p = at(SINGLE_VECTORS * VL); single<ST, SINGLE_VECTORS, false>(d, p.first, src_stride, p.second, VL, x); }
    while (column + SINGLE_VECTORS / 2 * VL <= d.dv) { auto p = at(SINGLE_VECTORS / 2 * VL); single<ST, SINGLE_VECTORS / 2, false>(d, p.first, src_stride, p.second, VL, x); }
    while (column + VL <= d.dv) { auto p = at(VL); single<ST, 1, false>(d, p.first, src_stride, p.second, VL, x); }
    if (column < d.dv) { const int lanes = d.dv - column; auto p = at(lanes); single<ST, 1, true>(d, p.first, src_stride, p.second, lanes, x); }
}

// Rows of S [dk, width], plus k u^T where k is given, into a slot.
template <class ST> void emit(const LinearDesc& d, int slot, int head, int column, int width, const float* S, const float* k, const float* u) {
    ST* dst = (ST*)d.state + slot * d.state_stride + (int64_t)head * d.dk * d.dv + column;
    const int valid = d.dv - column < width ? d.dv - column : width;
    for (int i = 0; i < d.dk; i++)
        for (int c = 0; c < valid; c += VL) {
            vf s = load(S + i * width + c);
            if (k) s = fmadd(splat(k[i]), load(u + c), s);
            if (c + VL <= valid) store_as(dst + (int64_t)i * d.dv + c, s);
            else store_part(dst + (int64_t)i * d.dv + c, s, valid - c);
        }
}
void emit_state(const LinearDesc& d, int slot, int head, int column, int width, const float* S, const float* k, const float* u) {
    if (d.state_dtype == F32) emit<float>(d, slot, head, column, width, S, k, u);
    else emit<bf16>(d, slot, head, column, width, S, k, u);
}

template <class ST> void fetch(const LinearDesc& d, int slot, int head, int column, int width, float* S) {
    const int valid = d.dv - column < width ? d.dv - column : width;
    const ST* src = (const ST*)d.state + slot * d.state_stride + (int64_t)head * d.dk * d.dv + column;
    for (int i = 0; i < d.dk; i++) widen_row(src + (int64_t)i * d.dv, S + i * width, valid);
}
void fetch_state(const LinearDesc& d, int slot, int head, int column, int width, float* S) {
    if (slot < 0) std::memset(S, 0, sizeof(float) * d.dk * width);
    else if (d.state_dtype == F32) fetch<float>(d, slot, head, column, width, S);
    else fetch<bf16>(d, slot, head, column, width, S);
}

// One token on a tile of S [dk, NV * VL]: the update that token t-1 left (FIRST: none), decay, and both
// dot products, in one pass. u holds the pending update and receives this token's.
template <int NV, bool CHANNEL, bool FIRST>
BRAID_INLINE void delta_token(float* S, int dk, const float* pending_k, vf* u, const Token& x) {
    vf kS[NV] = {}, qS[NV] = {};
    const vf a0 = splat(x.alpha[0]);
    for (int i = 0; i < dk; i++) {
        const vf a = CHANNEL ? splat(x.alpha[i]) : a0, k = splat(x.k[i]), q = splat(x.q[i]);
        float* row = S + i * NV * VL;
        BRAID_UNROLL
        for (int n = 0; n < NV; n++) {
            vf s = load(row + n * VL);
            if (!FIRST) s = fmadd(splat(pending_k[i]), u[n], s);
            s = a * s;
            store(row + n * VL, s);
            kS[n] = fmadd(k, s, kS[n]);
            qS[n] = fmadd(q, s, qS[n]);
        }
    }
    BRAID_UNROLL
    for (int n = 0; n < NV; n++) {
        u[n] = x.beta * (load(x.v + n * VL) - kS[n]);
        store(x.o + n * VL, x.scale * fmadd(splat(x.qk), u[n], qS[n]));
    }
}

template <int NV> BRAID_INLINE void plain_token(float* S, int dk, const Token& x) {
    vf acc[NV] = {}, u[NV];
    const vf a = splat(x.alpha[0]);
    BRAID_UNROLL
    for (int n = 0; n < NV; n++) u[n] = x.beta * load(x.v + n * VL);
    for (int i = 0; i < dk; i++) {
        const vf k = splat(x.k[i]), q = splat(x.q[i]);
        float* row = S + i * NV * VL;
        BRAID_UNROLL
        for (int n = 0; n < NV; n++) {
            vf s = fmadd(k, u[n], a * load(row + n * VL));
            store(row + n * VL, s);
            acc[n] = fmadd(q, s, acc[n]);
        }
    }
    BRAID_UNROLL
    for (int n = 0; n < NV; n++) store(x.o + n * VL, fmadd(splat(x.skip), load(x.v + n * VL), x.scale * acc[n]));
}

Token token_at(const Task& k, int h, int t) {
    const Call& c = k.c;
    const LinearDesc& d = *c.d;
    const int pitch = round_up(CHUNK, VL);
    const bool channel = per_channel(d);
    Token x;
    x.q = k.r.q + t * c.dkp;
    x.k = k.r.k + t * c.dkp;
    x.v = k.r.v + (h * pitch + t) * c.dvp;
    x.o = k.r.o + t * c.dvp;
    x.alpha = channel ? k.r.alpha + t * c.dkp : k.r.alpha + h * pitch + t;
    x.beta = k.r.beta[h * pitch + t];
    x.qk = k.r.qk[t];
    x.scale = d.scale;
    x.skip = d.skip ? d.skip[k.head + h] : 0.0f;
    return x;
}

// Chunk rows [row, row + n) of one head on one column tile.
template <int NV, bool CHANNEL> void delta_tile(const Task& k, int h, int row, int n, int column, float* S) {
    const LinearDesc& d = *k.c.d;
    const int width = NV * VL;
    vf u[NV];
    const float* pending_k = nullptr;
    for (int t = 0; t < n; t++) {
        Token x = token_at(k, h, t);
        x.v += column;
        x.o += column;
        if (t == 0) delta_token<NV, CHANNEL, true>(S, d.dk, pending_k, u, x);
        else delta_token<NV, CHANNEL, false>(S, d.dk, pending_k, u, x);
        pending_k = x.k;
        const int slot = k.c.state_out[row + t];
        if (slot >= 0) {
            BRAID_UNROLL
            for (int i = 0; i < NV; i++) store(k.r.u + i * VL, u[i]);
            emit_state(d, slot, k.head + h, column, width, S, x.k, k.r.u);
        }
    }
    if (row + n == k.end) return;
    for (int i = 0; i < d.dk; i++)
        BRAID_UNROLL
        for (int v = 0; v < NV; v++)
            store(S + i * width + v * VL, fmadd(splat(pending_k[i]), u[v], load(S + i * width + v * VL)));
}

template <int NV> void plain_tile(const Task& k, int h, int row, int n, int column, float* S) {
    const LinearDesc& d = *k.c.d;
    for (int t = 0; t < n; t++) {
        Token x = token_at(k, h, t);
        x.v += column;
        x.o += column;
        plain_token<NV>(S, d.dk, x);
        const int slot = k.c.state_out[row + t];
        if (slot >= 0) emit_state(d, slot, k.head + h, column, NV * VL, S, nullptr, nullptr);
    }
}

template <int NV> void tile(const Task& k, int h, int row, int n, int column) {
    const LinearDesc& d = *k.c.d;
    float* S = k.r.S + (size_t)h * d.dk * k.c.dvp + (size_t)d.dk * column;
    if (row == k.begin) fetch_state(d, k.c.state_in[k.sequence], k.head + h, column, NV * VL, S);
    const bool channel = per_channel(d);
    if (!d.delta) plain_tile<NV>(k, h, row, n, column, S);
    else if (channel) delta_tile<NV, true>(k, h, row, n, column, S);
    else delta_tile<NV, false>(k, h, row, n, column, S);
}

void chunk_head(const Task& k, int h, int row, int n) {
    const int dvp = k.c.dvp;
    // A tile of S should stay in half of a 32 KiB L1 cache.
    const bool wide = k.c.d->dk * TILE_VECTORS * VL * 4 <= 16384;
    int column = 0;
    if (wide)
        for (; column + TILE_VECTORS * VL <= dvp; column += TILE_VECTORS * VL) tile<TILE_VECTORS>(k, h, row, n, column);
    for (; column + 2 * VL <= dvp; column += 2 * VL) tile<2>(k, h, row, n, column);
    for (; column < dvp; column += VL) tile<1>(k, h, row, n, column);
}

// A one-token span: `key_heads` key heads at once, so that convolution and gates fill the lanes.
void run_single(Task& k, int key_heads) {
    const Call& c = k.c;
    const LinearDesc& d = *c.d;
    const int row = k.begin, heads = k.heads;
    k.r = lay_out_single(c, key_heads, heads);
    float* carry = k.r.carry;
    auto segments = [&](int input, int column, int count, int width, int stride, float* dst, bool owns) {
        const int merged = width == stride ? count : 1;  // whole vectors: neighbours are one segment
        for (int i = 0; i < count; i += merged)
            prepare_segment(k, row, 1, c.in[input], column + i * width, merged * width, merged * stride, carry, dst + i * stride, owns);
    };
    segments(d.q_input, d.q_column + k.key_head * d.dk, key_heads, d.dk, c.dkp, k.r.q, k.owns_qk);
    segments(d.k_input, d.k_column + k.key_head * d.dk, key_heads, d.dk, c.dkp, k.r.k, k.owns_qk);
    segments(d.v_input, d.v_column + k.head * d.dv, heads, d.dv, c.dvp, k.r.v, true);
    row_gates(c, row, k.head, heads, k.r.alpha, k.r.beta);
    if (d.l2) {
        l2_normalise(k.r.q, key_heads, c.dkp);
        l2_normalise(k.r.k, key_heads, c.dkp);
    }
    if (d.delta) dot_rows(k.r.q, k.r.k, key_heads, c.dkp, k.r.qk);
    const bool channel = per_channel(d);
    for (int h = 0; h < heads; h++) {
        const int g = (k.head + h) / c.group - k.key_head;
        if (channel) channel_gates(c, row, k.head + h, k.r.u);
        Token x{k.r.q + g * c.dkp, k.r.k + g * c.dkp, k.r.v + h * c.dvp, channel ? k.r.u : k.r.alpha + h, k.r.o,
                k.r.beta[h], k.r.qk[g], d.scale, d.skip ? d.skip[k.head + h] : 0.0f};
        if (d.state_dtype == F32) single_head<float>(c, k.sequence, k.head + h, x);
        else single_head<bf16>(c, k.sequence, k.head + h, x);
        narrow_row(k.r.o, c.out, c.out_dtype, row * c.out_stride + (int64_t)(k.head + h) * d.dv, d.dv);
    }
}

void run_task(const Call& c, int64_t index) {
    const LinearDesc& d = *c.d;
    const int tasks = d.k_heads * c.blocks_per_group;
    const int b = (int)(index / tasks), block = (int)(index % tasks);
    Task k{c, b, c.cu[b], c.cu[b + 1], block / c.blocks_per_group, 0, 0, block % c.blocks_per_group == 0, {}};
    if (k.begin == k.end) return;
    const int first = block % c.blocks_per_group * c.block;
    k.head = k.key_head * c.group + first;
    k.heads = c.group - first < c.block ? c.group - first : c.block;
    if (k.end - k.begin == 1) {
        const int together = c.blocks_per_group == 1 ? HEADS / c.group : 1;  // key heads per task
        if (k.key_head % together) return;  // done by the task of the first of them
        const int key_heads = d.k_heads - k.key_head < together ? d.k_heads - k.key_head : together;
        if (together > 1) k.heads = key_heads * c.group;
        run_single(k, key_heads);
        return;
    }
    k.r = lay_out(c, k.heads);
    for (int row = k.begin; row < k.end; row += CHUNK) {
        const int n = k.end - row < CHUNK ? k.end - row : CHUNK;
        prepare_chunk(k, row, n);
        for (int h = 0; h < k.heads; h++) {
            chunk_head(k, h, row, n);
            for (int t = 0; t < n; t++)
                narrow_row(k.r.o + t * c.dvp, c.out, c.out_dtype, (row + t) * c.out_stride + (int64_t)(k.head + h) * d.dv, d.dv);
        }
    }
}

}  // namespace

extern "C" {

int64_t braid_linear_desc_size() { return sizeof(LinearDesc); }

// One layer over one step. Inputs in the order of the descriptor's *_input indices.
int64_t braid_linear(const LinearDesc* d, const void* x0, int64_t s0, int32_t d0, const void* x1, int64_t s1, int32_t d1,
                     const void* x2, int64_t s2, int32_t d2, const int32_t* cu, int64_t batch, const int32_t* state_in,
                     const int32_t* state_out, int64_t tokens, void* out, int64_t out_stride, int32_t out_dtype) {
    Call c{d, {{x0, s0, d0}, {x1, s1, d1}, {x2, s2, d2}}, cu, state_in, state_out, batch, tokens, out, out_stride, out_dtype, 0, 0, 0, 0, 0};
    const int64_t failed = check_spans({cu, state_in, state_out, batch, tokens}, d->num_slots);
    if (failed) return failed;
    c.group = d->v_heads / d->k_heads;
    c.block = c.group < HEADS ? c.group : HEADS;
    c.blocks_per_group = (c.group + c.block - 1) / c.block;
    c.dkp = round_up(d->dk, VL);
    c.dvp = round_up(d->dv, VL);
    const double work = (double)tokens * d->v_heads * d->dk * d->dv;
    parallel(batch * d->k_heads * c.blocks_per_group, work, [&](int64_t i) { run_task(c, i); });
    return OK;
}

}  // extern "C"
