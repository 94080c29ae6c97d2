"""Device functions shared by every kernel: activations, decays, betas, casts; on a value or on a tile.

All but the casts take and give fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Whether kernels run on the CPU in Triton's interpreter. Triton decides it when a kernel is defined, so it
# is read once, at import.
INTERPRETED: bool = triton.knobs.runtime.interpret
_TRUNCATES = tl.constexpr(INTERPRETED)

# Forms of the log decay, natural log, <= 0. Per head unless "channel".
CONSTANT = tl.constexpr(0)  # rate
SOFTPLUS_HEAD = tl.constexpr(1)  # -rate * softplus(x + bias)
SOFTPLUS_CHANNEL = tl.constexpr(2)  # the same with x and bias per key channel
BOUNDED_CHANNEL = tl.constexpr(3)  # bound * sigmoid(rate * (x + bias)), per key channel
TIME_STEP = tl.constexpr(4)  # -rate * clamp(softplus(x + bias), low, high)

# Forms of beta.
ONE = tl.constexpr(0)
SIGMOID = tl.constexpr(1)  # beta_scale * sigmoid(x)
STEP = tl.constexpr(2)  # clamp(softplus(x + bias), low, high)


@triton.jit
def cast(x: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """x in DTYPE, rounded to nearest even, also under the interpreter, whose own cast to bf16 truncates."""
    if _TRUNCATES and tl.bfloat16 == DTYPE:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def operand(x: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """x as an operand of a product in DTYPE; the interpreter's products of bf16 are wrong, those of the
    same values in fp32 are not."""
    y = cast(x, DTYPE)
    return y.to(tl.float32) if _TRUNCATES else y


@triton.jit
def silu(x: tl.tensor) -> tl.tensor:
    """x * sigmoid(x)."""
    return x * tl.sigmoid(x)


@triton.jit
def softplus(x: tl.tensor) -> tl.tensor:
    """log(1 + e^x), accurate relative to itself in both tails.

    The hardware's logarithm has an absolute error near 1, which would make a slowly forgetting state
    forget at a wrong rate: log1p(e) = 2 artanh(e / (2 + e)), whose series needs eight terms for e <= 1.
    """
    e = tl.exp(-tl.abs(x))
    z = e / (2.0 + e)
    s = z * z  # <= 1/9
    series = 1.0 / 15.0
    series = series * s + 1.0 / 13.0
    series = series * s + 1.0 / 11.0
    series = series * s + 1.0 / 9.0
    series = series * s + 1.0 / 7.0
    series = series * s + 1.0 / 5.0
    series = series * s + 1.0 / 3.0
    series = series * s + 1.0
    return tl.maximum(x, 0.0) + 2.0 * z * series


@triton.jit
def time_step(x: tl.tensor, bias: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """clamp(softplus(x + bias), low, high): mamba2's dt."""
    return tl.minimum(tl.maximum(softplus(x + bias), low), high)


@triton.jit
def log_decay(
    x: tl.tensor,
    rate: tl.tensor,
    bias: tl.tensor,
    bound: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    DECAY: tl.constexpr,
) -> tl.tensor:
    """The natural log of alpha in form DECAY; see the constants above. CONSTANT reads `rate` alone."""
    if DECAY == CONSTANT:
        g = rate
    elif DECAY == BOUNDED_CHANNEL:
        g = bound * tl.sigmoid(rate * (x + bias))
    elif DECAY == TIME_STEP:
        g = -rate * time_step(x, bias, low, high)
    else:
        g = -rate * softplus(x + bias)
    return g


@triton.jit
def beta_of(
    x: tl.tensor,
    bias: tl.tensor,
    beta_scale: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    BETA: tl.constexpr,
) -> tl.tensor:
    """beta in form SIGMOID or STEP; see the constants above."""
    return beta_scale * tl.sigmoid(x) if BETA == SIGMOID else time_step(x, bias, low, high)
