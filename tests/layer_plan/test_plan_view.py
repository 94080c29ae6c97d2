"""The plan on a terminal (80 columns, no colours) and as JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from braid_orchestrator.layer_plan import build_plans
from braid_orchestrator.plan_view import human_bytes, pattern, plan_command, render, strip, to_json
from braid_wire.errors import ConfigInvalid, RequestInvalid
from braid_wire.layers import Kind, digest
from rich.console import Console

CONFIGS = Path(__file__).parent / "configs"
SNAPSHOTS = Path(__file__).parent / "snapshots"

LETTERS = {"F": Kind.FULL, "L": Kind.LINEAR, "P": Kind.PARALLEL, "-": Kind.NONE}


def printed(config: Path, encoding: str = "utf-8", width: int = 80, **options: Any) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    console = Console(file=file, width=width, no_color=True, legacy_windows=False)
    assert plan_command(config, console=console, **options) == 0
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize(
    ("stem", "options"),
    [
        ("golden-ling_2_6_tiny", {}),
        ("kimi-linear-48b-a3b", {"compact": True}),
        ("nemotron-3-nano-30b-a3b", {"compact": True, "context": 1_000_000}),
        ("minimax-text-01", {"compact": True}),
    ],
)
def test_snapshot(stem: str, options: dict[str, Any]) -> None:
    """To accept a new look, write what is printed here to tests/layer_plan/snapshots."""
    text = "\n".join(line.rstrip() for line in printed(CONFIGS / f"{stem}.json", **options).splitlines())
    assert text + "\n" == (SNAPSHOTS / f"{stem}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("stem", sorted(file.stem for file in CONFIGS.glob("*.json")))
def test_fits_80_columns_in_plain_text(stem: str) -> None:
    text = printed(CONFIGS / f"{stem}.json")
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "\x1b" not in text


@pytest.mark.parametrize("model_type", ["falcon_h1", "zamba2", "jamba", "lfm2", "deepseek_v3", "cohere2"])
def test_every_mechanism_fits(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert max(len(line) for line in printed(tmp_path, compact=True).splitlines()) <= 80


def test_a_terminal_without_unicode(configs: dict[str, dict[str, Any]]) -> None:
    plans = build_plans(configs["nemotron-3-nano-30b-a3b"])
    assert "-.-.-#.-.-.-#" in strip(plans.target, 80, ascii_only=True).plain
    assert "▪·▪·▪█·▪·▪·▪█" in strip(plans.target, 80).plain


def test_colours_go_by_kind(configs: dict[str, dict[str, Any]]) -> None:
    file = io.StringIO()
    render(
        build_plans(configs["bench-10m"]),
        1,
        Console(file=file, width=80, force_terminal=True, color_system="standard"),
    )
    assert "\x1b[36m▪" in file.getvalue() and "\x1b[35m█" in file.getvalue()


def test_rows_are_separate_unless_compact(configs: dict[str, dict[str, Any]]) -> None:
    config = CONFIGS / "kimi-linear-48b-a3b.json"
    long, short = printed(config), printed(config, compact=True)
    assert long.count("kimi_delta") == 20
    assert short.count("kimi_delta") == 7
    assert "24-25" in short and "24-25" not in long


def test_the_strip_keeps_ids_under_the_ruler(configs: dict[str, dict[str, Any]]) -> None:
    """Rows hold whole periods, so that what repeats stands in columns."""
    lines = strip(build_plans(configs["minimax-text-01"]).target, 80).plain.splitlines()
    assert lines[0].split() == [str(i) for i in range(0, 72, 8)]
    assert lines[1].strip() == "▪▪▪▪▪▪▪█" * 9
    assert lines[2].split() == ["72"]
    ruler, row = lines[0], lines[1]
    assert row[ruler.index("64") : ruler.index("64") + 8] == "▪▪▪▪▪▪▪█"


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        ("LLLF" * 12, "3×linear + 1×full, ×12"),
        ("P" * 32, "32×parallel"),
        ("F", "1×full"),
        ("LF", "1×linear + 1×full"),
        ("LLLF" * 6 + "LLF", "3×linear + 1×full, ×6, then 2×linear + 1×full"),
        ("LLLLLFLLF", "5×linear + 1×full + 2×linear + 1×full"),
        ("L-" * 10 + "LFL-LF-LF", "1×linear + 1×none, ×10, then 9 others"),
        ("LLFLFLLLFLLFLLLLFLFLLLLLFLF", "irregular"),
    ],
)
def test_pattern(kinds: str, words: str) -> None:
    assert pattern([LETTERS[letter] for letter in kinds]) == words


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1152, "1.12 KiB"),
        (2 * 1024**2, "2 MiB"),
        (100 * 1024**2, "100 MiB"),
        (1536 * 1024**3, "1.5 TiB"),
    ],
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_json_is_stable() -> None:
    """Keys, order and values; other programs read this."""
    text = printed(CONFIGS / "golden-ling_2_6_tiny.json", json_out=True, context=10)
    found = json.loads(text)
    plans = build_plans(json.loads((CONFIGS / "golden-ling_2_6_tiny.json").read_text()))
    linear = {
        "layer_id": 0,
        "kind": "linear",
        "mechanism": "lightning",
        "service": "linear",
        "geometry": {
            "full": None,
            "linear": {
                "mechanism": "lightning",
                "num_heads": 4,
                "head_dim": 16,
                "scale": "0.25",
                "activation": "none",
            },
        },
        "state_bytes": 4096,
        "kv_bytes_per_token": 0,
    }
    full = {
        "layer_id": 7,
        "kind": "full",
        "mechanism": "mla",
        "service": "full",
        "geometry": {
            "full": {
                "mechanism": "mla",
                "num_heads": 4,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 8,
                "v_head_dim": 16,
                "kv_lora_rank": 32,
                "scale": repr(24**-0.5),
            },
            "linear": None,
        },
        "state_bytes": 0,
        "kv_bytes_per_token": 160,
    }
    assert plans.draft is not None
    expected = {
        "family": "bailing_moe_v2_5",
        "model_type": "bailing_hybrid",
        "architecture": "BailingMoeV2_5ForCausalLM",
        "dtype": "float32",
        "vocab_size": 320,
        "hidden_size": 64,
        "max_positions": 4096,
        "target": {
            "layers": [*({**linear, "layer_id": i} for i in range(7)), full],
            "counts": {"full": 1, "linear": 7, "parallel": 0, "none": 0},
            "digest": digest(plans.target),
        },
        "draft": {
            "layers": [{**full, "layer_id": 0}],
            "counts": {"full": 1, "linear": 0, "parallel": 0, "none": 0},
            "digest": digest(plans.draft),
        },
        "totals": {"context": 10, "kv_bytes": 3200, "state_bytes": 28672, "total_bytes": 31872},
        "notes": ["mtp: 1 layer(s) as draft layer 0, stored as layer 8 in the checkpoint"],
    }
    assert found == expected
    assert list(found) == list(expected)
    assert text == printed(CONFIGS / "golden-ling_2_6_tiny.json", json_out=True, context=10)


def test_json_without_bounds_is_still_json() -> None:
    """Mamba-2 has an unbounded time step, which JSON cannot say as a number."""
    found = json.loads(printed(CONFIGS / "nemotron-3-nano-30b-a3b.json", json_out=True), parse_constant=str)
    assert found["target"]["layers"][0]["geometry"]["linear"]["dt_max"] == "inf"
    assert found["target"]["layers"][1] == {
        "layer_id": 1,
        "kind": "none",
        "mechanism": "-",
        "service": None,
        "geometry": {"full": None, "linear": None},
        "state_bytes": 0,
        "kv_bytes_per_token": 0,
    }


def test_json_is_not_wrapped_by_a_narrow_terminal() -> None:
    wide, narrow = (printed(CONFIGS / "qwen3.6-27b.json", json_out=True, width=width) for width in (400, 20))
    assert wide == narrow


def test_roles(configs: dict[str, dict[str, Any]]) -> None:
    plans = build_plans(configs["qwen3.6-27b"])
    both, target, draft = (to_json(plans, 100, role) for role in ("both", "target", "draft"))
    assert target["draft"] is None and draft["target"] is None
    assert (target["target"], draft["draft"]) == (both["target"], both["draft"])
    parts = target["totals"]["total_bytes"] + draft["totals"]["total_bytes"]
    assert both["totals"]["total_bytes"] == parts


def test_refusals(tmp_path: Path, configs: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(ConfigInvalid):
        plan_command(tmp_path)
    dense = CONFIGS / "qwen2.5-7b-dense.json"
    for options in ({"role": "draft"}, {"role": "verify"}, {"context": -1}):
        with pytest.raises(RequestInvalid):
            printed(dense, **options)


def test_windows_and_long_contexts_are_pointed_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mistral", "max_position_embeddings": 1024}')
    text = printed(tmp_path, compact=True)
    assert "w4096" in text
    assert "counted with their full KV" in text
    assert "exceeds the model's 1,024 positions" in text


@pytest.mark.parametrize(
    "stem", ["kimi-linear-48b-a3b", "ling-2.6-flash", "golden-ling_2_6_tiny", "golden-ring_2_5_tiny"]
)
def test_mla_layers_are_reported_with_the_bytes_of_their_latents(stem: str) -> None:
    """One latent and one rotary key per token, shared by all heads; linear layers keep nothing per token."""
    config = json.loads((CONFIGS / f"{stem}.json").read_text())
    width = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    itemsize = 4 if config.get("torch_dtype", config.get("dtype")) == "float32" else 2
    layers = to_json(build_plans(config))["target"]["layers"]
    assert {layer["kv_bytes_per_token"] for layer in layers if layer["kind"] == "full"} == {width * itemsize}
    assert {layer["kv_bytes_per_token"] for layer in layers if layer["kind"] == "linear"} == {0}
