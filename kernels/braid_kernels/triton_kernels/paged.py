"""Softmax attention over paged keys and values: append, attend, merge.

One kernel serves gqa and mla in its absorbed form (one latent row is the key of every head, and its first
columns are the value), decode and prefill: a tile is a few rows of a span times a few query heads of one KV
head. Long contexts of few sequences are cut into parts that are attended to side by side and merged by
log-sum-exp, natural logarithm; a part without a key is out 0, lse -inf.
Source: arXiv 2205.14135 (online softmax), arXiv 2501.01005 section 2.2 (merging).
"""

from __future__ import annotations

import triton
import triton.language as tl

from braid_kernels.triton_kernels.gates import cast, operand


@triton.jit
def append_kernel(
    rows: tl.tensor,
    cache: tl.tensor,
    row_page: tl.tensor,
    row_offset: tl.tensor,
    rows_row: tl.tensor,
    cache_page: tl.tensor,
    cache_position: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """cache[row_page[t], row_offset[t], :WIDTH] = rows[t, :WIDTH]. Grid: rows, blocks of columns."""
    t = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    page = tl.load(row_page + t).to(tl.int64)
    offset = tl.load(row_offset + t).to(tl.int64)
    value = tl.load(rows + t.to(tl.int64) * rows_row + column, mask=inside, other=0.0).to(tl.float32)
    at = cache + page * cache_page + offset * cache_position + column
    tl.store(at, cast(value, cache.dtype.element_ty), mask=inside)


@triton.jit
def paged_attention_kernel(
    q: tl.tensor,
    q_rope: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    tile_span: tl.tensor,
    tile_row: tl.tensor,
    cu_seqlens: tl.tensor,
    context_lens: tl.tensor,
    page_table: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    rope_row: tl.tensor,
    rope_head: tl.tensor,
    k_page: tl.tensor,
    v_page: tl.tensor,
    out_part: tl.tensor,
    out_row: tl.tensor,
    out_head: tl.tensor,
    lse_part: tl.tensor,
    table_row: tl.tensor,
    scale: tl.tensor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    DR: tl.constexpr,
    DV: tl.constexpr,
    LATENT: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DR: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """out[part, t, h] = softmax over the part's keys; lse[part, t, h] its natural log-sum-exp.

    q [T, HEADS, D] (and q_rope [T, HEADS, DR]); k [pages, PAGE, KV_HEADS, D + DR], v [pages, PAGE,
    KV_HEADS, DV], or, LATENT, the first DV columns of k. Tile i has rows tile_row[i] .. + BLOCK_R of span
    tile_span[i]; row r of span b has position context_lens[b] + r and sees the keys up to it, under a
    WINDOW w the last w of them alone. With PARTS > 1 the tile's keys are cut into PARTS runs of whole
    blocks, and `lse` is written. Entries of page_table that no seen key needs are not followed.
    Grid: tiles, KV_HEADS x blocks of BLOCK_H query heads, PARTS.
    """
    tile = tl.program_id(0)
    blocks: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    kv_head = tl.program_id(1) // blocks
    head_block = tl.program_id(1) % blocks
    part = tl.program_id(2)
    b = tl.load(tile_span + tile)
    first_row = tl.load(tile_row + tile)
    begin = tl.load(cu_seqlens + b)
    length = tl.load(cu_seqlens + b + 1) - begin
    context = tl.load(context_lens + b)

    m = tl.arange(0, BLOCK_R * BLOCK_H)
    r = first_row + m // BLOCK_H
    in_group = head_block * BLOCK_H + m % BLOCK_H
    head = kv_head * GROUP + in_group
    live = (r < length) & (in_group < GROUP)
    position = context + r
    row = (begin + r).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    queries = tl.load(
        q + row[:, None] * q_row + head[:, None] * q_head + d[None, :],
        mask=live[:, None] & (d < D)[None, :],
        other=0.0,
    )
    queries = operand(queries, DOT)
    if DR:
        dr = tl.arange(0, BLOCK_DR)
        rope = tl.load(
            q_rope + row[:, None] * rope_row + head[:, None] * rope_head + dr[None, :],
            mask=live[:, None] & (dr < DR)[None, :],
            other=0.0,
        )
        rope = operand(rope, DOT)

    # Keys that some row of the tile sees, and of them this part's.
    stop = context + tl.minimum(first_row + BLOCK_R, length)
    start = 0
    if WINDOW:
        start = tl.maximum(context + first_row - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    if PARTS > 1:
        run = tl.cdiv(tl.cdiv(stop - start, BLOCK_N), PARTS) * BLOCK_N
        start = start + part * run
        stop = tl.minimum(stop, start + run)

    highest = tl.full([BLOCK_R * BLOCK_H], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_R * BLOCK_H], dtype=tl.float32)
    acc = tl.zeros([BLOCK_R * BLOCK_H, BLOCK_DV], dtype=tl.float32)
    dv = tl.arange(0, BLOCK_DV)
    for n0 in range(start, stop, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        exists = n < stop
        if WINDOW:
            exists = exists & (n > context + first_row - WINDOW)
        page = tl.load(page_table + b * table_row + n // PAGE, mask=exists, other=0).to(tl.int64)
        key_at = page * k_page + ((n % PAGE) * KV_HEADS + kv_head) * (D + DR)
        keys = tl.load(k + key_at[:, None] + d[None, :], mask=exists[:, None] & (d < D)[None, :], other=0.0)
        keys = operand(keys, DOT)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if DR:
            rotated = tl.load(
                k + key_at[:, None] + (D + dr)[None, :],
                mask=exists[:, None] & (dr < DR)[None, :],
                other=0.0,
            )
            scores = tl.dot(rope, tl.trans(operand(rotated, DOT)), scores, input_precision=PRECISION)
        seen = exists[None, :] & (n[None, :] <= position[:, None]) & live[:, None]
        if WINDOW:
            seen = seen & (n[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores * scale, float("-inf"))
        top = tl.maximum(highest, tl.max(scores, axis=1))
        base = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp(scores - base[:, None])
        fade = tl.exp(highest - base)
        total = total * fade + tl.sum(weights, axis=1)
        if LATENT:
            values = keys
        else:
            value_at = page * v_page + ((n % PAGE) * KV_HEADS + kv_head) * DV
            values = tl.load(
                v + value_at[:, None] + dv[None, :], mask=exists[:, None] & (dv < DV)[None, :], other=0.0
            )
            values = operand(values, DOT)
        acc = tl.dot(operand(weights, DOT), values, acc * fade[:, None], input_precision=PRECISION)
        highest = top

    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    at = out + part.to(tl.int64) * out_part + row[:, None] * out_row + head[:, None] * out_head + dv[None, :]
    tl.store(at, cast(acc, out.dtype.element_ty), mask=live[:, None] & (dv < DV)[None, :])
    if PARTS > 1:
        base = tl.where(highest == float("-inf"), 0.0, highest)
        tl.store(lse + part.to(tl.int64) * lse_part + row * HEADS + head, base + tl.log(total), mask=live)


@triton.jit
def merge_parts_kernel(
    parts: tl.tensor,
    lse: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    part_stride: tl.tensor,
    part_row: tl.tensor,
    part_head: tl.tensor,
    lse_part: tl.tensor,
    out_row: tl.tensor,
    out_head: tl.tensor,
    HEADS: tl.constexpr,
    DV: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_DV: tl.constexpr,
) -> None:
    """out[t, h] = sum_i parts[i, t, h] e^(lse_i - lse), lse = log sum_i e^lse_i; fp32 parts.

    rows: the rows t to merge. Grid: rows, HEADS.
    """
    t = tl.load(rows + tl.program_id(0)).to(tl.int64)
    h = tl.program_id(1)
    dv = tl.arange(0, BLOCK_DV)
    inside = dv < DV
    top = float("-inf")
    for i in tl.static_range(PARTS):
        top = tl.maximum(top, tl.load(lse + i * lse_part + t * HEADS + h))
    base = tl.where(top == float("-inf"), 0.0, top)
    total = 0.0
    acc = tl.zeros([BLOCK_DV], dtype=tl.float32)
    for i in tl.static_range(PARTS):
        weight = tl.exp(tl.load(lse + i * lse_part + t * HEADS + h) - base)
        part = tl.load(parts + i * part_stride + t * part_row + h * part_head + dv, mask=inside, other=0.0)
        acc += weight * part
        total += weight
    acc = acc / tl.where(total > 0.0, total, 1.0)
    tl.store(out + t * out_row + h * out_head + dv, cast(acc, out.dtype.element_ty), mask=inside)
