"""Steps that come by mailbox: as exact as those of the stream, and as well guarded."""

from __future__ import annotations

import queue
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc
import pytest
import torch
from braid.v1 import attention_pb2 as pb
from braid_wire import errors
from braid_wire.doorbell import BELL_BYTES, Doorbell
from braid_wire.layers import Kind
from braid_wire.mailbox import Mailbox
from service_harness import PATIENCE_S, Cell, Sent, Work, assert_status

KINDS = (Kind.FULL, Kind.LINEAR)
ROOM = 1 << 14


def alive() -> None:
    """The service lives."""


@dataclass
class Posted:
    """A walk whose first step comes on the stream, and the others by mail."""

    cell: Cell
    kind: Kind
    requests: queue.SimpleQueue[pb.WalkRequest | None] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        self.call = self.cell.services[self.kind].stub.Walk(iter(self.requests.get, None), timeout=PATIENCE_S)
        room = self.cell.room["metadata"]
        self.bells = [room.empty((BELL_BYTES,), torch.uint8).zero_() for _ in range(2)]
        self.boxes = [room.empty((ROOM,), torch.uint8).zero_() for _ in range(2)]
        self.request, self.done = (Doorbell(memory) for memory in self.bells)
        self.sent, self.answers = (Mailbox(memory) for memory in self.boxes)
        self.timings = room.empty((16, 3), torch.int64)
        self.base = 0

    def message(self, sent: Sent, works: list[Work], mail: bool) -> pb.WalkRequest:
        request = self.cell.open_request(sent, works)
        bells, view = request.open.doorbells, self.cell.view
        bells.request.CopyFrom(view(self.bells[0]))
        bells.done.CopyFrom(view(self.bells[1]))
        bells.timings.CopyFrom(view(self.timings[: len(works)]))
        bells.base = self.base
        if mail:
            bells.mail.requests.CopyFrom(view(self.boxes[0]))
            bells.mail.responses.CopyFrom(view(self.boxes[1]))
        return request

    def on_stream(self, message: pb.WalkRequest) -> pb.WalkResponse:
        self.requests.put(message)
        answer: pb.WalkResponse = next(self.call)
        return answer

    def by_mail(self, *texts: bytes) -> list[pb.WalkResponse]:
        self.sent.put(texts)
        letter = self.answers.take(alive, PATIENCE_S)
        assert letter is not None
        return [pb.WalkResponse.FromString(text) for text in letter]

    def run(self, sent: Sent, works: list[Work]) -> None:
        for index, work in enumerate(works):
            self.request.ring(self.base + index + 1)
            assert self.done.wait(self.base + index + 1, alive, PATIENCE_S)
            self.cell.check(self.kind, sent, work)
        self.base += len(works)

    def first(self, sent: Sent) -> None:
        works = self.cell.all_work(self.kind, sent)
        assert self.on_stream(self.message(sent, works, mail=True)).HasField("opened")
        self.run(sent, works)

    def next(self, sent: Sent) -> None:
        works = self.cell.all_work(self.kind, sent)
        (answer,) = self.by_mail(self.message(sent, works, mail=False).SerializeToString())
        assert answer.HasField("opened"), answer
        self.run(sent, works)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.value)
def posted(cell: Cell, request: pytest.FixtureRequest) -> Iterator[Posted]:
    made = Posted(cell, request.param)
    made.first(cell.batch((cell.sequence(0), 3)))
    yield made
    made.call.cancel()
    cell.next_epoch()
    cell.shadow = {
        key: {name: t.clone() for name, t in memory.items()} for key, memory in cell.memory.items()
    }
    again = Posted(cell, request.param)  # whatever was done, the service takes a correct step
    again.first(cell.batch((cell.sequence(3), 4)))
    again.next(cell.batch((cell.sequence(2), 1)))
    again.call.cancel()


def test_steps_by_mail_are_exact(cell: Cell, posted: Posted) -> None:
    sequence = cell.sequence(1)
    for length in (5, 1, 1, 7):
        sent = cell.batch((sequence, length))
        posted.next(sent)
        sent.commit()


def test_a_refused_step_is_answered_and_the_next_one_runs(cell: Cell, posted: Posted) -> None:
    wrong = cell.batch((cell.sequence(1), 2))
    message = posted.message(wrong, cell.all_work(posted.kind, wrong), mail=False)
    message.open.plan.batch.num_sequences = 0
    (answer,) = posted.by_mail(message.SerializeToString())
    assert_status(answer.failed, errors.BatchInvalid)
    posted.next(cell.batch((cell.sequence(1), 2)))


def test_letters_that_cannot_be_read_are_answered(cell: Cell, posted: Posted) -> None:
    (answer,) = posted.by_mail(b"\xff\xff no message")
    assert_status(answer.failed, errors.BatchInvalid)
    for garbage in (struct.pack("<q", 1 << 40), struct.pack("<qq", 1, 1 << 40), struct.pack("<qq", 1, -5)):
        posted.sent.put([bytes(64)])  # counts the letter; its text is written over before it is read again
        assert posted.answers.take(alive, PATIENCE_S) is not None
        memory = posted.boxes[0]
        memory[BELL_BYTES : BELL_BYTES + len(garbage)] = torch.frombuffer(
            bytearray(garbage), dtype=torch.uint8
        )
        posted.sent._letters += 1
        Doorbell(memory[:BELL_BYTES]).ring(posted.sent._letters)
        letter = posted.answers.take(alive, PATIENCE_S)
        assert letter is not None
        assert_status(pb.WalkResponse.FromString(letter[0]).failed, errors.ViewInvalid)
    posted.next(cell.batch((cell.sequence(1), 2)))


def test_a_second_pair_of_mailboxes_is_refused(cell: Cell, posted: Posted) -> None:
    sent = cell.batch((cell.sequence(1), 2))
    message = posted.message(sent, cell.all_work(posted.kind, sent), mail=True)
    (answer,) = posted.by_mail(message.SerializeToString())
    assert_status(answer.failed, errors.StepOrder)


def test_given_up_mailboxes_lead_back_to_the_stream(cell: Cell, posted: Posted) -> None:
    posted.sent.give_up()
    sent = cell.batch((cell.sequence(1), 2))
    works = cell.all_work(posted.kind, sent)
    assert posted.on_stream(posted.message(sent, works, mail=False)).HasField("opened")
    posted.run(sent, works)


def test_the_end_of_the_stream_ends_a_walk_that_waits_for_mail(cell: Cell, posted: Posted) -> None:
    posted.requests.put(None)
    posted.sent.give_up()
    assert list(posted.call) == []  # and not the error of the call's own deadline


@pytest.mark.parametrize("size", [BELL_BYTES, 8])
def test_memory_that_is_no_mailbox_is_refused(cell: Cell, size: int) -> None:
    made = Posted(cell, Kind.FULL)
    sent = cell.batch((cell.sequence(1), 2))
    message = made.message(sent, cell.all_work(made.kind, sent), mail=True)
    message.open.doorbells.mail.responses.shape[:] = [size]
    assert_status(made.on_stream(message).failed, errors.ViewInvalid)
    made.call.cancel()
    with pytest.raises(grpc.RpcError):
        next(made.call)
