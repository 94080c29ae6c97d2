// Full attention over paged caches: append the new keys and values, then causal softmax attention.
//
// Work is cut into units: (sequence, KV head, block of query tokens, range of keys). The query heads
// that share a KV head are rows of one unit, so a key or value is read once for all of them. Few rows
// (decode): dot products straight from the pages. Many rows (prefill, verify): key/value tiles are
// widened once into the cache and multiplied as small matrices, with scores kept transposed
// [keys, rows], so that the softmax runs down the lanes and nothing has to be transposed but q.
// How a sequence is cut depends on that sequence alone, never on the batch or the thread count.
//
// MLA has two forms. Absorbed (decode, short spans): the same units, one latent row per position is key
// of every head and, in its first `rank` columns, value. Expanded (prompts): one unit per sequence and
// head, which makes keys and values of that head from a chunk of latents at a time and lets every row of
// the span attend to them. A plan says how the cached prefix is cut into chunks.
//
// Parts of an attention are kept as (weighted sum, maximum, sum) of each row: its log-sum-exp, natural
// logarithm, is maximum + log(sum), and parts merge with the weights exp(maximum - common maximum).
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "common.h"

using namespace braid;

namespace {

constexpr int KEYS = 64;           // keys per tile
constexpr int FEW_ROWS = 8;        // up to here: the decode path
constexpr int BLOCK_ROWS = 128;    // query rows per unit of the prefill path
constexpr int SPLIT_ROWS = 64;     // up to here a long context is split ..
constexpr int64_t SPLIT_KEYS = 1024;  // .. into ranges of this many keys, to keep all cores busy
constexpr int MIN_EXPANDED_ROWS = 16;  // shorter spans share their reads of w_uk and w_uv instead
constexpr int EXPANDED_KEYS = 512;     // keys expanded at a time where no plan says
constexpr int MR = VL == 16 ? 8 : 4;  // register block of the small matrix products: MR rows x 2 vectors
constexpr float NEG_INF = -std::numeric_limits<float>::infinity();

}  // namespace

// Mirrored field by field in native/full.py.
struct FullDesc {
    int32_t mla;
    int32_t q_heads, kv_heads, dk, dv;      // of the attention core (mla: 1 KV head, dk = rank + rope, dv = rank)
    int32_t nope, rope, v_head_dim;         // mla only
    int32_t window, page_size, cache_dtype, weight_dtype;
    float scale, spare_f;
    int64_t num_pages, k_page_stride, v_page_stride;  // strides in elements
    int64_t uk_row, uv_row;                 // mla: padded row lengths of w_uk [H, nope, uk_row] and w_uv [H, rank, uv_row]
    void *k, *v;                            // [num_pages, page_size, kv_heads, dk | dv]; mla: both the latent cache
    const void *w_uk, *w_uv;
};

namespace {

struct Rows {
    const void* data;
    int64_t stride;  // elements between token rows
    int32_t dtype;
};

enum Path : uint8_t { CHEAPER = 0, EXPAND = 1, ABSORB = 2 };  // mirrored in native/full.py

struct Plan {
    const int32_t *starts, *lengths;  // [chunks, batch]: parts of the prefixes, for mla
    const uint8_t* paths;             // [batch], or null: CHEAPER for all
    int64_t chunks;
};

struct Call {
    const FullDesc* d;
    Plan plan;
    Rows q, out;  // [T, q_heads, dk | dv]
    const int32_t *cu, *context, *pages;
    int64_t batch, tokens, max_pages;
    int group, dkp, dvp;          // query heads per KV head; dk, dv in whole vectors
    int64_t k_step, v_step;       // elements between positions of a page
    float* partials;              // per part: weighted sums [rows, dvp], then maxima and sums [2, rows]
    const int32_t* rows;          // [batch]: first row of each sequence in q and out, -1: not attended to here
};

struct Unit {
    int sequence, kv_head, token, tokens;  // rows [token, token + tokens) of Call::q and Call::out
    int64_t position;                      // of the first query token
    int64_t first, last;                   // keys [first, last)
    int64_t partial;                       // -1: write the output; else offset of this part in Call::partials
    // Rows of the sequence's whole span: how a block is computed follows from it and not from the block,
    // so that a prompt gives the same bits wherever it is cut into spans.
    int64_t span_rows;
};

struct Merge {
    int unit, parts;  // units [unit, unit + parts) hold the parts of one block
};

// Rows of one head lie kv_heads apart, in pages in no order: the hardware's prefetchers do not follow.
BRAID_INLINE void prefetch(const void* row, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)row + i, 0, 2);
}

int rows_of(const Call& c, const Unit& u) { return u.tokens * c.group; }

int64_t first_key(const Call& c, int64_t position) {
    const int64_t first = c.d->window ? position - c.d->window + 1 : 0;
    return first > 0 ? first : 0;
}

template <class T> const T* key_at(const Call& c, const Unit& u, int64_t p) {
    const FullDesc& d = *c.d;
    const int64_t page = c.pages[u.sequence * c.max_pages + p / d.page_size];
    return (const T*)d.k + page * d.k_page_stride + p % d.page_size * c.k_step + (int64_t)u.kv_head * d.dk;
}
template <class T> const T* value_at(const Call& c, const Unit& u, int64_t p) {
    const FullDesc& d = *c.d;
    const int64_t page = c.pages[u.sequence * c.max_pages + p / d.page_size];
    return (const T*)d.v + page * d.v_page_stride + p % d.page_size * c.v_step + (int64_t)u.kv_head * (d.mla ? d.dk : d.dv);
}

// Query row r of a unit (token r / group, head r % group of the KV head's group), scaled, as floats.
void query_row(const Call& c, const Unit& u, int r, float* dst) {
    const int64_t head = (int64_t)u.kv_head * c.group + r % c.group;
    widen_row(c.q.data, c.q.dtype, (u.token + r / c.group) * c.q.stride + head * c.d->dk, dst, c.d->dk);
    for (int i = 0; i < c.dkp; i += VL) store(dst + i, load(dst + i) * c.d->scale);
}

