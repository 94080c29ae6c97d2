"""Gate formulas: log decays, betas, time steps, and the q/k normalisation. All in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

L2_EPS = 1e-6


def l2norm(x: Tensor) -> Tensor:
    """x / sqrt(sum(x^2) + 1e-6) over the last dimension; the eps lies inside the root.

    Source: `l2norm` in transformers' qwen3_next (the same as flash-linear-attention's).
    """
    x = x.double()
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + L2_EPS)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), exact in both tails (torch's own switches to x above 20, 2e-9 off)."""
    x = x.double()
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def softplus_log_decay(a: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """log alpha = -e^A_log * softplus(a + dt_bias), <= 0.

    Per head (gated_delta): a [T, H], A_log [H], dt_bias [H]. Per channel (kimi_delta): a [T, H, d],
    A_log [H, 1], dt_bias [H, d]. Source: Qwen3NextGatedDeltaNet, KimiLinear's forget gate.
    """
    return -A_log.double().exp() * softplus(a.double() + dt_bias.double())


def bounded_log_decay(a: Tensor, A_log: Tensor, dt_bias: Tensor, lower_bound: float) -> Tensor:
    """log alpha = lower_bound * sigmoid(e^A_log * (a + dt_bias)), in [lower_bound, 0].

    Shapes as in `softplus_log_decay`. Source: BailingHybrid's gate under `kda_safe_gate`.
    """
    return lower_bound * torch.sigmoid(A_log.double().exp() * (a.double() + dt_bias.double()))


def sigmoid_beta(b: Tensor, beta_scale: float = 1.0) -> Tensor:
    """beta = beta_scale * sigmoid(b). beta_scale 2 lets the erase step flip signs (olmo_hybrid)."""
    return beta_scale * torch.sigmoid(b.double())


def mamba2_dt(dt: Tensor, dt_bias: Tensor, dt_min: float = 0.0, dt_max: float = math.inf) -> Tensor:
    """dt = clamp(softplus(dt + dt_bias), dt_min, dt_max); [T, H]. Source: bamba's torch scan."""
    return softplus(dt.double() + dt_bias.double()).clamp(dt_min, dt_max)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x), in float64."""
    return F.silu(x.double())
