"""How the layers of a walked step change hands: counters in shared memory, streams, events.

The orchestrator rings a request counter when a layer's inputs are written, and waits for the done counter.
On a device the two may stand for work that is enqueued, not finished.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from braid.v1 import attention_pb2

from braid_wire import doorbell
from braid_wire.attention_config import ReadyTicket
from braid_wire.attention_host import AttentionHost
from braid_wire.attention_step import LANES, Layout, Step
from braid_wire.cuda_doorbell import DeviceBell, Event, Streams
from braid_wire.cuda_driver import HANDLE_BYTES
from braid_wire.errors import MechanismUnsupported, StepAborted, StepOrder, ViewInvalid
from braid_wire.views import ArenaMap

LONGEST_WAIT_S = 3600.0
"""Behind the slowest body between two layers; a peer that is gone is noticed long before."""

# Layers enqueued ahead of the device: few enough that the driver's queue never fills, in which case the
# thread would hang in a launch where nobody can release it.
_AHEAD = 32


@dataclass(frozen=True)
class _StreamValues:
    """The counters by which streams hand layers over."""

    request: DeviceBell
    done: DeviceBell


@dataclass(frozen=True)
class _Events:
    """The events of one lane."""

    request: Event  # the orchestrator's
    done: Event


@dataclass(frozen=True)
class Bells:
    """How the layers of a step are handed over."""

    request: doorbell.Doorbell
    done: doorbell.Doorbell
    lanes: int
    place: tuple[int, int]  # of the counter's arena: arena id, offset
    timings: memoryview  # int64 [tickets · 3]
    values: _StreamValues | None = None
    events: _Events | None = None


@dataclass(frozen=True, eq=False)
class Kept:
    """What an `open` said, resolved: enough to begin steps like it."""

    layout: Layout
    tickets: tuple[ReadyTicket, ...]
    bells: Bells | None

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """Of the tickets' layers, in the process's table."""
        return tuple(ticket.layer.row for ticket in self.tickets)


class OpenStep:
    """A step of a walk: its tickets, and which one is next."""

    def __init__(self, step: Step, kept: Kept, base: int) -> None:
        self.step = step
        self.tickets = kept.tickets
        self.bells = kept.bells
        self.rows = kept.rows
        self.base = base
        self.next = 0


class Handovers:
    """Of one walk: resolves what each step names, and runs its layers as they come."""

    def __init__(self, host: AttentionHost) -> None:
        self._host = host
        self._events: dict[tuple[bytes, int], _Events] = {}
        self._values: tuple[tuple[int, ...], _StreamValues] | None = None

    def bells(self, step: Step, given: attention_pb2.Doorbells) -> Bells:
        """The counters of a step, and how its layers are ordered on the device."""
        found = _counters(step, given)
        way, streams = given.device, self._host.streams
        if way == attention_pb2.DEVICE_HANDOVER_UNSPECIFIED:
            return found
        if streams is None or way not in self._host.handovers:
            raise MechanismUnsupported(
                f"this service has not declared {attention_pb2.DeviceHandover.Name(way)}", device=way
            )
        if way == attention_pb2.DEVICE_HANDOVER_EVENTS:
            return replace(found, events=self._events_of(streams, given.device_event, step.lane))
        return replace(found, values=self._values_of(streams, given, step.configuration.arenas))

    def run_by_bell(self, opened: OpenStep, index: int, value: int, check: Callable[[], None]) -> None:
        """Run one ticket of a step when its bell rings."""
        host, step, bells = self._host, opened.step, opened.bells
        if bells is None:
            raise StepOrder(f"step {step.step}, lane {step.lane} has no doorbells")

        def look() -> None:
            check()
            host.expect_live(step)

        rung = bells.request.wait(value, look, LONGEST_WAIT_S)
        received = time.monotonic_ns()
        if not rung:
            raise StepAborted(f"step {step.step}, lane {step.lane} was given up")
        if bells.events is not None and host.streams is not None:
            started, finished = self._run_by_event(host.streams, opened, index, bells.events, look)
        else:
            started, finished = host.execute(step, opened.tickets[index])
        times, at = bells.timings, 3 * index
        times[at], times[at + 1], times[at + 2] = received, started, finished
        bells.done.ring(value)

    def _run_by_event(
        self, streams: Streams, opened: OpenStep, index: int, events: _Events, look: Callable[[], None]
    ) -> tuple[int, int]:
        """Enqueue one layer behind the peer's event; the last one of a step is waited for.

        The times are those of enqueuing, but for the last layer's end.
        """
        host, step = self._host, opened.step
        with host.alone(step), streams.entered():
            started = time.monotonic_ns()
            events.request.wait()
            host.launch(step, opened.tickets[index])
            events.done.record()
        if index == len(opened.tickets) - 1:
            with streams.entered():
                streams.finish(look, LONGEST_WAIT_S)
        return started, time.monotonic_ns()

    def run_streamed(
        self,
        streams: Streams,
        opened: Sequence[OpenStep],
        bells: Bells,
        values: _StreamValues,
        check: Callable[[], None],
    ) -> None:
        """Enqueue all layers of a step, each between a wait for its inputs and the ring of its output.

        Returns when the device has run them; `done` is rung then, with the times of all.
        """
        host = self._host

        def look() -> None:
            check()
            for one in opened:
                host.expect_live(one.step)
            if bells.request.failed:
                raise StepAborted(f"step {opened[0].step.step} was given up")

        both = (values.request, values.done)
        host.device_bells = list(both)
        marks: list[list[object]] = [[] for _ in opened]
        value = opened[0].base
        try:
            with streams.entered():
                for ticket in range(len(opened[0].tickets)):
                    for lane, one in enumerate(opened):
                        value += 1
                        near = partial(_has_reached, values.done, value - _AHEAD)
                        streams.until(near, look, LONGEST_WAIT_S)
                        streams.wait(values.request, value)
                        with host.alone(one.step):
                            marks[lane].append(streams.mark())
                            host.launch(one.step, one.tickets[ticket])
                            marks[lane].append(streams.mark())
                            streams.ring(values.done, value)
                last = streams.mark()
                streams.finish(look, LONGEST_WAIT_S)
                now = time.monotonic_ns()
                if values.request.failed:
                    raise StepAborted(f"step {opened[0].step.step} was given up")
                for one, found in zip(opened, marks, strict=True):
                    _write_times(one, streams.times(found, last, now))
        except BaseException:
            bells.done.fail()
            with streams.entered():
                streams.drain(both)
            raise
        finally:
            host.device_bells = []
        bells.done.ring(value)

    def close(self) -> None:
        """Let go of what the steps named."""
        self._values = None
        self._events.clear()

    def _events_of(self, streams: Streams, handle: bytes, lane: int) -> _Events:
        """A lane's events; opened once for a walk."""
        found = self._events.get((handle, lane))
        if found is None:
            if len(handle) != HANDLE_BYTES:
                raise ViewInvalid(
                    f"device_event has {len(handle)} bytes; it must have {HANDLE_BYTES}", field="device_event"
                )
            found = self._events[handle, lane] = _Events(streams.peer_event(handle), streams.event())
        return found

    def _values_of(self, streams: Streams, given: attention_pb2.Doorbells, arenas: ArenaMap) -> _StreamValues:
        """A walk's counters on the device; made reachable once."""
        views = {"device_request": given.device_request, "device_done": given.device_done}
        tensors = [
            arenas.expect(view, name, torch.uint8, (doorbell.BELL_BYTES,)) for name, view in views.items()
        ]
        key = tuple(tensor.data_ptr() for tensor in tensors)
        if self._values is None or self._values[0] != key:
            self._values = key, _StreamValues(*(streams.bell(tensor) for tensor in tensors))
        return self._values[1]


