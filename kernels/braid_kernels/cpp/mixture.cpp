// Mixtures of experts: the rows of each expert together through its two products, then weighed and added.
#include <algorithm>

#include "elementary.h"
#include "gemm.h"
#include "program.h"

namespace braid {
namespace {

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// What a mixture works with: (row, choice) pairs ordered by expert, and their values.
struct Pairs {
    int64_t* first;      // [experts + 1]: where the pairs of an expert begin
    int64_t* place;      // [rows * chosen]: of each pair in that order
    char *x, *inner, *up, *out;
};

Pairs divide(const Mixture& m, int64_t rows, std::vector<char>& workspace) {
    const int64_t count = rows * m.chosen, bytes = m.dtype == BF16 ? 2 : 4, widest = m.gated ? 2 * m.inner : m.inner;
    const int64_t sizes[] = {(m.experts + 1) * 8, count * 8, count * m.width * bytes, count * m.inner * bytes, count * widest * bytes,
                             count * m.width * bytes};
    int64_t whole = 64;
    for (const int64_t size : sizes) whole += aligned(size);
    if ((int64_t)workspace.size() < whole) workspace.resize(whole);
    char* at = workspace.data() + (64 - (uintptr_t)workspace.data() % 64) % 64;
    char* found[6];
    for (int i = 0; i < 6; i++) {
        found[i] = at;
        at += aligned(sizes[i]);
    }
    return {(int64_t*)found[0], (int64_t*)found[1], found[2], found[3], found[4], found[5]};
}

// Counts the pairs of each expert and gives each pair its place; -1, or the row of an unknown expert.
int64_t order(const Mixture& m, const MixtureRows& given, const Pairs& p) {
    const int64_t* ids = (const int64_t*)given.ids;
    std::fill(p.first, p.first + m.experts + 1, 0);
    for (int64_t r = 0; r < given.rows; r++)
        for (int64_t j = 0; j < m.chosen; j++) {
            const int64_t expert = ids[r * m.ids.row + j];
            if (expert < 0 || expert >= m.experts) return r;
            p.first[expert + 1]++;
        }
    for (int64_t e = 0; e < m.experts; e++) p.first[e + 1] += p.first[e];
    for (int64_t r = 0; r < given.rows; r++)
        for (int64_t j = 0; j < m.chosen; j++) p.place[r * m.chosen + j] = p.first[ids[r * m.ids.row + j]]++;
    for (int64_t e = m.experts; e > 0; e--) p.first[e] = p.first[e - 1];
    p.first[0] = 0;
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

void run_expert(const Mixture& m, const Pairs& p, int64_t expert) {
    const int64_t first = p.first[expert], rows = p.first[expert + 1] - first, bytes = m.dtype == BF16 ? 2 : 4;
    if (rows == 0) return;
    const char* x = p.x + first * m.width * bytes;
    char *inner = p.inner + first * m.inner * bytes, *out = p.out + first * m.width * bytes;
    const int64_t widest = m.gated ? 2 * m.inner : m.inner;
    if (m.gated && m.activation == SILU_OF) {
        const GemmPart part{inner, m.inner, 0, m.inner};
        gemm_gated(x, m.width, rows, m.up[expert], m.inner, m.width, m.dtype, &part, 1);
    } else {
        char* up = p.up + first * widest * bytes;
        gemm(x, m.width, rows, m.up[expert], widest, m.width, m.dtype, up, widest);
        if (m.dtype == F32) activate(m, (const float*)up, (float*)inner, rows);
        else activate(m, (const bf16*)up, (bf16*)inner, rows);
    }
    gemm(inner, m.inner, rows, m.down[expert], m.width, m.inner, m.dtype, out, m.width);
}

// out = the sum over a row's choices of score * the expert's output, in the order of the choices.
template <class T> void combine(const Mixture& m, const MixtureRows& given, const Pairs& p) {
    parallel(given.rows, (double)given.rows * m.chosen * m.width, [&](int64_t r) {
        T* to = (T*)given.out + r * m.out.row;
        for (int64_t i = 0; i < m.width; i += VL) {
            const int n = m.width - i < VL ? (int)(m.width - i) : VL;
            vf sum{};
            for (int64_t j = 0; j < m.chosen; j++) {
                const T* from = (const T*)p.out + p.place[r * m.chosen + j] * m.width + i;
                const float score = element(given.scores, m.scores_dtype, r * m.scores.row + j);
                sum = fmadd(n == VL ? load_as(from) : load_part(from, n), splat(score), sum);
            }
            if (n == VL) store_as(to + i, sum);
            else store_part(to + i, sum, n);
        }
    });
}

}  // namespace

int64_t mix(const Mixture& m, const MixtureRows& given, std::vector<char>& workspace) {
    const Pairs p = divide(m, given.rows, workspace);
    const int64_t unknown = order(m, given, p);
    if (unknown >= 0) return unknown;
    const int64_t bytes = m.dtype == BF16 ? 2 : 4;
    for (int64_t r = 0; r < given.rows; r++)
        for (int64_t j = 0; j < m.chosen; j++)
            std::memcpy(p.x + p.place[r * m.chosen + j] * m.width * bytes, (const char*)given.x + r * m.x.row * bytes, m.width * bytes);
    for (int64_t e = 0; e < m.experts; e++) run_expert(m, p, e);
    if (m.dtype == F32) combine<float>(m, given, p);
    else combine<bf16>(m, given, p);
    return -1;
}

}  // namespace braid
