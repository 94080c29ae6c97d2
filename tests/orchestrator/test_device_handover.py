"""Layers handed over between streams and by events: both real services' hosts behind real gRPC.

The device is one that runs everything at once in the thread that enqueues it, and whose waits hold that
thread; what crosses the boundary, and in which order, is what a GPU's would be.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "wire"))

import braid_full_attn.core
import braid_linear_attn.core
from braid.v1 import attention_pb2 as pb
from braid_orchestrator import dispatcher as dispatchers
from braid_orchestrator.cell import Cell
from braid_orchestrator.dispatch import Dispatch
from braid_orchestrator.link import RemoteLink
from braid_orchestrator.memory import SequenceMemory, Span
from braid_orchestrator.overlap import OverlapMode
from braid_wire.attention_host import AttentionHost
from braid_wire.attention_servicer import RunningService
from braid_wire.audit import Auditor
from braid_wire.cuda_doorbell import Streams
from braid_wire.errors import BatchInvalid, BraidError, ServiceFault
from braid_wire.layers import Kind, Mode, Role
from braid_wire.metrics import ProcessMetrics
from cells import CellMaker
from cuda_fakes import HostStreams, failure

VALUES, EVENTS = pb.DEVICE_HANDOVER_STREAM_VALUES, pb.DEVICE_HANDOVER_EVENTS
WAYS = {"values": (VALUES, EVENTS), "events": (EVENTS,), "neither": ()}


class Device:
    """Both services over gRPC in this process, and the streams of all three sides."""

    def __init__(
        self, directory: Path, ways: tuple[pb.DeviceHandover.ValueType, ...], audited: bool = False
    ) -> None:
        self.ours = HostStreams(ways)
        self.streams = {kind: HostStreams(ways) for kind in (Kind.FULL, Kind.LINEAR)}
        loads = {Kind.FULL: braid_full_attn.core.load, Kind.LINEAR: braid_linear_attn.core.load}
        self.metrics = {kind: ProcessMetrics(kind.value, "test") for kind in loads}
        self.hosts = {
            kind: AttentionHost(
                load("auto", 1),
                self.metrics[kind],
                auditor=Auditor(self.metrics[kind], 1e-3) if audited else None,
                streams=self.streams[kind],
            )
            for kind, load in loads.items()
        }
        self.running = {
            kind: RunningService(host, f"unix:{directory}/{kind.value}", 0)
            for kind, host in self.hosts.items()
        }

    def links(self) -> dict[Kind, RemoteLink]:
        return {kind: RemoteLink(kind, running.address) for kind, running in self.running.items()}

    def stop(self) -> None:
        for running in self.running.values():
            running.stop(0.0)


@pytest.fixture
def device(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Device]:
    found = Device(tmp_path_factory.mktemp("d"), WAYS[getattr(request, "param", "values")])

    def ours(where: torch.device, own: bool) -> Streams:
        return found.ours

    monkeypatch.setattr(dispatchers, "streams_for", ours)
    yield found
    found.stop()


def run(cell: Cell, steps: int = 3) -> list[torch.Tensor]:
    """Logits of a prompt and some decode steps of two sequences."""
    random = np.random.default_rng(0)
    memories = [SequenceMemory(1), SequenceMemory(2)]
    found = []
    for step in range(steps):
        lengths = (7, 12) if step == 0 else (1, 1)
        mode = Mode.DECODE if step else Mode.EXTEND
        spans = [
            Span(memory, random.integers(0, 199, length), mode)
            for memory, length in zip(memories, lengths, strict=True)
        ]
        rows = np.cumsum(lengths) - 1
        found.append(cell.walker.run(spans, rows).clone())
    for memory in memories:
        cell.walker.memory(Role.TARGET).release(memory)
    return found


@pytest.mark.parametrize("segments", ["eager", "off"])
@pytest.mark.parametrize("device", WAYS, indirect=True)
def test_every_way_gives_what_one_process_gives(device: Device, make_cell: CellMaker, segments: str) -> None:
    expected = run(make_cell(segments=segments))
    cell = make_cell(links=device.links(), segments=segments)
    for _ in range(2):  # counters go on from step to step
        for ours, theirs in zip(run(cell), expected, strict=True):
            assert torch.equal(ours, theirs)
    linear = device.streams[Kind.LINEAR]
    if VALUES in device.ours.handovers:
        layers = sum(spec.kind is Kind.LINEAR for spec in cell.plans.target)
        assert linear.waited == linear.rung == list(range(1, 2 * 3 * layers + 1))
    else:
        assert not linear.rung


@pytest.mark.parametrize("device", ["values", "events"], indirect=True)
def test_two_lanes(device: Device, make_cell: CellMaker) -> None:
    expected = run(make_cell(segments="native", overlap=OverlapMode.OFF))
    cell = make_cell(links=device.links(), segments="native", overlap=OverlapMode.ON)
    for ours, theirs in zip(run(cell), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_calls_for_each_layer_wait_for_the_device(device: Device, make_cell: CellMaker) -> None:
    expected = run(make_cell(segments="eager"))
    cell = make_cell(links=device.links(), segments="eager", dispatch=Dispatch.RPC)
    for ours, theirs in zip(run(cell), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert not device.ours.rung


def audits(metrics: ProcessMetrics) -> float:
    """How many a service has done."""
    found = [sample for family in metrics.registry.collect() for sample in family.samples]
    return sum(sample.value for sample in found if sample.name == "braid_audits_total")


def test_audited_services_take_no_handovers_between_streams(
    make_cell: CellMaker, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample is copied between a layer and the next, which streams would run through."""
    expected = run(make_cell(segments="eager"))
    device = Device(tmp_path_factory.mktemp("d"), WAYS["values"], audited=True)

    def ours(where: torch.device, own: bool) -> Streams:
        return device.ours

    monkeypatch.setattr(dispatchers, "streams_for", ours)
    cell = make_cell(links=device.links(), segments="eager")
    for ours_, theirs in zip(run(cell), expected, strict=True):
        assert torch.equal(ours_, theirs)
    described = cell.dispatcher.descriptions
    device.stop()
    for kind, metrics in device.metrics.items():
        assert not described[kind].device_handovers and not device.streams[kind].rung
        deadline = time.monotonic() + 30.0
        while not audits(metrics):  # on a thread of its own, behind everything else
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_layers_are_timed_on_the_device(device: Device, make_cell: CellMaker) -> None:
    cell = make_cell(links=device.links(), segments="eager")
    seen = []
    cell.dispatcher.observer = seen.append
    run(cell)
    for step in seen:
        for layer in step.layers:
            assert layer.posted_ns <= layer.started_ns <= layer.finished_ns <= layer.taken_ns
            assert layer.compute_ns > 0 and layer.hop_ns >= 0
    status = cell.dispatcher.descriptions[Kind.FULL]
    assert list(status.device_handovers) == [VALUES, EVENTS]
    assert status.device_sharing == pb.DEVICE_SHARING_TIME_SLICED


