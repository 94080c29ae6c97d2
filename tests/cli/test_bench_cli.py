"""`braid bench`: what its reports hold, and that it reports nothing where a peer computes something else."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from braid_orchestrator.bench.peers import TransformersPeer
from braid_orchestrator.bench.transports import TRANSPORTS
from braid_orchestrator.cli import run
from cli_harness import Place

Report = dict[str, Any]
Bench = Callable[..., Report]

LAYERS = 4
SHORT = ("--steps", "2", "--repeats", "1")
# Bodies are compiled for the benchmarks that are about it; that takes a second for each cell.
QUICK = (*SHORT, "--segments", "off")


@pytest.fixture
def cli(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """The command in this process, so that torch is imported once."""
    monkeypatch.setenv("BRAID_RUNTIME_DIR", str(place.runtime))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    before = own_processes()
    yield lambda *words: run([str(word) for word in words])
    assert own_processes() <= before  # services and busy processes are gone
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(threads)


def own_processes() -> set[str]:
    """Process ids of this process's children, whichever thread made them."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if int(fields[1]) == os.getpid():
            found.add(stat.parent.name)
    return found


@pytest.fixture
def bench(cli: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Bench:
    """Run a benchmark, and read what it printed."""

    def call(*words: object) -> Report:
        assert cli("bench", *words, "--json") == 0
        report = json.loads(capsys.readouterr().out)
        assert isinstance(report, dict)
        check_origin(report, str(words[0]))
        return report

    return call


def check_origin(report: Report, name: str) -> None:
    """Every report says what it was measured on, and how."""
    assert report["bench"] == name
    assert report["command"].startswith(f"braid bench {name}") and "--json" not in report["command"]
    assert datetime.fromisoformat(report["date"]).tzinfo is not None
    assert report["machine"]["cpu"] and report["machine"]["cores"] >= 1
    assert {"python", "torch", "transformers", "braid-attention"} <= report["versions"].keys()
    for row in report["rows"]:
        assert row["bench"] == name and row["repeats"] == 1 and row["threads"] == 1


def check_ratio(ratio: float, ours: float, theirs: float) -> None:
    """Of one turn, a ratio is that of the rates but for their rounding; a turn may take however long."""
    rate, part = 0.05 + 1e-9, 0.0005 + 1e-9
    assert (ours - rate) / (theirs + rate) - part <= ratio <= (ours + rate) / (theirs - rate) + part


def test_decode_stands_beside_its_peers(bench: Bench, model: Path) -> None:
    peers = ("transformers", "embedded", "grpc_bytes")
    report = bench(
        *("decode", "--model", model, "--batch", "1,3", "--context", 16, "--dtype", "bfloat16", *SHORT),
        *("--peers", "embedded,grpc_bytes"),
    )
    assert [(row["batch"], row["context"]) for row in report["rows"]] == [(1, 16), (3, 16)]
    assert "--peers embedded,grpc_bytes" in report["command"]
    for row in report["rows"]:
        assert row["dtype"] == "bfloat16" and row["segments"] == "auto"
        assert 0 < row["matmul_fraction"] < 1
        assert 0 < row["hop_us_p50"] <= row["hop_us_p99"]
        assert row["spread"] == 0  # of a single turn
        for peer in peers:
            check_ratio(row[f"ratio_{peer}"], row["tokens_per_s"], row[f"tokens_per_s_{peer}"])


def test_prefill_is_written_to_a_file_too(
    cli: Callable[..., int], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "prefill.json"
    assert cli("bench", "prefill", "--model", model, "--context", 40, *QUICK, "--out", out) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    check_origin(report, "prefill")
    (row,) = report["rows"]
    assert row["batch"] == 1 and row["context"] == 40 and row["dtype"] == "float32"
    assert row["segments"] == "off" and row["matmul_fraction"] is None
    assert f"{row['tokens_per_s']:,}" in printed and "transformers" in printed
    assert str(tmp_path) not in report["command"]


def test_hop_of_every_transport_free_and_loaded(bench: Bench, model: Path) -> None:
    report = bench("hop", "--model", model, "--batch", 1, "--context", 8, *QUICK)
    assert [(row["load"], row["transport"]) for row in report["rows"]] == [
        (load, name) for load in ("free", "loaded") for name in TRANSPORTS
    ]
    for row in report["rows"]:
        assert 0 < row["hop_us_p50"] <= row["hop_us_p90"] <= row["hop_us_p99"]
        assert row["layers_timed"] == 2 * LAYERS
        assert row["kernel_us_p50_full"] > 0 and row["kernel_us_p50_linear"] > 0
        assert (row["ratio_grpc_unary"] == 1) == (row["transport"] == "grpc_unary")


def test_scale_varies_one_size_at_a_time(bench: Bench) -> None:
    report = bench(
        *("scale", "--layers", "4,9", "--layers-context", 8, "--batch", "1,2", "--batch-context", 5),
        *("--context", "16,33", *QUICK),
    )
    rows = report["rows"]
    assert [(row["sweep"], row["layers"], row["batch"], row["context"]) for row in rows] == [
        ("layers", 4, 1, 8),
        ("layers", 9, 1, 8),
        ("batch", 8, 1, 5),
        ("batch", 8, 2, 5),
        ("context", 8, 1, 16),
        ("context", 8, 1, 33),
    ]
    for row in rows:
        assert row["step_us"] > 0 and row["step_us_embedded"] > 0 and row["hop_us_p50"] > 0
        # Every fourth layer has two key/value heads of 64, key and value, in pages of 16; the others a
        # float32 state of 8·64·64 and a window of 3 of 1024 channels.
        full = row["layers"] // 4
        state = (row["layers"] - full) * (8 * 64 * 64 + 3 * 1024) * 4
        assert row["memory_kv_bytes"] == full * 2 * 2 * 64 * 4 * (-(-row["context"] // 16) * 16)
        assert row["memory_state_bytes"] == 2 * state
        assert row["memory_bytes"] == row["memory_kv_bytes"] + row["memory_state_bytes"]
        assert row["memory_kv_bytes_planned"] == full * 2 * 2 * 64 * 4 * row["context"]
        assert row["memory_state_bytes_planned"] == state
        assert row["context_made_of"] == "one prompt"


def test_scale_needs_layers_of_both_kinds(
    cli: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("bench", "scale", "--sweep", "layers", "--layers", 3) == 2
    assert capsys.readouterr().err == "error REQUEST_INVALID: layers is 3; it must be at least 4\n"


def test_two_lanes_beside_one(bench: Bench, model: Path) -> None:
    report = bench("overlap", "--model", model, "--batch", 4, "--prompts", 3, "--context", 12, *SHORT)
    assert [(row["phase"], row["batch"], row["context"]) for row in report["rows"]] == [
        ("decode", 4, 12),
        ("prefill", 3, 12),
    ]
    for row in report["rows"]:
        assert row["lanes_one_lane"] == 1 and row["lanes_two_lanes"] == 2 and row["lanes_auto"] in (1, 2)
        for name in ("one_lane", "two_lanes", "auto"):
            assert row[f"tokens_per_s_{name}"] > 0
            assert 0 < row[f"waiting_{name}"] < 1
        check_ratio(row["ratio_two_lanes"], row["tokens_per_s_two_lanes"], row["tokens_per_s_one_lane"])


def test_nothing_is_reported_where_logits_differ(
    cli: Callable[..., int],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = TransformersPeer.decode

    def wrong(self: TransformersPeer, tokens: Any) -> torch.Tensor:
        logits = right(self, tokens).clone()
        logits[-1, 7] += 0.01 * (logits.max() - logits.min())
        return logits

    monkeypatch.setattr(TransformersPeer, "decode", wrong)
    out = tmp_path / "decode.json"
    code = cli("bench", "decode", "--model", model, "--batch", 2, "--context", 8, *QUICK, "--out", out)
    said = capsys.readouterr()
    assert code == 1
    assert said.err.startswith("error SERVICE_FAULT: braid differs from transformers by ")
    assert said.err.endswith("nothing is reported\n")
    assert said.out == "" and not out.exists()


@pytest.mark.parametrize(
    "words",
    [
        "decode --batch 0",
        "decode --batch 1,x",
        "decode --peers nobody",
        "hop --transport pigeon",
        "hop --load heavy",
        "scale --sweep breadth",
        "overlap --phase nap",
        "scale --layers ,",
    ],
)
def test_wrong_usage(cli: Callable[..., int], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("bench", *words.split()) == 2
    assert words.split()[-1] in capsys.readouterr().err


def test_names_of_options_are_those_of_the_benchmarks() -> None:
    from braid_orchestrator.bench.hop import LOADS
    from braid_orchestrator.bench.overlap import PHASES
    from braid_orchestrator.bench.scale import SWEEPS

    commands = import_module("braid_orchestrator.cli.bench")
    assert tuple(TRANSPORTS) == commands.TRANSPORT_NAMES
    assert commands.LOAD_NAMES == LOADS
    assert commands.SWEEP_NAMES == SWEEPS
    assert commands.PHASE_NAMES == PHASES
