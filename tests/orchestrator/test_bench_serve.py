"""`braid bench serve`: what it asks, how it counts, and a load on a real cell."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from braid_orchestrator.bench import serve, serve_run
from braid_orchestrator.bench.serve import Load, Outcome
from braid_orchestrator.bench.workload import Lengths, Synthetic, Turn, read_conversations
from braid_orchestrator.cli import run
from braid_wire.errors import BraidError, RequestInvalid, ServiceFault

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
SYNTHETIC = Synthetic(100, Lengths(2, 30), Lengths(1, 9), prefix_share=0.5, prefix_tokens=5, turns=3)


def test_the_same_seed_asks_the_same() -> None:
    found = SYNTHETIC.conversations(40)
    assert found == SYNTHETIC.conversations(40)
    assert [len(conversation) for conversation in found] == [3] * 13 + [1]
    first = [conversation[0].prompt for conversation in found]
    alike = [sum(prompt[:5] == other[:5] for other in first) for prompt in first]
    assert 4 <= max(alike) <= 11
    assert all(2 <= len(turn.prompt) <= 35 and 1 <= turn.max_tokens <= 9 for c in found for turn in c)


def test_arrivals_have_the_rate_and_the_burstiness() -> None:
    smooth, bursts = (
        np.diff(Load(rate=20, burstiness=shape, seed=1).arrivals(4000)) for shape in (1.0, 0.25)
    )
    for gaps, spread in ((smooth, 1.0), (bursts, 2.0)):  # the coefficient of variation is 1/√shape
        assert gaps.mean() == pytest.approx(1 / 20, rel=0.1)
        assert gaps.std() / gaps.mean() == pytest.approx(spread, rel=0.1)


def test_files_of_several_formats(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    lines = [
        {"prompt": "a", "max_tokens": 3},
        {"prompt": [4, 5]},
        {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "x"},
                      {"role": "user", "content": "c"}], "max_tokens": 2},
        {"conversations": [{"from": "human", "value": "d"}, {"from": "gpt", "value": "y"}]},
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    found = read_conversations(path, 7, Lengths(6, 6))
    known = [(Turn("a", 3),), (Turn((4, 5), 6),), (Turn("b", 2), Turn("c", 2)), (Turn("d", 6),)]
    assert found == [*known, known[0], known[1]]


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"prompt": ""}', '{"prompt": "a", "max_tokens": 0}'])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(RequestInvalid, match="line 2"):
        read_conversations(path, 1, Lengths(1, 1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Load(),
        lambda: Load(rate=0),
        lambda: Load(rate=float("nan")),
        lambda: Load(concurrency=1, cancel_share=1.5),
        lambda: Lengths.parse("5:2"),
        lambda: Lengths.parse("-3"),
        lambda: Synthetic(100, Lengths(1, 1), Lengths(1, 1), prefix_share=2),
    ],
)
def test_values_out_of_range(make: object) -> None:
    with pytest.raises(RequestInvalid):
        make()  # type: ignore[operator]


def outcome(
    index: int, intended: float, sent: float, ended: float, tokens: list[int], error: str = ""
) -> Outcome:
    return Outcome(index, 0, intended, sent, (sent + ended) / 2, ended, [0.01, 0.03], tokens, error=error)


def test_times_count_from_when_a_request_was_to_be_sent() -> None:
    late = [outcome(0, 1.0, 3.0, 5.0, [1, 2]), outcome(1, 1.0, 1.0, 2.0, [3], "QUEUE_FULL")]
    row = serve.report("x", late, Load(rate=1, slo_ttft_ms=3500, slo_itl_ms=15))
    assert row["e2e_ms_p50"] == 4000 and row["ttft_ms_p99"] == 3000 and row["send_delay_ms_p90"] == 2000
    assert (row["completed"], row["errors"], row["goodput_share"]) == (1, {"QUEUE_FULL": 1}, 0.0)
    assert serve.report("x", late, Load(rate=1, slo_ttft_ms=3500))["goodput_share"] == 0.5


def test_speedup_fairness_and_a_refusal_where_tokens_differ() -> None:
    alone = [outcome(0, 0, 0, 1, [1, 2]), outcome(1, 1, 1, 2, [3, 4])]
    loaded = [outcome(0, 0, 0, 1, [1, 2]), outcome(1, 0, 0, 1, [3, 4])]
    row = serve.report("x", loaded, Load(concurrency=2), alone)
    assert (row["speedup"], row["fairness"], row["same_as_alone"]) == (2.0, 1.0, 2)
    loaded[1].token_ids = [3, 5]
    with pytest.raises(ServiceFault, match=r"request 1\.0"):
        serve.report("x", loaded, Load(concurrency=2), alone)
    assert serve.jain([1, 0, 0, 0]) == 0.25


def test_queueing_is_of_the_load_alone() -> None:
    before, after = {0.1: 50.0, 1.0: 50.0, float("inf"): 50.0}, {0.1: 50.0, 1.0: 98.0, float("inf"): 150.0}
    found = serve.queueing(before, after)
    assert found["queue_ms_p50_at_most"] is None
    assert serve.queueing({}, {0.1: 9.0, 1.0: 10.0})["queue_ms_p90_at_most"] == 100.0


def test_a_load_on_a_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BRAID_RUNTIME_DIR", str(tmp_path / "r"))
    details, command = (
        tmp_path / "requests.json",
        ["bench", "serve", TINY, "--requests", "12", "--turns", "2"],
    )
    command += ["--rate", "40", "--speedup", "--input-tokens", "2:20", "--output-tokens", "3:8"]
    command += ["--cancel-share", "0.3", "--max-context", "128", "--json", "--details", details]
    assert run([str(word) for word in command]) == 0
    report = json.loads(capsys.readouterr().out)
    typed = report["command"].split()  # to be typed again as it is
    assert typed[:4] == ["braid", "bench", "serve", str(TINY)]
    assert typed[typed.index("--speedup") + 1].startswith("--") and "--json" not in typed
    alone, loaded = report["rows"]
    assert (alone["completed"], alone["errors"], loaded["errors"]) == (12, {}, {})
    assert loaded["completed"] + loaded["cancelled"] == loaded["requests"] > loaded["completed"] > 0
    assert loaded["same_as_alone"] == loaded["completed"]
    assert loaded["in_use_afterwards"] == {"pages": 0, "slots": 0}
    assert loaded["ttft_ms_p50"] <= loaded["e2e_ms_p50"] and loaded["queue_ms_p99_at_most"] > 0
    requests = json.loads(details.read_text())
    assert len(requests) == loaded["requests"]
    for one in requests:
        assert one["intended"] <= one["sent"] <= one["first"] <= one["ended"]


def test_a_target_that_is_not_there_and_options_that_disagree() -> None:
    given = {"model": None, "target": None, "rate": 1.0, "concurrency": None, "burstiness": 1.0}
    given |= {"cancel_share": 0.0, "slo_ttft_ms": None, "slo_itl_ms": None, "seed": 0}
    given |= {"input_tokens": "1", "output_tokens": "1"}
    with pytest.raises(RequestInvalid, match="MODEL"):
        serve_run.measure(given, print)
    with pytest.raises(BraidError):
        asyncio.run(serve.run("unix:/nowhere.sock", [(Turn("a", 1),)], Load(concurrency=1)))
