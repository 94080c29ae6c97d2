// Vectors, bf16 conversion, elementary functions and the thread pool shared by the kernels.
//
// Everything is written on one vector type of the machine's width (GCC/Clang vector extensions), so
// that one source serves AVX-512, AVX2, NEON and plain SSE. Products are fused only where fmadd() says
// so (the build uses -ffp-contract=off): the order and rounding of every operation is fixed by this
// text, which is what makes a sequence's result independent of its company in the batch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace braid {

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));

#define BRAID_INLINE static inline __attribute__((always_inline))

// For loops over the vectors of a register tile: unrolled always, or the tile would live in memory.
#if defined(__clang__)
#define BRAID_UNROLL _Pragma("clang loop unroll(full)")
#else
#define BRAID_UNROLL _Pragma("GCC unroll 16")
#endif

BRAID_INLINE vf splat(float x) { return x - vf{}; }
BRAID_INLINE vf load(const float* p) { vf r; std::memcpy(&r, p, sizeof r); return r; }
BRAID_INLINE void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }

BRAID_INLINE vf fmadd(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX__) && defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

BRAID_INLINE vf select(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
BRAID_INLINE vf vmax(vf a, vf b) { return select(a > b, a, b); }

// Sum of the lanes, in a fixed order: halves are added until one lane is left.
#if defined(__AVX__)
BRAID_INLINE float hsum128(__m128 x) {
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
BRAID_INLINE float hsum256(__m256 x) { return hsum128(_mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1))); }
#endif
BRAID_INLINE float hsum(vf x) {
#if defined(__AVX512F__)
    __m512 y = (__m512)x;
    __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(y), 1));
    return hsum256(_mm256_add_ps(_mm512_castps512_ps256(y), high));
#elif defined(__AVX__)
    return hsum256((__m256)x);
#else
    return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

// ---- element types: float and bf16 (a uint16_t holding the upper half of a float) ----
typedef uint16_t bf16;
enum DType : int32_t { F32 = 0, BF16 = 1 };

