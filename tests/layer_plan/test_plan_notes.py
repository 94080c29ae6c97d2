"""Architecture decides where a model type is shared, and notes say what was decided."""

from __future__ import annotations

from typing import Any

import pytest
from braid_orchestrator.layer_plan import build_plans
from braid_wire.layers import KimiDelta, Kind, Lightning


def test_the_two_bailing_hybrids(configs: dict[str, dict[str, Any]]) -> None:
    ling_2_5 = build_plans(configs["ling-2.6-flash"])
    ling_3 = build_plans(
        {
            "model_type": "bailing_hybrid",
            "architectures": ["BailingHybridForCausalLM"],
            "num_hidden_layers": 32,
        }
    )
    assert isinstance(ling_2_5.target.layer(0).linear, Lightning)
    assert ling_3.target.layer(0).linear == KimiDelta(32, 128, 4, 128**-0.5, gate_lower_bound=-5.0)
    assert [spec.layer_id for spec in ling_3.target.side(Kind.FULL)] == [5, 11, 17, 23, 29]


def test_ling_2_5_incomplete_last_group_is_full(configs: dict[str, dict[str, Any]]) -> None:
    config = {**configs["ling-2.6-flash"], "num_hidden_layers": 18}
    ids = [spec.layer_id for spec in build_plans(config).target.side(Kind.FULL)]
    assert ids == [7, 15, 16, 17]


def test_a_list_wins_over_the_interval_and_is_noted() -> None:
    config = {
        "model_type": "qwen3_next",
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "linear_attention"],
        "full_attention_interval": 2,
    }
    plans = build_plans(config)
    assert [spec.kind for spec in plans.target] == [Kind.FULL, Kind.LINEAR]
    assert "layer_types decides; it does not follow full_attention_interval=2" in plans.notes
    agreeing = build_plans({**config, "layer_types": ["linear_attention", "full_attention"]})
    assert not any("decides" in note for note in agreeing.notes)


def test_defaults_are_written_down() -> None:
    notes = build_plans({"model_type": "llama", "hidden_size": 2048}).notes
    assert notes == (
        "defaulted: dtype=bfloat16, head_dim=64, max_position_embeddings=2048, num_attention_heads=32, "
        "num_hidden_layers=32, num_key_value_heads=32, vocab_size=32000",
    )


def test_quantised_weights_are_fine_for_a_plan() -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}
    plans = build_plans(config)
    assert plans.target == build_plans({"model_type": "llama"}).target
    assert "weights are quantised (fp8); pages and states are not" in plans.notes


def test_an_unverified_architecture_is_noted() -> None:
    plans = build_plans({"model_type": "llama", "architectures": ["LlamaForFun"]})
    assert any("LlamaForFun" in note for note in plans.notes)


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.float32"}, "float32"),
        ({"dtype": None, "torch_dtype": "float32"}, "float32"),
        ({}, "bfloat16"),
    ],
)
def test_dtype(fields: dict[str, Any], dtype: str) -> None:
    assert build_plans({"model_type": "llama", **fields}).dtype == dtype


def test_dtype_of_the_wrapper() -> None:
    wrapped = {"model_type": "qwen3_5", "dtype": "float16", "text_config": {"num_hidden_layers": 4}}
    assert build_plans(wrapped).dtype == "float16"
    wrapped["text_config"] = {"num_hidden_layers": 4, "dtype": "float32"}
    assert build_plans(wrapped).dtype == "float32"


def test_old_and_new_spelling_of_kinds() -> None:
    """Older and newer spellings of the same kinds."""
    old = {"model_type": "granitemoehybrid", "num_hidden_layers": 2, "layer_types": ["mamba", "attention"]}
    new = {**old, "layer_types": ["linear_attention", "full_attention"]}
    assert build_plans(old).target == build_plans(new).target


def test_minimax_lists_that_agree() -> None:
    config = {
        "model_type": "minimax",
        "num_hidden_layers": 3,
        "attn_type_list": [0, 1, 0],
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    }
    assert [spec.layer_id for spec in build_plans(config).target.side(Kind.FULL)] == [1]
