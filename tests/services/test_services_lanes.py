"""Two lanes of a step on one pair of doorbells: exact, in turn, and refused where they do not fit."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from braid.v1 import attention_pb2 as pb
from braid_wire import errors
from braid_wire.doorbell import BELL_BYTES, Doorbell
from braid_wire.layers import Kind
from service_harness import PATIENCE_S, Cell, Sent, Work, assert_status

KINDS = (Kind.FULL, Kind.LINEAR)


def alive() -> None:
    """The service lives."""


@dataclass
class Pair:
    """A walk whose steps have two lanes."""

    cell: Cell
    kind: Kind
    base: int = 0
    requests: queue.SimpleQueue[pb.WalkRequest | None] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        self.call = self.cell.services[self.kind].stub.Walk(iter(self.requests.get, None), timeout=PATIENCE_S)
        room = self.cell.room["metadata"]
        self.memory = [room.empty((BELL_BYTES,), torch.uint8).zero_() for _ in range(2)]
        self.request, self.done = (Doorbell(memory) for memory in self.memory)
        self.timings = room.empty((2, 16, 3), torch.int64)

    def lanes(self, *parts: tuple[int, int]) -> list[Sent]:
        """One batch a lane: (sequence, tokens) of each, both of one step."""
        sent = [
            self.cell.batch((self.cell.sequence(sequence), tokens), lane=lane)
            for lane, (sequence, tokens) in enumerate(parts)
        ]
        for one in sent:
            one.message.step = sent[0].message.step
        return sent

    def bells(self, lane: int, tickets: int, lanes: int = 2, base: int | None = None) -> pb.Doorbells:
        request, done = (self.cell.view(memory) for memory in self.memory)
        return pb.Doorbells(
            request=request,
            done=done,
            base=self.base if base is None else base,
            timings=self.cell.view(self.timings[lane, :tickets]),
            lanes=lanes,
        )

    def open(self, sent: Sent, works: list[Work], bells: pb.Doorbells) -> pb.WalkResponse:
        request = self.cell.open_request(sent, works)
        request.open.doorbells.CopyFrom(bells)
        self.requests.put(request)
        response: pb.WalkResponse = next(self.call)
        return response

    def end(self) -> None:
        self.requests.put(None)
        assert list(self.call) == []


@pytest.fixture(params=KINDS, ids=lambda kind: kind.value)
def pair(cell: Cell, request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(cell, request.param)
    yield made
    made.call.cancel()
    cell.next_epoch()


def apart(cell: Cell, pair: Pair, *parts: tuple[int, int]) -> tuple[list[Sent], list[list[Work]]]:
    """Two lanes, and the work of each."""
    sent = pair.lanes(*parts)
    return sent, [cell.all_work(pair.kind, one) for one in sent]


def test_lanes_take_turns_and_are_exact(cell: Cell, pair: Pair) -> None:
    for parts in (((0, 5), (1, 3)), ((2, 1), (3, 4))):
        sent, works = apart(cell, pair, *parts)
        for lane in range(2):
            opened = pair.open(sent[lane], works[lane], pair.bells(lane, len(works[lane])))
            assert opened.HasField("opened"), opened
        tickets = len(works[0])
        for index in range(tickets):
            for lane in range(2):
                value = pair.base + 2 * index + lane + 1
                assert pair.done.value == value - 1  # the other lane's layer ran, and no more
                pair.request.ring(value)
                assert pair.done.wait(value, alive, PATIENCE_S)
                cell.check_output(pair.kind, sent[lane], works[lane][index])
        stamps = pair.timings[:, :tickets].transpose(0, 1).flatten().tolist()
        assert stamps == sorted(stamps)
        pair.base += 2 * tickets
    pair.end()


def test_nothing_runs_before_both_lanes_are_open(cell: Cell, pair: Pair) -> None:
    sent, works = apart(cell, pair, (0, 2), (1, 2))
    assert pair.open(sent[0], works[0], pair.bells(0, len(works[0]))).HasField("opened")
    pair.request.ring(1)
    with pytest.raises(errors.StepTimeout):
        pair.done.wait(1, alive, 0.1)
    assert pair.open(sent[1], works[1], pair.bells(1, len(works[1]))).HasField("opened")
    assert pair.done.wait(1, alive, PATIENCE_S)


def test_giving_up_closes_both_lanes(cell: Cell, pair: Pair) -> None:
    sent, works = apart(cell, pair, (0, 2), (1, 2))
    for lane in range(2):
        pair.open(sent[lane], works[lane], pair.bells(lane, len(works[lane])))
    pair.request.ring(1)
    assert pair.done.wait(1, alive, PATIENCE_S)
    pair.request.fail()
    failed: pb.WalkResponse = next(pair.call)
    assert_status(failed.failed, errors.StepAborted)
    assert failed.lane == 1  # its layer was the next
    assert not pair.done.wait(2, alive, PATIENCE_S)
    for lane in range(2):
        run = pb.RunTicket(step=sent[lane].message.step, lane=lane, index=0)
        pair.requests.put(pb.WalkRequest(run=run))
        assert_status(next(pair.call).failed, errors.StepOrder)


@pytest.mark.parametrize(
    ("lane", "lanes", "base"),
    [(1, 2, 0), (0, 3, 0), (1, 1, 0)],
    ids=["lane 1 alone", "3 lanes", "lane 1 of 1"],
)
def test_lanes_that_do_not_fit_are_refused(cell: Cell, pair: Pair, lane: int, lanes: int, base: int) -> None:
    sent = pair.lanes((0, 2), (1, 2))[lane]
    works = cell.all_work(pair.kind, sent)
    answer = pair.open(sent, works, pair.bells(lane, len(works), lanes, base))
    assert_status(answer.failed, errors.StepOrder)


def test_lanes_with_different_counters_are_refused(cell: Cell, pair: Pair) -> None:
    sent, works = apart(cell, pair, (0, 2), (1, 2))
    assert pair.open(sent[0], works[0], pair.bells(0, len(works[0]))).HasField("opened")
    other = pair.bells(1, len(works[1]), base=64)
    assert_status(pair.open(sent[1], works[1], other).failed, errors.StepOrder)
