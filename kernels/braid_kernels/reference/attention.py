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


def gather(cache: Tensor, pages: list[int], begin: int, end: int) -> Tensor:
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
        k = gather(k_cache, page_table[b], base, context + end - begin).repeat_interleave(group, dim=1)
        v = gather(v_cache, page_table[b], base, context + end - begin).repeat_interleave(group, dim=1)
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


def expand_latent(latent: Tensor, w_uk: Tensor, w_uv: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [n, H, dn + dr] and values [n, H, dv] of latent rows [n, r + dr].

    w_uk [H, dn, r], w_uv [H, r, dv]; dtype of `latent`. k = (W_uk c, k_pe), v = W_uv c, with one k_pe for
    all heads. Source: arXiv 2405.04434, 2.1.
    """
    rank = w_uk.shape[2]
    c_kv, k_pe = latent[:, :rank], latent[:, rank:]
    k = torch.einsum("nr,hdr->nhd", c_kv, w_uk.to(latent.dtype))
    v = torch.einsum("nr,hrv->nhv", c_kv, w_uv.to(latent.dtype))
    return torch.cat([k, k_pe[:, None].expand(-1, k.shape[1], -1)], dim=-1), v


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of rows q [L, H, D] over k [n, H, D], v [n, H, Dv]: out [L, H, Dv], lse [L, H].

    causal: row i sees keys 0..i, else all of them. lse is the natural logarithm of the sum of
    exp(scale q·k); where a row sees no key (n = 0) it is -inf, and out is 0.
    """
    out, lse = q.new_zeros(*q.shape[:2], v.shape[2]), q.new_full(q.shape[:2], float("-inf"))
    for i in range(q.shape[0]):
        seen = slice(0, i + 1 if causal else k.shape[0])
        out[i], lse[i] = softmax_rows(scale * torch.einsum("hd,nhd->hn", q[i], k[seen]), v[seen])
    return out, lse


def merge_lse(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """One attention over two disjoint sets of keys: out [T, H, Dv] and natural-log lse [T, H] of each.

    lse = log(e^lse_a + e^lse_b), out = out_a e^(lse_a - lse) + out_b e^(lse_b - lse). A part whose lse
    is -inf saw no key and counts for nothing, whatever its out holds; both so: out 0, lse -inf.
    Source: arXiv 2501.01005, 2.2 (there too with the natural logarithm).
    """
    top = torch.maximum(lse_a, lse_b)
    base = torch.where(top == float("-inf"), 0.0, top)
    a, b = torch.exp(lse_a - base), torch.exp(lse_b - base)
    total = a + b
    share = torch.where(total > 0, total, 1.0)
    out = torch.zeros_like(out_a)
    for part, weight in ((out_a, a), (out_b, b)):
        out += torch.where(weight[..., None] != 0, part * (weight / share)[..., None], 0.0)
    return out, base + torch.log(total)
