"""Families with Mamba and short-conv layers against one transformers forward without a cache."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from braid_orchestrator.body import Body, LoadRequest, load_body
from braid_orchestrator.body.base import DispatchPoint
from braid_orchestrator.body.checkpoint import load_pretrained
from braid_orchestrator.body.families.zamba import ZAMBA2, SharedBlock
from braid_orchestrator.dispatch import Dispatch
from braid_orchestrator.layer_plan import build_plans, load_config
from braid_wire.errors import ConfigInvalid
from braid_wire.layers import Kind, LayerPlan
from harness import (
    BFLOAT16_OF_RANGE,
    FLOAT32_ABSOLUTE,
    SCHEDULES,
    bfloat16_error,
    cell,
    check,
    compare,
    load_reference,
    reference,
    save_random,
    score,
    sequences,
    worst,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mamba_checkpoints import FAMILIES, lively, save

VARIANTS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("nemotron_h", {}),
    ("nemotron_h", {"use_conv_bias": False, "n_groups": 1, "conv_kernel": 2, "use_bias": True}),
    ("nemotron_h", {"n_groups": 6, "moe_latent_size": 16, "time_step_min": 0.3, "tie_word_embeddings": True}),
    ("bamba", {}),
    (
        "bamba",
        {"mamba_conv_bias": False, "mamba_n_groups": 1, "mamba_proj_bias": True, "attention_bias": True},
    ),
    ("bamba", {"time_step_limit": (0.2, 0.6), "mamba_d_conv": 3, "mamba_n_groups": 6}),
    ("bamba", {"attn_layer_indices": None}),
    ("granitemoehybrid", {}),
    ("granitemoehybrid", {"position_embedding_type": "rope", "num_local_experts": 0}),
    ("granitemoehybrid", {"tie_word_embeddings": True, "mamba_conv_bias": False, "attention_bias": True}),
    ("falcon_h1", {}),
    ("falcon_h1", {"mamba_norm_before_gate": True, "mamba_n_groups": 1}),
    ("falcon_h1", {"mamba_rms_norm": False, "mamba_d_ssm": None, "projectors_bias": True}),
    ("zamba2", {}),
    ("zamba2", {"num_mem_blocks": 1, "use_shared_attention_adapter": False, "use_mem_rope": False}),
    ("zamba2", {"num_mem_blocks": 3, "use_shared_attention_adapter": False, "add_bias_linear": True}),
    ("jamba", {}),
    ("jamba", {"mamba_conv_bias": False, "mamba_proj_bias": True, "mamba_dt_rank": "auto", "num_experts": 1}),
    ("jamba", {"mamba_d_conv": 2, "mamba_d_state": 16, "attn_layer_period": 2, "tie_word_embeddings": True}),
    ("lfm2", {}),
    ("lfm2", {"conv_bias": True, "conv_L_cache": 4, "full_attn_idxs": [0, 4]}),
    ("lfm2_moe", {}),
)


def variant_id(value: object) -> str:
    """A test's name from the config fields that it changes."""
    return value if isinstance(value, str) else "+".join(value) or "usual"  # type: ignore[arg-type]


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=variant_id)
def test_every_schedule_matches_one_forward(family: str, changes: Mapping[str, Any], tmp_path: Path) -> None:
    found = check(save(family, tmp_path, **changes))
    assert found.logit_range > 1  # else the bound would say nothing


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family: str, tmp_path: Path) -> None:
    # A router's near-tie may fall otherwise in bfloat16, in transformers too: let every expert be chosen.
    chosen = {"jamba": {"num_experts": 2}, "granitemoehybrid": {"num_experts_per_tok": 4}}
    model_class, config = FAMILIES[family]
    model = save_random(
        model_class, config(**chosen.get(family, {})), tmp_path, dtype=torch.bfloat16, prepare=lively
    )
    assert bfloat16_error(model) <= BFLOAT16_OF_RANGE


