"""The one recurrence that covers the linear family."""

from __future__ import annotations

import torch
from torch import Tensor

from braid_kernels.metadata import NO_SLOT


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    delta: bool,
    scale: float,
    D: Tensor | None,
    cu_seqlens: list[int],
    state_in: list[int],
    state_out: list[int],
    state_pool: Tensor,
) -> Tensor:
    """Run every sequence token by token; per value head, S in [dk, dv], decay first, then erase:

        S <- Diag(alpha_t) S;  u = beta_t (v_t - delta S^T k_t);  S <- S + k_t u^T;
        o_t = scale S^T q_t (+ D v_t)

    q, k [T, Hk, dk] (value head h reads key head h // (Hv / Hk)); v [T, Hv, dv]; log_alpha [T, Hv] (one
    decay per head) or [T, Hv, dk] (one per key channel), natural log; beta [T, Hv]; D [Hv] or None.
    mamba2: k = B, q = C, v = x, beta = dt, log_alpha = dt * A, delta False.
    state_pool [num_slots, Hv, dk, dv]: read at state_in (-1: zeros), written at state_out, per token.
    Returns float64 [T, Hv, dv].
    Source: torch_recurrent_gated_delta_rule (transformers), arXiv 2412.06464 eq. 10, arXiv 2405.21060.
    """
    tokens, value_heads, dv = v.shape
    group = value_heads // q.shape[1]
    q, k = (x.double().repeat_interleave(group, dim=1) for x in (q, k))  # [T, Hv, dk]
    v, beta = v.double(), beta.double()
    alpha = log_alpha.double().exp()
    alpha = alpha[..., None, None] if alpha.dim() == 2 else alpha[..., None]  # [T, Hv, 1|dk, 1]
    out = torch.empty(tokens, value_heads, dv, dtype=torch.float64)
    for b, slot in enumerate(state_in):
        begin, end = cu_seqlens[b], cu_seqlens[b + 1]
        if begin == end:
            continue
        if slot == NO_SLOT:
            state = torch.zeros(value_heads, q.shape[2], dv, dtype=torch.float64)
        else:
            state = state_pool[slot].double()
        for t in range(begin, end):
            state = alpha[t] * state
            seen = torch.einsum("hkv,hk->hv", state, k[t]) if delta else 0.0
            u = beta[t][:, None] * (v[t] - seen)
            state = state + k[t][:, :, None] * u[:, None, :]
            out[t] = scale * torch.einsum("hkv,hk->hv", state, q[t])
            if state_out[t] != NO_SLOT:
                state_pool[state_out[t]] = state.to(state_pool.dtype)
    return out if D is None else out + D.double()[:, None] * v
