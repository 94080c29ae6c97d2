"""The selective scan of Mamba, and the norm that Jamba puts before it."""

from __future__ import annotations

import torch
from torch import Tensor

from braid_kernels.metadata import NO_SLOT


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; x itself without a weight. float64."""
    if weight is None:
        return x.double()
    x = x.double()
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight.double()


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    cu_seqlens: list[int],
    state_in: list[int],
    state_out: list[int],
    state_pool: Tensor,
) -> Tensor:
    """Run every sequence token by token; per channel i and state column n:

        h[i, n] <- e^(-e^A_log[i, n] dt[i]) h[i, n] + dt[i] B[n] u[i];  y[i] = sum_n C[n] h[i, n] + D[i] u[i]

    u, dt [T, I]; A_log [I, N]; B, C [T, N]; D [I]. state_pool [num_slots, I, N]: read at state_in (-1:
    zeros), written at state_out, per token. Returns float64 [T, I].
    Source: mamba_selective_scan in transformers' jamba, arXiv 2312.00752 algorithm 2.
    """
    u, dt, B, C, A = u.double(), dt.double(), B.double(), C.double(), -A_log.double().exp()
    out = torch.empty(u.shape, dtype=torch.float64)
    for b, slot in enumerate(state_in):
        state = torch.zeros(A.shape, dtype=torch.float64) if slot == NO_SLOT else state_pool[slot].double()
        for t in range(cu_seqlens[b], cu_seqlens[b + 1]):
            state = (dt[t, :, None] * A).exp() * state + (dt[t] * u[t])[:, None] * B[t]
            out[t] = state @ C[t]
            if state_out[t] != NO_SLOT:
                state_pool[state_out[t]] = state.to(state_pool.dtype)
    return out + D.double() * u