def _counters(step: Step, given: attention_pb2.Doorbells) -> Bells:
    """The counters of a step, checked like every other view."""
    if not doorbell.available():
        raise MechanismUnsupported("this service has no doorbells; send `run` messages")
    arenas, tickets = step.configuration.arenas, len(step.layers.layers)
    bells = [
        doorbell.Doorbell(arenas.expect(view, name, torch.uint8, (doorbell.BELL_BYTES,)))
        for name, view in (("request", given.request), ("done", given.done))
    ]
    timings = arenas.expect(given.timings, "timings", torch.int64, (tickets, 3))
    if not timings.is_contiguous() or timings.device.type != "cpu":
        raise ViewInvalid("timings must be contiguous and lie in host memory", field="timings")
    lanes = max(given.lanes, 1)
    if lanes > LANES or step.lane >= lanes:
        raise StepOrder(f"lane {step.lane} of {lanes}; a step has 1 or {LANES} lanes", lane=step.lane)
    place = given.request.arena_id, given.request.offset
    return Bells(bells[0], bells[1], lanes, place, timings.numpy().reshape(-1).data)


def _has_reached(bell: DeviceBell, value: int) -> bool:
    return bell.value >= value


def _write_times(opened: OpenStep, marks: Sequence[int]) -> None:
    """Note when each ticket of a step began and ended on the device."""
    if opened.bells is None:
        return
    times = opened.bells.timings
    for index in range(len(opened.tickets)):
        started, finished = marks[2 * index : 2 * index + 2]
        times[3 * index], times[3 * index + 1], times[3 * index + 2] = started, started, finished
