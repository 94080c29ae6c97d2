// Mamba (selective scan): convolution, SiLU, the projections of its output, and the scan, in one call.
//
//     u = silu(conv(x));  dt | B | C = x_proj u, each through its RMS norm;  dt = softplus(dt_proj dt + bias)
//     h[i, n] <- e^(-rate[i, n] dt[i]) h[i, n] + dt[i] B[n] u[i];  y[i] = sum_n C[n] h[i, n] + D[i] u[i]
//
// (see reference/mamba1.py). Rows go through all phases in panels of PANEL, so that the rows between phases
// stay in the cache; within a phase the work is cut over rows and channels. Every value of a row is computed
// by the same operations in the same order whatever panel or block it falls into, and states cross panels in
// floats, so a sequence's result depends neither on its company nor on how it was cut into steps.
#include <cmath>
#include <new>

#include "spans.h"

using namespace braid;

// Mirrored field by field in native/mamba1.py.
struct Mamba1Desc {
    Conv conv;
    int32_t inner, state, rank;
    int32_t state_dtype, x_dtype, dt_dtype;   // of the pool and of the two matrices
    float norm_eps, spare_f;
    int64_t num_slots, state_stride;          // stride in elements
    int64_t x_row, dt_row;                    // elements between rows of the matrices, whole vectors
    void* state_pool;                         // [slots, I, N]
    const void* x_proj;                       // [R + 2N, I]
    const void* dt_proj;                      // [I, R]
    const float *dt_bias, *skip;              // [I], padded by one vector
    const float* rate;                        // e^A_log as [N, I], padded by one vector
    const float *dt_norm, *b_norm, *c_norm;   // weights, or null: no norm
};