// Row r's weighted sum [dvp], maximum and sum: normalised into the output, or kept as a partial.
void finish_row(const Call& c, const Unit& u, int r, float* acc, float max, float sum) {
    const int rows = rows_of(c, u);
    if (u.partial >= 0) {
        float* part = c.partials + u.partial;
        std::memcpy(part + (int64_t)r * c.dvp, acc, sizeof(float) * c.dvp);
        part[(int64_t)rows * c.dvp + r] = max;
        part[(int64_t)rows * c.dvp + rows + r] = sum;
        return;
    }
    const float factor = sum > 0.0f ? 1.0f / sum : (sum == 0.0f ? 0.0f : sum);  // NaN stays NaN
    for (int i = 0; i < c.dvp; i += VL) store(acc + i, load(acc + i) * factor);
    const int64_t head = (int64_t)u.kv_head * c.group + r % c.group;
    narrow_row(acc, const_cast<void*>(c.out.data), c.out.dtype, (u.token + r / c.group) * c.out.stride + head * c.d->dv, c.d->dv);
}

// ---- few rows: decode ----

// scores[r][j] = q[r]·k[j] for NQ rows and NK keys.
template <int NQ, int NK, class T>
BRAID_INLINE void dots(const float* q, int dkp, const T* const* keys, int dk, float* scores) {
    vf acc[NQ][NK] = {};
    int i = 0;
    for (; i + VL <= dk; i += VL) {
        vf k[NK];
        BRAID_UNROLL
        for (int j = 0; j < NK; j++) k[j] = load_as(keys[j] + i);
        BRAID_UNROLL
        for (int r = 0; r < NQ; r++) {
            const vf x = load(q + r * dkp + i);
            BRAID_UNROLL
            for (int j = 0; j < NK; j++) acc[r][j] = fmadd(x, k[j], acc[r][j]);
        }
    }
    if (i < dk)
        BRAID_UNROLL
        for (int j = 0; j < NK; j++) {
            const vf k = load_part(keys[j] + i, dk - i);
            BRAID_UNROLL
            for (int r = 0; r < NQ; r++) acc[r][j] = fmadd(load(q + r * dkp + i), k, acc[r][j]);
        }
    BRAID_UNROLL
    for (int r = 0; r < NQ; r++)
        BRAID_UNROLL
        for (int j = 0; j < NK; j++) scores[r * KEYS + j] = hsum(acc[r][j]);
}

template <int NQ, class T> void score_rows(const float* q, int dkp, const T* const* keys, int n, int dk, float* scores) {
    int j = 0;
    for (; j + 4 <= n; j += 4) dots<NQ, 4>(q, dkp, keys + j, dk, scores + j);
    for (; j < n; j++) dots<NQ, 1>(q, dkp, keys + j, dk, scores + j);
}

// acc[r] += sum_j p[r][j] v[j], eight keys at a time.
template <class T> void add_values(float* acc, int rows, int dvp, const T* const* values, int n, int dv, const float* p) {
    for (int j = 0; j < n; j += 8) {
        const int m = n - j < 8 ? n - j : 8;
        for (int i = 0; i < dv; i += VL) {
            vf v[8];
            BRAID_UNROLL
            for (int x = 0; x < 8; x++)
                v[x] = x >= m ? vf{} : i + VL <= dv ? load_as(values[j + x] + i) : load_part(values[j + x] + i, dv - i);
            for (int r = 0; r < rows; r++) {
                const float* weight = p + r * KEYS + j;  // zero beyond n
                vf sum = load(acc + r * dvp + i);
                BRAID_UNROLL
                for (int x = 0; x < 8; x++) sum = fmadd(splat(weight[x]), v[x], sum);
                store(acc + r * dvp + i, sum);
            }
        }
    }
}

// Online softmax of one row over a tile: scores become weights (0 outside [from, to)), acc is rescaled.
void soften(float* scores, int from, int to, float& max, float& sum, float* acc, int dvp) {
    for (int j = 0; j < from; j++) scores[j] = NEG_INF;
    for (int j = to > from ? to : from; j < KEYS; j++) scores[j] = NEG_INF;
    vf top = splat(NEG_INF);
    for (int j = 0; j < KEYS; j += VL) top = vmax(load(scores + j), top);
    float best = max;
    for (int i = 0; i < VL; i++) best = top[i] > best ? top[i] : best;
    const float base = best == NEG_INF ? 0.0f : best;
    vf total{};
    for (int j = 0; j < KEYS; j += VL) {
        vf w = vexp(load(scores + j) - base);
        store(scores + j, w);
        total += w;
    }
    const float keep = max == NEG_INF ? 0.0f : vexp(splat(max - base))[0];
    sum = sum * keep + hsum(total);
    if (best != max)
        for (int i = 0; i < dvp; i += VL) store(acc + i, load(acc + i) * keep);
    max = best;
}