@pytest.mark.parametrize("family", ["falcon_h1", "zamba2", "jamba", "lfm2"])
def test_the_reference_kernels_and_calls_instead_of_a_walk(family: str, tmp_path: Path) -> None:
    model = save(family, tmp_path)
    with cell(model, "reference", dispatch=Dispatch.RPC) as running:
        prompts = sequences(running.plans.vocab_size, (1, 9, 14))
        found = score(running, prompts, SCHEDULES[-1])
    assert worst(found, reference(load_reference(model), prompts)) <= FLOAT32_ABSOLUTE


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    heads=st.integers(1, 5),
    head_dim=st.integers(1, 9),
    groups=st.integers(1, 3),
    state=st.integers(1, 40),
    width=st.integers(2, 6),
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_any_shape_of_mamba2(
    heads: int,
    head_dim: int,
    groups: int,
    state: int,
    width: int,
    lengths: list[int],
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    model = save(
        "falcon_h1", tmp_path_factory.mktemp("shape"), seed=seed, num_hidden_layers=2,
        mamba_d_ssm=heads * groups * head_dim, mamba_n_heads=heads * groups, mamba_n_groups=groups,
        mamba_d_state=state, mamba_d_conv=width,
    )  # fmt: skip
    found = compare(model, schedules=SCHEDULES[-1:], lengths=lengths, seed=seed)
    assert found.error <= FLOAT32_ABSOLUTE


@settings(max_examples=6, deadline=None)
@given(
    state=st.integers(1, 20),
    rank=st.integers(1, 20),
    expand=st.integers(1, 3),
    width=st.integers(2, 6),
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_any_shape_of_mamba1(
    state: int,
    rank: int,
    expand: int,
    width: int,
    lengths: list[int],
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    model = save(
        "jamba", tmp_path_factory.mktemp("shape"), seed=seed, num_hidden_layers=2, num_experts=1,
        mamba_d_state=state, mamba_dt_rank=rank, mamba_expand=expand, mamba_d_conv=width,
    )  # fmt: skip
    found = compare(model, schedules=SCHEDULES[-1:], lengths=lengths, seed=seed)
    assert found.error <= FLOAT32_ABSOLUTE


def test_nemotron_blocks_spelled_as_a_pattern(tmp_path: Path) -> None:
    """Published configs say `hybrid_override_pattern`; MLP and MoE blocks keep their ids."""
    model = save("nemotron_h", tmp_path)
    config = load_config(model)
    del config["layers_block_type"]
    config["hybrid_override_pattern"] = "M-*EM*"
    (model / "config.json").write_text(json.dumps(config))
    assert check(model).mechanisms == ("gqa", "mamba2")
    assert [spec.kind for spec in build_plans(config).target] == [
        Kind.LINEAR, Kind.NONE, Kind.FULL, Kind.NONE, Kind.LINEAR, Kind.FULL,
    ]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_no_mask_reaches_a_layer(family: str, tmp_path: Path) -> None:
    """A causal mask over packed rows would hide rows of a sequence behind those of its neighbours."""
    model = save(family, tmp_path)
    seen: list[object] = []
    with cell(model, segments="off") as running:
        for layer in running.body.model.model.layers:
            layer.register_forward_pre_hook(
                lambda _module, _args, kwargs: seen.extend(
                    value for name, value in kwargs.items() if "mask" in name
                ),
                with_kwargs=True,
            )
        score(running, sequences(running.plans.vocab_size, (3, 5)))
    assert not any(value is not None for value in seen)
    assert seen or family == "zamba2"  # whose layers take them by position


def body_by(model: Path, target: LayerPlan | None = None) -> Body:
    """The body of a checkpoint under its own plan, or under another one."""
    plans = build_plans(load_config(model))
    return load_body(
        LoadRequest(model, dataclasses.replace(plans, target=target or plans.target), torch.float32)
    )


OTHER_KINDS = [
    (family, first, second)
    for family, first, second in (
        ("nemotron_h", 0, 2), ("nemotron_h", 1, 2), ("nemotron_h", 3, 4), ("bamba", 0, 1),
        ("granitemoehybrid", 2, 3), ("jamba", 0, 1), ("lfm2", 1, 2), ("lfm2_moe", 0, 1), ("zamba2", 0, 1),
    )
]  # fmt: skip


@pytest.mark.parametrize(("family", "first", "second"), OTHER_KINDS)
def test_a_module_of_the_other_kind_is_refused(family: str, first: int, second: int, tmp_path: Path) -> None:
    """Two layers' specs change places; the modules stay."""
    model = save(family, tmp_path)
    layers = list(build_plans(load_config(model)).target)
    layers[first], layers[second] = (
        dataclasses.replace(layers[second], layer_id=first),
        dataclasses.replace(layers[first], layer_id=second),
    )
    with pytest.raises(ConfigInvalid, match=rf"layer {first} is ") as caught:
        body_by(model, LayerPlan(build_plans(load_config(model)).target.role, tuple(layers)))
    assert caught.value.metadata["layer_id"] == str(first)


def test_a_config_whose_ids_are_off_by_one_is_refused(tmp_path: Path) -> None:
    """The plan of a 1-indexed list does not fit the modules that transformers built from a 0-indexed one."""
    model = save("bamba", tmp_path)
    shifted = build_plans({**load_config(model), "attn_layer_indices": [0, 2]}).target
    with pytest.raises(ConfigInvalid, match="layer 0 is full"):
        body_by(model, shifted)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("nemotron_h", {"mamba_hidden_act": "gelu"}),
        ("bamba", {"hidden_act": "relu"}),
        ("granitemoehybrid", {"hidden_act": "gelu"}),
        ("falcon_h1", {"hidden_act": "gelu"}),
        ("jamba", {"hidden_act": "gelu"}),
    ],
)
def test_another_activation_is_refused_by_name(
    family: str, changes: Mapping[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigInvalid, match=next(iter(changes.values()))):
        body_by(save(family, tmp_path, **changes))


@pytest.mark.parametrize(
    ("family", "changes", "what"),
    [
        ("nemotron_h", {"time_step_min": 0.2}, "bounds of dt"),
        ("granitemoehybrid", {"attention_multiplier": 0.3}, "softmax scale"),
        ("jamba", {"rms_norm_eps": 1e-3}, "eps"),
    ],
)
def test_a_plan_with_other_constants_is_refused(
    family: str, changes: Mapping[str, float], what: str, tmp_path: Path
) -> None:
    model = save(family, tmp_path)
    with pytest.raises(ConfigInvalid, match=what):
        body_by(model, build_plans({**load_config(model), **changes}).target)


def test_layers_that_share_one_block_keep_their_own_ids(tmp_path: Path) -> None:
    """Even one module instance in several layers: adapters go around it, never into it."""
    model = save("zamba2", tmp_path, num_mem_blocks=1)
    plans = build_plans(load_config(model))
    loaded = load_pretrained(LoadRequest(model, plans, torch.float32))
    layers = loaded.model.layers
    shared = [layer_id for layer_id, spec in enumerate(plans.target) if spec.kind is Kind.PARALLEL]
    block = layers[shared[0]].shared_transformer
    parts = dict(block.named_children())
    for layer_id in shared:
        layers[layer_id].shared_transformer = block
    seen: list[tuple[int, Kind | None]] = []

    def attend(layer_id: int, inputs: Mapping[str, torch.Tensor], side: Kind | None = None) -> torch.Tensor:
        seen.append((layer_id, side))
        geometry = plans.target.layer(layer_id).geometry(side or Kind.LINEAR)
        return torch.zeros(4, *geometry.output())

    point = DispatchPoint()
    for layer_id in range(len(layers)):
        ZAMBA2.adapt(layers[layer_id], plans.target.layer(layer_id), point)
    assert all(isinstance(layers[layer_id].shared_transformer, SharedBlock) for layer_id in shared)
    assert dict(block.named_children()) == parts
    with point.leads_to(attend), torch.inference_mode():
        loaded.model(input_ids=torch.arange(4)[None], use_cache=False)
    both = [(layer_id, side) for layer_id in shared for side in (Kind.FULL, Kind.LINEAR)]
    linear = [(spec.layer_id, Kind.LINEAR) for spec in plans.target if spec.kind is Kind.LINEAR]
    assert seen == sorted(both + linear, key=lambda item: item[0])
