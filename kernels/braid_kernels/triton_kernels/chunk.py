"""The recurrence of all mechanisms a chunk at a time: prefill.

A chunk is up to CHUNK consecutive rows of one span; it ends early at a row whose state is asked for, so
that states are only ever needed at ends of chunks. With G_i the sum of log decays up to and including
row i (a number per head, or a vector over key channels), S_0 the state before the chunk and n its rows:

    A_ij = beta_i k_i . (e^(G_i - G_j) k_j)  for j < i, else 0;      T = (I + A)^-1
    U = T diag(beta) V;   W = T diag(beta) (e^G K);   V' = U - W S_0          (delta rule)
    V' = diag(beta) V                                                         (no delta rule)
    o_i = scale (S_0^T (e^(G_i) q_i) + sum_{j<=i} (q_i . e^(G_i - G_j) k_j) v'_j)
    S_n = Diag(e^(G_n)) S_0 + (e^(G_n - G) K)^T V'

Exponents are always differences that are <= 0, so nothing overflows however strong the decay.
Source: arXiv 2412.06464 section 3.3 and 2510.26692 (WY form), arXiv 2405.21060 section 6 (no delta rule).

Four kernels per layer: gates (G), scores (per-channel decay alone), solve (delta rule alone), then the
only sequential one, states, and outputs. Rows beyond a chunk's end are loaded as zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from braid_kernels.triton_kernels.gates import (
    CONSTANT,
    ONE,
    beta_of,
    cast,
    log_decay,
    operand,
    silu,
)

# Below e^-30 a token's decay is as good as a reset (1e-13 of the old state), and the bound keeps sums
# over a chunk small enough that their differences stay accurate in fp32.
MIN_LOG_DECAY = tl.constexpr(-30.0)


@triton.jit
def chunk_gate_kernel(
    gate: tl.tensor,
    decay: tl.tensor,
    rate: tl.tensor,
    bias: tl.tensor,
    chunk_row: tl.tensor,
    chunk_len: tl.tensor,
    gate_row: tl.tensor,
    bound: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    COLUMNS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    DECAY: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """decay[t, c] = G: log decays summed over the rows of t's chunk, up to and including t; fp32.

    gate and decay [T, COLUMNS], COLUMNS = heads * PER_HEAD. Grid: chunks, blocks of columns.
    """
    chunk = tl.program_id(0)
    row = tl.load(chunk_row + chunk).to(tl.int64)
    i = tl.arange(0, CHUNK)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < COLUMNS
    live = (i < tl.load(chunk_len + chunk))[:, None] & inside[None, :]
    head_rate = tl.load(rate + c // PER_HEAD, mask=inside, other=0.0)[None, :]
    if DECAY == CONSTANT:
        g = head_rate + tl.zeros([CHUNK, BLOCK_C], dtype=tl.float32)
    else:
        x = tl.load(gate + (row + i)[:, None] * gate_row + c[None, :], mask=live, other=0.0).to(tl.float32)
        gate_bias = tl.load(bias + c, mask=inside, other=0.0)[None, :]
        g = log_decay(x, head_rate, gate_bias, bound, low, high, DECAY)
    g = tl.where(live, tl.maximum(g, MIN_LOG_DECAY), 0.0)
    tl.store(decay + (row + i)[:, None] * COLUMNS + c[None, :], tl.cumsum(g, axis=0), mask=live)


@triton.jit
def chunk_scores_kernel(
    q: tl.tensor,
    k: tl.tensor,
    decay: tl.tensor,
    key_scores: tl.tensor,
    query_scores: tl.tensor,
    chunk_row: tl.tensor,
    chunk_len: tl.tensor,
    q_row: tl.tensor,
    k_row: tl.tensor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    CHUNK: tl.constexpr,
    SUB: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Scores under a decay per channel: x_i . (e^(G_i - G_j) k_j) for x = k (j < i) and x = q (j <= i).

    key_scores, query_scores [T, HEADS, CHUNK] fp32, column j of a row = row j of its chunk; zeros
    elsewhere. Grid: chunks, CHUNK/SUB sub-blocks of rows, HEADS.

    e^(G_i - G_j) is split as e^(G_i - r) e^(r - G_j) with r = G at the sub-block's first row. Columns
    before the sub-block have both exponents <= 0. Within the sub-block r - G_j is positive and may be
    anything, so those columns are summed one by one from the difference itself.
    """
    chunk = tl.program_id(0)
    base = tl.program_id(1) * SUB
    h = tl.program_id(2)
    n = tl.load(chunk_len + chunk)
    if base < n:
        row = tl.load(chunk_row + chunk).to(tl.int64)
        i = tl.arange(0, SUB)
        j = tl.arange(0, CHUNK)
        live = base + i < n
        keys = tl.zeros([SUB, CHUNK], dtype=tl.float32)
        queries = tl.zeros([SUB, CHUNK], dtype=tl.float32)
        for k0 in tl.static_range(0, DK, BLOCK_K):
            kc = k0 + tl.arange(0, BLOCK_K)
            k_in = kc < DK
            at = live[:, None] & k_in[None, :]
            rows = row + base + i
            q_i = tl.load(
                q + rows[:, None] * q_row + ((h // GROUP) * DK + kc)[None, :], mask=at, other=0.0
            ).to(tl.float32)
            k_i = tl.load(
                k + rows[:, None] * k_row + ((h // GROUP) * DK + kc)[None, :], mask=at, other=0.0
            ).to(tl.float32)
            g_at = decay + (h * DK + kc)
            g_i = tl.load(g_at[None, :] + rows[:, None] * (HEADS * DK), mask=at, other=0.0)
            reference = tl.load(g_at + (row + base) * (HEADS * DK), mask=k_in, other=0.0)
            # Columns before the sub-block: both factors <= 1.
            before = (j < base)[:, None] & k_in[None, :]
            k_j = tl.load(
                k + (row + j)[:, None] * k_row + ((h // GROUP) * DK + kc)[None, :], mask=before, other=0.0
            ).to(tl.float32)
            g_j = tl.load(g_at[None, :] + (row + j)[:, None] * (HEADS * DK), mask=before, other=0.0)
            k_j = tl.where(before, k_j * tl.exp(tl.minimum(reference[None, :] - g_j, 0.0)), 0.0)
            k_j = operand(tl.trans(k_j), DOT)
            down = tl.exp(tl.minimum(g_i - reference[None, :], 0.0))
            keys = tl.dot(operand(k_i * down, DOT), k_j, keys, input_precision=PRECISION)
            queries = tl.dot(operand(q_i * down, DOT), k_j, queries, input_precision=PRECISION)
            # Columns of the sub-block itself.
            for s in range(tl.minimum(n - base, SUB)):
                one = row + base + s
                k_s = tl.load(k + one * k_row + (h // GROUP) * DK + kc, mask=k_in, other=0.0).to(tl.float32)
                g_s = tl.load(g_at + one * (HEADS * DK), mask=k_in, other=0.0)
                faded = k_s[None, :] * tl.exp(
                    tl.where((live & (i >= s))[:, None], g_i - g_s[None, :], float("-inf"))
                )
                column = (j == base + s)[None, :]
                keys = tl.where(column, keys + tl.sum(k_i * faded, axis=1)[:, None], keys)
                queries = tl.where(column, queries + tl.sum(q_i * faded, axis=1)[:, None], queries)
        at = (row + base + i)[:, None] * (HEADS * CHUNK) + h * CHUNK + j[None, :]
        own = (base + i)[:, None] > j[None, :]
        tl.store(key_scores + at, tl.where(own, keys, 0.0), mask=live[:, None] & (j < n)[None, :])
        tl.store(query_scores + at, queries, mask=live[:, None] & (j < n)[None, :])


@triton.jit
def unit_lower_inverse(
    A: tl.tensor, CHUNK: tl.constexpr, SUB: tl.constexpr, PRECISION: tl.constexpr
) -> tl.tensor:
    """(I + A)^-1 of a strictly lower triangular A [CHUNK, CHUNK], fp32; CHUNK / SUB is at most 4.

    The SUB x SUB blocks on the diagonal are inverted by forward substitution, all at once; call that D,
    and N the rest of A. M = D N is nilpotent of order CHUNK / SUB <= 4 as a block matrix, so that
    (I + A)^-1 = (I + M)^-1 D = (I - M)(I + M^2) D. (Powers of A itself, which would need no
    substitution, grow so fast for similar keys that they cancel catastrophically.)
    """
    BLOCKS: tl.constexpr = CHUNK // SUB
    i = tl.arange(0, CHUNK)
    N = tl.where((i // SUB)[:, None] == (i // SUB)[None, :], 0.0, A)
    b = tl.arange(0, BLOCKS)
    r = tl.arange(0, SUB)
    same = b[:, None, None, None] == b[None, None, :, None]
    blocks = tl.sum(tl.where(same, tl.reshape(A, [BLOCKS, SUB, BLOCKS, SUB]), 0.0), axis=2)
    eye = tl.where(r[:, None] == r[None, :], 1.0, 0.0)
    X = eye[None, :, :] + tl.zeros([BLOCKS, SUB, SUB], dtype=tl.float32)
    for s in range(1, SUB):
        chosen = (r == s)[None, :, None]
        line = tl.sum(tl.where(chosen, blocks, 0.0), axis=1)  # [BLOCKS, SUB], row s of every block
        X = tl.where(chosen, X - tl.sum(line[:, :, None] * X, axis=1)[:, None, :], X)
    D = tl.reshape(tl.where(same, X[:, :, None, :], 0.0), [CHUNK, CHUNK])
    M = tl.dot(D, N, input_precision=PRECISION)
    Y = tl.dot(tl.dot(M, M, input_precision=PRECISION), D, D, input_precision=PRECISION)
    return Y - tl.dot(M, Y, input_precision=PRECISION)


@triton.jit
def chunk_solve_kernel(
    k: tl.tensor,
    v: tl.tensor,
    step: tl.tensor,
    decay: tl.tensor,
    key_scores: tl.tensor,
    w: tl.tensor,
    u: tl.tensor,
    chunk_row: tl.tensor,
    chunk_len: tl.tensor,
    k_row: tl.tensor,
    v_row: tl.tensor,
    step_row: tl.tensor,
    beta_scale: tl.tensor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    CHANNEL: tl.constexpr,
    CHUNK: tl.constexpr,
    SUB: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    SOLVE_PRECISION: tl.constexpr,
) -> None:
    """w = W [T, HEADS, DK] and u = U [T, HEADS, DV] of the delta rule. Grid: chunks, HEADS."""
    chunk = tl.program_id(0)
    h = tl.program_id(1)
    row = tl.load(chunk_row + chunk).to(tl.int64)
    i = tl.arange(0, CHUNK)
    live = i < tl.load(chunk_len + chunk)
    rows = row + i
    beta = beta_scale * tl.sigmoid(tl.load(step + rows * step_row + h, mask=live, other=0.0).to(tl.float32))
    beta = tl.where(live, beta, 0.0)
    lower = (i[:, None] > i[None, :]) & live[:, None]
    if CHANNEL:
        A = tl.load(
            key_scores + rows[:, None] * (HEADS * CHUNK) + h * CHUNK + i[None, :], mask=lower, other=0.0
        )
    else:
        A = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
        for k0 in tl.static_range(0, DK, BLOCK_K):
            kc = k0 + tl.arange(0, BLOCK_K)
            keys = tl.load(
                k + rows[:, None] * k_row + ((h // GROUP) * DK + kc)[None, :],
                mask=live[:, None] & (kc < DK)[None, :],
                other=0.0,
            )
            keys = operand(keys, DOT)
            A = tl.dot(keys, tl.trans(keys), A, input_precision=PRECISION)
        G = tl.load(decay + rows * HEADS + h, mask=live, other=0.0)
        grow = tl.exp(G)
        A = A * tl.exp(tl.where(lower, G[:, None] - G[None, :], float("-inf")))
    T = unit_lower_inverse(A * beta[:, None], CHUNK, SUB, SOLVE_PRECISION)
    T = operand(T * beta[None, :], DOT)
    for v0 in tl.static_range(0, DV, BLOCK_V):
        vc = v0 + tl.arange(0, BLOCK_V)
        at = live[:, None] & (vc < DV)[None, :]
        values = tl.load(v + rows[:, None] * v_row + (h * DV + vc)[None, :], mask=at, other=0.0)
        part = tl.dot(T, operand(values, DOT), input_precision=PRECISION)
        tl.store(
            u + rows[:, None] * (HEADS * DV) + (h * DV + vc)[None, :], cast(part, u.dtype.element_ty), mask=at
        )
    for k0 in tl.static_range(0, DK, BLOCK_K):
        kc = k0 + tl.arange(0, BLOCK_K)
        at = live[:, None] & (kc < DK)[None, :]
        keys = tl.load(k + rows[:, None] * k_row + ((h // GROUP) * DK + kc)[None, :], mask=at, other=0.0).to(
            tl.float32
        )
        column = (h * DK + kc)[None, :]
        if CHANNEL:
            keys = keys * tl.exp(tl.load(decay + rows[:, None] * (HEADS * DK) + column, mask=at, other=0.0))
        else:
            keys = keys * grow[:, None]
        part = tl.dot(T, operand(keys, DOT), input_precision=PRECISION)
        tl.store(w + rows[:, None] * (HEADS * DK) + column, cast(part, w.dtype.element_ty), mask=at)


@triton.jit
def chunk_state_kernel(
    k: tl.tensor,
    v: tl.tensor,
    step: tl.tensor,
    decay: tl.tensor,
    w: tl.tensor,
    u: tl.tensor,
    fresh: tl.tensor,
    states: tl.tensor,
    pool: tl.tensor,
    bias: tl.tensor,
    spans: tl.tensor,
    span_chunks: tl.tensor,
    chunk_row: tl.tensor,
    chunk_len: tl.tensor,
    state_in: tl.tensor,
    state_out: tl.tensor,
    k_row: tl.tensor,
    v_row: tl.tensor,
    step_row: tl.tensor,
    pool_slot: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    CHANNEL: tl.constexpr,
    BETA: tl.constexpr,
    DELTA: tl.constexpr,
    SILU: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Walk the chunks of a span: states[chunk] = S_0 of each chunk, fresh = V' (delta rule alone).

    states [chunks, HEADS, DK, DV]; fresh [T, HEADS, DV]; pool [slots, HEADS, DK, DV], read at state_in
    (-1: zeros), written where a chunk's last row names a slot. Grid: blocks of DV, HEADS, spans.
    """
    h = tl.program_id(1)
    span = tl.program_id(2)
    b = tl.load(spans + span)
    first = tl.load(span_chunks + span)
    last = tl.load(span_chunks + span + 1)
    i = tl.arange(0, CHUNK)
    kc = tl.arange(0, BLOCK_K)
    vc = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    k_in = kc < DK
    v_in = vc < DV
    tile = h * (DK * DV) + kc[:, None] * DV + vc[None, :]
    tile_in = k_in[:, None] & v_in[None, :]
    step_bias = 0.0
    if (not DELTA) and (BETA != ONE):
        step_bias = tl.load(bias + h)

    slot = tl.load(state_in + b).to(tl.int64)
    S = tl.zeros([BLOCK_K, BLOCK_V], dtype=tl.float32)
    if slot >= 0:
        S = tl.load(pool + slot * pool_slot + tile, mask=tile_in, other=0.0).to(tl.float32)
    states_at = states + first.to(tl.int64) * (HEADS * DK * DV) + tile
    row_at = chunk_row + first
    len_at = chunk_len + first
    for _ in range(first, last):
        tl.store(states_at, cast(S, states.dtype.element_ty), mask=tile_in)
        row = tl.load(row_at).to(tl.int64)
        n = tl.load(len_at)
        live = i < n
        rows = row + i
        end = row + n - 1
        k_at = live[:, None] & k_in[None, :]
        v_at = live[:, None] & v_in[None, :]
        keys = tl.load(k + rows[:, None] * k_row + ((h // GROUP) * DK + kc)[None, :], mask=k_at, other=0.0)
        if DELTA:
            erase = tl.load(w + rows[:, None] * (HEADS * DK) + (h * DK + kc)[None, :], mask=k_at, other=0.0)
            own = rows[:, None] * (HEADS * DV) + (h * DV + vc)[None, :]
            new = tl.load(u + own, mask=v_at, other=0.0).to(tl.float32)
            new = new - tl.dot(operand(erase, DOT), operand(S, DOT), input_precision=PRECISION)
            tl.store(fresh + own, cast(new, fresh.dtype.element_ty), mask=v_at)
        else:
            new = tl.load(v + rows[:, None] * v_row + (h * DV + vc)[None, :], mask=v_at, other=0.0).to(
                tl.float32
            )
            if SILU:
                new = silu(new)
            if BETA != ONE:
                x = tl.load(step + rows * step_row + h, mask=live, other=0.0).to(tl.float32)
                new = new * beta_of(x, step_bias, 1.0, low, high, BETA)[:, None]
        keys = keys.to(tl.float32)
        if SILU:
            keys = silu(keys)
        if CHANNEL:
            g_at = decay + (h * DK + kc)
            g_end = tl.load(g_at + end * (HEADS * DK), mask=k_in, other=0.0)
            g = tl.load(g_at[None, :] + rows[:, None] * (HEADS * DK), mask=k_at, other=0.0)
            keys = keys * tl.exp(tl.minimum(g_end[None, :] - g, 0.0))  # dead rows: keys are zero
            S = S * tl.exp(g_end)[:, None]
        else:
            g_end = tl.load(decay + end * HEADS + h)
            g = tl.load(decay + rows * HEADS + h, mask=live, other=0.0)
            new = new * tl.exp(tl.minimum(g_end - g, 0.0))[:, None]  # dead rows: new is zero
            S = S * tl.exp(g_end)
        S = tl.dot(tl.trans(operand(keys, DOT)), operand(new, DOT), S, input_precision=PRECISION)
        target = tl.load(state_out + end).to(tl.int64)
        if target >= 0:
            tl.store(pool + target * pool_slot + tile, cast(S, pool.dtype.element_ty), mask=tile_in)
        states_at += HEADS * DK * DV
        row_at += 1
        len_at += 1


@triton.jit
def chunk_output_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    step: tl.tensor,
    decay: tl.tensor,
    query_scores: tl.tensor,
    fresh: tl.tensor,
    states: tl.tensor,
    out: tl.tensor,
    bias: tl.tensor,
    skip: tl.tensor,
    chunk_row: tl.tensor,
    chunk_len: tl.tensor,
    q_row: tl.tensor,
    k_row: tl.tensor,
    v_row: tl.tensor,
    step_row: tl.tensor,
    out_row: tl.tensor,
    scale: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    CHANNEL: tl.constexpr,
    BETA: tl.constexpr,
    DELTA: tl.constexpr,
    SILU: tl.constexpr,
    SKIP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """out [T, HEADS, DV] from each chunk's S_0 and V'. Grid: blocks of DV, HEADS, chunks."""
    h = tl.program_id(1)
    chunk = tl.program_id(2)
    row = tl.load(chunk_row + chunk).to(tl.int64)
    i = tl.arange(0, CHUNK)
    live = i < tl.load(chunk_len + chunk)
    rows = row + i
    vc = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    v_in = vc < DV
    v_at = live[:, None] & v_in[None, :]
    lower = (i[:, None] >= i[None, :]) & live[:, None]
    o = tl.zeros([CHUNK, BLOCK_V], dtype=tl.float32)
    if CHANNEL:
        scores = tl.load(
            query_scores + rows[:, None] * (HEADS * CHUNK) + h * CHUNK + i[None, :], mask=lower, other=0.0
        )
    else:
        scores = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
        G = tl.load(decay + rows * HEADS + h, mask=live, other=0.0)
    states_at = states + chunk.to(tl.int64) * (HEADS * DK * DV) + h * (DK * DV)
    for k0 in tl.static_range(0, DK, BLOCK_K):
        kc = k0 + tl.arange(0, BLOCK_K)
        k_in = kc < DK
        k_at = live[:, None] & k_in[None, :]
        head = ((h // GROUP) * DK + kc)[None, :]
        queries = tl.load(q + rows[:, None] * q_row + head, mask=k_at, other=0.0)
        S = tl.load(states_at + kc[:, None] * DV + vc[None, :], mask=k_in[:, None] & v_in[None, :], other=0.0)
        if SILU:
            queries = silu(queries.to(tl.float32))
        if CHANNEL:
            g = tl.load(decay + rows[:, None] * (HEADS * DK) + (h * DK + kc)[None, :], mask=k_at, other=0.0)
            queries = queries.to(tl.float32) * tl.exp(g)
        else:
            keys = tl.load(k + rows[:, None] * k_row + head, mask=k_at, other=0.0)
            if SILU:
                keys = silu(keys.to(tl.float32))
            scores = tl.dot(
                operand(queries, DOT), tl.trans(operand(keys, DOT)), scores, input_precision=PRECISION
            )
        o = tl.dot(operand(queries, DOT), operand(S, DOT), o, input_precision=PRECISION)
    if not CHANNEL:
        o = o * tl.exp(G)[:, None]
        scores = scores * tl.exp(tl.where(lower, G[:, None] - G[None, :], float("-inf")))
    if DELTA:
        new = tl.load(fresh + rows[:, None] * (HEADS * DV) + (h * DV + vc)[None, :], mask=v_at, other=0.0)
    else:
        new = tl.load(v + rows[:, None] * v_row + (h * DV + vc)[None, :], mask=v_at, other=0.0).to(tl.float32)
        if SILU:
            new = silu(new)
        raw = new
        if BETA != ONE:
            x = tl.load(step + rows * step_row + h, mask=live, other=0.0).to(tl.float32)
            new = new * beta_of(x, tl.load(bias + h), 1.0, low, high, BETA)[:, None]
    o = tl.dot(operand(scores, DOT), operand(new, DOT), o, input_precision=PRECISION) * scale
    if SKIP:
        o += tl.load(skip + h) * raw
    tl.store(out + rows[:, None] * out_row + (h * DV + vc)[None, :], cast(o, out.dtype.element_ty), mask=v_at)