BRAID_INLINE float to_float(float x) { return x; }
BRAID_INLINE float to_float(bf16 x) {
    uint32_t u = (uint32_t)x << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
BRAID_INLINE void from_float(float x, float* p) { *p = x; }
BRAID_INLINE void from_float(float x, bf16* p) {  // round to nearest even, NaN stays NaN
    uint32_t u;
    std::memcpy(&u, &x, 4);
    *p = (x != x) ? 0x7fc0 : (bf16)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

BRAID_INLINE vf load_as(const float* p) { return load(p); }
BRAID_INLINE vf load_as(const bf16* p) {
    vh h;
    std::memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}
BRAID_INLINE void store_as(float* p, vf x) { store(p, x); }
BRAID_INLINE void store_as(bf16* p, vf x) {
    vu u = (vu)x;
    vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    vu nan = (vu)(x != x);
    rounded = (rounded & ~nan) | (nan & 0x7fc0u);
    vh h = __builtin_convertvector(rounded, vh);
    std::memcpy(p, &h, sizeof h);
}

// The first n lanes only (the rest reads as zero); memory beyond them is not touched.
template <class T> BRAID_INLINE vf load_part(const T* p, int n) {
    float lanes[VL] = {};
    for (int i = 0; i < n; i++) lanes[i] = to_float(p[i]);
    return load(lanes);
}
template <class T> BRAID_INLINE void store_part(T* p, vf x, int n) {
    float lanes[VL];
    store(lanes, x);
    for (int i = 0; i < n; i++) from_float(lanes[i], p + i);
}
template <bool PART, class T> BRAID_INLINE vf load_lanes(const T* p, int n) {
    if constexpr (PART) return load_part(p, n);
    else return load_as(p);
}
template <bool PART, class T> BRAID_INLINE void store_lanes(T* p, vf x, int n) {
    if constexpr (PART) store_part(p, x, n);
    else store_as(p, x);
}

constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

// n elements to floats, zero-padded up to a multiple of VL.
template <class T> static inline void widen_row(const T* src, float* dst, int n) {
    int i = 0;
    for (; i + VL <= n; i += VL) store(dst + i, load_as(src + i));
    if (i < n) store(dst + i, load_part(src + i, n - i));
}
static inline void widen_row(const void* base, int32_t dtype, int64_t offset, float* dst, int n) {
    if (dtype == F32) widen_row((const float*)base + offset, dst, n);
    else widen_row((const bf16*)base + offset, dst, n);
}
template <class T> static inline void narrow_row(const float* src, T* dst, int n) {
    int i = 0;
    for (; i + VL <= n; i += VL) store_as(dst + i, load(src + i));
    if (i < n) store_part(dst + i, load(src + i), n - i);
}
static inline void narrow_row(const float* src, void* base, int32_t dtype, int64_t offset, int n) {
    if (dtype == F32) narrow_row(src, (float*)base + offset, n);
    else narrow_row(src, (bf16*)base + offset, n);
}
static inline float element(const void* base, int32_t dtype, int64_t offset) {
    return dtype == F32 ? ((const float*)base)[offset] : to_float(((const bf16*)base)[offset]);
}

// ---- elementary functions: relative error about 1e-7; NaN in, NaN out ----
// e^x: x = n ln2 + r, polynomial in r (Cephes expf). 0 below -87.3, clamped (about 2e38) above 88.3.
BRAID_INLINE vf vexp(vf x) {
    const float LO = -87.33654f, HI = 88.37626f;
    vi underflow = x < LO;
    vf c = select(x > HI, splat(HI), x);
    c = select(underflow, splat(LO), c);
    const vf MAGIC = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
    vf shifted = fmadd(c, splat(1.44269504f), MAGIC);
    vf n = shifted - MAGIC;
    vf r = fmadd(n, splat(-0.693359375f), c);
    r = fmadd(n, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = fmadd(p, r, splat(1.3981999507e-3f));
    p = fmadd(p, r, splat(8.3334519073e-3f));
    p = fmadd(p, r, splat(4.1665795894e-2f));
    p = fmadd(p, r, splat(1.6666665459e-1f));
    p = fmadd(p, r, splat(5.0000001201e-1f));
    p = fmadd(p, r * r, r) + 1.0f;
    vf power = (vf)(((vi)shifted - (vi)MAGIC + 127) << 23);
    return select(underflow, vf{}, p * power);
}
BRAID_INLINE vf vsigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }
BRAID_INLINE vf vsilu(vf x) { return x / (1.0f + vexp(-x)); }

// log(1 + y) for y in [0, 1]: log u of the rounded u = 1 + y, plus the rounding's own first-order part,
// so that a tiny y keeps its relative accuracy.
BRAID_INLINE vf vlog1p01(vf y) {
    vf u = 1.0f + y;
    vf lost = (y - (u - 1.0f)) / u;
    vi big = u > 1.41421356f;
    vf m = select(big, u * 0.5f, u) - 1.0f;
    vf e = select(big, splat(1.0f), vf{});
    vf z = m * m;
    vf p = splat(7.0376836292e-2f);
    p = fmadd(p, m, splat(-1.1514610310e-1f));
    p = fmadd(p, m, splat(1.1676998740e-1f));
    p = fmadd(p, m, splat(-1.2420140846e-1f));
    p = fmadd(p, m, splat(1.4249322787e-1f));
    p = fmadd(p, m, splat(-1.6668057665e-1f));
    p = fmadd(p, m, splat(2.0000714765e-1f));
    p = fmadd(p, m, splat(-2.4999993993e-1f));
    p = fmadd(p, m, splat(3.3333331174e-1f));
    vf log_m = fmadd(z * m, p, fmadd(z, splat(-0.5f), m));
    return fmadd(e, splat(0.693147181f), log_m) + lost;
}
// log(1 + e^x) = max(x, 0) + log1p(e^-|x|)
BRAID_INLINE vf vsoftplus(vf x) {
    vf magnitude = (vf)((vi)x & 0x7fffffff);
    vf positive = select(x < 0.0f, vf{}, x);
    return positive + vlog1p01(vexp(-magnitude));
}

// ---- thread pool ----
// Runs task(context, index) for every index in [0, count); the calling thread takes part. Tasks are
// handed out one by one, so results must not depend on who runs what (they do not). `work` is a rough
// number of multiply-adds: below a threshold the caller runs everything itself.
void parallel_for(int64_t count, double work, void (*task)(void*, int64_t), void* context);

template <class F> static inline void parallel(int64_t count, double work, F&& body) {
    parallel_for(count, work, [](void* f, int64_t i) { (*static_cast<F*>(f))(i); }, &body);
}

// Private, 64-byte-aligned scratch of the calling thread, valid until its next scratch() call.
float* scratch(size_t floats);

// Return values of the C entry points: 0, or (code << 32) | index.
enum Code : int64_t { OK = 0, SPANS = 1, STATE_IN = 2, STATE_OUT = 3, STATE_SHARED = 4, CONTEXT = 5, PAGE = 6, MEMORY = 7, CHUNKS = 8 };
static inline int64_t failure(Code code, int64_t index) { return ((int64_t)code << 32) | (index & 0xffffffff); }

}  // namespace braid
