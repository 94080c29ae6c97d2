"""Published configs: kinds, ids and sizes, against lists and sums written by hand."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from braid_orchestrator.layer_plan import build_plans, load_config, memory_per_sequence, plan_memory
from braid_wire.errors import ConfigInvalid, LayerMisrouted, LayerUnknown, RequestInvalid
from braid_wire.layers import KimiDelta, Kind, Lightning, Mamba2, Mla, Role

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared"


@dataclass(frozen=True)
class Expected:
    family: str
    layers: int
    full: list[int]
    kv_bytes: int  # per token, all layers of the target
    state_bytes: int  # one version, all layers of the target
    none: list[int] = field(default_factory=list)
    draft: list[str] | None = None


# kv: layers x heads x (k + v) x bytes. state: layers x (heads x dk x dv x 4 + channels x 3 x bytes).
EXPECTED = {
    "bench-10m": Expected("qwen3_5", 8, [3, 7], 2 * 2 * 128 * 4, 6 * (8 * 64 * 64 * 4 + 1024 * 3 * 4)),
    "granite-4.0-h-350m": Expected(
        "granitemoehybrid",
        32,
        [10, 13, 17, 27],
        4 * 32 * 256 * 2,
        28 * (128 * 256 * 64 * 4 + (8192 + 512) * 3 * 2),
    ),
    "kimi-linear-48b-a3b": Expected(
        "kimi_linear",
        27,
        [3, 7, 11, 15, 19, 23, 26],
        7 * 576 * 2,
        20 * (32 * 128 * 128 * 4 + 12288 * 3 * 2),
    ),
    "ling-2.6-flash": Expected(
        "bailing_moe_v2_5", 32, [7, 15, 23, 31], 4 * 576 * 2, 28 * 32 * 128 * 128 * 4, draft=["full"]
    ),
    "minimax-text-01": Expected(
        "minimax_text_01",
        80,
        [7, 15, 23, 31, 39, 47, 55, 63, 71, 79],
        10 * 8 * 256 * 2,
        70 * 64 * 128 * 128 * 4,
    ),
    "nemotron-3-nano-30b-a3b": Expected(
        "nemotron_h",
        52,
        [5, 12, 19, 26, 33, 42],
        6 * 2 * 256 * 2,
        23 * (64 * 128 * 64 * 4 + (4096 + 2048) * 3 * 2),
        none=[1, 3, 6, 8, 10, 13, 15, 17, 20, 22, 24, 27, 29, 31, 34, 36, 38, 40, 43, 45, 47, 49, 51],
    ),
    "qwen2.5-7b-dense": Expected("qwen2", 28, list(range(28)), 28 * 4 * 256 * 2, 0),
    "qwen3-next-80b-a3b": Expected(
        "qwen3_next",
        48,
        [3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47],
        12 * 2 * 512 * 2,
        36 * (32 * 128 * 128 * 4 + 8192 * 3 * 2),
    ),
    "qwen3.6-27b": Expected(
        "qwen3_5",
        64,
        [3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47, 51, 55, 59, 63],
        16 * 4 * 512 * 2,
        48 * (48 * 128 * 128 * 4 + 10240 * 3 * 2),
        draft=["full"],
    ),
    "qwen3.6-35b-a3b": Expected(
        "qwen3_5_moe",
        40,
        [3, 7, 11, 15, 19, 23, 27, 31, 35, 39],
        10 * 2 * 512 * 2,
        30 * (32 * 128 * 128 * 4 + 8192 * 3 * 2),
    ),
    "golden-ling_2_6_tiny": Expected("bailing_moe_v2_5", 8, [7], 40 * 4, 7 * 4 * 16 * 16 * 4, draft=["full"]),
    "golden-ring_2_5_tiny": Expected("bailing_moe_v2_5", 8, [3, 7], 2 * 40 * 4, 6 * 4 * 16 * 16 * 4),
}


def check(config: dict[str, Any], expected: Expected) -> None:
    plans = build_plans(config)
    target = plans.target
    assert plans.family == expected.family
    assert [spec.layer_id for spec in target] == list(range(expected.layers))
    assert [spec.layer_id for spec in target.side(Kind.FULL)] == expected.full
    linear = set(range(expected.layers)) - set(expected.full) - set(expected.none)
    assert {spec.layer_id for spec in target.side(Kind.LINEAR)} == linear
    assert [spec.layer_id for spec in target if spec.kind is Kind.NONE] == expected.none
    itemsize = 4 if plans.dtype == "float32" else 2
    one, many = (plan_memory(target, context, itemsize) for context in (1, 1000))
    assert (one.kv_bytes, one.state_bytes) == (expected.kv_bytes, expected.state_bytes)
    assert (many.kv_bytes, many.state_bytes) == (1000 * expected.kv_bytes, expected.state_bytes)
    draft = plans.draft
    assert (draft and [spec.kind.value for spec in draft]) == expected.draft
    if draft is not None:
        assert draft.role is Role.DRAFT
        assert [spec.layer_id for spec in draft] == list(range(len(draft)))
        assert draft.layers[0].full == target.layers[expected.full[0]].full


@pytest.mark.parametrize("stem", sorted(EXPECTED))
def test_kept_config(configs: dict[str, dict[str, Any]], stem: str) -> None:
    check(configs[stem], EXPECTED[stem])


def test_every_kept_config_is_expected(configs: dict[str, dict[str, Any]]) -> None:
    assert set(configs) == set(EXPECTED)


def shared_files() -> list[Path]:
    return sorted([*SHARED.glob("configs/*.json"), *SHARED.glob("goldens/*/config.json")])


def test_shared_configs_are_the_kept_ones(configs: dict[str, dict[str, Any]]) -> None:
    """Where the shared folder exists, what is kept beside the tests must not have drifted from it."""
    files = shared_files()
    if not files:
        pytest.skip("no shared/ beside the repository: the configs kept beside the tests stand alone")
    for file in files:
        stem = f"golden-{file.parent.name}" if file.name == "config.json" else file.stem
        config = load_config(file)
        assert config == configs[stem], stem
        check(config, EXPECTED[stem])


def test_kimi_ids_are_one_indexed(configs: dict[str, dict[str, Any]]) -> None:
    config = configs["kimi-linear-48b-a3b"]
    target = build_plans(config).target
    assert config["linear_attn_config"]["full_attn_layers"][0] == 4
    assert target.layer(3).kind is Kind.FULL
    assert target.layer(4).kind is Kind.LINEAR
    assert target.layer(0).linear == KimiDelta(32, 128, 4, 128**-0.5, gate_lower_bound=0.0)


def test_latent_pages_are_576_wide(configs: dict[str, dict[str, Any]]) -> None:
    for stem, layer_id in (("kimi-linear-48b-a3b", 3), ("ling-2.6-flash", 7)):
        geometry = build_plans(configs[stem]).target.layer(layer_id).full
        assert geometry == Mla(32, 128, 64, 128, 512, 192**-0.5)
        assert geometry is not None and geometry.caches() == {"latent": (576,)}


def test_a_none_layer_is_known_and_runs_nowhere(configs: dict[str, dict[str, Any]]) -> None:
    target = build_plans(configs["nemotron-3-nano-30b-a3b"]).target
    assert target.layer(0).linear == Mamba2(64, 64, 128, 8, 4, dt_min=0.001)
    for side in (Kind.FULL, Kind.LINEAR):
        with pytest.raises(LayerMisrouted):
            target.layer(1).geometry(side)
    with pytest.raises(LayerUnknown):
        target.layer(52)


def test_lightning_scales_differ(configs: dict[str, dict[str, Any]]) -> None:
    ling = build_plans(configs["ling-2.6-flash"]).target.layer(0).linear
    minimax = build_plans(configs["minimax-text-01"]).target.layer(0).linear
    assert ling == Lightning(32, 128, 128**-0.5, "none")
    assert minimax == Lightning(64, 128, 1.0, "silu")


def test_dense_model_has_an_empty_linear_side(configs: dict[str, dict[str, Any]]) -> None:
    plans = build_plans(configs["qwen2.5-7b-dense"])
    assert plans.target.side(Kind.LINEAR) == ()
    assert plans.target.count(Kind.FULL) == len(plans.target)
    assert plans.draft is None


def test_memory_counts_the_draft_too(configs: dict[str, dict[str, Any]]) -> None:
    plans = build_plans(configs["qwen3.6-27b"])
    assert plans.draft is not None
    target, draft = plan_memory(plans.target, 100, 2), plan_memory(plans.draft, 100, 2)
    both = memory_per_sequence(plans, 100, 2)
    assert both.total_bytes == target.total_bytes + draft.total_bytes
    assert draft.kv_bytes == 100 * 4 * 512 * 2
    halved = memory_per_sequence(plans, 100, 2, state_itemsize=2)
    assert both.state_bytes - halved.state_bytes == 48 * 48 * 128 * 128 * 2
    with pytest.raises(RequestInvalid):
        plan_memory(plans.target, -1, 2)


def test_facts_of_the_model(configs: dict[str, dict[str, Any]]) -> None:
    plans = build_plans(configs["qwen3.6-27b"])
    assert (plans.model_type, plans.architecture) == ("qwen3_5", "Qwen3_5ForConditionalGeneration")
    assert (plans.dtype, plans.vocab_size, plans.hidden_size) == ("bfloat16", 248320, 5120)
    assert plans.max_positions == 262144
    assert "wrapped under text_config" in plans.notes


def test_load_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert load_config(tmp_path) == load_config(tmp_path / "config.json") == {"model_type": "llama"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "JSON object"),
        (b"null", "JSON object"),
        (b"{}", "model_type"),
        (b'{"model_type": null}', "model_type"),
        (b'{"model_type": 3}', "model_type"),
    ],
)
def test_load_config_refuses(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigInvalid, match=says):
        load_config(tmp_path)


def test_load_config_without_a_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.json"):
        with pytest.raises(ConfigInvalid, match="cannot be read"):
            load_config(path)


def test_infinity_survives_the_reader(tmp_path: Path) -> None:
    """Both ways in which config files write an unbounded time step."""
    for limit in ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}]):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "bamba", "time_step_limit": limit}))
        geometry = build_plans(load_config(tmp_path)).target.layer(0).linear
        assert isinstance(geometry, Mamba2) and (geometry.dt_min, geometry.dt_max) == (0.0, float("inf"))