template <class T> void few_rows(const Call& c, const Unit& u) {
    const FullDesc& d = *c.d;
    const int rows = rows_of(c, u);
    float* q = scratch((size_t)rows * (c.dkp + c.dvp + KEYS));
    float *acc = q + rows * c.dkp, *scores = acc + rows * c.dvp;
    float max[FEW_ROWS], sum[FEW_ROWS];
    for (int r = 0; r < rows; r++) {
        query_row(c, u, r, q + r * c.dkp);
        max[r] = NEG_INF;
        sum[r] = 0.0f;
    }
    std::memset(acc, 0, sizeof(float) * rows * c.dvp);
    const T *keys[KEYS], *values[KEYS];
    for (int64_t p = u.first; p < u.last; p += KEYS) {
        const int n = u.last - p < KEYS ? (int)(u.last - p) : KEYS;
        for (int j = 0; j < n; j++) {
            keys[j] = key_at<T>(c, u, p + j);
            values[j] = value_at<T>(c, u, p + j);
            prefetch(values[j], d.dv * sizeof(T));  // needed when the scores are done
        }
        for (int r = 0; r < rows;) {
            const float* x = q + r * c.dkp;
            float* s = scores + r * KEYS;
            if (rows - r >= 4) { score_rows<4>(x, c.dkp, keys, n, d.dk, s); r += 4; }
            else if (rows - r >= 2) { score_rows<2>(x, c.dkp, keys, n, d.dk, s); r += 2; }
            else { score_rows<1>(x, c.dkp, keys, n, d.dk, s); r += 1; }
        }
        for (int r = 0; r < rows; r++) {
            const int64_t position = u.position + r / c.group, from = first_key(c, position) - p, to = position + 1 - p;
            soften(scores + r * KEYS, from > n ? n : from > 0 ? (int)from : 0, to > n ? n : to > 0 ? (int)to : 0, max[r], sum[r],
                   acc + r * c.dvp, c.dvp);
        }
        for (int64_t next = p + KEYS; next < u.last && next < p + 2 * KEYS; next++) prefetch(key_at<T>(c, u, next), d.dk * sizeof(T));
        add_values(acc, rows, c.dvp, values, n, d.dv, scores);
    }
    for (int r = 0; r < rows; r++) finish_row(c, u, r, acc + r * c.dvp, max[r], sum[r]);
}

// ---- many rows: prefill, verify, wide groups ----

// C[m][n] (+)= sum_k A[m * am + k * ak] B[k * ldb + n] for M rows and NV vectors of columns.
template <int M, int NV, class BT>
BRAID_INLINE void multiply_block(const float* A, int am, int ak, const BT* B, int64_t ldb, float* C, int ldc, int depth, bool add) {
    vf acc[M][NV];
    BRAID_UNROLL
    for (int m = 0; m < M; m++)
        BRAID_UNROLL
        for (int n = 0; n < NV; n++) acc[m][n] = add ? load(C + m * ldc + n * VL) : vf{};
    for (int k = 0; k < depth; k++) {
        vf b[NV];
        BRAID_UNROLL
        for (int n = 0; n < NV; n++) b[n] = load_as(B + k * ldb + n * VL);
        BRAID_UNROLL
        for (int m = 0; m < M; m++) {
            const vf a = splat(A[m * am + k * ak]);
            BRAID_UNROLL
            for (int n = 0; n < NV; n++) acc[m][n] = fmadd(a, b[n], acc[m][n]);
        }
    }
    BRAID_UNROLL
    for (int m = 0; m < M; m++)
        BRAID_UNROLL
        for (int n = 0; n < NV; n++) store(C + m * ldc + n * VL, acc[m][n]);
}
template <int NV, class BT>
void multiply_rows(const float* A, int am, int ak, const BT* B, int64_t ldb, float* C, int ldc, int rows, int depth, bool add) {
    int m = 0;
    for (; m + MR <= rows; m += MR) multiply_block<MR, NV>(A + m * am, am, ak, B, ldb, C + m * ldc, ldc, depth, add);
    for (; m < rows; m++) multiply_block<1, NV>(A + m * am, am, ak, B, ldb, C + m * ldc, ldc, depth, add);
}
// B lies in panels of 2 VL columns (the last may be VL wide): panel at column n begins at B + n * depth_of_panel.
void multiply_panels(const float* A, int am, int ak, const float* B, int panel_depth, float* C, int ldc, int rows, int columns, int depth, bool add) {
    int n = 0;
    for (; n + 2 * VL <= columns; n += 2 * VL)
        multiply_rows<2>(A, am, ak, B + (int64_t)n * panel_depth, 2 * VL, C + n, ldc, rows, depth, add);
    if (n < columns) multiply_rows<1>(A, am, ak, B + (int64_t)n * panel_depth, VL, C + n, ldc, rows, depth, add);
}
int panel_width(int n, int columns) { return n + 2 * VL <= columns ? 2 * VL : VL; }

struct Tile {
    int rows, padded;  // query rows, and in whole vectors
    float *q;          // panels [padded][dk]: q transposed
    float *keys;       // [KEYS, dkp]
    float *values;     // panels [dvp][KEYS]
    float *scores;     // [KEYS, padded]
    float *acc;        // [padded, dvp]
    float *max, *sum;  // [padded]
    float *position;   // [padded], exact in a float up to 2^24
};

Tile lay_out(const Call& c, int rows) {
    Tile t{};
    t.rows = rows;
    t.padded = round_up(rows, VL);
    const size_t parts[] = {(size_t)t.padded * c.d->dk, (size_t)KEYS * c.dkp, (size_t)KEYS * c.dvp, (size_t)KEYS * t.padded,
                            (size_t)t.padded * c.dvp, (size_t)t.padded, (size_t)t.padded, (size_t)t.padded};
    float** fields[] = {&t.q, &t.keys, &t.values, &t.scores, &t.acc, &t.max, &t.sum, &t.position};
    size_t total = 0;
    for (size_t n : parts) total += (n + 15) / 16 * 16;
    float* at = scratch(total);
    BRAID_UNROLL
    for (int i = 0; i < 8; i++) {
        *fields[i] = at;
        at += (parts[i] + 15) / 16 * 16;
    }
    return t;
}

void pack_queries(const Call& c, const Unit& u, Tile& t) {
    const int dk = c.d->dk;
    for (int n = 0; n < t.padded;) {
        const int width = panel_width(n, t.padded);
        float* panel = t.q + (size_t)n * dk;
        for (int r = 0; r < width; r++) {
            float* row = t.keys;  // not in use yet
            if (n + r < t.rows) query_row(c, u, n + r, row);
            else std::memset(row, 0, sizeof(float) * c.dkp);
            for (int i = 0; i < dk; i++) panel[i * width + r] = row[i];
        }
        n += width;
    }
    for (int r = 0; r < t.padded; r++) {
        const int real = r < t.rows ? r : t.rows - 1;
        t.position[r] = (float)(u.position + real / c.group - u.first);  // relative to the first key
        t.max[r] = NEG_INF;
        t.sum[r] = 0.0f;
    }
    std::memset(t.acc, 0, sizeof(float) * t.padded * c.dvp);
}