def break_layer(host: AttentionHost, error: Exception) -> Callable[[], None]:
    """Have the host's next layer raise, in the middle of a step; gives what undoes it."""
    launch = host.launch
    count = 0

    def broken(step: object, ticket: object) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise error
        launch(step, ticket)  # type: ignore[arg-type]

    host.launch = broken  # type: ignore[method-assign]

    def mend() -> None:
        host.launch = launch  # type: ignore[method-assign]

    return mend


@pytest.mark.parametrize("device", ["values", "events"], indirect=True)
def test_a_layer_that_fails_releases_everybody(device: Device, make_cell: CellMaker) -> None:
    """The body's stream waits for what will never come; the error arrives and the cell lives on."""
    expected = run(make_cell(segments="eager"))
    cell = make_cell(links=device.links(), segments="eager")
    mend = break_layer(device.hosts[Kind.LINEAR], BatchInvalid("told so", field="x"))
    with pytest.raises(BatchInvalid, match="told so"):
        run(cell)
    mend()
    before = cell.dispatcher.epoch
    for ours, theirs in zip(run(cell), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert cell.dispatcher.epoch == before
    if VALUES in device.ours.handovers:
        assert device.streams[Kind.LINEAR].drained and device.ours.drained


def test_a_step_that_the_orchestrator_gives_up_releases_the_services(
    device: Device, make_cell: CellMaker
) -> None:
    """Their streams wait for inputs that nobody will write."""
    cell = make_cell(links=device.links(), segments="off")
    span = Span(SequenceMemory(1), np.arange(4), Mode.EXTEND)
    with pytest.raises(KeyError), cell.walker.step(Role.TARGET, [span]) as (_, step):
        spec = cell.plans.target.layer(0)
        shapes = spec.geometry(spec.kind).inputs()
        step.attend(0, {name: torch.randn(4, *shape) for name, shape in shapes.items()})
        raise KeyError("a body that fails")
    cell.walker.memory(Role.TARGET).release(span.memory)
    expected = run(make_cell(segments="off"))
    for ours, theirs in zip(run(cell), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_service_that_is_lost_is_noticed(device: Device, make_cell: CellMaker) -> None:
    cell = make_cell(links=device.links(), segments="eager")
    run(cell)
    device.running[Kind.FULL].stop(0.0)
    with pytest.raises(BraidError):
        cell.walker._recovery_s = 0.2
        run(cell)


def test_a_device_that_fails_ends_the_service(device: Device, make_cell: CellMaker) -> None:
    cell = make_cell(links=device.links(), segments="eager")
    host, told = device.hosts[Kind.LINEAR], []
    host.on_fault = lambda: told.append(host)
    device.streams[Kind.LINEAR].fault = failure("cuStreamQuery", 700, "ILLEGAL_ADDRESS")
    with pytest.raises(ServiceFault, match="ILLEGAL_ADDRESS"):
        run(cell)
    assert host.faulted and told == [host]
    device.streams[Kind.LINEAR].fault = None


def test_a_way_that_was_not_declared_is_refused(device: Device, make_cell: CellMaker) -> None:
    cell = make_cell(links=device.links(), segments="eager")
    device.streams[Kind.LINEAR].handovers = ()
    with pytest.raises(BraidError, match="STREAM_VALUES") as caught:
        run(cell)
    assert caught.value.reason == "MECHANISM_UNSUPPORTED"
