"""KDA, Lightning, Gated DeltaNet of OLMo, and latent attention, against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import HYBRID, LATENT, Case
from harness import cell, check

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


def test_kimi_ids_counted_from_1(tmp_path: Path) -> None:
    """The publisher's config counts layers from 1 and keeps the sizes of KDA in a section."""
    model = HYBRID[0].save(tmp_path)
    file = model / "config.json"
    config = json.loads(file.read_text())
    kinds = config.pop("layer_types")
    config["linear_attn_config"] = {
        "full_attn_layers": [i for i, kind in enumerate(kinds, 1) if kind == "full_attention"],
        "kda_layers": [i for i, kind in enumerate(kinds, 1) if kind == "linear_attention"],
        "head_dim": config.pop("linear_head_dim"),
        "num_heads": config.pop("linear_num_heads"),
        "short_conv_kernel_size": config.pop("linear_conv_kernel_dim"),
    }
    file.write_text(json.dumps(config))
    with cell(model) as running:
        assert [spec.kind.value for spec in running.plans.target] == ["linear", "full", "linear", "full"]
    check(model)
