"""The recurrence of all mechanisms token by token: decode, verification, short spans."""

from __future__ import annotations

import triton
import triton.language as tl

from braid_kernels.triton_kernels.gates import (
    CONSTANT,
    ONE,
    TIME_STEP,
    beta_of,
    cast,
    log_decay,
    silu,
)


@triton.jit
def recurrent_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    gate: tl.tensor,
    step: tl.tensor,
    out: tl.tensor,
    pool: tl.tensor,
    rate: tl.tensor,
    bias: tl.tensor,
    skip: tl.tensor,
    spans: tl.tensor,
    cu_seqlens: tl.tensor,
    state_in: tl.tensor,
    state_out: tl.tensor,
    q_row: tl.tensor,
    k_row: tl.tensor,
    v_row: tl.tensor,
    gate_row: tl.tensor,
    step_row: tl.tensor,
    out_row: tl.tensor,
    pool_slot: tl.tensor,
    scale: tl.tensor,
    beta_scale: tl.tensor,
    bound: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    CHANNEL: tl.constexpr,
    DECAY: tl.constexpr,
    BETA: tl.constexpr,
    DELTA: tl.constexpr,
    SILU: tl.constexpr,
    SKIP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
) -> None:
    """Per value head, S in [DK, DV], decay first, then erase:

        S <- Diag(alpha_t) S;  u = beta_t (v_t - delta S^T k_t);  S <- S + k_t u^T;
        o_t = scale S^T q_t (+ skip v_t)

    q, k [T, HEADS/GROUP, DK], v and out [T, HEADS, DV], gate [T, HEADS] or [T, HEADS*DK], step (beta's
    input) [T, HEADS]; pool [slots, HEADS, DK, DV], read at state_in (-1: zeros), written at state_out,
    per token. rate [HEADS], bias like a row of gate, skip [HEADS], fp32. spans: the sequences to run.
    Grid: blocks of DV, HEADS, spans; a program owns BLOCK_V columns of one head's state, for the columns
    do not touch one another. Source: arXiv 2412.06464 eq. 10, arXiv 2405.21060.
    """
    h = tl.program_id(1)
    b = tl.load(spans + tl.program_id(2))
    begin = tl.load(cu_seqlens + b)
    end = tl.load(cu_seqlens + b + 1)
    kc = tl.arange(0, BLOCK_K)
    vc = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    k_in = kc < DK
    v_in = vc < DV
    tile = h * (DK * DV) + kc[:, None] * DV + vc[None, :]
    tile_in = k_in[:, None] & v_in[None, :]

    slot = tl.load(state_in + b).to(tl.int64)
    S = tl.zeros([BLOCK_K, BLOCK_V], dtype=tl.float32)
    if slot >= 0:
        S = tl.load(pool + slot * pool_slot + tile, mask=tile_in, other=0.0).to(tl.float32)

    head_rate = tl.load(rate + h)
    if CHANNEL:
        gate_bias = tl.load(bias + h * DK + kc, mask=k_in, other=0.0)
    elif DECAY == CONSTANT:
        gate_bias = 0.0
    else:
        gate_bias = tl.load(bias + h)
    if DECAY == CONSTANT:
        alpha = tl.exp(head_rate)
    step_bias = 0.0
    if DECAY == TIME_STEP:
        step_bias = gate_bias
    if SKIP:
        head_skip = tl.load(skip + h)

    row = begin.to(tl.int64)
    q_at = q + row * q_row + (h // GROUP) * DK + kc
    k_at = k + row * k_row + (h // GROUP) * DK + kc
    v_at = v + row * v_row + h * DV + vc
    out_at = out + row * out_row + h * DV + vc
    slot_at = state_out + row
    gate_at = gate + row * gate_row
    gate_at = gate_at + h * DK + kc if CHANNEL else gate_at + h
    step_at = step + row * step_row + h
    for _ in range(begin, end):
        qt = tl.load(q_at, mask=k_in, other=0.0).to(tl.float32)
        kt = tl.load(k_at, mask=k_in, other=0.0).to(tl.float32)
        vt = tl.load(v_at, mask=v_in, other=0.0).to(tl.float32)
        if SILU:
            qt = silu(qt)
            kt = silu(kt)
            vt = silu(vt)
        if CHANNEL:
            x = tl.load(gate_at, mask=k_in, other=0.0).to(tl.float32)
            decay = tl.exp(log_decay(x, head_rate, gate_bias, bound, low, high, DECAY))
            S = S * decay[:, None]
        elif DECAY == CONSTANT:
            S = S * alpha
        else:
            x = tl.load(gate_at).to(tl.float32)
            S = S * tl.exp(log_decay(x, head_rate, gate_bias, bound, low, high, DECAY))
        u = vt
        if DELTA:
            u = u - tl.sum(S * kt[:, None], axis=0)
        if BETA != ONE:
            u = u * beta_of(tl.load(step_at).to(tl.float32), step_bias, beta_scale, low, high, BETA)
        S = S + kt[:, None] * u[None, :]
        o = scale * tl.sum(S * qt[:, None], axis=0)
        if SKIP:
            o = o + head_skip * vt
        tl.store(out_at, cast(o, out.dtype.element_ty), mask=v_in)
        target = tl.load(slot_at).to(tl.int64)
        if target >= 0:
            tl.store(pool + target * pool_slot + tile, cast(S, pool.dtype.element_ty), mask=tile_in)
        q_at += q_row
        k_at += k_row
        v_at += v_row
        gate_at += gate_row
        step_at += step_row
        out_at += out_row
        slot_at += 1
