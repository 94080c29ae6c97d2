"""Walks by doorbells: exact, released at once by whatever ends them, refused where they are wrong."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
import torch
from braid.v1 import attention_pb2 as pb
from braid_wire import errors
from braid_wire.doorbell import BELL_BYTES, Doorbell
from braid_wire.layers import Kind
from service_harness import PATIENCE_S, Cell, MakeCell, Sent, Service, Work, assert_status, start_service

KINDS = (Kind.FULL, Kind.LINEAR)
RELEASE_S = 0.1
ATTEMPTS = 20
"""One release may be late because others have the cores; the quickest of many is not."""
BEFORE_KEEPALIVE_S = 5.0
"""Well before gRPC's keep-alive would find a peer gone: 10 s until it asks, and 5 s for the answer."""


def alive() -> None:
    """The service lives."""


@dataclass
class Rung:
    """A walk that is driven by bells."""

    cell: Cell
    kind: Kind
    requests: queue.SimpleQueue[pb.WalkRequest | None] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        self.call = self.cell.services[self.kind].stub.Walk(iter(self.requests.get, None), timeout=PATIENCE_S)
        room = self.cell.room["metadata"]
        self.memory = [room.empty((BELL_BYTES,), torch.uint8).zero_() for _ in range(2)]
        self.request, self.done = (Doorbell(memory) for memory in self.memory)
        self.timings = room.empty((16, 3), torch.int64)
        self.base = 0

    def bells(self, tickets: int) -> pb.Doorbells:
        request, done = (self.cell.view(memory) for memory in self.memory)
        timings = self.cell.view(self.timings[:tickets])
        return pb.Doorbells(request=request, done=done, base=self.base, timings=timings)

    def open(self, sent: Sent, works: list[Work], bells: pb.Doorbells | None = None) -> pb.WalkResponse:
        request = self.cell.open_request(sent, works)
        request.open.doorbells.CopyFrom(bells or self.bells(len(works)))
        self.requests.put(request)
        return self.answer()

    def answer(self) -> pb.WalkResponse:
        response: pb.WalkResponse = next(self.call)
        return response

    def run(self, at: int) -> None:
        self.request.ring(self.base + at + 1)
        self.done.wait(self.base + at + 1, alive, PATIENCE_S)

    def walk(self, sent: Sent) -> None:
        """A whole correct step."""
        works = self.cell.all_work(self.kind, sent)
        assert self.open(sent, works).HasField("opened")
        for index, work in enumerate(works):
            self.run(index)
            assert not self.done.failed
            self.cell.check(self.kind, sent, work)
        times = self.timings[: len(works)].flatten().tolist()
        assert times == sorted(times)
        assert times[0] > 0
        self.base += len(works)
        close = pb.CloseStep(step=sent.message.step, lane=sent.message.lane)
        self.requests.put(pb.WalkRequest(close=close))

    def end(self) -> None:
        self.requests.put(None)
        assert list(self.call) == []


@pytest.fixture(params=KINDS, ids=lambda kind: kind.value)
def rung(cell: Cell, request: pytest.FixtureRequest) -> Iterator[Rung]:
    """A walk; when the test is over, a new one must take a correct step."""
    yield Rung(cell, request.param)
    cell.next_epoch()
    cell.shadow = {
        key: {name: t.clone() for name, t in memory.items()} for key, memory in cell.memory.items()
    }
    after = Rung(cell, request.param)
    after.walk(cell.batch((cell.sequence(3), 4)))
    after.end()


def test_steps_are_exact_and_follow_one_another(cell: Cell, rung: Rung) -> None:
    first, second = cell.sequence(0), cell.sequence(1)
    for lengths in ((5, 3), (1, 7), (1, 1)):
        sent = cell.batch((first, lengths[0]), (second, lengths[1]))
        rung.walk(sent)
        sent.commit()
    rung.end()


