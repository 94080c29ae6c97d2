"""The operator of mixtures of experts, against one token and one expert at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from braid_orchestrator.body.experts import IMPLEMENTATION, run_experts
from checkpoints import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers.integrations.moe import grouped_mm_experts_forward
from walks import load

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu2": lambda rows: F.relu(rows) ** 2}


def naive(
    hidden: torch.Tensor,
    index: torch.Tensor,
    scores: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    activation: str,
    gated: bool,
) -> torch.Tensor:
    """float64 [T, H]."""
    found = torch.zeros(hidden.shape, dtype=torch.float64)
    for token in range(len(hidden)):
        for expert, score in zip(index[token].tolist(), scores[token].double(), strict=True):
            inner = up[expert].double() @ hidden[token].double()
            if gated:
                gate, value = inner.chunk(2)
                inner = ACTIVATIONS[activation](gate) * value
            else:
                inner = ACTIVATIONS[activation](inner)
            found[token] += score * (down[expert].double() @ inner)
    return found


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 20),
    experts=st.integers(1, 9),
    chosen=st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 13), st.integers(1, 11)),
    activation=st.sampled_from(list(ACTIVATIONS)),
    gated=st.booleans(),
    seed=st.integers(0, 99),
)
def test_each_token_goes_through_its_experts(
    tokens: int, experts: int, chosen: int, sizes: tuple[int, int], activation: str, gated: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    (width, inner), chosen = sizes, min(chosen, experts)
    hidden = torch.randn(tokens, width)
    index = torch.rand(tokens, experts).argsort(dim=1)[:, :chosen]
    scores = torch.rand(tokens, chosen)
    up = torch.randn(experts, (2 if gated else 1) * inner, width)
    down = torch.randn(experts, width, inner)
    up[torch.ones(experts, dtype=torch.bool).index_fill(0, index.flatten(), False)] = float("nan")
    given_ = hidden, index, scores, up, down, activation, gated
    found, wanted = run_experts(*given_), naive(*given_)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(torch.ops.braid_experts.run(*given_), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_bits_are_those_of_transformers(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.family == family)
    model = load(case.save(tmp_path), dtype).model
    assert model.config._experts_implementation == IMPLEMENTATION
    (module, *_) = [one for name, one in model.named_modules() if name.endswith(".experts")]
    torch.manual_seed(0)
    for tokens in (1, 2, 30):
        hidden = torch.randn(tokens, model.config.hidden_size).to(dtype)
        index = torch.rand(tokens, module.num_experts).argsort(dim=1)[:, :2]
        scores = torch.rand(tokens, 2).to(dtype)
        wanted = grouped_mm_experts_forward(module, hidden, index, scores)
        assert torch.equal(module(hidden, index, scores), wanted)


def test_scores_may_be_more_exact_than_hidden_states() -> None:
    torch.manual_seed(0)
    hidden, scores = torch.randn(3, 4).bfloat16(), torch.rand(3, 2)
    index, up, down = torch.tensor([[0, 1], [1, 0], [0, 1]]), torch.randn(2, 6, 4), torch.randn(2, 4, 3)
    found = run_experts(hidden, index, scores, up.bfloat16(), down.bfloat16(), "silu", True)
    wanted = naive(hidden, index, scores, up.bfloat16(), down.bfloat16(), "silu", True)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, atol=0.05, rtol=0.05)
