// The matrix product of the projections (see gemm.h).
//
// A panel is PANEL outputs, two vectors. The packed weight is, for each block of k, for each panel,
// [steps][PANEL] words of 32 bits, a word being one fp32 or two neighbours in k of bf16: one stream,
// however many rows there are. A tile is up to TILE rows of one panel (of WIDE neighbours, where one fp32
// row is all there is), its sums in registers; a task is some rows times some panels.
#include "gemm.h"

extern "C" int32_t braid_get_threads();

namespace braid {
namespace {

constexpr int PANEL = 2 * VL;
constexpr int K_BLOCK = GEMM_K_BLOCK;
#if defined(__AVX512F__)
constexpr int TILE = 14;  // 28 sums, 2 vectors of weights, 1 of x: 31 of 32 registers
#elif defined(__aarch64__)
constexpr int TILE = 12;
#else
constexpr int TILE = 6;  // 16 registers
#endif
constexpr int X_STRIDE = K_BLOCK + 16;    // of the copied rows; not a power of two, for the sake of L1's sets
constexpr int64_t TASK_ROWS = 16 * TILE;  // a block of x: K_BLOCK x this, fp32, at home in L2
constexpr int64_t TASK_SUMS = 1 << 18;    // floats, where k takes several blocks
constexpr int WIDE = 4;                   // panels at a time of a single fp32 row: its sums alone hide no latency
constexpr int GROUP = 16;                 // panels between two visits of a tile's outputs: longer runs of stores
constexpr int64_t AHEAD = 16384;          // bytes of weights
constexpr int LINE = 64;                  // bytes
constexpr int STEP = PANEL * 4;           // bytes of a panel in one step of k

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

template <class T> constexpr int DEPTH = 4 / sizeof(T);  // of k, in one step

// ---- the packed weight ----

// Row `w` (null: zeros) becomes column `column` of panel `panel`.
template <class T> void pack_column(const T* w, int64_t panel, int column, int64_t panels, int64_t k, T* out) {
    constexpr int D = DEPTH<T>;
    for (int64_t begin = 0; begin < k; begin += K_BLOCK) {
        const int64_t depth = k - begin < K_BLOCK ? k - begin : K_BLOCK, padded = ceil_div(depth, D) * D;
        T* at = out + (begin * panels + panel * padded) * PANEL + column * D;
        for (int64_t i = 0; i < padded; i++) at[i / D * D * PANEL + i % D] = w && i < depth ? w[begin + i] : T{};
    }
}

template <class T>
void pack_rows_as(const T* w, int64_t stride, int64_t first, int64_t rows, int64_t n, int64_t k, T* out) {
    const int64_t panels = ceil_div(n, PANEL);
    const int64_t end = first + rows == n ? panels * PANEL : first + rows;
    for (int64_t c = first; c < end; c++)
        pack_column(c < n ? w + (c - first) * stride : nullptr, c / PANEL, (int)(c % PANEL), panels, k, out);
}

template <class T>
void pack_gated_as(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, int64_t n, int64_t k, T* out) {
    const int64_t panels = ceil_div(n, VL);
    for (int64_t c = 0; c < panels * VL; c++) {
        pack_column(c < n ? gate + c * gate_stride : nullptr, c / VL, (int)(c % VL), panels, k, out);
        pack_column(c < n ? up + c * up_stride : nullptr, c / VL, (int)(c % VL) + VL, panels, k, out);
    }
}

// ---- tiles ----

// acc[row][vector] += x[row] * words[vector], for one step of k.
template <int ROWS, int VECTORS>
BRAID_INLINE void multiply(const float* x, const vf (&words)[VECTORS], vf (&acc)[ROWS][VECTORS]) {
    BRAID_UNROLL
    for (int r = 0; r < ROWS; r++) {
        const vf value = splat(x[r * X_STRIDE]);
        BRAID_UNROLL
        for (int v = 0; v < VECTORS; v++) acc[r][v] = fmadd(value, words[v], acc[r][v]);
    }
}

template <class T> struct Step;
template <> struct Step<float> {
    static constexpr int X = 1;  // words of a row of x
    static void copy(const float* row, float* x, int depth) { widen_row(row, x, depth); }
    template <int ROWS, int VECTORS>
    BRAID_INLINE void run(const float* x, const vf (&words)[VECTORS], vf (&acc)[ROWS][VECTORS]) {
        multiply(x, words, acc);
    }
};
#if defined(__AVX512BF16__)
// The processor's product of pairs is two fmadd in turn, the second of a pair first (subnormal numbers
// count as zero): the same sums as below, in half the instructions and without widening.
template <> struct Step<bf16> {
    static constexpr int X = 1;
    static void copy(const bf16* row, float* x, int depth) {
        std::memcpy(x, row, depth * sizeof(bf16));
        if (depth % 2) std::memset((char*)x + depth * sizeof(bf16), 0, sizeof(bf16));
    }
    template <int ROWS, int VECTORS>
    BRAID_INLINE void run(const float* x, const vf (&words)[VECTORS], vf (&acc)[ROWS][VECTORS]) {
        BRAID_UNROLL
        for (int r = 0; r < ROWS; r++) {
            int32_t pair;
            std::memcpy(&pair, x + r * X_STRIDE, sizeof pair);
            const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
            BRAID_UNROLL
            for (int v = 0; v < VECTORS; v++) acc[r][v] = (vf)_mm512_dpbf16_ps((__m512)acc[r][v], value, (__m512bh)words[v]);
        }
    }
};
#else
template <> struct Step<bf16> {
    static constexpr int X = 2;
    static void copy(const bf16* row, float* x, int depth) { widen_row(row, x, depth); }
    template <int ROWS, int VECTORS>
    BRAID_INLINE void run(const float* x, const vf (&words)[VECTORS], vf (&acc)[ROWS][VECTORS]) {
        vf half[VECTORS];
        BRAID_UNROLL
        for (int v = 0; v < VECTORS; v++) half[v] = (vf)((vu)words[v] & 0xffff0000u);
        multiply(x + 1, half, acc);
        BRAID_UNROLL
        for (int v = 0; v < VECTORS; v++) half[v] = (vf)((vu)words[v] << 16);
        multiply(x, half, acc);
    }
};
#endif

// sums[row][panel][PANEL] (+)= x[row][steps] . w[panel][steps][PANEL] for ROWS rows of x and PANELS panels.
// One panel fetches weights for later, `advance` bytes from `ahead` in each step: the processor's own
// prefetcher follows one stream too late. It follows four well, and is then only hindered by hints.
template <class T, int ROWS, int PANELS>
void tile(const float* x, const float* w, int64_t steps, float* sums, int64_t stride, bool add, const char* ahead,
          int64_t advance) {
    vf acc[ROWS][2 * PANELS];
    BRAID_UNROLL
    for (int r = 0; r < ROWS; r++) {
        BRAID_UNROLL
        for (int v = 0; v < 2 * PANELS; v++) acc[r][v] = vf{};
    }
    for (int64_t i = 0; i < steps; i++) {
        if constexpr (PANELS == 1) {
            // A row or two take the weights as fast as they come; more rows leave them time, in which those
            // ahead would drive x and this panel out of L1: L2 is near enough.
            constexpr int NEAR = ROWS <= 2 ? 3 : 2;
            __builtin_prefetch(ahead, 0, NEAR);
            if constexpr (STEP > LINE) __builtin_prefetch(ahead + LINE, 0, NEAR);
            ahead += advance;
        }
        vf words[2 * PANELS];
        BRAID_UNROLL
        for (int v = 0; v < 2 * PANELS; v++) words[v] = load(w + (v / 2 * steps + i) * PANEL + v % 2 * VL);
        Step<T>::run(x + i * Step<T>::X, words, acc);
    }
    BRAID_UNROLL
    for (int r = 0; r < ROWS; r++) {
        BRAID_UNROLL
        for (int v = 0; v < 2 * PANELS; v++) {
            float* at = sums + r * stride + v * VL;
            store(at, add ? load(at) + acc[r][v] : acc[r][v]);
        }
    }
}

using Tile = void (*)(const float*, const float*, int64_t, float*, int64_t, bool, const char*, int64_t);

template <class T> struct Tiles {
    Tile of[TILE + 1];  // by rows; one panel
    constexpr Tiles() : of{} { fill<1>(); }
    template <int ROWS> constexpr void fill() {
        of[ROWS] = tile<T, ROWS, 1>;
        if constexpr (ROWS < TILE) fill<ROWS + 1>();
    }
};
template <class T> constexpr Tiles<T> TILES;

// ---- a task ----

template <class T> struct Product {
    const T* x;
    int64_t x_stride;
    const float* w;  // words
    int64_t k, panels;
    int64_t width;  // output columns of a panel: PANEL, or VL where it holds gates and ups
    const GemmPart* parts;
    int64_t part_count;
};

// Columns [from, to) of one row, from their sums to a part.
template <class T> void finish_row(const GemmPart& part, int64_t row, int64_t from, int64_t to, const float* sums) {
    T* out = (T*)part.out + row * part.row_stride;
    const T* bias = (const T*)part.bias;
    const T* addend = part.addend ? (const T*)part.addend + row * part.addend_stride : nullptr;
    int64_t c = from - part.first;
    const int64_t end = to - part.first;
    for (; c + VL <= end; c += VL, sums += VL) {
        vf value = load(sums);
        if (bias) value = value + load_as(bias + c);
        if (addend) value = value + load_as(addend + c);
        store_as(out + c, value);
    }
    if (c < end) {
        const int lanes = (int)(end - c);
        vf value = load_part(sums, lanes);
        if (bias) value = value + load_part(bias + c, lanes);
        if (addend) value = value + load_part(addend + c, lanes);
        store_part(out + c, value, lanes);
    }
}

// The sums of some panels, rows [row, row + rows), to the parts that their columns belong to.
template <class T>
void finish(const Product<T>& p, int64_t panel, int64_t panels, int64_t row, int64_t rows, float* sums, int64_t stride) {
    const int64_t begin = panel * p.width, end = begin + panels * p.width;
    for (int64_t r = 0; r < rows; r++, sums += stride) {
        for (int64_t i = 0; p.width == VL && i < panels; i++)
            store(sums + i * VL, vsilu(load(sums + i * PANEL)) * load(sums + i * PANEL + VL));
        for (int64_t i = 0; i < p.part_count; i++) {
            const GemmPart& part = p.parts[i];
            const int64_t from = part.first > begin ? part.first : begin;
            const int64_t to = part.first + part.columns < end ? part.first + part.columns : end;
            if (from < to) finish_row<T>(part, row + r, from, to, sums + (from - begin));
        }
    }
}

// A task's buffers: the rows of x of one block of k, and the sums [rows][stride] that are held at a time:
// those of one tile and group of panels, or where k takes several blocks, all of the task's.
template <class T> struct Task {
    const Product<T>& p;
    int64_t row, rows, first, last;
    int64_t tiles, group;
    float *x, *sums;
    int64_t stride;

    // Tile t times the panels [at, end), in the block of k from `begin`.
    void run(int64_t t, int64_t at, int64_t end, int64_t begin, int64_t depth) {
        const int64_t r = rows * t / tiles, size = rows * (t + 1) / tiles - r;
        float* to = p.k <= K_BLOCK ? sums : sums + r * stride + (at - first) * PANEL;
        const int64_t steps = ceil_div(depth, DEPTH<T>);
        const float* w = p.w + (begin / DEPTH<T> * p.panels + at * steps) * PANEL;
        for (int64_t panel = at; panel < end;) {
            const bool wide = rows == 1 && sizeof(T) == 4 && end - panel >= WIDE;
            const Tile tile_of = wide ? tile<T, 1, WIDE> : TILES<T>.of[size];
            const Fetch fetch = fetched(t, w, steps);
            tile_of(x + r * X_STRIDE, w, steps, to + (panel - at) * PANEL, stride, begin > 0, fetch.ahead, fetch.advance);
            panel += wide ? WIDE : 1;
            w += (wide ? WIDE : 1) * steps * PANEL;
        }
        if (begin + depth == p.k) finish(p, at, end - at, row + r, size, to, stride);
    }

    struct Fetch {
        const char* ahead;
        int64_t advance;
    };
    // Two tiles share the fetching of the next panel; otherwise the first one does it, for all that follow.
    Fetch fetched(int64_t t, const float* w, int64_t steps) const {
        if (tiles == 2) return {(const char*)w + (2 + t) * steps * STEP / 2, STEP / 2};
        if (t == 0) return {(const char*)w + AHEAD, STEP};
        return {(const char*)x, 0};
    }
};

// Rows [row, row + rows) times panels [first, last).
template <class T> void run_task(const Product<T>& p, int64_t row, int64_t rows, int64_t first, int64_t last) {
    const int64_t tiles = ceil_div(rows, TILE), wanted = tiles == 2 ? 1 : GROUP;
    const int64_t group = last - first < wanted ? last - first : wanted;
    const bool one_block = p.k <= K_BLOCK;
    const int64_t stride = (one_block ? group : last - first) * PANEL + VL;
    float* x = scratch(rows * X_STRIDE + (one_block ? TILE : rows) * stride);
    Task<T> task{p, row, rows, first, last, tiles, group, x, x + rows * X_STRIDE, stride};
    for (int64_t begin = 0; begin < p.k; begin += K_BLOCK) {
        const int64_t depth = p.k - begin < K_BLOCK ? p.k - begin : K_BLOCK;
        for (int64_t r = 0; r < rows; r++) Step<T>::copy(p.x + (row + r) * p.x_stride + begin, x + r * X_STRIDE, (int)depth);
        for (int64_t at = first; at < last; at += group) {
            const int64_t end = last - at < group ? last : at + group;
            for (int64_t t = 0; t < tiles; t++) task.run(t, at, end, begin, depth);
        }
    }
}

template <class T> void product(const Product<T>& p, int64_t m) {
    if (m <= 0) return;
    const int64_t threads = braid_get_threads();
    const int64_t row_tasks = ceil_div(m, TASK_ROWS), rows = ceil_div(m, row_tasks);
    int64_t panels = p.k <= K_BLOCK ? p.panels : TASK_SUMS / (rows * PANEL);
    const int64_t share = ceil_div(p.panels * row_tasks, 4 * threads);
    if (threads > 1 && panels > share) panels = share;
    panels = ceil_div(panels, 4) * 4;
    if (panels > p.panels) panels = p.panels;
    const int64_t panel_tasks = ceil_div(p.panels, panels);
    parallel(row_tasks * panel_tasks, (double)m * p.panels * PANEL * p.k, [&](int64_t i) {
        const int64_t row = i % row_tasks * rows, first = i / row_tasks * panels;
        run_task(p, row, m - row < rows ? m - row : rows, first, p.panels - first < panels ? p.panels : first + panels);
    });
}

void product(const void* x, int64_t x_stride, int64_t m, const void* packed, int64_t k, int64_t panels, int64_t width,
             int32_t dtype, const GemmPart* parts, int64_t part_count) {
    if (dtype == F32)
        product(Product<float>{(const float*)x, x_stride, (const float*)packed, k, panels, width, parts, part_count}, m);
    else product(Product<bf16>{(const bf16*)x, x_stride, (const float*)packed, k, panels, width, parts, part_count}, m);
}

int64_t bytes_of(int64_t panels, int64_t k, int32_t dtype) {
    return panels * STEP * (dtype == F32 ? k : ceil_div(k, DEPTH<bf16>));
}

}  // namespace

int64_t packed_bytes(int64_t n, int64_t k, int32_t dtype) { return bytes_of(ceil_div(n, PANEL), k, dtype); }
int64_t packed_gated_bytes(int64_t n, int64_t k, int32_t dtype) { return bytes_of(ceil_div(n, VL), k, dtype); }

void pack(const void* w, int32_t dtype, int64_t row_stride, int64_t n, int64_t k, void* out) {
    pack_rows(w, dtype, row_stride, 0, n, n, k, out);
}

void pack_rows(const void* w, int32_t dtype, int64_t row_stride, int64_t first, int64_t rows, int64_t n, int64_t k, void* out) {
    if (dtype == F32) pack_rows_as((const float*)w, row_stride, first, rows, n, k, (float*)out);
    else pack_rows_as((const bf16*)w, row_stride, first, rows, n, k, (bf16*)out);
}

void pack_gated(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, int32_t dtype, int64_t n, int64_t k,
                void* out) {
    if (dtype == F32)
        pack_gated_as((const float*)gate, gate_stride, (const float*)up, up_stride, n, k, (float*)out);
    else pack_gated_as((const bf16*)gate, gate_stride, (const bf16*)up, up_stride, n, k, (bf16*)out);
}

void gemm(const void* x, int64_t x_stride, int64_t m, const void* packed, int64_t n, int64_t k, int32_t dtype,
          const GemmPart* parts, int64_t part_count) {
    product(x, x_stride, m, packed, k, ceil_div(n, PANEL), PANEL, dtype, parts, part_count);
}

void gemm_gated(const void* x, int64_t x_stride, int64_t m, const void* packed, int64_t n, int64_t k, int32_t dtype,
                const GemmPart* parts, int64_t part_count) {
    product(x, x_stride, m, packed, k, ceil_div(n, VL), VL, dtype, parts, part_count);
}

}  // namespace braid

