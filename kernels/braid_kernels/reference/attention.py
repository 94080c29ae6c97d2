"""Softmax attention over paged caches."""

from __future__ import annotations

import torch
from torch import Tensor


def append_kv(
    rows: Tensor, cache: Tensor, cu_seqlens: list[int], context_lens: list[int], page_table: list[list[int]]
) -> None:
    """Write row t of sequence b at position context_lens[b] + (t - cu_seqlens[b]) of its pages.

    rows [T, ...]; cache [num_pages, page_size, ...]. No other position is touched.
    """
    page_size = cache.shape[1]
    for b, context in enumerate(context_lens):
        for i, t in enumerate(range(cu_seqlens[b], cu_seqlens[b + 1])):
            page, offset = divmod(context + i, page_size)
            cache[page_table[b][page], offset] = rows[t].to(cache.dtype)


def _gather(cache: Tensor, pages: list[int], begin: int, end: int) -> Tensor:
    """Positions begin..end-1 of one sequence, float64 [end - begin, ...]."""
    page_size = cache.shape[1]
    positions = range(begin, end)
    return cache[[pages[p // page_size] for p in positions], [p % page_size for p in positions]].double()


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens: list[int],
    context_lens: list[int],
    page_table: list[list[int]],
    scale: float,
    sliding_window: int = 0,
) -> tuple[Tensor, Tensor]:
    """Causal attention of every row over its sequence's pages (the new keys are already there).

    q [T, Hq, D]; k_cache [num_pages, page_size, Hkv, D]; v_cache [.., Hkv, Dv]. Row t of sequence b has
    position p = context_lens[b] + (t - cu_seqlens[b]) and sees positions 0..p, or p-w+1..p under a
    sliding window w. Returns (out float64 [T, Hq, Dv], lse float64 [T, Hq]): lse is the NATURAL log of
    the sum of exp(scale q·k), so that parts merge as out = sum_i out_i e^(lse_i - lse).
    A row that sees no key would be out 0, lse -inf (see `softmax_rows`).
    """
    tokens, q_heads, _ = q.shape
    group = q_heads // k_cache.shape[2]
    out = torch.zeros(tokens, q_heads, v_cache.shape[3], dtype=torch.float64)
    lse = torch.full((tokens, q_heads), float("-inf"), dtype=torch.float64)
    for b, context in enumerate(context_lens):
        begin, end = cu_seqlens[b], cu_seqlens[b + 1]
        if begin == end:
            continue
        base = first_key(context, sliding_window)  # of the span's first row: later rows see no older key
        k = _gather(k_cache, page_table[b], base, context + end - begin).repeat_interleave(group, dim=1)
        v = _gather(v_cache, page_table[b], base, context + end - begin).repeat_interleave(group, dim=1)
        for t in range(begin, end):
            position = context + t - begin
            seen = slice(first_key(position, sliding_window) - base, position + 1 - base)
            out[t], lse[t] = softmax_rows(scale * torch.einsum("hd,nhd->hn", q[t].double(), k[seen]), v[seen])
    return out, lse


def first_key(position: int, sliding_window: int) -> int:
    """The oldest key that a row at `position` sees (sliding_window 0: no window)."""
    return max(0, position - sliding_window + 1) if sliding_window else 0


def softmax_rows(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax-weighted sum and natural-log LSE of scores [H, n] over v [n, H, Dv].

    n = 0, or a row of -inf alone: out 0, lse -inf.
    """
    if scores.shape[1] == 0:
        heads = scores.shape[0]
        return scores.new_zeros(heads, v.shape[2]), scores.new_full((heads,), float("-inf"))
    lse = torch.logsumexp(scores, dim=1)  # [H]
    weights = torch.exp(scores - lse[:, None]).nan_to_num(0.0)  # -inf minus -inf
    return torch.einsum("hn,nhd->hd", weights, v.double()), lse


def mla_rows(q_nope: Tensor, q_pe: Tensor, w_uk: Tensor, c_kv: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
    """MLA in its absorbed form: queries [T, H, r + dr] and cache rows [T, r + dr], float64.

    q_nope·(W_uk^T c) = (q_nope W_uk)·c, so one latent row serves as key of every head (and, its first r
    columns, as value, to be projected by W_uv after the softmax). Source: arXiv 2405.04434, 2.1.
    """
    latent_q = torch.einsum("thd,hdr->thr", q_nope.double(), w_uk.double())
    return torch.cat([latent_q, q_pe.double()], dim=-1), torch.cat([c_kv.double(), k_pe.double()], dim=-1)