template <class T> void pack_keys(const Call& c, const Unit& u, Tile& t, int64_t p, int n) {
    float row[2 * VL];
    const FullDesc& d = *c.d;
    for (int j = 0; j < n; j++) {
        widen_row(key_at<T>(c, u, p + j), t.keys + j * c.dkp, d.dk);
        const T* value = value_at<T>(c, u, p + j);
        if (p + KEYS + j < u.last) {
            prefetch(key_at<T>(c, u, p + KEYS + j), d.dk * sizeof(T));
            if (!d.mla) prefetch(value_at<T>(c, u, p + KEYS + j), d.dv * sizeof(T));
        }
        for (int i = 0; i < c.dvp;) {
            const int width = panel_width(i, c.dvp), valid = d.dv - i < width ? d.dv - i : width;
            float* dst = t.values + (size_t)i * KEYS + j * width;
            if (valid == width) {
                widen_row(value + i, dst, width);
            } else {
                std::memset(row, 0, sizeof row);
                widen_row(value + i, row, valid);
                std::memcpy(dst, row, sizeof(float) * width);
            }
            i += width;
        }
    }
}

// Online softmax down the lanes: scores [n keys, padded] become weights; returns through keep[] the
// factor that the earlier sums get. `from` is the tile's first key relative to the unit's.
void soften_tile(const Call& c, Tile& t, int64_t from, int n, bool masked, float* keep) {
    const float window = c.d->window ? (float)c.d->window : std::numeric_limits<float>::infinity();
    for (int r = 0; r < t.padded; r += VL) {
        const vf position = load(t.position + r), old = load(t.max + r);
        vf best = old;
        for (int j = 0; j < n; j++) {
            float* at = t.scores + (size_t)j * t.padded + r;
            vf s = load(at);
            if (masked) {
                const vf key = splat((float)(from + j));
                s = select((key <= position) & (key + window > position), s, splat(NEG_INF));
                store(at, s);
            }
            best = vmax(s, best);
        }
        const vf base = select(best == NEG_INF, vf{}, best);
        vf total{};
        for (int j = 0; j < n; j++) {
            float* at = t.scores + (size_t)j * t.padded + r;
            const vf w = vexp(load(at) - base);
            store(at, w);
            total += w;
        }
        const vf factor = select(old == NEG_INF, vf{}, vexp(old - base));
        store(keep + r, factor);
        store(t.sum + r, load(t.sum + r) * factor + total);
        store(t.max + r, best);
    }
}

template <class T> void many_rows(const Call& c, const Unit& u) {
    Tile t = lay_out(c, rows_of(c, u));
    pack_queries(c, u, t);
    std::vector<float> keep(t.padded);
    const int64_t last_position = u.position + u.tokens - 1;
    for (int64_t p = u.first; p < u.last; p += KEYS) {
        const int n = u.last - p < KEYS ? (int)(u.last - p) : KEYS;
        pack_keys<T>(c, u, t, p, n);
        multiply_panels(t.keys, c.dkp, 1, t.q, c.d->dk, t.scores, t.padded, n, t.padded, c.d->dk, false);
        const bool masked = p + n - 1 > u.position || (c.d->window && p <= last_position - c.d->window);
        soften_tile(c, t, p - u.first, n, masked, keep.data());
        if (p > u.first)
            for (int r = 0; r < t.padded; r++)
                if (keep[r] != 1.0f)
                    for (int i = 0; i < c.dvp; i += VL) store(t.acc + r * c.dvp + i, load(t.acc + r * c.dvp + i) * keep[r]);
        multiply_panels(t.scores, 1, t.padded, t.values, KEYS, t.acc, c.dvp, t.padded, c.dvp, n, true);
    }
    for (int r = 0; r < t.rows; r++) finish_row(c, u, r, t.acc + r * c.dvp, t.max[r], t.sum[r]);
}

void run_unit(const Call& c, const Unit& u) {
    const bool few = u.span_rows <= FEW_ROWS;
    if (c.d->cache_dtype == F32) few ? few_rows<float>(c, u) : many_rows<float>(c, u);
    else few ? few_rows<bf16>(c, u) : many_rows<bf16>(c, u);
}

// ---- the step ----

int64_t check(const Call& c) {
    const FullDesc& d = *c.d;
    if (c.cu[0] != 0) return failure(SPANS, 0);
    for (int64_t b = 0; b < c.batch; b++)
        if (c.cu[b + 1] < c.cu[b]) return failure(SPANS, b + 1);
    if (c.cu[c.batch] != c.tokens) return failure(SPANS, c.batch);
    for (int64_t b = 0; b < c.batch; b++) {
        const int64_t length = c.cu[b + 1] - c.cu[b], context = c.context[b];
        if (length == 0) continue;
        if (context < 0 || context + length > c.max_pages * d.page_size) return failure(CONTEXT, b);
        for (int64_t i = first_key(c, context) / d.page_size; i <= (context + length - 1) / d.page_size; i++) {
            const int64_t page = c.pages[b * c.max_pages + i];
            if (page < 0 || page >= d.num_pages) return failure(PAGE, b * c.max_pages + i);
        }
    }
    return OK;
}

// Chunks, where there are any, must cover every prefix from its start, in order and to its end; of a
// sequence that is absorbed they may cover nothing.
int64_t check_plan(const Call& c) {
    const Plan& p = c.plan;
    for (int64_t b = 0; p.chunks && b < c.batch; b++) {
        int64_t covered = 0;
        for (int64_t i = 0; i < p.chunks; i++) {
            const int64_t at = i * c.batch + b, length = p.lengths[at];
            if (length < 0 || (length && p.starts[at] != covered)) return failure(CHUNKS, b);
            covered += length;
        }
        const bool needed = p.paths[b] != ABSORB && c.cu[b + 1] > c.cu[b];
        if (covered != c.context[b] && (needed || covered)) return failure(CHUNKS, b);
    }
    return OK;
}

