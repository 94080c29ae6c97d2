"""The selective scan of Mamba-1, token by token: decode, verification and prefill alike."""

from __future__ import annotations

import triton
import triton.language as tl

from braid_kernels.triton_kernels.gates import cast, softplus


@triton.jit
def selective_scan_kernel(
    u: tl.tensor,
    dt: tl.tensor,
    B: tl.tensor,
    C: tl.tensor,
    out: tl.tensor,
    pool: tl.tensor,
    rate: tl.tensor,
    bias: tl.tensor,
    skip: tl.tensor,
    cu_seqlens: tl.tensor,
    state_in: tl.tensor,
    state_out: tl.tensor,
    u_row: tl.tensor,
    dt_row: tl.tensor,
    B_row: tl.tensor,
    C_row: tl.tensor,
    out_row: tl.tensor,
    pool_slot: tl.tensor,
    INNER: tl.constexpr,
    N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Per channel i and state column n, with s = softplus(dt[t, i] + bias[i]):

        h[i, n] <- e^(-rate[i, n] s) h[i, n] + s B[t, n] u[t, i]
        out[t, i] = sum_n C[t, n] h[i, n] + skip[i] u[t, i]

    u, dt [T, INNER]; B, C [T, N]; rate [INNER, N], bias and skip [INNER], all fp32; out [T, INNER]; pool
    [slots, INNER, N], read at state_in (-1: zeros), written at state_out, per token.
    Grid: blocks of channels, sequences.
    Source: arXiv 2312.00752 algorithm 2.
    """
    b = tl.program_id(1)
    begin = tl.load(cu_seqlens + b)
    end = tl.load(cu_seqlens + b + 1)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    n = tl.arange(0, BLOCK_N)
    i_in = i < INNER
    n_in = n < N
    tile = i[:, None] * N + n[None, :]
    tile_in = i_in[:, None] & n_in[None, :]
    decay = tl.load(rate + tile, mask=tile_in, other=0.0)
    step_bias = tl.load(bias + i, mask=i_in, other=0.0)
    through = tl.load(skip + i, mask=i_in, other=0.0)
    slot = tl.load(state_in + b).to(tl.int64)
    h = tl.zeros([BLOCK_I, BLOCK_N], dtype=tl.float32)
    if (slot >= 0) & (begin < end):
        h = tl.load(pool + slot * pool_slot + tile, mask=tile_in, other=0.0).to(tl.float32)
    row = begin.to(tl.int64)
    u_at = u + row * u_row + i
    dt_at = dt + row * dt_row + i
    B_at = B + row * B_row + n
    C_at = C + row * C_row + n
    out_at = out + row * out_row + i
    slot_at = state_out + row
    for _ in range(begin, end):
        x = tl.load(u_at, mask=i_in, other=0.0)
        s = softplus(tl.load(dt_at, mask=i_in, other=0.0) + step_bias)
        write = tl.load(B_at, mask=n_in, other=0.0)
        read = tl.load(C_at, mask=n_in, other=0.0)
        h = h * tl.exp(-decay * s[:, None]) + (s * x)[:, None] * write[None, :]
        y = tl.sum(h * read[None, :], axis=1) + through * x
        tl.store(out_at, cast(y, out.dtype.element_ty), mask=i_in)
        target = tl.load(slot_at).to(tl.int64)
        if target >= 0:
            tl.store(pool + target * pool_slot + tile, cast(h, pool.dtype.element_ty), mask=tile_in)
        u_at += u_row
        dt_at += dt_row
        B_at += B_row
        C_at += C_row
        out_at += out_row
        slot_at += 1
