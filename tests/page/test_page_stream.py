"""What the stream tells is what the cell did."""

from __future__ import annotations

import socket
import threading
from itertools import pairwise

import pytest
from braid_orchestrator.page.snapshots import Snapshots
from braid_orchestrator.page.windows import Buckets
from braid_orchestrator.recent import LONGEST_MESSAGE, MOST_ERRORS, RecentErrors
from braid_wire.errors import BraidError, QueueFull, RequestCancelled, RequestInvalid
from braid_wire.layers import Kind
from page_harness import LIMITS, TINY, Json, Watched, eventually


def by_layer(frame: Json) -> dict[tuple[str, int, str], Json]:
    return {(layer["role"], layer["id"], layer["side"]): layer for layer in frame["layers"]}


def test_the_description_is_the_plan(watched: Watched) -> None:
    with watched.events() as events:
        name, said = next(events)
    assert (name, said["model"], said["family"]) == ("cell", TINY.name, "qwen3_next")
    assert said["limits"]["max_sequences"] == LIMITS.max_sequences
    for role in said["roles"]:
        plan = next(plan for key, plan in watched.cell.store.plans.items() if key.value == role["role"])
        assert [(layer["id"], layer["kind"]) for layer in role["layers"]] == [
            (spec.layer_id, spec.kind.value) for spec in plan
        ]
        assert all(side["mechanism"] and side["shape"] for layer in role["layers"] for side in layer["sides"])


def test_counts_are_those_of_the_cell(watched: Watched) -> None:
    before = watched.frame()
    completion = watched.client.complete("def add(", 24, ignore_eos=True)
    after = watched.frame(lambda frame: frame["running"] == 0)
    made = after["totals"]["generated_tokens"] - before["totals"]["generated_tokens"]
    assert made == completion.completion_tokens == 24
    assert after["totals"]["finished"] == before["totals"]["finished"] + 1
    for point, totals in watched.cell.dispatcher.totals.items():
        layer = by_layer(after)[point[0].value, point[1], point[2].value]
        assert layer["modes"] == totals.dispatches
        # The first frame of a stream tells of everything since the cell began.
        assert layer["count"] == totals.count
        assert layer["compute"] == pytest.approx(totals.compute_s / totals.count * 1e6, abs=0.01)
        assert layer["hop"] == pytest.approx(totals.overhead_s / totals.count * 1e6, abs=0.01)
        assert 0 <= layer["queue"] <= layer["hop"] + 0.01
    assert after["latency"]["first_token"][0] > 0
    assert after["drafts"]["accepted"] + after["drafts"]["rejected"] > 0
    assert {service["state"] for service in after["services"]} == {"ready"}


def test_frames_tell_of_the_time_between_them(watched: Watched) -> None:
    assert watched.frame()["rates"] is None
    # Not by a stream: who is slow to follow one misses frames, and with them what happened before them.
    snapshots = Snapshots(watched.cell)
    first = snapshots.frame()
    assert first["rates"] is None
    generation, frames = watched.client.generate("class A:", 40, ignore_eos=True), []
    for _ in generation:
        frames.append(snapshots.frame())
    frames.append(snapshots.frame())
    made = sum(frame["rates"]["generated_tokens"] * frame["elapsed"] for frame in frames)
    assert made == pytest.approx(generation.completion.completion_tokens) == 40
    steps = frames[-1]["layers"][0]["modes"]
    counted = sum(frame["layers"][0]["count"] for frame in frames)
    assert sum(steps.values()) - sum(first["layers"][0]["modes"].values()) == counted > 0
    assert {layer["count"] for layer in snapshots.frame()["layers"]} == {0}


def test_requests_and_memory_while_they_run(watched: Watched) -> None:
    over = threading.Event()
    # Long ones: a frame must find all of them before the first is over.
    generations = [watched.client.generate("def ", 4000, ignore_eos=True) for _ in range(6)]

    def follow(generation: object) -> None:
        for _ in generation:  # type: ignore[attr-defined]
            if over.is_set():
                return

    workers = [threading.Thread(target=follow, args=(generation,)) for generation in generations]
    for worker in workers:
        worker.start()
    try:
        frame = watched.frame(lambda found: found["running"] + found["waiting"] == 6 and found["running"] > 0)
        assert len(frame["requests"]) == 6
        assert {request["phase"] for request in frame["requests"]} <= {"waiting", "prefill", "decode"}
        assert {request["max_tokens"] for request in frame["requests"]} == {4000}
        pages = next(pool for pool in frame["pools"] if (pool["role"], pool["name"]) == ("target", "pages"))
        assert 0 < pages["used"] <= pages["total"]
    finally:
        over.set()
        for worker in workers:
            worker.join()
    assert watched.frame(lambda found: not found["requests"])["running"] == 0


