"""`benchmarks/plots.py`: every report gives a picture, the same one every time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PLOTS = Path(__file__).resolve().parents[2] / "benchmarks" / "plots.py"
SIZES = {"dtype": "float32", "threads": 1, "repeats": 5, "spread": 0.1}


def report(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "bench": name,
        "command": f"braid bench {name}",
        "date": "2026-01-02T03:04:05+00:00",
        "machine": {"cpu": "Some <CPU> & Co", "cores": 2, "features": []},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "rows": [{"bench": name, **SIZES, **row} for row in rows],
    }


def reports() -> dict[str, dict[str, Any]]:
    """As the commands write them, with only what the pictures need."""
    peers = {"tokens_per_s": 700.0, "tokens_per_s_transformers": 350.0, "tokens_per_s_embedded": 800.0}
    hops = {"hop_us_p50": 20.0, "hop_us_p90": 40.0, "hop_us_p99": 90.0}
    layer = {"hop_us_p50": 20.0, "kernel_us_p50_full": 50.0, "kernel_us_p50_linear": 30.0}
    memory = {"memory_bytes": 3 << 20, "memory_bytes_planned": 2 << 20, "memory_state_bytes": 1 << 20}
    step = {"step_us": 3000.0, "step_us_embedded": 2500.0, **layer, **memory}
    served = {f"{name}_ms_p{p}": float(p) for name in ("ttft", "itl", "e2e") for p in (50, 90, 95, 99)}
    lanes = {f"{key}_{name}": 0.5 for key in ("waiting", "ratio") for name in ("two_lanes", "auto")}
    return {
        "decode": report("decode", [{"batch": batch, "context": 512, **peers} for batch in (1, 8)]),
        "prefill": report("prefill", [{"batch": 1, "context": 2048, **peers}]),
        "hop": report(
            "hop",
            [
                {"transport": name, "load": load, "batch": 1, "context": 128, **hops}
                for load in ("free", "loaded")
                for name in ("doorbells", "grpc_unary")
            ],
        ),
        "scale": report(
            "scale",
            [
                {"sweep": sweep, "layers": size, "batch": size, "context": size, **step}
                for sweep in ("layers", "batch", "context")
                for size in (8, 32)
            ],
        ),
        "serve": report(
            "serve",
            [
                {"load": name, "tokens_per_s": 900.0, **served}
                for name in ("one at a time", "closed loop, 256")
            ],
        ),
        "overlap": report(
            "overlap", [{"phase": "decode", "batch": 8, "context": 256, "waiting_one_lane": 0.3, **lanes}]
        ),
    }


def draw(results: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, PLOTS, "--results", results, "--out", out]
    # Another hash seed each time: no order of a set may show.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=120, env=environment
    )


def drawn(results: Path, out: Path) -> dict[str, bytes]:
    """File name → what is in it."""
    done = draw(results, out)
    assert done.returncode == 0, done.stderr
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_pictures_of_all_reports(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    for name, found in reports().items():
        (results / f"{name}.json").write_text(json.dumps(found))
    first = drawn(results, tmp_path / "one")
    assert sorted(first) == sorted(f"{name}.{ending}" for name in reports() for ending in ("png", "svg"))
    for name in ("decode", "overlap", "prefill", "serve"):
        (results / f"{name}.json").unlink()
    again = drawn(results, tmp_path / "other")
    assert sorted(again) == ["hop.png", "hop.svg", "scale.png", "scale.svg"]
    assert all(first[name] == data for name, data in again.items())
    for name, data in first.items():
        assert data.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
        assert b"Matplotlib v" not in data  # its version would change the bytes


def test_a_report_that_is_missing_is_named(tmp_path: Path) -> None:
    done = draw(tmp_path, tmp_path)
    assert done.returncode == 1
    assert f"no results in {tmp_path}" in done.stderr


def test_reports_of_the_repository_have_pictures() -> None:
    for path in (PLOTS.parent / "results").glob("*.json"):
        found = json.loads(path.read_text())
        assert found["bench"] == path.stem.partition("-")[0]
        assert found["rows"] and found["machine"]["cores"] >= 1
        for ending in ("png", "svg") if path.stem in reports() else ():
            assert (PLOTS.parent / "plots" / f"{path.stem}.{ending}").exists(), "run `make plots`"
