"""Handing steps over to one service by mailboxes, and their layers by doorbells."""

from __future__ import annotations

from collections.abc import Sequence

from braid.v1 import attention_pb2 as pb
from braid_wire.doorbell import Doorbell
from braid_wire.errors import ServiceFault, from_status
from braid_wire.layers import Kind
from braid_wire.mailbox import Mailbox

from braid_orchestrator.link import Walk
from braid_orchestrator.store import Bells, Store


class Handover:
    """One service's doorbells and mailboxes, for as long as its walk is open.

    The lanes of a step share it: the service runs ticket 0 of each lane, then ticket 1 of each.

    Args:
        store: where the bells lie.
        kind: of the service.
        walk: the stream on which the service says why a step failed.
        timeout_s: longest time that one layer may take.
    """

    def __init__(self, store: Store, kind: Kind, walk: Walk, timeout_s: float) -> None:
        self._bells: Bells = store.bells(kind)
        self._request = Doorbell(self._bells.request)
        self._done = Doorbell(self._bells.done)
        self._times = self._bells.timings.numpy()
        self._requests = Mailbox(self._bells.requests)
        self._responses = Mailbox(self._bells.responses)
        self._mail: bool | None = None
        """Whether the service reads its mail; None: it does not know of it yet."""
        self._on_stream = True
        self._messages: dict[tuple[int, int], list[pb.Doorbells]] = {}
        """(tickets, lanes) → the message of each lane."""
        self._walk = walk
        self._timeout = timeout_s
        self._base = 0
        self._tickets = 0
        self._lanes = 1

    def begin(self, tickets: int, lanes: int = 1) -> list[pb.Doorbells]:
        """The message of each lane of a step of so many tickets a lane."""
        self._base += self._tickets * self._lanes
        self._tickets, self._lanes = tickets, lanes
        known = self._messages.get((tickets, lanes))
        if known is None:
            known = [self._bells.message(tickets, lane, lanes) for lane in range(lanes)]
            self._messages[tickets, lanes] = known
        for message in known:
            message.base = self._base
        return known

    def announce_step(self) -> None:
        """Let the service wake up: a step will be sent soon."""
        if self._mail:
            self._requests.announce()

    def send(self, steps: Sequence[pb.OpenStep]) -> None:
        """Open the lanes of a step: `receive` has the answers."""
        if self._mail is None:
            steps[-1].doorbells.mail.CopyFrom(self._bells.mail())
        messages = [pb.WalkRequest(open=step) for step in steps]
        texts = [message.SerializeToString() for message in messages] if self._mail else []
        if self._mail and not self._requests.fits(texts):
            self._requests.give_up()  # the service goes back to its stream, for good
            self._mail = False
        self._on_stream = not self._mail
        if self._mail:
            self._requests.put(texts)
            return
        for message in messages:
            self._walk.send(message)
        self._mail = self._mail is None

    def receive(self, count: int) -> list[pb.WalkResponse]:
        """The answers to the last `send`, one for each lane.

        Raises:
            BraidError: the service refused a lane, or was lost.
        """
        if not self._on_stream:
            letter = self._responses.take(self._walk.check, self._timeout, expected=True)
            if letter:
                answers = [pb.WalkResponse.FromString(text) for text in letter]
                for answer in answers:
                    if answer.HasField("failed"):
                        raise from_status(answer.failed)
                return answers
        return [self._walk.receive() for _ in range(count)]

    def announce(self, index: int, lane: int) -> None:
        """Let the service wake up: a ticket will be posted soon."""
        self._request.announce(self._value(index, lane))

    def post(self, index: int, lane: int) -> None:
        """Have a ticket run; tickets are posted lane by lane in each layer."""
        self._request.ring(self._value(index, lane))

    def take(self, index: int, lane: int) -> None:
        """Wait until a ticket's output is written.

        Raises:
            BraidError: why the step failed, or that the service was lost.
        """
        value = self._value(index, lane)
        if not self._done.wait(value, self._walk.check, self._timeout, expected=True):
            self._walk.receive()  # raises what went wrong
            raise ServiceFault("a service gave a step up and did not say why")

    def times(self, index: int, lane: int) -> list[int]:
        """When a ticket that has run was received, started and finished, nanoseconds of CLOCK_MONOTONIC."""
        found: list[int] = self._times[lane, index].tolist()
        return found

    def release(self) -> None:
        """Let the service stop waiting: the step, or the walk, is given up."""
        self._request.fail()
        self._requests.give_up()

    def _value(self, index: int, lane: int) -> int:
        return self._base + self._lanes * index + lane + 1