// Converts n elements from one row to another.
void copy_row(const Rows& src, int64_t from, void* dst, int32_t dtype, int64_t to, int n) {
    if (src.dtype == dtype) {
        const size_t size = dtype == F32 ? 4 : 2;
        std::memcpy((char*)dst + to * size, (const char*)src.data + from * size, n * size);
        return;
    }
    float block[64];
    for (int i = 0; i < n; i += 64) {
        const int m = n - i < 64 ? n - i : 64;
        widen_row(src.data, src.dtype, from + i, block, m);
        narrow_row(block, dst, dtype, to + i, m);
    }
}

// Writes `width` new columns of every token at its position, from column `column` of the cached row.
void append(const Call& c, const Rows& x, void* cache, int64_t page_stride, int64_t step, int column, int width) {
    const FullDesc& d = *c.d;
    parallel(c.batch, (double)c.tokens * width / 4, [&](int64_t b) {
        for (int t = c.cu[b]; t < c.cu[b + 1]; t++) {
            const int64_t p = (int64_t)c.context[b] + t - c.cu[b], page = c.pages[b * c.max_pages + p / d.page_size];
            copy_row(x, t * x.stride, cache, d.cache_dtype, page * page_stride + p % d.page_size * step + column, width);
        }
    });
}

// Tokens of the batch that lie one behind the other among the absorbed rows too, MR at most.
struct Run {
    int64_t token, row;
    int tokens;
};

struct Work {
    std::vector<Unit> units;
    std::vector<Merge> merges;
    std::vector<float> partials;
    std::vector<float> q, out;  // mla: absorbed queries [rows, H, dk] and latent outputs [rows, H, dv]
    std::vector<int32_t> rows;  // mla: see Call::rows
    std::vector<int32_t> expanded;  // mla: sequences whose keys and values are expanded
    std::vector<Run> runs;
};

// Cuts one block of query tokens over its keys, where the context is long and the rows are few.
void add_block(const Call& c, Work& w, Unit u, int64_t& floats) {
    const int rows = rows_of(c, u);
    const int64_t from = u.first / SPLIT_KEYS, to = (u.last - 1) / SPLIT_KEYS;
    if (u.span_rows > SPLIT_ROWS || from == to) {
        for (int h = 0; h < c.d->kv_heads; h++) {
            u.kv_head = h;
            w.units.push_back(u);
        }
        return;
    }
    const int64_t first = u.first, last = u.last;
    for (int h = 0; h < c.d->kv_heads; h++) {
        w.merges.push_back(Merge{(int)w.units.size(), (int)(to - from + 1)});
        for (int64_t s = from; s <= to; s++) {
            u.kv_head = h;
            u.first = s == from ? first : s * SPLIT_KEYS;
            u.last = s == to ? last : (s + 1) * SPLIT_KEYS;
            u.partial = floats;
            floats += (int64_t)rows * (c.dvp + 2);
            w.units.push_back(u);
        }
    }
}

double cut(Call& c, Work& w) {
    w.units.clear();
    w.merges.clear();
    const int block = BLOCK_ROWS / c.group > 0 ? BLOCK_ROWS / c.group : 1;
    int64_t floats = 0;
    double work = 0;
    for (int b = 0; b < c.batch; b++) {
        const int begin = c.rows ? c.rows[b] : c.cu[b], length = begin < 0 ? 0 : c.cu[b + 1] - c.cu[b];
        const int64_t context = c.context[b];
        // Late blocks see most keys: handed out first, so that no thread is left with one at the end.
        for (int i = (length - 1) / block * block; length && i >= 0; i -= block) {
            const int n = length - i < block ? length - i : block;
            const int64_t position = context + i;
            Unit u{b, 0, begin + i, n, position, first_key(c, position), position + n, -1, (int64_t)length * c.group};
            work += (double)n * c.d->q_heads * (u.last - u.first) * (c.d->dk + c.d->dv);
            add_block(c, w, u, floats);
        }
    }
    if (w.partials.size() < (size_t)floats) w.partials.resize(floats);
    c.partials = w.partials.data();
    return work;
}

void merge_block(const Call& c, const Work& w, const Merge& m) {
    Unit u = w.units[m.unit];
    const int rows = rows_of(c, u);
    float* acc = scratch(c.dvp);
    for (int r = 0; r < rows; r++) {
        float best = NEG_INF, sum = 0.0f;
        for (int i = 0; i < m.parts; i++) {
            const float max = c.partials[w.units[m.unit + i].partial + (int64_t)rows * c.dvp + r];
            best = max > best ? max : best;
        }
        std::memset(acc, 0, sizeof(float) * c.dvp);
        for (int i = 0; i < m.parts; i++) {
            const float* part = c.partials + w.units[m.unit + i].partial;
            const float max = part[(int64_t)rows * c.dvp + r];
            if (max == NEG_INF) continue;  // this part held none of the row's keys
            const float factor = vexp(splat(max - best))[0];
            sum += part[(int64_t)rows * c.dvp + rows + r] * factor;
            for (int j = 0; j < c.dvp; j += VL) store(acc + j, fmadd(splat(factor), load(part + (int64_t)r * c.dvp + j), load(acc + j)));
        }
        u.partial = -1;
        finish_row(c, u, r, acc, best, sum);
    }
}

void attend(Call& c, Work& w) {
    const double work = cut(c, w);
    parallel((int64_t)w.units.size(), work, [&](int64_t i) { run_unit(c, w.units[i]); });
    if (w.merges.empty()) return;
    parallel((int64_t)w.merges.size(), (double)w.partials.size(), [&](int64_t i) { merge_block(c, w, w.merges[i]); });
}

