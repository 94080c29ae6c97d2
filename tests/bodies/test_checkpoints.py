"""Checkpoints as hubs have them: shards, dtypes, extras, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from braid_orchestrator.body import LoadRequest, load_body
from braid_orchestrator.layer_plan import build_plans, load_config
from braid_wire.errors import ConfigInvalid
from braid_wire.layers import GatedDelta, Gqa, Kind, LayerPlan, LayerSpec, Mla
from checkpoints import CASES, DENSE, HYBRID, LATENT, QWEN, Case
from goldens import GOLDENS, needs_goldens
from harness import BFLOAT16_OF_RANGE, FLOAT32_ABSOLUTE, bfloat16_rows, compare, load_reference
from safetensors.torch import load_file, save_file

LLAMA, TIED = DENSE[0], DENSE[1]
NEXT, QWEN35 = QWEN[0], QWEN[2]
BY_NAME = {str(case): case for case in CASES}


def load(model: Path, **changes: Any) -> object:
    """Load a body; `changes` are of its plans."""
    plans = replace(build_plans(load_config(model)), **changes)
    return load_body(LoadRequest(model, plans, torch.float32))


def edit_config(model: Path, **changes: Any) -> None:
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("case", [TIED, NEXT, QWEN35, HYBRID[0], HYBRID[2]], ids=str)
def test_shards_with_an_index(case: Case, tmp_path: Path) -> None:
    case.save(tmp_path, shard="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert compare(tmp_path).error <= FLOAT32_ABSOLUTE


def exact_slopes(model: Any) -> None:
    """transformers saves MiniMax's decay tables rounded; a checkpoint of the publisher has none."""
    for layer in model.model.layers:
        if layer.block_type == "linear_attention":
            layer.self_attn.slope_rate = layer.self_attn.get_slope_rate()
            tables = layer.self_attn.decay_factors(layer.self_attn.slope_rate)
            for name, table in zip(("query_decay", "key_decay", "diagonal_decay"), tables, strict=True):
                setattr(layer.self_attn, name, table)


@pytest.mark.parametrize("case", [LLAMA, NEXT, HYBRID[0], HYBRID[4], LATENT[1]], ids=str)
def test_bfloat16_on_disk_and_float32_in_memory(case: Case, tmp_path: Path) -> None:
    case.save(tmp_path, dtype=torch.bfloat16)
    oracle = load_reference(tmp_path)
    if case.family == "minimax":
        exact_slopes(oracle)
    assert compare(tmp_path, oracle).error <= FLOAT32_ABSOLUTE


@pytest.mark.parametrize("case", [DENSE[0], DENSE[14], QWEN[2], QWEN[4], *HYBRID[::2], *LATENT[::2]], ids=str)
def test_bfloat16_cell(case: Case, tmp_path: Path) -> None:
    ours, stock = bfloat16_rows(case.save(tmp_path, dtype=torch.bfloat16))
    assert ours.isfinite().all()
    assert ours.median() <= BFLOAT16_OF_RANGE
    # As near to float32 as transformers itself comes in this dtype.
    assert ours.median() <= 1.25 * stock.median()
    assert ours.quantile(0.9) <= 1.25 * stock.quantile(0.9) + 1e-3


@pytest.mark.parametrize(
    ("case", "lost"),
    [
        (LLAMA, "model.layers.1.self_attn.q_proj.weight"),
        (LLAMA, "lm_head.weight"),
        (NEXT, "model.layers.0.linear_attn.A_log"),
        (HYBRID[0], "model.layers.0.self_attn.dt_bias"),
    ],
    ids=str,
)
def test_a_missing_weight_is_named(case: Case, lost: str, tmp_path: Path) -> None:
    model = case.save(tmp_path)
    edit_weights(model, lambda weights: weights.pop(lost))
    with pytest.raises(ConfigInvalid, match=rf"lacks 1 weight.*{lost.rpartition('.')[0].rpartition('.')[2]}"):
        load(model)


def test_an_unknown_weight_is_named(tmp_path: Path) -> None:
    model = LLAMA.save(tmp_path)
    edit_weights(model, lambda weights: weights.update({"model.layers.0.self_attn.sinks": torch.ones(6)}))
    with pytest.raises(ConfigInvalid, match=r"1 weight\(s\) unknown .*sinks"):
        load(model)


def test_parts_that_are_not_run_may_be_there(tmp_path: Path) -> None:
    model = QWEN35.save(tmp_path)
    extras = {"mtp.fc.weight": torch.ones(2, 2), "model.visual.merger.weight": torch.ones(3)}
    edit_weights(model, lambda weights: weights.update(extras))
    load(model)


