"""Depthwise causal convolution (+ SiLU, + L2 norm per head) over packed rows, with state by slot."""

from __future__ import annotations

import triton
import triton.language as tl

from braid_kernels.triton_kernels.gates import cast, silu


@triton.jit(do_not_specialize=["num_tokens"])
def conv_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    pool: tl.tensor,
    work: tl.tensor,
    token_span: tl.tensor,
    cu_seqlens: tl.tensor,
    state_in: tl.tensor,
    state_out: tl.tensor,
    num_tokens: tl.tensor,
    x_row: tl.tensor,
    work_row: tl.tensor,
    pool_slot: tl.tensor,
    FIRST: tl.constexpr,
    FIRST_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
    SILU: tl.constexpr,
    BIAS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """work[t, c] = silu(bias[c] + sum_j weight[c, j] x[t - (TAPS-1) + j, c]), within each span; without
    SILU the sum itself.

    x [T, C]; weight [C, TAPS] and bias [C] fp32; pool [slots, C, TAPS-1], the inputs before the span,
    oldest first (slot -1: zeros); work [T, C]. The channels are FIRST groups of FIRST_WIDTH, then groups
    of WIDTH; with NORM the first ones (heads of q and k) leave as y / sqrt(sum y^2 + 1e-6).
    After a token with a slot in state_out, its last TAPS-1 inputs are written there. A span shorter than
    that carries older columns over, which is why history is read by distance and not by column.
    Grid: blocks of tokens, groups. Source: causal_conv1d_fn / _update and l2norm in transformers'
    qwen3_next.
    """
    group = tl.program_id(1)
    first = group < FIRST
    width = tl.where(first, FIRST_WIDTH, WIDTH)
    column = tl.where(first, group * FIRST_WIDTH, FIRST * FIRST_WIDTH + (group - FIRST) * WIDTH)
    lane = tl.arange(0, BLOCK_C)
    inside = lane < width
    c = column + lane

    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = t < num_tokens
    span = tl.load(token_span + t, mask=live, other=0)
    begin = tl.load(cu_seqlens + span, mask=live, other=0)
    slot_in = tl.load(state_in + span, mask=live, other=-1).to(tl.int64)
    slot_out = tl.load(state_out + t, mask=live, other=-1).to(tl.int64)
    read_at = pool + slot_in[:, None] * pool_slot + (c * (TAPS - 1))[None, :]
    write_at = pool + slot_out[:, None] * pool_slot + (c * (TAPS - 1))[None, :]
    writes = (slot_out >= 0)[:, None] & inside[None, :]

    acc = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
    for tap in tl.static_range(TAPS):
        back = TAPS - 1 - tap
        source = t - back
        own = (live & (source >= begin))[:, None]
        value = tl.load(
            x + source.to(tl.int64)[:, None] * x_row + c[None, :], mask=own & inside[None, :], other=0.0
        ).to(tl.float32)
        if back > 0:
            old = (live & (source < begin) & (slot_in >= 0))[:, None]
            history = tl.load(
                read_at + (TAPS - 1 + source - begin)[:, None], mask=old & inside[None, :], other=0.0
            )
            value = tl.where(own, value, cast(history.to(tl.float32), x.dtype.element_ty).to(tl.float32))
        if back < TAPS - 1:
            tl.store(write_at + (TAPS - 2 - back), cast(value, pool.dtype.element_ty), mask=writes)
        acc += value * tl.load(weight + c * TAPS + tap, mask=inside, other=0.0)[None, :]
    if BIAS:
        acc += tl.load(bias + c, mask=inside, other=0.0)[None, :]
    y = silu(acc) if SILU else acc
    if NORM:
        norm = tl.rsqrt(tl.sum(y * y, axis=1) + 1e-6)
        y = tl.where(first, y * norm[:, None], y)
    tl.store(
        work + t.to(tl.int64)[:, None] * work_row + c[None, :],
        cast(y, work.dtype.element_ty),
        mask=live[:, None] & inside[None, :],
    )
