"""Handing steps over to one service by mailboxes, and their layers by doorbells.

On a GPU the doorbells say when work was enqueued, and something else in which order it runs: counters that
streams write and wait for, so that nobody waits inside a step; or events; or, where a service has neither,
each process waits for its own kernels before it rings.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from braid.v1 import attention_pb2 as pb
from braid_wire.batch import IntArray
from braid_wire.cuda_doorbell import DeviceBell, Event, Mark, Streams
from braid_wire.doorbell import Doorbell
from braid_wire.errors import ServiceFault, from_status
from braid_wire.layers import Kind
from braid_wire.mailbox import Mailbox

from braid_orchestrator.link import Walk
from braid_orchestrator.store import Bells, Store

# Steps that a service keeps; fewer than it takes.
_KEPT = 512
# Layers enqueued ahead of the device, so that the driver's queue never fills: a launch that hangs there
# could not be released.
_AHEAD = 32


class Kept:
    """The numbers under which the service at the end of a walk keeps steps, to begin more like them."""

    def __init__(self) -> None:
        self._numbers: OrderedDict[Hashable, int] = OrderedDict()

    def number(self, like: Hashable) -> tuple[int, bool]:
        """The number of steps like this, and whether the service knows it; from here on it does."""
        found = self._numbers.get(like)
        if found is not None:
            return found, True
        if len(self._numbers) < _KEPT:
            found = len(self._numbers) + 1
        else:
            _, found = self._numbers.popitem(last=False)
        self._numbers[like] = found
        return found, False


@dataclass(frozen=True)
class DeviceOrder:
    """How the layers of one service are ordered on the device.

    Args:
        streams: of this process.
        way: the best that both sides have; UNSPECIFIED: each waits for its own kernels.
    """

    streams: Streams
    way: pb.DeviceHandover.ValueType

    @classmethod
    def between(cls, streams: Streams, offered: Sequence[pb.DeviceHandover.ValueType]) -> DeviceOrder:
        """The best of what a service offers and this process has."""
        common = [way for way in streams.handovers if way in offered]
        return cls(streams, common[0] if common else pb.DEVICE_HANDOVER_UNSPECIFIED)

    @property
    def by_values(self) -> bool:
        """Whether streams write and wait for counters."""
        return self.way == pb.DEVICE_HANDOVER_STREAM_VALUES

    @property
    def by_events(self) -> bool:
        """Whether streams record and wait for events."""
        return self.way == pb.DEVICE_HANDOVER_EVENTS


class Handover:
    """One service's doorbells and mailboxes, for as long as its walk is open.

    The lanes of a step share it: the service runs ticket 0 of each lane, then ticket 1 of each.

    Args:
        store: where the bells lie.
        kind: of the service.
        walk: the stream on which the service says why a step failed.
        timeout_s: longest time that one layer may take.
        order: of its layers on a device; None: on a CPU, where a ring is all.
    """

    def __init__(
        self, store: Store, kind: Kind, walk: Walk, timeout_s: float, order: DeviceOrder | None = None
    ) -> None:
        self._order = order
        self._device_bells: tuple[DeviceBell, ...] = ()
        """Request and done, where streams write them."""
        self._own_events: list[Event] = []
        self._peer_events: dict[int, tuple[bytes, Event]] = {}
        """Lane → its handle, and the event that the service records."""
        self._marks: dict[tuple[int, int], list[Mark]] = {}
        """(index, lane) → when the stream handed a ticket over, and when it had its output."""
        self._stamps: dict[tuple[int, int], tuple[int, int]] = {}
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
        if order is not None and order.by_values:
            bells = self._bells.device_request, self._bells.device_done
            self._device_bells = tuple(order.streams.bell(memory) for memory in bells)
            # A graph is recorded in the middle of a step, which waits for the whole device.
            walk.on_lost = self._fail_device_bells

    @property
    def device_bells(self) -> tuple[DeviceBell, ...]:
        """What this process's stream writes or waits for."""
        return self._device_bells

    def begin(self, tickets: int, lanes: int = 1) -> int:
        """Where the bells stand before a step of so many tickets a lane."""
        self._base += self._tickets * self._lanes
        self._tickets, self._lanes = tickets, lanes
        self._marks.clear()
        self._stamps.clear()
        return self._base

    def bells(self) -> list[pb.Doorbells]:
        """The message of each lane of the step that was begun."""
        key = self._tickets, self._lanes
        known = self._messages.get(key)
        if known is None:
            known = [self._message(self._tickets, lane, self._lanes) for lane in range(self._lanes)]
            self._messages[key] = known
        for message in known:
            message.base = self._base
        return known

    def announce_step(self) -> None:
        """Let the service wake up: a step will be sent soon."""
        if self._mail:
            self._requests.announce()

    def send(self, messages: Sequence[pb.WalkRequest]) -> None:
        """Open the lanes of a step: `receive` has the answers."""
        if self._mail is None:
            messages[-1].open.doorbells.mail.CopyFrom(self._bells.mail())
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
        answers = self._received(count)
        if self._order is not None and self._order.by_events:
            for lane, answer in enumerate(answers):
                handle = answer.opened.device_event
                if self._peer_events.get(lane, (b"",))[0] != handle:
                    self._peer_events[lane] = handle, self._order.streams.peer_event(handle)
        return answers

    def _received(self, count: int) -> list[pb.WalkResponse]:
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
        """Have a ticket run; tickets are posted lane by lane in each layer.

        On a device, behind what this process's stream has been given so far.
        """
        value, order = self._value(index, lane), self._order
        if order is not None and order.by_values:
            self._marks[index, lane] = [order.streams.mark()]
            order.streams.ring(self._device_bells[0], value)
            return
        if order is not None and order.by_events:
            self._own_events[lane].record()
        elif order is not None:
            order.streams.finish(self._walk.check, self._timeout)
        self._request.ring(value)

    def take(self, index: int, lane: int) -> None:
        """Wait until a ticket's output is written, or have this process's stream wait for it.

        Raises:
            BraidError: why the step failed, or that the service was lost.
        """
        value, order = self._value(index, lane), self._order
        if order is not None and order.by_values:
            request, done = self._device_bells
            self._look()
            order.streams.until(lambda: request.value >= value - _AHEAD, self._look, self._timeout)
            order.streams.wait(done, value)
            self._marks[index, lane].append(order.streams.mark())
            return
        self._wait(value)
        if order is not None and order.by_events:
            self._peer_events[lane][1].wait()

    def arrive(self) -> None:
        """Wait until this process's stream has run all that it was given, the waits for layers included.

        Raises:
            BraidError: why the step failed, or that the service was lost.
        """
        if self._order is not None:
            self._order.streams.finish(self._look, self._timeout)

    def settle(self) -> None:
        """Wait until the service has said when the layers of a step ran, all of which have been taken.

        Raises:
            BraidError: why the step failed, or that the service was lost.
        """
        order = self._order
        if order is None or not order.by_values:
            return
        if self._marks and not self._stamps:
            last = order.streams.mark()
            order.streams.finish(self._look, self._timeout)
            now = time.monotonic_ns()
            for key, marks in self._marks.items():
                posted, taken = order.streams.times(marks, last, now)
                self._stamps[key] = posted, taken
        self._wait(self._base + self._tickets * self._lanes)

    def device_stamps(self, lane: int) -> Mapping[int, tuple[int, int]]:
        """Index → when the stream handed a ticket of a lane over and had its output, nanoseconds of
        CLOCK_MONOTONIC; without the tickets where this process did both itself."""
        return {index: stamps for (index, at), stamps in self._stamps.items() if at == lane}

    def _wait(self, value: int) -> None:
        if not self._done.wait(value, self._walk.check, self._timeout, expected=True):
            self._explain()

    def _look(self) -> None:
        """Raise what has gone wrong meanwhile."""
        self._walk.check()
        if self._done.failed:
            self._explain()

    def _explain(self) -> NoReturn:
        self._walk.receive()  # raises what went wrong
        raise ServiceFault("a service gave a step up and did not say why")

    def times(self, lane: int) -> IntArray:
        """When the tickets of a lane that has run were received, started and finished, nanoseconds of
        CLOCK_MONOTONIC: int64 [tickets, 3], a copy."""
        found: IntArray = self._times[lane, : self._tickets].copy()
        return found

    def release(self) -> None:
        """Let the service stop waiting: the step, or the walk, is given up.

        What streams wait for is released too; the caller lets its own run dry before it goes on.
        """
        self._request.fail()
        self._requests.give_up()
        self._fail_device_bells()

    def _fail_device_bells(self) -> None:
        for bell in self._device_bells:
            bell.fail()

    def _message(self, tickets: int, lane: int, lanes: int) -> pb.Doorbells:
        message, order = self._bells.message(tickets, lane, lanes), self._order
        if order is None:
            return message
        message.device = order.way
        if order.by_values:
            for name, view in self._bells.device_views().items():
                getattr(message, name).CopyFrom(view)
        elif order.by_events:
            while len(self._own_events) <= lane:
                self._own_events.append(order.streams.event())
            message.device_event = self._own_events[lane].handle
        return message

    def _value(self, index: int, lane: int) -> int:
        return self._base + self._lanes * index + lane + 1
