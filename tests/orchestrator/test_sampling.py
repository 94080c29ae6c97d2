"""Sampling: each filter keeps what its definition says, and a seed fixes the tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from braid_orchestrator.sampling import Sampler, Sampling, distribution
from braid_wire.errors import RequestInvalid
from hypothesis import given, settings
from hypothesis import strategies as st

LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=40).map(torch.tensor)


@given(LOGITS)
@settings(deadline=None)
def test_greedy_is_the_likeliest(logits: torch.Tensor) -> None:
    assert logits[Sampler(Sampling()).choose(logits)] == logits.max()


@given(LOGITS, st.floats(0.5, 3), st.integers(1, 50))
@settings(deadline=None)
def test_top_k_keeps_the_k_likeliest(logits: torch.Tensor, temperature: float, k: int) -> None:
    kept = distribution(logits, Sampling(temperature, top_k=k)) > 0
    assert logits[kept].min() >= logits.sort(descending=True).values[min(k, len(logits)) - 1]
    assert kept.sum() >= min(k, len(logits))


@given(LOGITS, st.floats(0.05, 0.999))
@settings(deadline=None)
def test_top_p_keeps_the_smallest_set_with_that_mass(logits: torch.Tensor, top_p: float) -> None:
    full = distribution(logits, Sampling(1.0))
    kept = distribution(logits, Sampling(1.0, top_p=top_p)) > 0
    mass = full[kept].sum()
    assert mass >= top_p - 1e-5
    assert mass - full[kept].min() <= top_p + 1e-5


@given(LOGITS, st.floats(0.01, 1))
@settings(deadline=None)
def test_min_p_drops_what_is_far_below_the_likeliest(logits: torch.Tensor, min_p: float) -> None:
    full = distribution(logits, Sampling(1.0))
    kept = distribution(logits, Sampling(1.0, min_p=min_p)) > 0
    assert torch.equal(kept, (full >= min_p * full.max()) & (full > 0))


def test_frequencies_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    sampling = Sampling(0.7, seed=1)
    sampler = Sampler(sampling)
    counts = torch.bincount(torch.tensor([sampler.choose(logits) for _ in range(4000)]), minlength=4)
    expected = distribution(logits, sampling) * 4000
    # Chi-square with 3 degrees of freedom: 16.3 is passed once in a thousand seeds; this seed is fixed.
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3


def test_a_seed_fixes_the_tokens() -> None:
    logits = torch.linspace(0, 1, 50)
    runs = [[Sampler(Sampling(1.0, seed=7)).choose(logits)] for _ in range(3)]
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", math.nan),
    ],
)
def test_a_value_outside_its_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestInvalid) as error:
        Sampling(**{field: value})
    assert error.value.metadata["field"] == field