// y[h, :columns] = x[h, :] W[h] for every head of every token of the runs; W [H, depth, row]. One side
// has the batch's tokens as rows, the other (absorb: y) the absorbed ones.
template <class WT>
void project(const Call& c, const std::vector<Run>& runs, bool absorb, const Rows& x, int64_t x_head, int depth, const WT* weight, int64_t row,
             const Rows& y, int64_t y_head, int columns) {
    const int64_t blocks = (int64_t)runs.size();
    const int padded = round_up(columns, VL), depth_p = round_up(depth, VL);
    parallel(blocks * c.d->q_heads, (double)blocks * MR * c.d->q_heads * depth * columns, [&](int64_t i) {
        const int64_t h = i / blocks;
        const Run& run = runs[i % blocks];
        const int64_t from = absorb ? run.token : run.row, to = absorb ? run.row : run.token;
        const int n = run.tokens;
        float* in = scratch((size_t)MR * (depth_p + padded));
        float* result = in + MR * depth_p;
        for (int t = 0; t < n; t++) widen_row(x.data, x.dtype, (from + t) * x.stride + h * x_head, in + t * depth_p, depth);
        const WT* W = weight + h * depth * row;
        int j = 0;
        for (; j + 2 * VL <= padded; j += 2 * VL) multiply_rows<2>(in, depth_p, 1, W + j, row, result + j, padded, n, depth, false);
        if (j < padded) multiply_rows<1>(in, depth_p, 1, W + j, row, result + j, padded, n, depth, false);
        for (int t = 0; t < n; t++) narrow_row(result + t * padded, const_cast<void*>(y.data), y.dtype, (to + t) * y.stride + h * y_head, columns);
    });
}
void project(const Call& c, const std::vector<Run>& runs, bool absorb, const Rows& x, int64_t x_head, int depth, const void* weight, int64_t row,
             const Rows& y, int64_t y_head, int columns) {
    if (c.d->weight_dtype == F32) project(c, runs, absorb, x, x_head, depth, (const float*)weight, row, y, y_head, columns);
    else project(c, runs, absorb, x, x_head, depth, (const bf16*)weight, row, y, y_head, columns);
}

// ---- MLA, expanded: one head of one sequence ----

// Whether expanding takes fewer multiply-adds; planning.py `expands` has the formula.
bool expands(const Call& c, int64_t b) {
    const FullDesc& d = *c.d;
    const int64_t rows = c.cu[b + 1] - c.cu[b], context = c.context[b];
    const int path = c.plan.paths ? c.plan.paths[b] : CHEAPER;
    if (path != CHEAPER) return path == EXPAND;
    if (rows < MIN_EXPANDED_ROWS) return false;
    const double pairs = rows * (context + (rows + 1) * 0.5), project = (double)d.dv * (d.nope + d.v_head_dim);
    const double absorbed = pairs * (d.dk + d.dv) + rows * project;
    return pairs * (d.nope + d.rope + d.v_head_dim) + (double)(context + rows) * project < absorbed;
}

struct Expanded {
    int rows, padded, dk, dkp, dvp, latent_p;  // dk = nope + rope; *p: in whole vectors
    float *q;       // blocks of BLOCK_ROWS rows, each in panels [padded][dk]
    float *w_uk;    // panels [nope][rank]: this head's w_uk transposed
    float *latent;  // [KEYS, latent_p]
    float *keys;    // [chunk, dkp]
    float *values;  // per KEYS keys: panels [dvp][KEYS]
    float *scores, *acc, *max, *sum, *position, *keep, *row;  // as in Tile; keep [BLOCK_ROWS]; row: one query
};

Expanded lay_out(const Call& c, int rows, int64_t chunk) {
    const FullDesc& d = *c.d;
    Expanded e{};
    e.rows = rows;
    e.padded = round_up(rows, VL);
    e.dk = d.nope + d.rope;
    e.dkp = round_up(e.dk, VL);
    e.dvp = round_up(d.v_head_dim, VL);
    e.latent_p = round_up(d.dk, VL);
    const size_t tiles = (size_t)(chunk + KEYS - 1) / KEYS, padded = e.padded;
    const size_t parts[] = {padded * e.dk, (size_t)round_up(d.nope, VL) * d.dv, (size_t)KEYS * e.latent_p, tiles * KEYS * e.dkp, tiles * KEYS * e.dvp,
                            (size_t)KEYS * BLOCK_ROWS, padded * e.dvp, padded, padded, padded, (size_t)BLOCK_ROWS, (size_t)e.dkp + VL};
    float** fields[] = {&e.q, &e.w_uk, &e.latent, &e.keys, &e.values, &e.scores, &e.acc, &e.max, &e.sum, &e.position, &e.keep, &e.row};
    size_t total = 0;
    for (size_t n : parts) total += (n + 15) / 16 * 16;
    float* at = scratch(total);
    for (int i = 0; i < 12; i++) {
        *fields[i] = at;
        at += (parts[i] + 15) / 16 * 16;
    }
    return e;
}