// ---- the C interface, for tests and measurements ----
extern "C" {

int64_t braid_gemm_part_size() { return sizeof(braid::GemmPart); }
int64_t braid_gemm_packed_bytes(int64_t n, int64_t k, int32_t dtype) { return braid::packed_bytes(n, k, dtype); }
int64_t braid_gemm_packed_gated_bytes(int64_t n, int64_t k, int32_t dtype) { return braid::packed_gated_bytes(n, k, dtype); }
void braid_gemm_pack_rows(const void* w, int32_t dtype, int64_t row_stride, int64_t first, int64_t rows, int64_t n, int64_t k,
                          void* out) {
    braid::pack_rows(w, dtype, row_stride, first, rows, n, k, out);
}
void braid_gemm_pack_gated(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, int32_t dtype, int64_t n,
                           int64_t k, void* out) {
    braid::pack_gated(gate, gate_stride, up, up_stride, dtype, n, k, out);
}
void braid_gemm(const void* x, int64_t x_stride, int64_t m, const void* packed, int64_t n, int64_t k, int32_t dtype,
                const braid::GemmPart* parts, int64_t part_count, int32_t gated) {
    (gated ? braid::gemm_gated : static_cast<decltype(&braid::gemm_gated)>(braid::gemm))(x, x_stride, m, packed, n, k, dtype,
                                                                                        parts, part_count);
}

}  // extern "C"
