// The matrix product of the projections: out[m, n] = x[m, k] . w[n, k]^T, with what follows a projection.
//
// Weights are packed once (pack, pack_gated) and then used for any number of rows. Every output element
// is the same bits whatever the number of rows, its row, the number of threads, the other columns of the
// packed weight and the way that they are divided over destinations: k is summed in blocks of
// GEMM_K_BLOCK, each block one chain of fmadd over ascending k from zero (with bf16, over ascending pairs
// of k, the second of a pair first), and the blocks' sums are added in ascending order.
//
// All arithmetic is fp32. `dtype` (F32 or BF16) is that of the weight, x, outputs, biases and addends
// alike; bf16 results are rounded once, after bias, gate and addend. Strides count elements; rows are
// contiguous. n, k >= 1; m >= 0. Calls use scratch() of the calling thread and of the pool's threads.
#pragma once

#include "common.h"

namespace braid {

constexpr int GEMM_K_BLOCK = 256;

// Bytes of a packed weight w[n, k]; pack() writes all of them. Align the buffer to 64 bytes for speed,
// and let large ones lie in huge pages where the system has them (madvise).
int64_t packed_bytes(int64_t n, int64_t k, int32_t dtype);
void pack(const void* w, int32_t dtype, int64_t row_stride, int64_t n, int64_t k, void* out);

// A weight that several projections of the same x share: give pack_rows() each matrix's rows and the
// first output column they become. All n columns must be given, in any order and in any pieces.
void pack_rows(const void* w, int32_t dtype, int64_t row_stride, int64_t first, int64_t rows, int64_t n, int64_t k, void* out);

// The gated unit of an MLP, silu(x . gate^T) * (x . up^T): gate[n, k] and up[n, k] are packed together,
// and gemm_gated() writes n columns. Neither product is ever stored, and neither is rounded to bf16.
int64_t packed_gated_bytes(int64_t n, int64_t k, int32_t dtype);
void pack_gated(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, int32_t dtype, int64_t n, int64_t k,
                void* out);

// Where the columns [first, first + columns) of a product go. Parts may come in any order; columns that
// no part names are computed at most, and dropped. Two parts must not name the same memory.
struct GemmPart {
    void* out;                    // [m, columns]
    int64_t row_stride;           // of out
    int64_t first, columns;
    const void* bias = nullptr;   // [columns], or null
    const void* addend = nullptr; // [m, columns], or null: the residual. May be `out` itself.
    int64_t addend_stride = 0;
};

// out = x . w^T (+ bias) (+ addend), in this order. No output or addend may overlap x.
void gemm(const void* x, int64_t x_stride, int64_t m, const void* packed, int64_t n, int64_t k, int32_t dtype,
          const GemmPart* parts, int64_t part_count);

// out = silu(x . gate^T) * (x . up^T) (+ bias) (+ addend); n and the parts count output columns.
void gemm_gated(const void* x, int64_t x_stride, int64_t m, const void* packed, int64_t n, int64_t k, int32_t dtype,
                const GemmPart* parts, int64_t part_count);

// One destination for all columns.
static inline void gemm(const void* x, int64_t x_stride, int64_t m, const void* packed, int64_t n, int64_t k, int32_t dtype,
                        void* out, int64_t out_stride) {
    const GemmPart part{out, out_stride, 0, n};
    gemm(x, x_stride, m, packed, n, k, dtype, &part, 1);
}

}  // namespace braid