void pack_head(const Call& c, const Expanded& e, const Rows& q_nope, const Rows& q_pe, int64_t begin, int h) {
    const FullDesc& d = *c.d;
    for (int first = 0; first < e.rows; first += BLOCK_ROWS) {
        const int rows = e.rows - first < BLOCK_ROWS ? e.rows - first : BLOCK_ROWS, padded = round_up(rows, VL);
        for (int n = 0; n < padded;) {
            const int width = panel_width(n, padded);
            float* panel = e.q + (size_t)(first + n) * e.dk;
            for (int r = 0; r < width; r++) {
                const int64_t t = begin + first + n + r;
                std::memset(e.row, 0, sizeof(float) * (e.dkp + VL));
                if (n + r < rows) {
                    widen_row(q_nope.data, q_nope.dtype, t * q_nope.stride + (int64_t)h * d.nope, e.row, d.nope);
                    if (d.rope) widen_row(q_pe.data, q_pe.dtype, t * q_pe.stride + (int64_t)h * d.rope, e.row + d.nope, d.rope);
                }
                for (int i = 0; i < e.dk; i++) panel[i * width + r] = e.row[i] * d.scale;
            }
            n += width;
        }
    }
    const int64_t weights = (int64_t)h * d.nope * d.uk_row;
    for (int n = 0; n < round_up(d.nope, VL);) {
        const int width = panel_width(n, round_up(d.nope, VL));
        float* panel = e.w_uk + (size_t)n * d.dv;
        for (int i = 0; i < width; i++)
            for (int k = 0; k < d.dv; k++)
                panel[(size_t)k * width + i] = n + i < d.nope ? element(d.w_uk, d.weight_dtype, weights + (n + i) * d.uk_row + k) : 0.0f;
        n += width;
    }
    for (int r = 0; r < e.padded; r++) {
        e.position[r] = (float)(r < e.rows ? r : e.rows - 1);  // relative to the first new token
        e.max[r] = NEG_INF;
        e.sum[r] = 0.0f;
    }
    std::memset(e.acc, 0, sizeof(float) * e.padded * e.dvp);
}

// Keys and values of head h at positions [first, first + count) of sequence b, from its pages.
template <class WT> void expand_chunk(const Call& c, const Expanded& e, const WT* w_uv, int64_t b, int64_t first, int64_t count) {
    const FullDesc& d = *c.d;
    const int rank = d.dv;
    for (int64_t at = 0; at < count; at += KEYS) {
        const int n = count - at < KEYS ? (int)(count - at) : KEYS;
        for (int j = 0; j < n; j++) {
            const int64_t p = first + at + j, page = c.pages[b * c.max_pages + p / d.page_size];
            widen_row(d.k, d.cache_dtype, page * d.k_page_stride + p % d.page_size * c.k_step, e.latent + j * e.latent_p, d.dk);
        }
        float *keys = e.keys + at * e.dkp, *values = e.values + at * e.dvp;
        multiply_panels(e.latent, e.latent_p, 1, e.w_uk, rank, keys, e.dkp, n, round_up(d.nope, VL), rank, false);
        for (int j = 0; d.rope && j < n; j++) std::memcpy(keys + j * e.dkp + d.nope, e.latent + j * e.latent_p + rank, sizeof(float) * d.rope);
        int i = 0;
        for (; i + 2 * VL <= e.dvp; i += 2 * VL) multiply_rows<2>(e.latent, e.latent_p, 1, w_uv + i, d.uv_row, values + i * KEYS, 2 * VL, n, rank, false);
        if (i < e.dvp) multiply_rows<1>(e.latent, e.latent_p, 1, w_uv + i, d.uv_row, values + i * KEYS, VL, n, rank, false);
    }
}

// Every row attends to the chunk's keys; `from` is the first one relative to the first new token.
void attend_chunk(const Call& c, const Expanded& e, int64_t from, int64_t count) {
    for (int first = 0; first < e.rows; first += BLOCK_ROWS) {
        Tile t{};
        t.rows = e.rows - first < BLOCK_ROWS ? e.rows - first : BLOCK_ROWS;
        t.padded = round_up(t.rows, VL);
        t.scores = e.scores;
        t.acc = e.acc + (size_t)first * e.dvp;
        t.max = e.max + first;
        t.sum = e.sum + first;
        t.position = e.position + first;
        for (int64_t at = 0; at < count && from + at < first + t.rows; at += KEYS) {
            const int n = count - at < KEYS ? (int)(count - at) : KEYS;
            multiply_panels(e.keys + at * e.dkp, e.dkp, 1, e.q + (size_t)first * e.dk, e.dk, t.scores, t.padded, n, t.padded, e.dk, false);
            soften_tile(c, t, from + at, n, from + at + n - 1 > first, e.keep);
            for (int r = 0; r < t.padded; r++)
                if (e.keep[r] != 1.0f)
                    for (int i = 0; i < e.dvp; i += VL) store(t.acc + r * e.dvp + i, load(t.acc + r * e.dvp + i) * e.keep[r]);
            multiply_panels(t.scores, 1, t.padded, e.values + at * e.dvp, KEYS, t.acc, e.dvp, t.padded, e.dvp, n, true);
        }
    }
}

template <class WT> void expand_head(const Call& c, const Rows& q_nope, const Rows& q_pe, int b, int h) {
    const FullDesc& d = *c.d;
    const int64_t begin = c.cu[b], context = c.context[b];
    const int rows = c.cu[b + 1] - c.cu[b];
    int64_t step = 0;
    for (int64_t i = 0; i < c.plan.chunks; i++) step = c.plan.lengths[i * c.batch + b] > step ? c.plan.lengths[i * c.batch + b] : step;
    const bool planned = step > 0;
    if (!planned) step = context + rows < EXPANDED_KEYS ? context + rows : EXPANDED_KEYS;
    const Expanded e = lay_out(c, rows, step);
    pack_head(c, e, q_nope, q_pe, begin, h);
    const WT* w_uv = (const WT*)d.w_uv + (int64_t)h * d.dv * d.uv_row;
    const auto chunk = [&](int64_t first, int64_t count) {
        expand_chunk(c, e, w_uv, b, first, count);
        attend_chunk(c, e, first - context, count);
    };
    for (int64_t i = 0; planned && i < c.plan.chunks; i++) chunk(c.plan.starts[i * c.batch + b], c.plan.lengths[i * c.batch + b]);
    const int64_t end = context + rows;
    for (int64_t p = planned ? context : 0; p < end; p += step) chunk(p, end - p < step ? end - p : step);
    for (int r = 0; r < rows; r++) {
        float* acc = e.acc + (size_t)r * e.dvp;
        const float sum = e.sum[r], factor = sum > 0.0f ? 1.0f / sum : sum;  // NaN stays NaN
        for (int i = 0; i < e.dvp; i += VL) store(acc + i, load(acc + i) * factor);
        narrow_row(acc, const_cast<void*>(c.out.data), c.out.dtype, (begin + r) * c.out.stride + (int64_t)h * d.v_head_dim, d.v_head_dim);
    }
}

