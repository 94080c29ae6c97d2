"""The plan against transformers' own models, built on the meta device with published sizes.

The plan is made from the raw JSON, the model from transformers' config class, so this checks the
rules, the geometries and every default that the families state. BailingMoeV2_5 and minimax_text_01
have no model in transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from braid_orchestrator.layer_plan import REGISTRY, build_plans
from braid_wire.layers import (
    GatedDelta,
    Gqa,
    KimiDelta,
    Kind,
    LayerSpec,
    Lightning,
    LinearGeometry,
    Mamba1,
    Mamba2,
    Mla,
    ShortConv,
)
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

LINEAR = re.compile(
    r"(GatedDeltaNet|DeltaAttention|LightningAttention|MambaMixer|Mamba2Mixer|BambaMixer|FalconH1Mixer"
    r"|MambaLayer|ShortConv)$"
)
FULL = re.compile(r"Attention$")
# These read the window from the config when they attend; the others keep it on the module.
WINDOW_FROM_CONFIG = {"mistral", "mixtral", "phi3", "starcoder2", "minimax"}

KIMI_LISTS = {"full_attn_layers": [2, 5], "kda_layers": [1, 3, 4]}
SMALL = {"num_hidden_layers": 6}
YARN = {"rope_type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 10000.0}
SLIDING = ["sliding_attention", "full_attention"] * 3
LFM_LIST = ["conv", "conv", "full_attention", "conv", "full_attention", "conv"]

# (model type, fields beyond the published defaults)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_next", {"num_hidden_layers": 9}),
    ("qwen3_next", {**SMALL, "full_attention_interval": 3}),
    ("qwen3_next", {"num_hidden_layers": 3, "layer_types": ["full_attention", *["linear_attention"] * 2]}),
    ("qwen3_5_text", {"num_hidden_layers": 8}),
    ("qwen3_5_text", {**SMALL, "linear_num_value_heads": 48, "num_attention_heads": 24, "hidden_size": 5120}),
    ("qwen3_5_moe_text", {"num_hidden_layers": 5}),
    ("kimi_linear", {"num_hidden_layers": 5, "linear_attn_config": KIMI_LISTS}),
    (
        "kimi_linear",
        {"num_hidden_layers": 5, "linear_attn_config": {**KIMI_LISTS, "num_heads": 8, "head_dim": 64}},
    ),
    ("kimi_linear", {"num_hidden_layers": 10}),
    ("kimi_linear", {"num_hidden_layers": 2, "layer_types": ["full_attention", "linear_attention"]}),
    ("bailing_hybrid", {"num_hidden_layers": 14}),
    ("bailing_hybrid", {**SMALL, "layer_group_size": 4, "kda_safe_gate": False}),
    ("bailing_hybrid", {"num_hidden_layers": 2, "layer_types": ["full_attention", "linear_attention"]}),
    ("bailing_hybrid", {**SMALL, "rope_scaling": YARN}),
    ("minimax", SMALL),
    ("minimax", {**SMALL, "head_dim": 64, "layer_types": ["linear_attention", "full_attention"] * 3}),
    ("nemotron_h", {"hybrid_override_pattern": "MEM*-M*E"}),
    ("nemotron_h", {"layers_block_type": ["mamba", "attention", "mlp", "moe"], "time_step_min": 0.01}),
    ("bamba", {**SMALL, "attn_layer_indices": [1, 4]}),
    ("bamba", SMALL),
    ("granitemoehybrid", {**SMALL, "layer_types": ["mamba", "attention", "mamba"] * 2}),
    ("granitemoehybrid", {**SMALL, "attention_multiplier": 0.015625, "num_key_value_heads": 8}),
    ("falcon_h1", SMALL),
    ("falcon_h1", {**SMALL, "mamba_d_ssm": None, "head_dim": 64}),
    ("zamba2", {}),
    ("zamba2", {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]}),
    ("olmo_hybrid", {"num_hidden_layers": 9}),
    ("olmo_hybrid", {"num_hidden_layers": 2}),
    ("olmo_hybrid", {"num_hidden_layers": 4, "linear_allow_neg_eigval": False, "linear_key_head_dim": 96}),
    ("jamba", {"num_hidden_layers": 16}),
    ("jamba", {**SMALL, "attn_layer_period": 3, "attn_layer_offset": 0, "mamba_dt_rank": 8}),
    ("lfm2", {**SMALL, "layer_types": LFM_LIST}),
    ("lfm2", {**SMALL, "full_attn_idxs": [2, 5]}),
    ("lfm2", SMALL),
    ("lfm2_moe", {**SMALL, "layer_types": LFM_LIST}),
    ("llama", SMALL),
    ("mistral", SMALL),
    ("mistral", {**SMALL, "sliding_window": None, "head_dim": 160}),
    ("mixtral", {**SMALL, "sliding_window": 128}),
    ("qwen2", SMALL),
    ("qwen2", {**SMALL, "use_sliding_window": True, "max_window_layers": 4}),
    ("qwen2_moe", SMALL),
    ("qwen2_moe", {**SMALL, "use_sliding_window": True, "max_window_layers": 4}),
    ("qwen3", SMALL),
    ("qwen3", {**SMALL, "use_sliding_window": True, "sliding_window": 99, "layer_types": SLIDING}),
    ("qwen3_moe", SMALL),
    ("qwen3_moe", {**SMALL, "use_sliding_window": True}),
    ("gemma", SMALL),
    ("phi3", SMALL),
    ("phi3", {**SMALL, "sliding_window": 2047}),
    ("olmo", SMALL),
    ("olmo2", SMALL),
    ("olmo3", {"num_hidden_layers": 9}),
    ("olmo3", {**SMALL, "layer_types": SLIDING}),
    ("olmoe", SMALL),
    ("smollm3", SMALL),
    ("smollm3", {**SMALL, "use_sliding_window": True, "sliding_window": 64, "no_rope_layer_interval": 3}),
    ("granite", {**SMALL, "attention_multiplier": 0.0078125}),
    ("granitemoe", SMALL),
    ("glm4", SMALL),
    ("starcoder2", {**SMALL, "sliding_window": 4096}),
    ("cohere", SMALL),
    ("cohere2", {"num_hidden_layers": 9}),
    ("deepseek_v2", SMALL),
    ("deepseek_v3", SMALL),
    ("deepseek_v3", {**SMALL, "rope_scaling": YARN, "q_lora_rank": None}),
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """transformers warns about sizes that do not matter here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def build(config: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def sides(layer: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The full-attention and the linear modules inside one decoder layer."""
    linear = [m for m in layer.modules() if LINEAR.search(type(m).__name__)]
    full = [m for m in layer.modules() if FULL.search(type(m).__name__) and m not in linear]
    return full, linear


def check_gqa(geometry: Gqa, module: Any, config: Any) -> None:
    assert geometry.head_dim == geometry.v_head_dim == module.head_dim
    assert geometry.num_q_heads // geometry.num_kv_heads == module.num_key_value_groups
    assert geometry.num_q_heads == config.num_attention_heads
    assert geometry.scale == pytest.approx(module.scaling, rel=1e-12)
    projections = dict(module.named_children())
    if "k_proj" in projections:
        assert projections["k_proj"].out_features == geometry.num_kv_heads * geometry.head_dim
    else:
        heads = geometry.num_q_heads + 2 * geometry.num_kv_heads
        assert projections["qkv_proj"].out_features == heads * geometry.head_dim
    keeper = config if config.model_type in WINDOW_FROM_CONFIG else module
    assert geometry.sliding_window == (getattr(keeper, "sliding_window", None) or 0)


def check_mla(geometry: Mla, module: Any) -> None:
    assert geometry.num_heads == module.num_heads
    assert geometry.qk_nope_head_dim == module.qk_nope_head_dim
    assert geometry.qk_rope_head_dim == module.qk_rope_head_dim
    assert geometry.v_head_dim == module.v_head_dim
    assert geometry.kv_lora_rank == module.kv_lora_rank
    assert geometry.caches()["latent"] == (module.kv_a_proj_with_mqa.out_features,)
    assert geometry.scale == pytest.approx(module.scaling, rel=1e-12)


def check_linear(geometry: LinearGeometry, module: Any, config: Any) -> None:
    if isinstance(geometry, GatedDelta):
        assert (geometry.num_k_heads, geometry.num_v_heads) == (module.num_k_heads, module.num_v_heads)
        assert (geometry.k_head_dim, geometry.v_head_dim) == (module.head_k_dim, module.head_v_dim)
        doubled = getattr(module, "allow_neg_eigval", False)
        assert geometry.beta_scale == (2.0 if doubled else 1.0)
    elif isinstance(geometry, KimiDelta):
        assert (geometry.num_heads, geometry.head_dim) == (module.num_heads, module.head_dim)
        bounded = getattr(module.forget_gate, "safe_gate", False)
        assert geometry.gate_lower_bound == (module.forget_gate.lower_bound if bounded else 0.0)
    elif isinstance(geometry, Lightning):
        assert (geometry.num_heads, geometry.head_dim) == (module.num_attention_heads, module.head_dim)
        assert geometry.activation == config.hidden_act
        return
    elif isinstance(geometry, Mamba2):
        assert (geometry.num_heads, geometry.head_dim) == (module.num_heads, module.head_dim)
        assert (geometry.state_dim, geometry.num_groups) == (module.ssm_state_size, module.n_groups)
        assert (geometry.dt_min, geometry.dt_max) == tuple(module.time_step_limit)
    elif isinstance(geometry, Mamba1):
        assert (geometry.inner_dim, geometry.state_dim) == (module.intermediate_size, module.ssm_state_size)
        assert geometry.dt_rank == module.time_step_rank
        assert geometry.norm_eps == module.dt_layernorm.variance_epsilon
        assert geometry.params()["x_proj"] == tuple(module.x_proj.weight.shape)
    else:
        assert isinstance(geometry, ShortConv)
    conv = module.conv if isinstance(geometry, ShortConv) else module.conv1d
    assert geometry.conv() == (conv.in_channels, conv.kernel_size[0] - 1)
    for name in {"A_log", "dt_bias", "D"} & dict(module.named_parameters(recurse=False)).keys():
        expected = torch.Size(geometry.params()[name]).numel()
        assert module.get_parameter(name).numel() == expected, name


def check_layer(spec: LayerSpec, layer: nn.Module, config: Any) -> None:
    full, linear = sides(layer)
    kind = {(1, 0): Kind.FULL, (0, 1): Kind.LINEAR, (1, 1): Kind.PARALLEL, (0, 0): Kind.NONE}
    assert spec.kind is kind[len(full), len(linear)]
    if isinstance(spec.full, Gqa):
        check_gqa(spec.full, full[0], config)
    elif isinstance(spec.full, Mla):
        check_mla(spec.full, full[0])
    if spec.linear is not None:
        check_linear(spec.linear, linear[0], config)


@pytest.mark.parametrize(("model_type", "fields"), CASES, ids=[f"{t}-{i}" for i, (t, _) in enumerate(CASES)])
def test_plan_is_what_transformers_builds(model_type: str, fields: dict[str, Any]) -> None:
    plans = build_plans({"model_type": model_type, **fields})
    # transformers takes rope settings over from the dict it is given, so it gets its own.
    config = AutoConfig.for_model(model_type, **{k: _copied(v) for k, v in fields.items()})
    model = build(config)
    layers: Any = model.get_decoder().layers  # type: ignore[operator]
    assert len(plans.target) == len(layers)
    for spec, layer in zip(plans.target, layers, strict=True):
        check_layer(spec, layer, config)
    assert plans.vocab_size == config.vocab_size
    assert plans.hidden_size == config.hidden_size
    assert plans.max_positions == config.max_position_embeddings
    assert plans.draft is None
    # What transformers saves spells much of it differently.
    assert build_plans(config.to_dict()).target == plans.target


def _copied(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


def test_every_model_type_is_compared() -> None:
    wrapped = {"qwen3_5", "qwen3_5_moe"}  # their text configs are compared
    assert {t for t, _ in CASES} | wrapped | {"minimax_text_01"} == set(REGISTRY.model_types())


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_5_moe"])
def test_wrapped_config_is_its_text_config(model_type: str) -> None:
    text = {"model_type": f"{model_type}_text", "num_hidden_layers": 5}
    wrapped = build_plans({"model_type": model_type, "text_config": text, "vision_config": {"depth": 2}})
    assert wrapped.target == build_plans(text).target
    assert AutoConfig.for_model(model_type, text_config=text).text_config.layer_types == [
        f"{spec.kind.value}_attention" for spec in wrapped.target
    ]
