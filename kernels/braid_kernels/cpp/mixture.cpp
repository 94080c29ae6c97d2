// Mixtures of experts: the rows of each expert together through its two products, then weighed and added.
//
// A row's sum runs over its experts in ascending order, whatever the order of its choices and whoever else
// is in the batch; experts take their rows in blocks, so that what is in between stays small.
#include <algorithm>

#include "elementary.h"
#include "gemm.h"
#include "program.h"

namespace braid {
namespace {

constexpr int64_t BLOCK = 256;     // rows of one expert at a time
constexpr int64_t COLUMNS = 512;   // of a sum that one task adds

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

struct Work {
    int64_t* first;      // [experts + 1]: where the pairs of an expert begin
    int64_t* pairs;      // [rows * chosen]: row * chosen + choice, ordered by expert
    float* sums;         // [rows, width]
    char *x, *up, *inner, *out;   // of a block
};

Work divide(const Mixture& m, int64_t rows, std::vector<char>& workspace) {
    const int64_t count = rows * m.chosen, bytes = m.dtype == BF16 ? 2 : 4, block = count < BLOCK ? count : BLOCK;
    const int64_t sizes[] = {(m.experts + 1) * 8, count * 8, rows * m.width * 4, block * m.width * bytes,
                             block * m.inner * bytes * (m.gated ? 2 : 1), block * m.inner * bytes, block * m.width * bytes};
    int64_t whole = 64;
    for (const int64_t size : sizes) whole += aligned(size);
    if ((int64_t)workspace.size() < whole) workspace.resize(whole);
    char* at = workspace.data() + (64 - (uintptr_t)workspace.data() % 64) % 64;
    char* found[7];
    for (int i = 0; i < 7; i++) {
        found[i] = at;
        at += aligned(sizes[i]);
    }
    return {(int64_t*)found[0], (int64_t*)found[1], (float*)found[2], found[3], found[4], found[5], found[6]};
}

// Orders the pairs by expert; -1, or the row of an unknown expert.
int64_t order(const Mixture& m, const MixtureRows& given, const Work& w) {
    const int64_t* ids = (const int64_t*)given.ids;
    std::fill(w.first, w.first + m.experts + 1, 0);
    for (int64_t r = 0; r < given.rows; r++)
        for (int64_t j = 0; j < m.chosen; j++) {
            const int64_t expert = ids[r * m.ids.row + j];
            if (expert < 0 || expert >= m.experts) return r;
            w.first[expert + 1]++;
        }
    for (int64_t e = 0; e < m.experts; e++) w.first[e + 1] += w.first[e];
    for (int64_t r = 0; r < given.rows; r++)
        for (int64_t j = 0; j < m.chosen; j++) w.pairs[w.first[ids[r * m.ids.row + j]]++] = r * m.chosen + j;
    for (int64_t e = m.experts; e > 0; e--) w.first[e] = w.first[e - 1];
    w.first[0] = 0;
    return -1;
}

vf activated(int32_t activation, vf x) {
    if (activation == SILU_OF) return vsilu(x);
    if (activation == GELU_OF) return vgelu(x);
    const vf positive = select(x > 0.0f, x, vf{});
    return positive * positive;
}

// inner = activation(up), or activation(first half of up) * second half.
template <class T> void activate(const Mixture& m, const T* up, T* inner, int64_t rows) {
    const int64_t stride = m.gated ? 2 * m.inner : m.inner;
    parallel(rows, (double)rows * m.inner * 8, [&](int64_t r) {
        const T* from = up + r * stride;
        T* to = inner + r * m.inner;
        for (int64_t i = 0; i < m.inner; i += VL) {
            const int n = m.inner - i < VL ? (int)(m.inner - i) : VL;
            vf y = activated(m.activation, n == VL ? load_as(from + i) : load_part(from + i, n));
            if (m.gated) y = y * (n == VL ? load_as(from + m.inner + i) : load_part(from + m.inner + i, n));
            if (n == VL) store_as(to + i, y);
            else store_part(to + i, y, n);
        }
    });
}

// sums[row] += score * out, for the pairs of a block; a row may be there twice.
template <class T> void add(const Mixture& m, const MixtureRows& given, const Work& w, const int64_t* pairs, int64_t count) {
    parallel((m.width + COLUMNS - 1) / COLUMNS, (double)count * m.width, [&](int64_t task) {
        const int64_t end = (task + 1) * COLUMNS < m.width ? (task + 1) * COLUMNS : m.width;
        for (int64_t p = 0; p < count; p++) {
            const int64_t row = pairs[p] / m.chosen, choice = pairs[p] % m.chosen;
            const vf score = splat(element(given.scores, m.scores_dtype, row * m.scores.row + choice));
            const T* from = (const T*)w.out + p * m.width;
            float* to = w.sums + row * m.width;
            for (int64_t i = task * COLUMNS; i < end; i += VL) {
                const int n = end - i < VL ? (int)(end - i) : VL;
                if (n == VL) store(to + i, fmadd(load_as(from + i), score, load(to + i)));
                else store_part(to + i, fmadd(load_part(from + i, n), score, load_part(to + i, n)), n);
            }
        }
    });
}

template <class T> void run_block(const Mixture& m, const MixtureRows& given, const Work& w, int64_t expert, const int64_t* pairs, int64_t rows) {
    for (int64_t p = 0; p < rows; p++)
        std::memcpy((T*)w.x + p * m.width, (const T*)given.x + pairs[p] / m.chosen * m.x.row, m.width * sizeof(T));
    if (m.gated && m.activation == SILU_OF) {
        const GemmPart part{w.inner, m.inner, 0, m.inner};
        gemm_gated(w.x, m.width, rows, m.up[expert], m.inner, m.width, m.dtype, &part, 1);
    } else {
        const int64_t columns = m.gated ? 2 * m.inner : m.inner;
        gemm(w.x, m.width, rows, m.up[expert], columns, m.width, m.dtype, w.up, columns);
        activate(m, (const T*)w.up, (T*)w.inner, rows);
    }
    gemm(w.inner, m.inner, rows, m.down[expert], m.width, m.inner, m.dtype, w.out, m.width);
    add<T>(m, given, w, pairs, rows);
}

template <class T> void run_all(const Mixture& m, const MixtureRows& given, const Work& w) {
    std::fill(w.sums, w.sums + given.rows * m.width, 0.0f);
    for (int64_t e = 0; e < m.experts; e++)
        for (int64_t p = w.first[e]; p < w.first[e + 1]; p += BLOCK)
            run_block<T>(m, given, w, e, w.pairs + p, w.first[e + 1] - p < BLOCK ? w.first[e + 1] - p : BLOCK);
    for (int64_t r = 0; r < given.rows; r++) narrow_row(w.sums + r * m.width, (T*)given.out + r * m.out.row, (int)m.width);
}

}  // namespace

int64_t mix(const Mixture& m, const MixtureRows& given, std::vector<char>& workspace) {
    const Work w = divide(m, given.rows, workspace);
    const int64_t unknown = order(m, given, w);
    if (unknown >= 0) return unknown;
    if (m.dtype == F32) run_all<float>(m, given, w);
    else run_all<bf16>(m, given, w);
    return -1;
}

}  // namespace braid