@pytest.mark.parametrize("wrap", [False, True])
def test_quantised_weights_are_refused_by_name_before_they_are_read(wrap: bool, tmp_path: Path) -> None:
    model = (QWEN[3] if wrap else LLAMA).save(tmp_path)
    (model / "model.safetensors").unlink()
    edit_config(model, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(ConfigInvalid, match="quantised \\(fp8\\)"):
        load(model)


@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
def test_rotary_that_depends_on_the_batch_is_refused(field: str, tmp_path: Path) -> None:
    model = LLAMA.save(tmp_path)
    edit_config(model, **{field: {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}})
    with pytest.raises(ConfigInvalid, match="dynamic"):
        load(model)


def test_no_weights_at_all(tmp_path: Path) -> None:
    model = LLAMA.save(tmp_path)
    (model / "model.safetensors").unlink()
    with pytest.raises(ConfigInvalid, match="cannot be loaded"):
        load(model)


GQA = Gqa(num_q_heads=6, num_kv_heads=2, head_dim=8, v_head_dim=8, scale=8**-0.5)
GDN = GatedDelta(num_k_heads=2, num_v_heads=2, k_head_dim=8, v_head_dim=8, conv_width=4, scale=8**-0.5)


def swapped(spec: LayerSpec) -> LayerSpec:
    """The layer, said to be of the other kind."""
    if spec.kind is Kind.FULL:
        return LayerSpec(spec.layer_id, Kind.LINEAR, linear=GDN)
    return LayerSpec(spec.layer_id, Kind.FULL, full=GQA)


@pytest.mark.parametrize(
    "case", [LLAMA, NEXT, QWEN35, QWEN[4], *(HYBRID[i] for i in (0, 2, 4, 6)), *LATENT[::2]], ids=str
)
@pytest.mark.parametrize("layer_id", [0, 1])
def test_a_layer_of_the_other_kind_is_refused(case: Case, layer_id: int, tmp_path: Path) -> None:
    model = case.save(tmp_path)
    plan = build_plans(load_config(model)).target
    layers = [swapped(spec) if spec.layer_id == layer_id else spec for spec in plan]
    with pytest.raises(ConfigInvalid, match=rf"layer {layer_id} ") as refused:
        load(model, target=LayerPlan(plan.role, tuple(layers)))
    assert refused.value.metadata["layer_id"] == str(layer_id)


def test_a_plan_that_lacks_a_layer_is_refused(tmp_path: Path) -> None:
    model = LLAMA.save(tmp_path)
    plan = build_plans(load_config(model)).target
    with pytest.raises(ConfigInvalid, match=r"layers \[0, 1, 2\], its plan \[0, 2\]"):
        load(model, target=LayerPlan(plan.role, (plan.layer(0), plan.layer(2))))


@pytest.mark.parametrize("case", [LLAMA, QWEN35, LATENT[0]], ids=str)
def test_another_scale_than_the_models_is_refused(case: Case, tmp_path: Path) -> None:
    model = case.save(tmp_path)
    plan = build_plans(load_config(model)).target
    layers = tuple(
        replace(spec, full=replace(spec.full, scale=0.5)) if isinstance(spec.full, Gqa | Mla) else spec
        for spec in plan
    )
    with pytest.raises(ConfigInvalid, match="scale"):
        load(model, target=LayerPlan(plan.role, layers))


@needs_goldens
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.pop("model.layers.2.mlp.experts.3.up_proj.weight"),
            "lacks 1 .*experts.3.up",
        ),
        (lambda weights: weights.pop("model.layers.8.eh_proj.weight"), "lacks 1 .*eh_proj"),
        (
            lambda weights: weights.update({"model.layers.1.attention.x": torch.ones(1)}),
            "unknown.*attention.x",
        ),
        (
            lambda weights: weights.update({"model.norm.weight": torch.ones(3)}),
            "model.norm.weight is \\[3\\]",
        ),
    ],
)
def test_ling_names_wrong_weights(change: Callable[..., Any], message: str, tmp_path: Path) -> None:
    model = Path(shutil.copytree(GOLDENS / "ling_2_6_tiny", tmp_path / "m"))
    edit_weights(model, change)
    with pytest.raises(ConfigInvalid, match=message):
        load(model)


@needs_goldens
def test_ling_without_mtp_weights_has_no_draft(tmp_path: Path) -> None:
    model = Path(shutil.copytree(GOLDENS / "ling_2_6_tiny", tmp_path / "m"))

    def drop(weights: dict[str, torch.Tensor]) -> None:
        for key in [key for key in weights if key.startswith("model.layers.8.")]:
            del weights[key]

    edit_weights(model, drop)
    assert not load(model).has_draft  # type: ignore[attr-defined]


@needs_goldens
@pytest.mark.parametrize(
    "change",
    [
        {"linear_silu": True},
        {"rope_interleave": False},
        {"score_function": "softmax"},
        {"use_qkv_bias": True},
    ],
    ids=str,
)
def test_ling_variants_that_nobody_published_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    model = Path(shutil.copytree(GOLDENS / "ring_2_5_tiny", tmp_path / "m"))
    edit_config(model, **change)
    with pytest.raises(ConfigInvalid, match=next(iter(change))):
        load(model)
