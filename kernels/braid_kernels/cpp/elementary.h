// Elementary functions of vectors that the programs' elementwise operations have beside those of common.h.
#pragma once

#include <cmath>

#include "common.h"

namespace braid {

BRAID_INLINE vf vsqrt(vf x) {
#if defined(__AVX512F__)
    return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX__)
    return (vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__aarch64__)
    return (vf)vsqrtq_f32((float32x4_t)x);
#else
    for (int i = 0; i < VL; i++) x[i] = std::sqrt(x[i]);
    return x;
#endif
}
BRAID_INLINE vf vabs(vf x) { return (vf)((vi)x & 0x7fffffff); }
BRAID_INLINE vf with_sign_of(vf magnitude, vf x) { return (vf)((vi)magnitude | ((vi)x & (vi)splat(-0.0f))); }

// Near zero an odd polynomial keeps the relative accuracy, further out the exponential does.
BRAID_INLINE vf vtanh(vf x) {
    vf a = vabs(x), z = x * x;
    vf p = splat(-5.70498872745e-3f);
    p = fmadd(p, z, splat(2.06390887954e-2f));
    p = fmadd(p, z, splat(-5.37397155531e-2f));
    p = fmadd(p, z, splat(1.33314422036e-1f));
    p = fmadd(p, z, splat(-3.33332819422e-1f));
    vf small = fmadd(p * z, x, x);
    vf large = with_sign_of(1.0f - 2.0f / (vexp(a + a) + 1.0f), x);
    return select(a < 0.625f, small, select(x != x, x, large));
}

// |x| < 1: x P(x^2), the series of the error function; beyond: 1 - e^(-x^2) Q(t), t = 1 / (1 + x / 2).
BRAID_INLINE vf verf(vf x) {
    vf a = vabs(x), z = x * x;
    vf p = splat(7.847259102e-5f);
    p = fmadd(p, z, splat(-8.008189316e-4f));
    p = fmadd(p, z, splat(5.188098889e-3f));
    p = fmadd(p, z, splat(-2.685369110e-2f));
    p = fmadd(p, z, splat(1.128358225e-1f));
    p = fmadd(p, z, splat(-3.761262557e-1f));
    p = fmadd(p, z, splat(1.128379166f));
    vf c = select(a > 4.2f, splat(4.2f), a), t = 1.0f / (1.0f + 0.5f * c);
    vf q = splat(-2.313385110e-1f);
    q = fmadd(q, t, splat(6.382420671e-1f));
    q = fmadd(q, t, splat(-6.627323167e-2f));
    q = fmadd(q, t, splat(3.978505082e-1f));
    q = fmadd(q, t, splat(2.593983665e-1f));
    q = fmadd(q, t, splat(1.857220103e-3f));
    vf large = with_sign_of(1.0f - vexp(-c * c) * q, x);
    return select(a < 1.0f, x * p, select(x != x, x, large));
}
BRAID_INLINE vf vgelu(vf x) { return 0.5f * x * (1.0f + verf(x * 0.70710678f)); }
BRAID_INLINE vf vgelu_tanh(vf x) {
    vf inner = 0.79788456f * fmadd(splat(0.044715f), x * x * x, x);
    return 0.5f * x * (1.0f + vtanh(inner));
}
template <float (*F)(float)> BRAID_INLINE vf each(vf x) {
    for (int i = 0; i < VL; i++) x[i] = F(x[i]);
    return x;
}

}  // namespace braid
