"""`braid trace`: every layer once a step, slices that nest, arrows that lead somewhere."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from braid_orchestrator.bench.trace import TraceOptions, record_steps
from braid_orchestrator.cli import run
from braid_orchestrator.layer_plan import build_plans, load_config
from braid_orchestrator.timeline import Processes, Timeline
from braid_orchestrator.timings import LayerTimes, StepTimes
from braid_wire.layers import GatedDelta, Gqa, Kind, LayerPlan, LayerSpec, Role
from cli_harness import Place

Event = dict[str, Any]

STEPS = 3
# Stamps are nanoseconds; as microseconds they are not exact in binary.
EXACT_US = 1e-5


@pytest.fixture(scope="module", autouse=True)
def environment(place: Place) -> Iterator[None]:
    """Cells run in this process and its children."""
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BRAID_RUNTIME_DIR", str(place.runtime))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def events(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    """A trace of the real thing."""
    out = tmp_path_factory.mktemp("trace") / "trace.json"
    words = ("trace", model, "--steps", STEPS, "--batch", 2, "--prompt-tokens", 9, "--out", out)
    with redirect_stdout(StringIO()) as said:
        assert run([str(word) for word in words]) == 0
    assert said.getvalue().startswith(f"{out}: a prompt and {STEPS} decode steps, ")
    trace = json.loads(out.read_text())
    assert trace["displayTimeUnit"] == "ns"
    assert trace["otherData"]["steps"] == STEPS
    found = trace["traceEvents"]
    assert isinstance(found, list)
    return found


def slices(events: list[Event], category: str = "") -> list[Event]:
    return [event for event in events if event["ph"] == "X" and event["cat"].startswith(category)]


def end(event: Event) -> float:
    return float(event["ts"] + event["dur"])


def process_names(events: list[Event]) -> dict[int, str]:
    return {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}


def check_nesting(events: list[Event]) -> None:
    """Of two slices of a track, one encloses the other, or they do not touch."""
    tracks: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in slices(events):
        assert event["dur"] >= 0
        tracks[event["pid"], event["tid"]].append(event)
    for track in tracks.values():
        opened: list[Event] = []
        for event in sorted(track, key=lambda event: (event["ts"], -event["dur"])):
            while opened and end(opened[-1]) <= event["ts"] + EXACT_US:
                opened.pop()
            if opened:
                assert end(event) <= end(opened[-1]) + EXACT_US, (event, opened[-1])
            opened.append(event)


def test_three_processes_are_named(events: list[Event]) -> None:
    names = process_names(events)
    assert sorted(names.values()) == ["full-attention service", "linear-attention service", "orchestrator"]
    assert names[os.getpid()] == "orchestrator"
    assert {event["pid"] for event in events} == set(names)
    lines = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] != "M"} == lines


def test_every_layer_ran_once_a_step_in_its_service(events: list[Event], model: Path) -> None:
    plan = build_plans(load_config(model)).target
    names = process_names(events)
    steps = slices(events, "step")
    assert [step["args"]["mode"] for step in steps] == ["extend"] + ["decode"] * STEPS
    assert [step["args"]["num_tokens"] for step in steps] == [18] + [2] * STEPS
    expected = Counter((step["args"]["step"], spec.layer_id) for step in steps for spec in plan)
    for category in ("wait", "layer", "queue", "compute"):
        found = slices(events, category)
        assert Counter((e["args"]["step"], e["args"]["layer_id"]) for e in found) == expected, category
        for event in found:
            spec = plan.layer(event["args"]["layer_id"])
            assert event["args"]["kind"] == event["args"]["side"] == spec.kind.value
            assert event["args"]["mechanism"] == spec.mechanism
            place = "orchestrator" if category == "wait" else f"{spec.kind.value}-attention service"
            assert names[event["pid"]] == place


def test_slices_nest_and_layers_are_in_order(events: list[Event]) -> None:
    check_nesting(events)
    for step in slices(events, "step"):
        mine = [e for e in slices(events) if e["args"]["step"] == step["args"]["step"] and e is not step]
        assert all(step["ts"] <= e["ts"] + EXACT_US and end(e) <= end(step) + EXACT_US for e in mine)
        line = sorted((e for e in mine if e["cat"] in ("wait", "body")), key=lambda e: e["ts"])
        assert [e["cat"] for e in line] == ["body", "wait"] * 4 + ["body"]
        assert [e["args"]["layer_id"] for e in line if e["cat"] == "wait"] == [0, 1, 2, 3]
        for before, after in pairwise(line):
            assert end(before) <= after["ts"] + EXACT_US
    for wait, layer in zip(slices(events, "wait"), slices(events, "layer"), strict=True):
        assert wait["args"] == layer["args"]
        assert wait["ts"] <= layer["ts"] and end(layer) <= end(wait)  # one clock for both processes
        about = wait["args"]
        assert about["queue_us"] + about["compute_us"] == pytest.approx(layer["dur"], abs=EXACT_US)
        assert 0 < about["hop_us"] <= wait["dur"] - about["compute_us"] + EXACT_US


def test_arrows_lead_from_the_ring_to_the_service_and_back(events: list[Event]) -> None:
    tails = {event["id"]: event for event in events if event["ph"] == "s"}
    heads = {event["id"]: event for event in events if event["ph"] == "f"}
    assert tails.keys() == heads.keys()
    assert len(tails) == 2 * 4 * (1 + STEPS)
    for number, tail in tails.items():
        head = heads[number]
        assert tail["ts"] <= head["ts"] and tail["pid"] != head["pid"]
        for event in (tail, head):
            assert any(
                (e["pid"], e["tid"]) == (event["pid"], event["tid"]) and e["ts"] <= event["ts"] < end(e)
                for e in slices(events)
                if e["cat"] != "step"
            )


def test_lanes_have_tracks_of_their_own(model: Path) -> None:
    """Two lanes take turns: while the body runs one, the other's layer is under way."""
    plan = build_plans(load_config(model)).target
    timeline = Timeline({Role.TARGET: plan}, Processes(1, {Kind.FULL: 2, Kind.LINEAR: 3}))
    for lane in (0, 1):
        layers, at = [], 1000 + 400 * lane
        for spec in plan:
            times = (at, at + 50, at + 60, at + 460, at + 500, at + 530)
            layers.append(LayerTimes(Role.TARGET, spec.layer_id, spec.kind, lane, *times))
            at += 800
        timeline.add(StepTimes(Role.TARGET, 7, lane, "decode", 4, 900, at, tuple(layers)))
    events = timeline.to_json({})["traceEvents"]
    check_nesting(events)
    assert {(e["pid"], e["tid"]) for e in slices(events)} == {(p, t) for p in (1, 2, 3) for t in (1, 2)}
    overlapping = [
        (body, layer)
        for body in slices(events, "body")
        for layer in slices(events, "compute")
        if body["ts"] < end(layer)
        and layer["ts"] < end(body)
        and body["args"]["lane"] != layer["args"]["lane"]
    ]
    assert overlapping
    waits = slices(events, "wait")
    assert all(e["dur"] == pytest.approx(0.03) and e["args"]["hop_us"] == pytest.approx(0.09) for e in waits)