namespace {

constexpr int PANEL = 128;
constexpr int TILE = 4;      // rows and outputs of one register tile of a product
constexpr int OUTPUTS = 32;  // outputs per task of a product
constexpr int GROUP = 8;     // vectors of channels per task of the other phases

struct Call {
    const Mamba1Desc& d;
    Spans s;
    const void* x;
    int64_t x_stride;
    int32_t x_dtype;
    void* out;
    int64_t out_stride;
    int32_t out_dtype;
    int inner, rank, width;  // I, R and R + 2N rounded up to whole vectors
    float *u, *dt;           // [PANEL, inner]
    float *mixed, *low;      // [PANEL, width]: dt | B | C; [PANEL, rank]: dt after its norm
    float* conv_carry;       // [blocks][K - 1, VL]: inputs before the panel, of the sequence that goes on
    float* state_carry;      // [blocks][N, VL]: its state; also the state of whichever sequence is under way
    float* flat;             // [groups][N + 1, VL]: a state on its way to or from its slot
};

// One sequence's rows in a panel.
struct Piece {
    int b, begin, end;
    bool first;  // the sequence's span begins here; else it goes on from the panel before
};

// out[r, m] = sum_k a[r, k] w[m, k]: R rows, M outputs; each sum runs over k in whole vectors, in order.
template <int R, int M, class W>
void product_tile(const float* a, int64_t a_stride, const W* w, int64_t w_row, int depth, float* out, int64_t out_stride) {
    vf sum[R][M] = {};
    for (int k = 0; k < depth; k += VL) {
        vf weight[M];
        BRAID_UNROLL
        for (int m = 0; m < M; m++) weight[m] = load_as(w + m * w_row + k);
        BRAID_UNROLL
        for (int r = 0; r < R; r++) {
            const vf x = load(a + r * a_stride + k);
            BRAID_UNROLL
            for (int m = 0; m < M; m++) sum[r][m] = fmadd(x, weight[m], sum[r][m]);
        }
    }
    BRAID_UNROLL
    for (int r = 0; r < R; r++)
        BRAID_UNROLL
        for (int m = 0; m < M; m++) out[r * out_stride + m] = hsum(sum[r][m]);
}
template <int M, class W>
void product_rows(const float* a, int64_t a_stride, int rows, const W* w, int64_t w_row, int depth, float* out, int64_t out_stride) {
    int r = 0;
    for (; r + TILE <= rows; r += TILE) product_tile<TILE, M>(a + r * a_stride, a_stride, w, w_row, depth, out + r * out_stride, out_stride);
    for (; r < rows; r++) product_tile<1, M>(a + r * a_stride, a_stride, w, w_row, depth, out + r * out_stride, out_stride);
}
template <class W>
void product(const float* a, int64_t a_stride, int rows, const W* w, int64_t w_row, int depth, int outputs, float* out, int64_t out_stride) {
    const int blocks = (outputs + OUTPUTS - 1) / OUTPUTS;
    parallel(blocks, (double)rows * outputs * depth, [&](int64_t block) {
        int m = (int)block * OUTPUTS;
        const int end = m + OUTPUTS < outputs ? m + OUTPUTS : outputs;
        for (; m + TILE <= end; m += TILE) product_rows<TILE>(a, a_stride, rows, w + m * w_row, w_row, depth, out + m, out_stride);
        for (; m < end; m++) product_rows<1>(a, a_stride, rows, w + m * w_row, w_row, depth, out + m, out_stride);
    });
}
void product(const float* a, int64_t a_stride, int rows, const void* w, int32_t dtype, int64_t w_row, int depth, int outputs,
             float* out, int64_t out_stride) {
    if (dtype == F32) product(a, a_stride, rows, (const float*)w, w_row, depth, outputs, out, out_stride);
    else product(a, a_stride, rows, (const bf16*)w, w_row, depth, outputs, out, out_stride);
}

// x / sqrt(mean(x^2) + eps) * weight; without a weight, x itself.
void rms_norm(const float* x, float* dst, int n, const float* weight, float eps) {
    float factor = 1.0f;
    if (weight) {
        float sum = 0.0f;
        for (int i = 0; i < n; i++) sum += x[i] * x[i];
        factor = 1.0f / std::sqrt(sum / (float)n + eps);
    }
    for (int i = 0; i < n; i++) dst[i] = weight ? x[i] * factor * weight[i] : x[i];
}

// work(column, lanes, block) for every vector of channels; a task takes the sequences one after the other,
// so that it finds their slots' neighbouring channels in the cache.
template <class F> void for_channels(const Call& c, double cost, const std::vector<Piece>& pieces, F&& work) {
    const int blocks = c.inner / VL, groups = (blocks + GROUP - 1) / GROUP;
    parallel(groups, cost * c.d.inner, [&](int64_t group) {
        for (const Piece& p : pieces)
            for (int block = (int)group * GROUP; block < blocks && block < (group + 1) * GROUP; block++) {
                const int column = block * VL, lanes = c.d.inner - column < VL ? c.d.inner - column : VL;
                work(p, column, lanes, block);
            }
    });
}

void convolve_panel(const Call& c, int start, const std::vector<Piece>& pieces, int rows) {
    const Conv& conv = c.d.conv;
    for_channels(c, (double)rows * (conv.width + 8), pieces, [&](const Piece& p, int column, int lanes, int block) {
        float* carry = c.conv_carry + (int64_t)block * (conv.width - 1) * VL;
        convolve_lanes(conv, c.s, p.b, p.begin, p.end, p.first, c.x, c.x_stride, c.x_dtype, column, lanes, carry,
                       [&](int t, vf y) { store(c.u + (int64_t)(t - start) * c.inner + column, vsilu(y)); });
    });
}

void project_panel(const Call& c, int rows) {
    const Mamba1Desc& d = c.d;
    product(c.u, c.inner, rows, d.x_proj, d.x_dtype, d.x_row, c.inner, d.rank + 2 * d.state, c.mixed, c.width);
    for (int r = 0; r < rows; r++) {
        float *mixed = c.mixed + (int64_t)r * c.width, *low = c.low + (int64_t)r * c.rank;
        float *B = mixed + d.rank, *C = B + d.state;
        rms_norm(mixed, low, d.rank, d.dt_norm, d.norm_eps);
        for (int i = d.rank; i < c.rank; i++) low[i] = 0.0f;
        rms_norm(B, B, d.state, d.b_norm, d.norm_eps);
        rms_norm(C, C, d.state, d.c_norm, d.norm_eps);
    }
    product(c.low, c.rank, rows, d.dt_proj, d.dt_dtype, d.dt_row, c.rank, d.inner, c.dt, c.inner);
}

// One vector of channels through the rows of one sequence; h [N, VL].
void scan_piece(const Call& c, int start, const Piece& p, int column, int lanes, float* h, float* flat) {
    const Mamba1Desc& d = c.d;
    const int64_t slot = c.s.state_in[p.b], at = (int64_t)column * d.state;
    if (p.first && slot >= 0) load_lanes_of(d.state_pool, d.state_dtype, slot * d.state_stride + at, d.state, lanes, flat, h);
    else if (p.first) std::memset(h, 0, sizeof(float) * d.state * VL);
    const vf bias = load(d.dt_bias + column), skip = load(d.skip + column);
    for (int t = p.begin; t < p.end; t++) {
        const int64_t row = t - start;
        const float *B = c.mixed + row * c.width + d.rank, *C = B + d.state;
        const vf u = load(c.u + row * c.inner + column);
        const vf dt = vsoftplus(load(c.dt + row * c.inner + column) + bias);
        const vf driven = dt * u;
        vf y = skip * u;
        for (int n = 0; n < d.state; n++) {
            const vf decay = vexp(-dt * load(d.rate + (int64_t)n * d.inner + column));
            const vf s = fmadd(splat(B[n]), driven, decay * load(h + n * VL));
            store(h + n * VL, s);
            y = fmadd(splat(C[n]), s, y);
        }
        store_row(c.out, c.out_dtype, t * c.out_stride + column, y, lanes);
        const int64_t out = c.s.state_out[t];
        if (out >= 0) store_lanes_of(h, d.state, lanes, flat, d.state_pool, d.state_dtype, out * d.state_stride + at);
    }
}

void scan_panel(const Call& c, int start, const std::vector<Piece>& pieces, int rows) {
    const int64_t state = (int64_t)c.d.state * VL;
    for_channels(c, (double)rows * c.d.state * 8, pieces, [&](const Piece& p, int column, int lanes, int block) {
        scan_piece(c, start, p, column, lanes, c.state_carry + block * state, c.flat + block / GROUP * (state + VL));
    });
}

std::vector<Piece> pieces_of(const Spans& s, int start, int end, int& b) {
    std::vector<Piece> pieces;
    for (; b < s.batch && s.cu[b] < end; b++) {
        const int from = s.cu[b] > start ? s.cu[b] : start, to = s.cu[b + 1] < end ? s.cu[b + 1] : end;
        if (from < to) pieces.push_back({b, from, to, from == s.cu[b]});
        if (s.cu[b + 1] > end) break;  // goes on in the next panel
    }
    return pieces;
}

void run(Call& c) {
    const Mamba1Desc& d = c.d;
    const int rows = c.s.tokens < PANEL ? (int)c.s.tokens : PANEL, past = d.conv.width - 1;
    const size_t I = c.inner, groups = (I / VL + GROUP - 1) / GROUP;
    const size_t sizes[] = {rows * I, rows * I, (size_t)rows * c.width, (size_t)rows * c.rank, past * I, d.state * I,
                            groups * (d.state + 1) * VL};
    float** fields[] = {&c.u, &c.dt, &c.mixed, &c.low, &c.conv_carry, &c.state_carry, &c.flat};
    size_t total = 0;
    for (size_t n : sizes) total += n;
    float* at = scratch(total);  // of the calling thread; no task asks for scratch of its own
    for (int i = 0; i < 7; i++) {
        *fields[i] = at;
        at += sizes[i];
    }
    int b = 0;
    for (int start = 0; start < c.s.tokens; start += PANEL) {
        const int end = start + PANEL < c.s.tokens ? start + PANEL : (int)c.s.tokens;
        const std::vector<Piece> pieces = pieces_of(c.s, start, end, b);
        convolve_panel(c, start, pieces, end - start);
        project_panel(c, end - start);
        scan_panel(c, start, pieces, end - start);
    }
}

}  // namespace

extern "C" {

int64_t braid_mamba1_desc_size() { return sizeof(Mamba1Desc); }

int64_t braid_mamba1(const Mamba1Desc* d, const void* x, int64_t x_stride, int32_t x_dtype, const int32_t* cu, int64_t batch,
                     const int32_t* state_in, const int32_t* state_out, int64_t tokens, void* out, int64_t out_stride,
                     int32_t out_dtype) {
    const Spans s{cu, state_in, state_out, batch, tokens};
    const int64_t failed = check_spans(s, d->num_slots);
    if (failed) return failed;
    try {
        Call c{*d, s, x, x_stride, x_dtype, out, out_stride, out_dtype, round_up(d->inner, VL), round_up(d->rank, VL),
               round_up(d->rank + 2 * d->state, VL), nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
        run(c);
    } catch (const std::bad_alloc&) {
        return failure(MEMORY, 0);
    }
    return OK;
}

}  // extern "C"
