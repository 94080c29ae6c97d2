"""The reference against independent implementations: transformers' torch functions and closed forms."""

from __future__ import annotations

import pytest
import torch
from braid_kernels.reference import (
    bounded_log_decay,
    causal_conv,
    l2norm,
    mamba2_dt,
    recurrence,
    sigmoid_beta,
    softplus_log_decay,
)
from torch.nn import functional as F

# transformers computes in fp32; the reference in float64.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("module", ["qwen3_next", "olmo_hybrid"])
def test_gated_delta_is_transformers_recurrent_rule(module: str, has_state: bool) -> None:
    modeling = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
    tokens, key_heads, value_heads, dk, dv = 37, 2, 4, 16, 24
    q, k = random(tokens, key_heads, dk), random(tokens, key_heads, dk, seed=1)
    v, beta = random(tokens, value_heads, dv, seed=2), random(tokens, value_heads, seed=3).sigmoid()
    log_alpha = -random(tokens, value_heads, seed=4).abs()
    state = random(1, value_heads, dk, dv, seed=5)
    pool = torch.cat([state, torch.zeros_like(state)])
    out = recurrence(
        l2norm(q), l2norm(k), v, log_alpha, beta, True, dk**-0.5, None,
        [0, tokens], [0 if has_state else -1], [-1] * (tokens - 1) + [1], pool,
    )  # fmt: skip
    q, k = (x.repeat_interleave(2, dim=1)[None] for x in (q, k))
    expected, expected_state = modeling.torch_recurrent_gated_delta_rule(
        q, k, v[None], log_alpha[None], beta[None],
        initial_state=state if has_state else None, output_final_state=True, use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    torch.testing.assert_close(out.float(), expected[0], **TOLERANCE)
    torch.testing.assert_close(pool[1], expected_state[0], **TOLERANCE)


def test_kimi_delta_is_transformers_recurrent_rule() -> None:
    modeling = pytest.importorskip("transformers.models.bailing_hybrid.modeling_bailing_hybrid")
    tokens, heads, d = 21, 3, 16
    q, k, v = (random(tokens, heads, d, seed=s) for s in range(3))
    log_alpha, beta = -random(tokens, heads, d, seed=4).abs(), random(tokens, heads, seed=3).sigmoid()
    state = random(1, heads, d, d, seed=5)
    pool = torch.cat([state, torch.zeros_like(state)])
    out = recurrence(
        l2norm(q), l2norm(k), v, log_alpha, beta, True, d**-0.5, None,
        [0, tokens], [0], [-1] * (tokens - 1) + [1], pool,
    )  # fmt: skip
    expected, expected_state = modeling.recurrent_kimi_delta_attention(
        q[None], k[None], v[None], log_alpha[None], beta[None],
        initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    torch.testing.assert_close(out.float(), expected[0], **TOLERANCE)
    torch.testing.assert_close(pool[1], expected_state[0], **TOLERANCE)


def test_convolution_is_transformers_update_and_prefill() -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    channels, taps, tokens = 12, 4, 9
    x, weight, bias = random(tokens, channels), random(channels, taps, seed=1), random(channels, seed=2)
    state = random(channels, taps - 1, seed=3)
    pool = torch.stack([state, torch.zeros_like(state)])
    carried = causal_conv(x, weight, bias, [0, tokens], [0], [-1] * (tokens - 1) + [1], pool)
    expected_state = state.clone()[None]
    expected = modeling.causal_conv1d_update(x.T[None], expected_state, weight, bias, "silu")
    torch.testing.assert_close(F.silu(carried).float(), expected[0].T, **TOLERANCE)
    assert torch.equal(pool[1], expected_state[0])
    fresh = causal_conv(x, weight, bias, [0, tokens], [-1], [-1] * tokens, pool)
    expected = modeling.causal_conv1d_fn(x.T[None], weight, bias, activation="silu")
    torch.testing.assert_close(F.silu(fresh).float(), expected[0].T, **TOLERANCE)


def test_mamba2_is_transformers_state_update() -> None:
    modeling = pytest.importorskip("transformers.models.bamba.modeling_bamba")
    heads, p, n, groups, tokens = 4, 8, 16, 2, 6
    x, B, C = (
        random(tokens, heads, p),
        random(tokens, groups, n, seed=1),
        random(tokens, groups, n, seed=2),
    )
    dt, dt_bias, A_log, D = (random(*s, seed=3 + i) for i, s in enumerate([(tokens, heads), *[(heads,)] * 3]))
    pool = torch.zeros(1, heads, n, p)
    step = mamba2_dt(dt, dt_bias)
    log_alpha = -A_log.double().exp() * step
    out = recurrence(
        C, B, x, log_alpha, step, False, 1.0, D, [0, tokens], [-1], [-1] * (tokens - 1) + [0], pool
    )
    state = torch.zeros(1, heads, p, n)
    A = -A_log.exp()[:, None, None].expand(heads, p, n)
    for t in range(tokens):
        expected = modeling.mamba2_selective_state_update(
            state, x[t][None], dt[t][None, :, None].expand(1, heads, p), A, B[t][None], C[t][None],
            D[:, None].expand(heads, p), z=None, dt_bias=dt_bias[:, None].expand(heads, p), dt_softplus=True,
        )  # fmt: skip
        torch.testing.assert_close(out[t].float(), expected[0].float(), **TOLERANCE)
    torch.testing.assert_close(pool[0], state[0].transpose(1, 2), **TOLERANCE)


def test_lightning_is_decayed_attention() -> None:
    """o_t = sum over s <= t of e^(slope (t - s)) (q_t·k_s) v_s: the closed form, no recurrence."""
    tokens, heads, d = 19, 2, 8
    q, k, v = (random(tokens, heads, d, seed=s).double() for s in range(3))
    slope = torch.tensor([-0.5, -0.03]).double()
    age = (torch.arange(tokens)[:, None] - torch.arange(tokens)[None]).double()
    weights = torch.where(age >= 0, (slope[:, None, None] * age).exp(), 0.0)  # [H, T, T]
    expected = torch.einsum("hts,thd,shd,shv->thv", weights, q, k, v)
    pool = torch.zeros(1, heads, d, d)
    ones = torch.ones(tokens, heads)
    out = recurrence(
        q, k, v, slope.expand(tokens, -1), ones, False, 1.0, None, [0, tokens], [-1], [-1] * tokens, pool
    )
    torch.testing.assert_close(out, expected)


def test_gates_are_transformers_formulas() -> None:
    a, A_log, dt_bias = random(5, 4), random(4, seed=1), random(4, seed=2)
    expected = -A_log.exp() * F.softplus(a + dt_bias)  # Qwen3NextGatedDeltaNet
    torch.testing.assert_close(softplus_log_decay(a, A_log, dt_bias).float(), expected)
    expected = -5.0 * torch.sigmoid(A_log.exp() * (a + dt_bias))  # BailingHybrid, kda_safe_gate
    torch.testing.assert_close(bounded_log_decay(a, A_log, dt_bias, -5.0).float(), expected)
    torch.testing.assert_close(sigmoid_beta(a, 2.0).float(), 2 * a.sigmoid())
    assert mamba2_dt(torch.tensor([-50.0, 50.0]), torch.zeros(2), 0.01, 0.5).tolist() == [0.01, 0.5]