def test_two_lanes_of_real_steps(model: Path) -> None:
    timeline = record_steps(TraceOptions(model, overlap="on", batch=4, prompt_tokens=8, steps=2))
    events = timeline.to_json({})["traceEvents"]
    check_nesting(events)
    steps = slices(events, "step")
    assert [step["args"]["lane"] for step in steps] == [0, 1] * 3
    assert [step["args"]["num_tokens"] for step in steps] == [16, 16, 2, 2, 2, 2]
    for step in steps:
        key = step["args"]["step"], step["args"]["lane"]
        waits = [e for e in slices(events, "wait") if (e["args"]["step"], e["args"]["lane"]) == key]
        assert [e["args"]["layer_id"] for e in waits] == [0, 1, 2, 3]
    # The orchestrator does one thing at a time, whichever lane it is for.
    busy = sorted((e for e in slices(events) if e["cat"] in ("body", "wait")), key=lambda e: e["ts"])
    for before, after in pairwise(busy):
        assert end(before) <= after["ts"] + EXACT_US, (before, after)
    seconds = timeline.shares()
    assert seconds["body"] + seconds["waits"] == pytest.approx(seconds["steps"])
    assert 0 < seconds["waits"] < seconds["steps"] and seconds["kernels"] > 0 and seconds["hops"] > 0


def test_both_sides_of_a_parallel_layer_may_be_under_way_at_once() -> None:
    full, linear = Gqa(4, 2, 32, 32, 1.0), GatedDelta(2, 4, 32, 32, 4, 1.0)
    plan = LayerPlan(Role.TARGET, (LayerSpec(0, Kind.PARALLEL, full=full, linear=linear),))
    timeline = Timeline({Role.TARGET: plan}, Processes(1, {Kind.FULL: 2, Kind.LINEAR: 3}))
    layers = (
        LayerTimes(Role.TARGET, 0, Kind.FULL, 0, 100, 120, 130, 180, 150, 200),
        LayerTimes(Role.TARGET, 0, Kind.LINEAR, 0, 140, 150, 160, 300, 201, 320),
    )
    timeline.add(StepTimes(Role.TARGET, 1, 0, "decode", 1, 0, 400, layers))
    events = timeline.to_json({})["traceEvents"]
    check_nesting(events)
    assert [e["args"]["side"] for e in slices(events, "wait")] == ["full", "linear"]
    assert {e["args"]["mechanism"] for e in slices(events, "layer")} == {"gqa", "gated_delta"}


def test_a_model_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["trace", str(tmp_path / "none"), "--out", str(tmp_path / "t.json")]) == 2
    said = capsys.readouterr()
    assert said.err == f"error CONFIG_INVALID: {tmp_path}/none is not a directory with a model\n"
    assert run(["trace", str(tmp_path)]) == 2  # nowhere to write to
