"""Steps that are opened by their numbers alone: as exact as others, and as well guarded."""

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
from service_harness import PATIENCE_S, Cell, MakeCell, Sent, Work, assert_status, changed, refused

KINDS = (Kind.FULL, Kind.LINEAR)
KEPT = 7


def alive() -> None:
    """The service lives."""


@dataclass
class Stream:
    """A walk whose layers run by messages."""

    cell: Cell
    kind: Kind
    requests: queue.SimpleQueue[pb.WalkRequest | None] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        self.call = self.cell.services[self.kind].stub.Walk(iter(self.requests.get, None), timeout=PATIENCE_S)
        self.works: list[Work] = []

    def ask(self, request: pb.WalkRequest) -> pb.WalkResponse:
        self.requests.put(request)
        answer: pb.WalkResponse = next(self.call)
        return answer

    def keep(self, sent: Sent, number: int = KEPT) -> pb.WalkResponse:
        """Open a step that the service is to keep."""
        self.works = self.cell.all_work(self.kind, sent)
        request = self.cell.open_request(sent, self.works)
        request.open.keep = number
        return self.ask(request)

    def again(self, sent: Sent, number: int = KEPT) -> pb.WalkResponse:
        """Open a step with the numbers of a batch whose arrays lie where the kept one's do."""
        message = sent.message
        again = pb.OpenAgain(kept=number, epoch=message.epoch, step=message.step)
        return self.ask(pb.WalkRequest(again=again))

    def run(self, sent: Sent) -> None:
        """Run and check every layer of the open step."""
        step, lane = sent.message.step, sent.message.lane
        for index, work in enumerate(self.works):
            for tensor in work.inputs.values():
                tensor.copy_(self.cell.noise(*tensor.shape))
            work.output.fill_(torch.nan)
            run = pb.RunTicket(step=step, lane=lane, index=index)
            assert self.ask(pb.WalkRequest(run=run)).HasField("done")
            self.cell.check(self.kind, sent, work)
        sent.commit()


def like(cell: Cell, first: Sent, *parts: object) -> Sent:
    """A batch of the first one's layout, whose arrays are written where that one's lie."""
    sent = cell.batch(*parts)  # type: ignore[arg-type]
    for name, array in sent.arrays.items():
        first.arrays[name].copy_(array)
    return Sent(sent.message, first.arrays, sent.parts, sent.slots)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.value)
def stream(cell: Cell, request: pytest.FixtureRequest) -> Iterator[Stream]:
    made = Stream(cell, request.param)
    yield made
    made.call.cancel()


def test_steps_by_number_are_exact(cell: Cell, stream: Stream) -> None:
    one, other = cell.sequence(1), cell.sequence(2)
    first = cell.batch((one, 3), (other, 2))
    assert stream.keep(first).HasField("opened")
    stream.run(first)
    for lengths in ((2, 3), (4, 1), (1, 4)):  # other spans, contexts, states and modes in the same places
        sent = like(cell, first, (one, lengths[0]), (other, lengths[1]))
        answer = stream.again(sent)
        assert answer.opened.summary.qo_indptr_last == 5
        assert answer.opened.summary.kv_tokens == one.length + other.length + 5
        stream.run(sent)


def test_by_doorbell_they_are_exact_too(cell: Cell, stream: Stream) -> None:
    room, sequence = cell.room["metadata"], cell.sequence(1)
    bells = [room.empty((BELL_BYTES,), torch.uint8).zero_() for _ in range(2)]
    first = cell.batch((sequence, 2))
    stream.works = cell.all_work(stream.kind, first)
    request = cell.open_request(first, stream.works)
    request.open.keep = KEPT
    doorbells, count = request.open.doorbells, len(stream.works)
    doorbells.request.CopyFrom(cell.view(bells[0]))
    doorbells.done.CopyFrom(cell.view(bells[1]))
    doorbells.timings.CopyFrom(cell.view(room.empty((count, 3), torch.int64)))
    asked, done = Doorbell(bells[0]), Doorbell(bells[1])
    sent = first
    for base in range(0, 4 * count, count):
        if base:
            sent = like(cell, first, (sequence, 2))
            again = pb.OpenAgain(kept=KEPT, epoch=sent.message.epoch, step=sent.message.step, base=base)
            request = pb.WalkRequest(again=again)
        assert stream.ask(request).HasField("opened")
        for index, work in enumerate(stream.works, start=base + 1):
            work.output.fill_(torch.nan)
            asked.ring(index)
            assert done.wait(index, alive, PATIENCE_S)
            cell.check(stream.kind, sent, work)
        sent.commit()


def test_an_unknown_number_is_refused(cell: Cell, stream: Stream) -> None:
    sent = cell.batch((cell.sequence(1), 2))
    assert_status(stream.again(sent).failed, errors.StepOrder)
    assert stream.keep(sent).HasField("opened")
    stream.run(sent)


def test_a_number_above_the_limit_is_refused(cell: Cell, stream: Stream) -> None:
    sent = cell.batch((cell.sequence(1), 2))
    assert_status(stream.keep(sent, 1025).failed, errors.BatchInvalid)
    assert stream.keep(sent, 1024).HasField("opened")


def test_a_later_step_takes_a_number_over(cell: Cell, stream: Stream) -> None:
    sequence = cell.sequence(1)
    first = cell.batch((sequence, 3))
    stream.keep(first)
    stream.run(first)
    second = cell.batch((sequence, 1))
    stream.keep(second)
    stream.run(second)
    sent = like(cell, second, (sequence, 1))
    assert stream.again(sent).opened.summary.qo_indptr_last == 1
    stream.run(sent)


@pytest.mark.parametrize("rule", ["spans", "references"])
def test_what_breaks_a_rule_is_refused_and_runs_nothing(cell: Cell, stream: Stream, rule: str) -> None:
    sequence = cell.sequence(1)
    first = cell.batch((sequence, 3))
    stream.keep(first)
    stream.run(first)
    bad = like(cell, first, (sequence, 3))
    if rule == "spans":
        changed(bad, "cu_seqlens", [0, 2])
        expected: type[errors.BraidError] = errors.BatchInvalid
    else:
        name = "page_generations" if stream.kind is Kind.FULL else "state_in_generations"
        changed(bad, name, (bad.arrays[name] + 1).numpy())
        expected = errors.ReferenceStale
    assert_status(stream.again(bad).failed, expected)
    run = pb.RunTicket(step=bad.message.step, index=0)
    assert_status(stream.ask(pb.WalkRequest(run=run)).failed, errors.StepOrder)
    # Nor does the step before run on, whose copies have been written over.
    work = stream.works[0]
    with refused(errors.PlanMissing):
        cell.services[stream.kind].stub.Attend(cell.attend_request(first, work), timeout=PATIENCE_S)
    good = like(cell, first, (sequence, 3))
    assert stream.again(good).HasField("opened")
    stream.run(good)


def test_an_older_epoch_is_refused(cell: Cell, stream: Stream) -> None:
    sequence = cell.sequence(1)
    first = cell.batch((sequence, 2))
    stream.keep(first)
    stream.run(first)
    sent = like(cell, first, (sequence, 2))
    sent.message.epoch -= 1
    assert_status(stream.again(sent).failed, errors.EpochStale)


def test_what_was_kept_ends_with_a_configure(cell: Cell, make_cell: MakeCell, stream: Stream) -> None:
    sequence = cell.sequence(1)
    first = cell.batch((sequence, 2))
    stream.keep(first)
    stream.run(first)
    cell.next_epoch()
    cell.configure()
    assert_status(stream.again(like(cell, first, (sequence, 2))).failed, errors.StepOrder)
