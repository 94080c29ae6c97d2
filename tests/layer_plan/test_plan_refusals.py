"""A config that contradicts itself is refused, and the refusal names the field."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from braid_orchestrator.layer_plan import REGISTRY, build_plans
from braid_wire.errors import ConfigInvalid
from braid_wire.layers import Kind, LayerPlan, LayerSpec, Role
from hypothesis import given
from hypothesis import strategies as st

KIMI_LISTS = {"full_attn_layers": [2, 4], "kda_layers": [1, 3], "head_dim": 8, "num_heads": 2}

BASES: dict[str, dict[str, Any]] = {
    "qwen3_next": {"model_type": "qwen3_next", "num_hidden_layers": 4},
    "qwen3_5": {"model_type": "qwen3_5", "text_config": {"num_hidden_layers": 4}},
    "kimi": {"model_type": "kimi_linear", "num_hidden_layers": 4, "linear_attn_config": KIMI_LISTS},
    "ling_2_5": {
        "model_type": "bailing_hybrid",
        "architectures": ["BailingMoeV2_5ForCausalLM"],
        "num_hidden_layers": 4,
        "layer_group_size": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
    "ling_3": {"model_type": "bailing_hybrid", "num_hidden_layers": 6},
    "minimax": {"model_type": "minimax", "num_hidden_layers": 4},
    "minimax_01": {"model_type": "minimax_text_01", "num_hidden_layers": 2, "attn_type_list": [0, 1]},
    "nemotron": {"model_type": "nemotron_h", "hybrid_override_pattern": "M*E-"},
    "bamba": {"model_type": "bamba", "num_hidden_layers": 4, "attn_layer_indices": [1]},
    "granite": {
        "model_type": "granitemoehybrid",
        "num_hidden_layers": 2,
        "layer_types": ["mamba", "attention"],
    },
    "falcon": {"model_type": "falcon_h1", "num_hidden_layers": 2},
    "zamba": {"model_type": "zamba2", "num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"]},
    "olmo": {"model_type": "olmo_hybrid", "num_hidden_layers": 4},
    "jamba": {"model_type": "jamba", "num_hidden_layers": 8},
    "lfm2": {"model_type": "lfm2", "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"model_type": "lfm2_moe", "num_hidden_layers": 2, "full_attn_idxs": [1]},
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2", "num_hidden_layers": 2},
    "deepseek": {"model_type": "deepseek_v3"},
}
BAD_LIST = ["linear_attention", "full_attention"]


def kimi(**changes: Any) -> dict[str, Any]:
    return {"linear_attn_config": {**KIMI_LISTS, **changes}}


REFUSED = [
    # (base, changes, field that must be named)
    ("qwen3_next", {"layer_types": BAD_LIST}, "layer_types"),
    ("qwen3_next", {"layer_types": ["linear_attention"] * 3 + ["sliding"]}, "layer_types"),
    ("qwen3_next", {"layer_types": "linear_attention"}, "layer_types"),
    ("qwen3_next", {"layer_types": [1, 2, 3, 4]}, "layer_types"),
    ("qwen3_next", {"full_attention_interval": 0}, "full_attention_interval"),
    ("qwen3_next", {"full_attention_interval": 2.5}, "full_attention_interval"),
    ("qwen3_next", {"num_hidden_layers": 0}, "num_hidden_layers"),
    ("qwen3_next", {"num_hidden_layers": "4"}, "num_hidden_layers"),
    ("qwen3_next", {"num_hidden_layers": True}, "num_hidden_layers"),
    ("qwen3_next", {"num_attention_heads": -16}, "num_attention_heads"),
    ("qwen3_next", {"num_attention_heads": 15}, "num_attention_heads"),
    ("qwen3_next", {"linear_num_value_heads": 24}, "linear_num_value_heads"),
    ("qwen3_next", {"linear_key_head_dim": -1}, "linear_key_head_dim"),
    ("qwen3_next", {"head_dim": 0}, "head_dim"),
    ("qwen3_next", {"vocab_size": 0}, "vocab_size"),
    ("qwen3_next", {"dtype": "int8"}, "dtype"),
    ("qwen3_next", {"torch_dtype": 16}, "torch_dtype"),
    ("qwen3_next", {"architectures": "Qwen3NextForCausalLM"}, "architectures"),
    ("qwen3_next", {"quantization_config": "fp8"}, "quantization_config"),
    ("qwen3_next", {"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config"),
    ("qwen3_next", {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
    ("qwen3_next", {"num_nextn_predict_layers": 1, "mtp_num_hidden_layers": 2}, "mtp_num_hidden_layers"),
    ("qwen3_next", {"num_nextn_predict_layers": 2, "mtp_layer_types": ["full_attention"]}, "mtp_layer_types"),
    ("qwen3_next", {"num_nextn_predict_layers": 0, "mtp_layer_types": ["full_attention"]}, "mtp_layer_types"),
    ("qwen3_next", {"num_nextn_predict_layers": 1, "mtp_layer_types": ["moe"]}, "mtp_layer_types"),
    ("qwen3_5", {"text_config": []}, "text_config"),
    ("qwen3_5", {"text_config": {"num_hidden_layers": -1}}, "text_config.num_hidden_layers"),
    ("qwen3_5", {"text_config": {"model_type": "llama"}}, "text_config.model_type"),
    ("qwen3_5", {"num_hidden_layers": 8}, "text_config.num_hidden_layers"),
    ("qwen3_5", {"text_config": {"mtp_num_hidden_layers": "1"}}, "text_config.mtp_num_hidden_layers"),
    (
        "kimi",
        {"linear_attn_config": {**KIMI_LISTS, "full_attn_layers": [0, 4]}},
        "linear_attn_config.full_attn_layers",
    ),
    (
        "kimi",
        {"linear_attn_config": {**KIMI_LISTS, "full_attn_layers": [2, 5]}},
        "linear_attn_config.full_attn_layers",
    ),
    (
        "kimi",
        {"linear_attn_config": {**KIMI_LISTS, "full_attn_layers": [2, 2]}},
        "linear_attn_config.full_attn_layers",
    ),
    (
        "kimi",
        {"linear_attn_config": {**KIMI_LISTS, "full_attn_layers": [2]}},
        "linear_attn_config.full_attn_layers",
    ),
    (
        "kimi",
        {"linear_attn_config": {**KIMI_LISTS, "kda_layers": [1, 2, 3]}},
        "linear_attn_config.kda_layers",
    ),
    ("kimi", {"linear_attn_config": {"kda_layers": [1]}}, "linear_attn_config.full_attn_layers"),
    ("kimi", {"linear_attn_config": {"full_attn_layers": [1]}}, "linear_attn_config.kda_layers"),
    ("kimi", kimi(num_heads=0), "linear_attn_config.num_heads"),
    ("kimi", {"linear_attn_config": [1]}, "linear_attn_config"),
    ("kimi", {"layer_types": ["full_attention"] * 4}, "layer_types"),
    ("kimi", {"qk_rope_head_dim": -1}, "qk_rope_head_dim"),
    ("kimi", {"max_position_embeddings": 8, "model_max_length": 9}, "model_max_length"),
    ("ling_2_5", {"layer_group_size": 0}, "layer_group_size"),
    ("ling_2_5", {"layer_group_size": None}, "layer_group_size"),
    ("ling_2_5", {"kv_lora_rank": None}, "kv_lora_rank"),
    ("ling_2_5", {"num_attention_heads": 3}, "num_attention_heads"),
    ("ling_2_5", {"layer_types": ["full_attention"] * 4}, "layer_types"),
    ("ling_2_5", {"num_kv_heads_for_linear_attn": 2}, "num_kv_heads_for_linear_attn"),
    ("ling_3", {"q_lora_rank": 1536}, "q_lora_rank"),
    ("ling_3", {"layer_group_size": -6}, "layer_group_size"),
    ("ling_3", {"kda_safe_gate": 1}, "kda_safe_gate"),
    ("ling_3", {"kda_lower_bound": 5.0}, "kda_lower_bound"),
    ("ling_3", {"kda_lower_bound": float("nan")}, "kda_lower_bound"),
    ("ling_3", {"num_mtp_layers": 2, "num_nextn_predict_layers": 1}, "num_mtp_layers"),
    ("minimax", {"attn_type_list": [0, 1]}, "attn_type_list"),
    ("minimax", {"attn_type_list": [0, 1, 2, 0]}, "attn_type_list"),
    ("minimax", {"attn_type_list": [0, 1, -1, 0]}, "attn_type_list"),
    ("minimax", {"attn_type_list": [0, True, 0, 0]}, "attn_type_list"),
    ("minimax", {"attn_type_list": [0, 0, 0, 1], "layer_types": ["full_attention"] * 4}, "layer_types"),
    ("minimax", {"hidden_act": "gelu"}, "hidden_act"),
    ("minimax_01", {"attn_type_list": None}, "attn_type_list"),
    ("nemotron", {"num_hidden_layers": 5}, "hybrid_override_pattern"),
    ("nemotron", {"hybrid_override_pattern": "MX"}, "hybrid_override_pattern"),
    ("nemotron", {"hybrid_override_pattern": ["M"]}, "hybrid_override_pattern"),
    ("nemotron", {"hybrid_override_pattern": None}, "hybrid_override_pattern"),
    ("nemotron", {"layers_block_type": ["mamba"] * 4}, "layers_block_type"),
    ("nemotron", {"layers_block_type": ["mamba"]}, "layers_block_type"),
    ("nemotron", {"layers_block_type": ["mamba", "attention", "moe", "gru"]}, "layers_block_type"),
    ("nemotron", {"n_groups": 7}, "mamba_num_heads"),
    ("nemotron", {"n_groups": 8, "mamba_n_groups": 4}, "mamba_n_groups"),
    (
        "nemotron",
        {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "Q"},
        "mtp_hybrid_override_pattern",
    ),
    ("nemotron", {"num_nextn_predict_layers": 1, "mtp_layers_block_type": []}, "mtp_layers_block_type"),
    ("bamba", {"attn_layer_indices": [4]}, "attn_layer_indices"),
    ("bamba", {"attn_layer_indices": [-1]}, "attn_layer_indices"),
    ("bamba", {"attn_layer_indices": [1, 1]}, "attn_layer_indices"),
    ("bamba", {"layers_block_type": ["attention"] * 4}, "layer_types"),
    ("bamba", {"mamba_d_head": 63}, "mamba_d_head"),
    ("bamba", {"mamba_d_head": "wide"}, "mamba_d_head"),
    ("bamba", {"mamba_n_heads": 100}, "mamba_n_heads"),
    ("bamba", {"mamba_n_groups": 3}, "mamba_n_heads"),
    ("bamba", {"mamba_expand": 0}, "mamba_expand"),
    ("bamba", {"time_step_limit": [1.0, 0.5]}, "time_step_limit"),
    ("bamba", {"time_step_limit": [1.0]}, "time_step_limit"),
    ("granite", {"layer_types": ["mamba", "hybrid"]}, "layer_types"),
    ("granite", {"attention_multiplier": "1"}, "attention_multiplier"),
    ("granite", {"layers_block_type": ["mamba", "mamba"]}, "layers_block_type"),
    ("falcon", {"layer_types": ["hybrid", "mamba"]}, "layer_types"),
    ("falcon", {"mamba_d_ssm": 1000}, "mamba_n_heads"),
    ("zamba", {"layers_block_type": None}, "layers_block_type"),
    ("zamba", {"layers_block_type": ["mamba", "attention"]}, "layers_block_type"),
    ("zamba", {"mamba_headdim": 100}, "mamba_headdim"),
    ("zamba", {"num_attention_heads": 48}, "num_attention_heads"),
    ("olmo", {"linear_allow_neg_eigval": "yes"}, "linear_allow_neg_eigval"),
    ("olmo", {"linear_num_key_heads": 7}, "linear_num_value_heads"),
    ("jamba", {"attn_layer_period": 0}, "attn_layer_period"),
    ("jamba", {"attn_layer_offset": 8}, "attn_layer_offset"),
    ("jamba", {"attn_layer_offset": -1}, "attn_layer_offset"),
    ("jamba", {"layers_block_type": ["mamba"] * 8}, "layer_types"),
    ("jamba", {"mamba_dt_rank": "wide"}, "mamba_dt_rank"),
    ("lfm2", {"full_attn_idxs": [0]}, "layer_types"),
    ("lfm2", {"full_attn_idxs": [2]}, "full_attn_idxs"),
    ("lfm2", {"conv_L_cache": 0}, "conv_L_cache"),
    ("lfm2_moe", {"full_attn_idxs": None}, "layer_types"),
    ("llama", {"layer_types": ["sliding_attention"] * 32}, "layer_types"),
    ("llama", {"num_attention_heads": 30}, "num_attention_heads"),
    ("llama", {"num_key_value_heads": 5}, "num_attention_heads"),
    ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
    (
        "qwen2",
        {
            "layer_types": ["full_attention", "sliding_attention"],
            "use_sliding_window": True,
            "sliding_window": None,
        },
        "sliding_window",
    ),
    ("deepseek", {"rope_scaling": {"type": "yarn", "mscale_all_dim": 1.0}}, "rope_scaling.factor"),
]


@pytest.mark.parametrize(("base", "changes", "field"), REFUSED)
def test_refused_with_the_field_named(base: str, changes: dict[str, Any], field: str) -> None:
    config = {**copy.deepcopy(BASES[base]), **changes}
    with pytest.raises(ConfigInvalid) as caught:
        build_plans(config)
    assert caught.value.metadata["field"] == field
    assert field in caught.value.message


@pytest.mark.parametrize("base", sorted(BASES))
def test_the_unchanged_base_is_accepted(base: str) -> None:
    build_plans(copy.deepcopy(BASES[base]))


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_oss", "gemma2", "mamba2", "", "Qwen3_next"])
def test_unknown_model_type_lists_the_known(model_type: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        build_plans({"model_type": model_type})
    assert caught.value.metadata == {"field": "model_type", "value": model_type}
    for known in REGISTRY.model_types():
        assert known in caught.value.message


def test_a_layer_id_cannot_stand_twice() -> None:
    with pytest.raises(ConfigInvalid) as caught:
        LayerPlan(Role.TARGET, (LayerSpec(3, Kind.NONE), LayerSpec(3, Kind.NONE)))
    assert caught.value.metadata["layer_id"] == "3"


LISTED = [  # (base, name of the list, its entries, field of the count)
    ("qwen3_next", "layer_types", ["linear_attention", "full_attention"]),
    ("minimax", "layer_types", ["linear_attention", "full_attention"]),
    ("granite", "layer_types", ["mamba", "attention"]),
    ("zamba", "layers_block_type", ["mamba", "hybrid"]),
    ("lfm2", "layer_types", ["conv", "full_attention"]),
    ("nemotron", "layers_block_type", ["mamba", "attention", "moe", "mlp"]),
]
FULL_NAMES = {"full_attention", "attention", "hybrid"}
LINEAR_NAMES = {"linear_attention", "mamba", "conv", "hybrid"}


@given(data=st.data())
def test_a_list_is_followed_exactly_or_refused(data: st.DataObject) -> None:
    base, name, entries = data.draw(st.sampled_from(LISTED))
    kinds = data.draw(st.lists(st.sampled_from([*entries, *entries, "nonsense"]), min_size=1, max_size=12))
    count = data.draw(st.one_of(st.just(len(kinds)), st.integers(1, 12)))
    config = {**BASES[base], "num_hidden_layers": count, name: kinds, "hybrid_override_pattern": None}
    if count != len(kinds) or "nonsense" in kinds:
        with pytest.raises(ConfigInvalid) as caught:
            build_plans(config)
        assert caught.value.metadata["field"] == name
        return
    target = build_plans(config).target
    assert [spec.full is not None for spec in target] == [kind in FULL_NAMES for kind in kinds]
    assert [spec.linear is not None for spec in target] == [kind in LINEAR_NAMES for kind in kinds]


@given(
    count=st.integers(1, 12),
    full=st.lists(st.integers(-1, 13), max_size=12),
    kda=st.lists(st.integers(-1, 13), max_size=12),
)
def test_kimi_lists_are_a_partition_or_refused(count: int, full: list[int], kda: list[int]) -> None:
    config = {
        "model_type": "kimi_linear",
        "num_hidden_layers": count,
        "linear_attn_config": {"full_attn_layers": full, "kda_layers": kda},
    }
    if sorted(full + kda) == list(range(1, count + 1)):
        target = build_plans(config).target
        assert [spec.layer_id + 1 for spec in target.side(Kind.FULL)] == sorted(full)
    else:
        with pytest.raises(ConfigInvalid) as caught:
            build_plans(config)
        assert caught.value.metadata["field"].startswith("linear_attn_config.")


@given(count=st.integers(1, 40), group=st.integers(1, 45))
def test_ling_2_5_groups(count: int, group: int) -> None:
    config = {**BASES["ling_2_5"], "num_hidden_layers": count, "layer_group_size": group}
    target = build_plans(config).target
    # Said another way than the code says it: walk the layers group by group.
    full = []
    for start in range(0, count, group):
        members = list(range(start, min(start + group, count)))
        full += [members[-1]] if len(members) == group else members
    assert [spec.layer_id for spec in target.side(Kind.FULL)] == full


@given(
    base=st.sampled_from(sorted(BASES)),
    field=st.sampled_from(["num_attention_heads", "num_hidden_layers", "hidden_size", "vocab_size"]),
    value=st.one_of(
        st.integers(max_value=0), st.text(max_size=5), st.booleans(), st.floats(), st.lists(st.integers())
    ),
)
def test_a_size_that_is_no_positive_integer_is_named(base: str, field: str, value: object) -> None:
    config = copy.deepcopy(BASES[base])
    (config.get("text_config") or config)[field] = value
    with pytest.raises(ConfigInvalid) as caught:
        build_plans(config)
    assert caught.value.metadata["field"].endswith(field)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
READ = [
    "layer_types",
    "text_config",
    "linear_attn_config",
    "attn_type_list",
    "hybrid_override_pattern",
    "architectures",
    "rope_scaling",
    "time_step_limit",
    "mamba_d_head",
    "mamba_d_ssm",
    "mamba_expand",
    "mtp_layer_types",
    "num_nextn_predict_layers",
    "quantization_config",
    "sliding_window",
    "dtype",
]


@given(base=st.sampled_from(sorted(BASES)), changes=st.dictionaries(st.sampled_from(READ), JSON, max_size=3))
def test_junk_is_refused_by_type_and_never_crashes(base: str, changes: dict[str, Any]) -> None:
    try:
        build_plans({**BASES[base], **changes})
    except ConfigInvalid as error:
        assert "field" in error.metadata