def opened(cell: Cell, rung: Rung) -> Sent:
    sent = cell.batch((cell.sequence(0), 3))
    assert rung.open(sent, cell.all_work(rung.kind, sent)).HasField("opened")
    rung.run(0)
    return sent


def quickest(cell: Cell, rung: Rung, release: Callable[[Rung], float]) -> float:
    """Seconds of the quickest of some releases, each of a walk of its own; the first may be `rung`."""
    took = [release(rung)]
    while took[-1] >= RELEASE_S and len(took) < ATTEMPTS:
        took.append(release(Rung(cell, rung.kind)))
    return min(took)


def test_a_step_that_is_given_up_releases_the_service(cell: Cell, rung: Rung) -> None:
    def give_up(rung: Rung) -> float:
        opened(cell, rung)
        began = time.monotonic()
        rung.request.fail()
        assert_status(rung.answer().failed, errors.StepAborted)
        took = time.monotonic() - began
        rung.end()
        return took

    assert quickest(cell, rung, give_up) < RELEASE_S


def test_a_new_epoch_releases_both_sides(cell: Cell, rung: Rung) -> None:
    def begin_another(rung: Rung) -> float:
        opened(cell, rung)
        cell.next_epoch()
        other = cell.batch((cell.sequence(2), 2))
        cell.plan(rung.kind, other)
        began = time.monotonic()
        assert_status(rung.answer().failed, errors.EpochStale)
        rung.done.wait(rung.base + 2, alive, PATIENCE_S)
        assert rung.done.failed
        took = time.monotonic() - began
        rung.end()
        return took

    assert quickest(cell, rung, begin_another) < RELEASE_S


def test_a_peer_that_leaves_inside_a_step_is_forgotten(cell: Cell, rung: Rung) -> None:
    opened(cell, rung)
    rung.call.cancel()
    deadline = time.monotonic() + PATIENCE_S
    while not rung.done.failed and time.monotonic() < deadline:
        time.sleep(0.005)
    assert rung.done.failed  # the service has stopped waiting; the fixture sees that it serves


def wrong_size(bells: pb.Doorbells) -> None:
    bells.request.shape[0] = 32


def unaligned(bells: pb.Doorbells) -> None:
    bells.done.offset += 8


def out_of_bounds(bells: pb.Doorbells) -> None:
    bells.done.offset += 1 << 40


def too_few_times(bells: pb.Doorbells) -> None:
    bells.timings.shape[0] -= 1


def missing(bells: pb.Doorbells) -> None:
    bells.ClearField("timings")


@pytest.mark.parametrize("change", [wrong_size, unaligned, out_of_bounds, too_few_times])
def test_memory_that_is_no_bell_is_refused(
    cell: Cell, rung: Rung, change: Callable[[pb.Doorbells], None]
) -> None:
    sent = cell.batch((cell.sequence(0), 3))
    works = cell.all_work(rung.kind, sent)
    bells = rung.bells(len(works))
    change(bells)
    assert_status(rung.open(sent, works, bells).failed, errors.ViewInvalid)
    rung.end()


def test_bells_without_times_are_refused(cell: Cell, rung: Rung) -> None:
    sent = cell.batch((cell.sequence(0), 3))
    works = cell.all_work(rung.kind, sent)
    bells = rung.bells(len(works))
    missing(bells)
    assert_status(rung.open(sent, works, bells).failed, errors.ArenaUnknown)
    rung.end()


def test_a_killed_service_breaks_the_stream_at_once(
    make_cell: MakeCell, services: dict[Kind, Service], runtime: Path
) -> None:
    own = start_service(Kind.LINEAR, f"unix:{runtime}/killed")
    cell = make_cell(services={**services, Kind.LINEAR: own})
    cell.configure()
    rung = Rung(cell, Kind.LINEAR)
    opened(cell, rung)
    own.kill()
    began = time.monotonic()
    with pytest.raises(grpc.RpcError):
        rung.answer()
    assert time.monotonic() - began < BEFORE_KEEPALIVE_S
