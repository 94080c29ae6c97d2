"""The rotary tables of qwen3_5 against those of transformers' module."""

from __future__ import annotations

import torch
from braid_orchestrator.body.families.qwen import GridRotary
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextRotaryEmbedding


@settings(deadline=None, max_examples=40)
@given(
    section=st.tuples(*3 * [st.integers(0, 8)]).filter(any),
    tokens=st.integers(1, 9),
    one_row=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_tables_have_the_same_bits(
    section: tuple[int, int, int], tokens: int, one_row: bool, dtype: torch.dtype, seed: int
) -> None:
    """Whatever the sections: of some, the last frequencies of an axis lie behind the others'."""
    rotary = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": list(section),
    }
    config = Qwen3_5TextConfig(head_dim=4 * sum(section), rope_parameters=rotary)
    theirs = Qwen3_5TextRotaryEmbedding(config)
    torch.manual_seed(seed)
    positions = torch.randint(0, 200_000, (1 if one_row else 3, 1, tokens))
    hidden = torch.zeros(1, tokens, 4, dtype=dtype)
    for found, wanted in zip(GridRotary(theirs)(hidden, positions), theirs(hidden, positions), strict=True):
        assert found.dtype is dtype and torch.equal(found, wanted)
