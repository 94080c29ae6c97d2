"""KDA, Lightning, Gated DeltaNet of OLMo, and latent attention, against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import HYBRID, LATENT, Case
from harness import check

MECHANISMS = {
    "kimi_linear": ("kimi_delta", "mla"),
    "bailing_hybrid": ("kimi_delta", "mla"),
    "minimax": ("gqa", "lightning"),
    "olmo_hybrid": ("gated_delta", "gqa"),
    "deepseek_v2": ("mla",),
    "deepseek_v3": ("mla",),
}


@pytest.mark.parametrize("case", [*HYBRID, *LATENT], ids=str)
def test_hybrid_model(case: Case, tmp_path: Path) -> None:
    found = check(case.save(tmp_path))
    assert found.mechanisms == MECHANISMS[case.family]