void attend_expanded(const Call& c, const Work& w, const Rows& q_nope, const Rows& q_pe) {
    const FullDesc& d = *c.d;
    double work = 0;
    for (int b : w.expanded) work += (double)(c.context[b] + c.cu[b + 1] - c.cu[b]) * d.dv * (d.nope + d.v_head_dim) * d.q_heads;
    parallel((int64_t)w.expanded.size() * d.q_heads, work, [&](int64_t i) {
        const int b = w.expanded[i / d.q_heads], h = (int)(i % d.q_heads);
        if (d.weight_dtype == F32) expand_head<float>(c, q_nope, q_pe, b, h);
        else expand_head<bf16>(c, q_nope, q_pe, b, h);
    });
}

// ---- a layer ----

void run_gqa(Call& c, Work& w, const Rows& k, const Rows& v) {
    const FullDesc& d = *c.d;
    append(c, k, d.k, d.k_page_stride, c.k_step, 0, d.kv_heads * d.dk);
    append(c, v, d.v, d.v_page_stride, c.v_step, 0, d.kv_heads * d.dv);
    attend(c, w);
}

// Parts the sequences into expanded and absorbed ones; gives the rows of the latter.
int64_t divide(const Call& c, Work& w) {
    w.rows.assign(c.batch, -1);
    w.expanded.clear();
    w.runs.clear();
    int64_t rows = 0;
    for (int b = 0; b < c.batch; b++) {
        const int length = c.cu[b + 1] - c.cu[b];
        if (length == 0) continue;
        if (expands(c, b)) {
            w.expanded.push_back(b);
            continue;
        }
        w.rows[b] = (int32_t)rows;
        for (int64_t t = c.cu[b]; t < c.cu[b + 1]; t++, rows++) {
            Run* last = w.runs.empty() ? nullptr : &w.runs.back();
            if (last && last->tokens < MR && last->token + last->tokens == t) last->tokens++;
            else w.runs.push_back(Run{t, rows, 1});
        }
    }
    return rows;
}

void run_mla(Call& c, Work& w, const Rows& q_nope, const Rows& q_pe, const Rows& c_kv, const Rows& k_pe) {
    const FullDesc& d = *c.d;
    append(c, c_kv, d.k, d.k_page_stride, c.k_step, 0, d.dv);
    if (d.rope) append(c, k_pe, d.k, d.k_page_stride, c.k_step, d.dv, d.rope);
    const int64_t rows = divide(c, w);
    attend_expanded(c, w, q_nope, q_pe);
    if (rows == 0) return;
    const size_t heads = (size_t)rows * d.q_heads;
    if (w.q.size() < heads * d.dk) w.q.resize(heads * d.dk);
    if (w.out.size() < heads * d.dv) w.out.resize(heads * d.dv);
    const Rows final = c.out;
    c.q = Rows{w.q.data(), (int64_t)d.q_heads * d.dk, F32};
    c.out = Rows{w.out.data(), (int64_t)d.q_heads * d.dv, F32};
    c.rows = w.rows.data();
    project(c, w.runs, true, q_nope, d.nope, d.nope, d.w_uk, d.uk_row, c.q, d.dk, d.dv);
    for (const Run& run : w.runs)
        for (int t = 0; d.rope && t < run.tokens; t++)
            for (int h = 0; h < d.q_heads; h++)
                copy_row(q_pe, (run.token + t) * q_pe.stride + (int64_t)h * d.rope, w.q.data(), F32, ((run.row + t) * d.q_heads + h) * d.dk + d.dv, d.rope);
    attend(c, w);
    project(c, w.runs, false, c.out, d.dv, d.dv, d.w_uv, d.uv_row, final, d.v_head_dim, d.v_head_dim);
}

}  // namespace

extern "C" {

int64_t braid_full_desc_size() { return sizeof(FullDesc); }

// One layer over one step. gqa: x0..x2 = q, k, v; mla: x0..x3 = q_nope, q_pe, c_kv, k_pe. The plan
// (chunk_starts, chunk_lengths [chunks, batch], paths [batch]; null and 0: none) concerns mla alone.
int64_t braid_full(const FullDesc* d, const void* x0, int64_t s0, int32_t d0, const void* x1, int64_t s1, int32_t d1,
                   const void* x2, int64_t s2, int32_t d2, const void* x3, int64_t s3, int32_t d3, const int32_t* cu,
                   const int32_t* context, const int32_t* pages, int64_t batch, int64_t max_pages, int64_t tokens, void* out,
                   int64_t out_stride, int32_t out_dtype, const int32_t* chunk_starts, const int32_t* chunk_lengths, int64_t chunks,
                   const uint8_t* paths) {
    Call c{d, {chunk_starts, chunk_lengths, paths, chunks}, {x0, s0, d0}, {out, out_stride, out_dtype}, cu, context, pages, batch, tokens, max_pages,
           d->q_heads / d->kv_heads, round_up(d->dk, VL), round_up(d->dv, VL), (int64_t)d->kv_heads * d->dk,
           d->mla ? (int64_t)d->dk : (int64_t)d->kv_heads * d->dv, nullptr, nullptr};
    int64_t failed = check(c);
    if (!failed) failed = check_plan(c);
    if (failed || tokens == 0) return failed;
    static thread_local Work work;
    try {
        if (d->mla) run_mla(c, work, {x0, s0, d0}, {x1, s1, d1}, {x2, s2, d2}, {x3, s3, d3});
        else run_gqa(c, work, {x1, s1, d1}, {x2, s2, d2});
    } catch (const std::bad_alloc&) {
        return failure(MEMORY, 0);
    }
    return OK;
}

}  // extern "C"
