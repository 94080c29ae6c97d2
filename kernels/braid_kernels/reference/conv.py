"""Depthwise causal convolution with state."""

from __future__ import annotations

import torch
from torch import Tensor

from braid_kernels.metadata import NO_SLOT
from braid_kernels.reference.gates import silu

__all__ = ["causal_conv", "silu"]


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: list[int],
    state_in: list[int],
    state_out: list[int],
    conv_pool: Tensor,
) -> Tensor:
    """y[t, c] = bias[c] + sum_j weight[c, j] * x[t - (K-1) + j, c], within each sequence.

    x [T, C]; weight [C, K]; bias [C] or None; conv_pool [num_slots, C, K-1]: the K-1 inputs before the
    span, oldest first (slot -1: zeros). After each token with a slot in state_out, its last K-1 inputs
    are written there. Returns float64 [T, C], before the activation.
    Source: causal_conv1d_fn / causal_conv1d_update in transformers' qwen3_next.
    """
    taps = weight.shape[1]
    out = torch.empty(x.shape, dtype=torch.float64)
    for b, slot in enumerate(state_in):
        begin, end = cu_seqlens[b], cu_seqlens[b + 1]
        if begin == end:
            continue
        history = conv_pool[slot].T.to(x.dtype) if slot != NO_SLOT else x.new_zeros(taps - 1, x.shape[1])
        padded = torch.cat([history, x[begin:end]])  # [K-1+L, C]
        windows = padded.double().unfold(0, taps, 1)  # [L, C, K]
        out[begin:end] = torch.einsum("lck,ck->lc", windows, weight.double())
        for t in range(begin, end):
            if state_out[t] != NO_SLOT:
                last = padded[t - begin + 1 : t - begin + taps]  # [K-1, C]
                conv_pool[state_out[t]] = last.T.to(conv_pool.dtype)
    return out if bias is None else out + bias.double()
