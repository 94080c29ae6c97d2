"""Draft plans: only what a checkpoint declares, with ids that restart at 0."""

from __future__ import annotations

from typing import Any

import pytest
from braid_orchestrator.layer_plan import build_plans
from braid_wire.errors import LayerUnknown
from braid_wire.layers import Kind, LayerPlan, Role

SMALL = {"num_hidden_layers": 6}


def draft_of(model_type: str, **fields: Any) -> LayerPlan | None:
    return build_plans({"model_type": model_type, **SMALL, **fields}).draft


def kinds(plan: LayerPlan | None) -> str:
    letters = {Kind.FULL: "F", Kind.LINEAR: "L", Kind.PARALLEL: "P", Kind.NONE: "-"}
    assert plan is not None
    assert plan.role is Role.DRAFT
    assert [spec.layer_id for spec in plan] == list(range(len(plan)))
    return "".join(letters[spec.kind] for spec in plan)


@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        ("qwen3_next", {"num_nextn_predict_layers": 1}, "F"),
        ("qwen3_5", {"mtp_num_hidden_layers": 1}, "F"),
        (
            "qwen3_5",
            {"mtp_num_hidden_layers": 2, "mtp_layer_types": ["linear_attention", "full_attention"]},
            "LF",
        ),
        ("qwen3_5", {"mtp_layer_types": ["linear_attention"]}, "L"),
        ("qwen3_5_moe", {"mtp_num_hidden_layers": 3}, "FFF"),
        ("bailing_hybrid", {"num_nextn_predict_layers": 1}, "F"),
        ("bailing_hybrid", {"num_mtp_layers": 2}, "FF"),
        ("bailing_hybrid", {"num_mtp_layers": 1, "mtp_layer_types": ["linear_attention"]}, "L"),
        ("deepseek_v3", {"num_nextn_predict_layers": 1}, "F"),
        ("kimi_linear", {"num_nextn_predict_layers": 1, "mtp_layer_types": ["full_attention"]}, "F"),
    ],
)
def test_declared(model_type: str, fields: dict[str, Any], expected: str) -> None:
    assert kinds(draft_of(model_type, **fields)) == expected


@pytest.mark.parametrize(
    "model_type",
    [
        "qwen3_next",
        "qwen3_5",
        "qwen3_5_moe",
        "kimi_linear",
        "bailing_hybrid",
        "deepseek_v3",
        "llama",
        "jamba",
    ],
)
def test_never_assumed(model_type: str) -> None:
    """Not even where transformers' config class has a default of one MTP layer."""
    assert draft_of(model_type) is None
    assert draft_of(model_type, num_nextn_predict_layers=0) is None


def test_kinds_that_nobody_published_are_not_guessed() -> None:
    plans = build_plans({"model_type": "kimi_linear", **SMALL, "num_nextn_predict_layers": 1})
    assert plans.draft is None
    assert any("mtp_layer_types" in note for note in plans.notes)


def test_a_linear_draft_has_the_targets_geometry() -> None:
    plans = build_plans({"model_type": "qwen3_5", **SMALL, "mtp_layer_types": ["linear_attention"]})
    assert plans.draft is not None
    assert plans.draft.layer(0).linear == plans.target.layer(0).linear
    assert plans.draft.side(Kind.FULL) == ()
    with pytest.raises(LayerUnknown):
        plans.draft.layer(1)


def test_the_draft_is_not_routed_by_the_targets_ids() -> None:
    """Layer 0 is linear in the target and full in the draft."""
    plans = build_plans({"model_type": "qwen3_5", **SMALL, "mtp_num_hidden_layers": 1})
    assert plans.draft is not None
    assert plans.target.layer(0).kind is Kind.LINEAR
    assert plans.draft.layer(0).kind is Kind.FULL


def test_where_the_checkpoint_keeps_them_is_noted() -> None:
    plans = build_plans({"model_type": "deepseek_v3", **SMALL, "num_nextn_predict_layers": 2})
    assert "mtp: 2 layer(s) as draft layers 0-1, stored as layers 6-7 in the checkpoint" in plans.notes


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"mtp_hybrid_override_pattern": "*E"}, "F-"),
        ({"mtp_layers_block_type": ["mamba", "attention", "moe"]}, "LF-"),
        ({"num_nextn_predict_layers": 2, "mtp_hybrid_override_pattern": "*E"}, "F-F-"),
        ({}, "F-"),
    ],
)
def test_nemotron_repeats_its_mtp_blocks(fields: dict[str, Any], expected: str) -> None:
    config = {"model_type": "nemotron_h", "hybrid_override_pattern": "M*", "num_nextn_predict_layers": 1}
    assert kinds(build_plans({**config, **fields}).draft) == expected


def test_nemotron_without_a_count_has_no_draft() -> None:
    config = {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "M*",
        "mtp_hybrid_override_pattern": "*E",
    }
    assert build_plans(config).draft is None