def test_a_frame_tells_of_one_moment(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that ends while a frame is made is in it or not, in its numbers as in its list."""
    generation = watched.client.generate("def ", 4000, ignore_eos=True)
    chunks, engine = iter(generation), watched.cell.engine
    next(chunks)

    def asked(kind: Kind) -> Json:
        generation.cancel()
        assert eventually(lambda: engine.load.running == 0)
        return {"name": kind.value, "state": "ready"}

    snapshots = Snapshots(watched.cell)
    monkeypatch.setattr(snapshots, "_service", asked)
    frame = snapshots.frame()
    assert frame["running"] == len(frame["requests"]) == 1


def test_errors_are_told_with_their_reasons(watched: Watched) -> None:
    for _ in range(3):
        with pytest.raises(RequestInvalid):
            watched.client.complete([1 << 30], 4)
    newest = watched.frame()["errors"][0]
    assert (newest["reason"], newest["count"]) == ("REQUEST_INVALID", 3)
    assert str(1 << 30) in newest["message"]


def test_errors_are_bounded_and_equal_ones_counted() -> None:
    errors = RecentErrors()
    errors.note(RequestCancelled("the caller left"))
    assert errors.newest_first() == []
    for number in range(3 * MOST_ERRORS):
        errors.note(QueueFull(f"{number} " + "x" * 1000))
        errors.note(QueueFull(f"{number} " + "x" * 1000))
    found = errors.newest_first()
    assert len(found) == MOST_ERRORS
    assert all(error.count == 2 and len(error.message) == LONGEST_MESSAGE for error in found)
    assert found[0].message.startswith(f"{3 * MOST_ERRORS - 1} ")


def test_who_reads_nothing_holds_up_nobody(watched: Watched) -> None:
    with socket.create_connection(("127.0.0.1", watched.page.port), timeout=10) as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        lazy.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with watched.events() as events:
            times = [data["time"] for name, data in (next(events) for _ in range(12)) if name == "frame"]
        # One that were held up would have no frame for as long as the other one reads nothing.
        assert max(after - before for before, after in pairwise(times)) < 5.0


def test_nobody_listening_costs_nothing(watched: Watched) -> None:
    with watched.events() as events:
        next(events)
        assert watched.page.listeners == 1
    assert eventually(lambda: watched.page.listeners == 0)
    assert watched.unwatched()


def test_a_frame_that_fails_ends_neither_page_nor_cell(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, calls = watched.cell.engine.in_hand, []

    def fails_once(most: int) -> object:
        calls.append(most)
        if len(calls) == 1:
            raise ValueError("made up")
        return real(most)

    monkeypatch.setattr(watched.cell.engine, "in_hand", fails_once)
    assert watched.frame()["state"] == "serving"
    assert "a frame of the page failed" in caplog.text


def test_a_recovery_is_told_with_the_process_after_it(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots, link = Snapshots(watched.cell), watched.cell.dispatcher.links[Kind.FULL]
    answers = [link.describe()]
    monkeypatch.setattr(link, "describe", lambda timeout_s=None: answers[-1])

    def told() -> tuple[int, str]:
        service = next(each for each in snapshots.frame()["services"] if each["name"] == link.name)
        return service["pid"], service["state"]

    for pid, epoch, state in [(11, 1, "ready"), (12, 1, "ready"), (13, 0, "unconfigured")]:
        answers.append(type(answers[0])(pid=pid, epoch=epoch))
        monkeypatch.setattr(watched.cell.walker, "replays", pid)
        assert told() == (pid, state)
    answers.append(type(answers[0])(pid=13, epoch=1))
    assert told() == (13, "ready")  # one that was not ready is asked again
    answers.append(type(answers[0])(pid=14, epoch=1))
    monkeypatch.setattr(watched.cell.walker, "recovering", True)
    assert told() == (14, "ready")


def test_percentiles_are_those_of_prometheus() -> None:
    buckets = Buckets((0.1, 0.5, 1.0, float("inf")), (0, 4, 8, 10))
    assert buckets.quantile(0.2) == pytest.approx(0.3)
    assert buckets.quantile(0.4) == pytest.approx(0.5)
    assert buckets.quantile(0.6) == pytest.approx(0.75)
    assert buckets.quantile(0.95) == 1.0
    assert buckets.since(buckets).quantile(0.5) is None


def test_the_error_table_alone_names_reasons(watched: Watched) -> None:
    reasons = {error["reason"] for error in watched.frame()["errors"]}
    assert reasons <= {cls.reason for cls in BraidError.__subclasses__()}
