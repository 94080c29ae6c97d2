"""Odd shapes, chosen by hypothesis: head counts and widths, conv widths, ranks, periods, lengths."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import DENSE, HYBRID, LATENT, QWEN, Case
from harness import CROWD_ABSOLUTE, FLOAT32_ABSOLUTE, SCHEDULES, compare
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# All heads of q, and a number of heads of k and v that divides it.
heads = st.sampled_from([(1, 1), (3, 1), (4, 2), (5, 5), (6, 3)])
even = st.sampled_from([2, 6, 8, 14, 20])
width = st.integers(1, 19)


@st.composite
def attention(draw: st.DrawFn) -> dict[str, Any]:
    """Grouped-query attention."""
    queries, keys = draw(heads)
    return {"num_attention_heads": queries, "num_key_value_heads": keys, "head_dim": draw(even)}


@st.composite
def delta(draw: st.DrawFn) -> dict[str, Any]:
    """Gated DeltaNet beside it."""
    keys, group = draw(st.sampled_from([(1, 1), (2, 3), (3, 1), (1, 4)]))
    return {
        **draw(attention()),
        "linear_num_key_heads": keys,
        "linear_num_value_heads": keys * group,
        "linear_key_head_dim": draw(width),
        "linear_value_head_dim": draw(width),
        "linear_conv_kernel_dim": draw(st.integers(2, 5)),
    }


@st.composite
def latent(draw: st.DrawFn) -> dict[str, Any]:
    """Latent attention."""
    count = draw(st.integers(1, 5))
    return {
        "num_attention_heads": count,
        "num_key_value_heads": count,
        "kv_lora_rank": draw(width),
        "qk_nope_head_dim": draw(width),
        "qk_rope_head_dim": draw(even),
        "v_head_dim": draw(width),
    }


@st.composite
def kimi(draw: st.DrawFn) -> dict[str, Any]:
    """Kimi Delta Attention beside it."""
    linear = {"linear_head_dim": draw(width), "linear_num_heads": draw(st.integers(1, 5))}
    return {**draw(latent()), **linear, "linear_conv_kernel_dim": draw(st.integers(2, 5))}


@st.composite
def ling_3(draw: st.DrawFn) -> dict[str, Any]:
    """As Ling-3 names them: the heads of both kinds are as many."""
    period, size = draw(st.integers(2, 4)), draw(st.integers(2, 19))
    return {**draw(latent()), "head_dim": size, "layer_group_size": period}


@st.composite
def ranked(draw: st.DrawFn) -> dict[str, Any]:
    """Latent attention whose queries may have a rank."""
    return {**draw(latent()), "q_lora_rank": draw(st.none() | width)}


CHOICES: list[tuple[Case, st.SearchStrategy[dict[str, Any]]]] = [
    (next(case for case in DENSE if case.family == "qwen3"), attention()),
    (QWEN[0], delta()),
    (QWEN[2], delta()),
    (HYBRID[0], kimi()),
    (HYBRID[2], ling_3()),
    (HYBRID[5], attention()),
    (LATENT[2], ranked()),
]


@pytest.mark.parametrize(
    ("case", "sizes"), CHOICES, ids=lambda value: str(value) if isinstance(value, Case) else ""
)
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_shapes(case: Case, sizes: st.SearchStrategy[Mapping[str, Any]], data: st.DataObject) -> None:
    drawn = data.draw(sizes)
    if case.family in ("qwen3_5", "qwen3_5_moe"):
        # Sections are counted in pairs of rotated dims.
        drawn = {**drawn, "rope_parameters": {**case.sizes["rope_parameters"], "mrope_section": [1, 0, 0]}}
        drawn["rope_parameters"]["partial_rotary_factor"] = 2 / drawn["head_dim"]
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    changed = replace(case, sizes={**case.sizes, **drawn})
    with tempfile.TemporaryDirectory() as directory:
        found = compare(
            changed.save(Path(directory)), schedules=(SCHEDULES[2], SCHEDULES[4]), lengths=lengths
        )
    assert found.error <= FLOAT32_ABSOLUTE, found.errors
    assert found.crowd <= CROWD_ABSOLUTE
