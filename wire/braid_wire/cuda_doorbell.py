"""Doorbells between the streams of two processes: work on a GPU in order, without a process in between.

A bell of this kind is a 64-bit counter in host memory that both processes and the device see. One side's
stream writes it behind its kernels, the other's waits for it before its own, and both processes have
enqueued all of that long before. Such a wait has no time limit and knows nothing of processes that die;
so whoever gives a step up writes `FAILED`, which no wait is above, until its own stream has run dry.
Every walk has bells of its own, so that nothing of a step that was given up can meet a later one.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from braid.v1 import attention_pb2 as pb

from braid_wire.cuda_arena import CudaContext, context_of
from braid_wire.cuda_driver import CAN_STREAM_VALUES, MPS_ENABLED, DriverError
from braid_wire.doorbell import BELL_BYTES, FAILED
from braid_wire.errors import StepTimeout, ViewInvalid

log = logging.getLogger(__name__)

_PROBE_S = 2.0
_PROBE_PAUSE_S = 1e-4
# A waiter first looks without a pause, for as long as a step may take, then every now and then.
_EAGER_S = 0.02
_PAUSE_S = 50e-6
# Looks at the stream between two looks at the peer.
_LOOKS = 64
_DRAIN_S = 30.0

_LEFT: list[tuple[DeviceBell, ...]] = []
"""Bells that a stream which never came to its end may still reach: their memory stays."""


class Pages:
    """Host pages that the device can reach, each registered once however many bells lie in it."""

    def __init__(self, context: CudaContext) -> None:
        self._context = context
        self._pages: dict[int, tuple[int, int]] = {}
        """Host address of a page → its device address, users."""
        self._lock = threading.Lock()

    def register(self, pointer: int) -> int:
        """The device address of a host address. Raises DriverError."""
        page = pointer - pointer % mmap.PAGESIZE
        with self._lock:
            address, users = self._pages.get(page, (0, 0))
            if not users:
                self._context.make_current()
                address = self._context.driver.register_host(page, mmap.PAGESIZE)
            self._pages[page] = address, users + 1
            return address + pointer - page

    def release(self, pointer: int) -> None:
        """Undo one `register`. Raises DriverError."""
        page = pointer - pointer % mmap.PAGESIZE
        with self._lock:
            address, users = self._pages[page]
            if users > 1:
                self._pages[page] = address, users - 1
                return
            del self._pages[page]
            self._context.make_current()
            self._context.driver.unregister_host(page)


class DeviceBell:
    """A counter that streams write and wait for.

    Args:
        memory: uint8 [64] of a host arena, 64-byte aligned; kept alive by this object.
        pages: makes it reachable for the device.

    Raises:
        ViewInvalid: the memory is no bell.
        DriverError: the device cannot reach it.
    """

    def __init__(self, memory: torch.Tensor, pages: Pages) -> None:
        if memory.dtype is not torch.uint8 or memory.shape != (BELL_BYTES,) or memory.device.type != "cpu":
            raise ViewInvalid(
                f"a bell is uint8 [{BELL_BYTES}] of host memory, not {memory.dtype} {memory.shape}"
            )
        pointer = memory.data_ptr()
        if pointer % BELL_BYTES:
            raise ViewInvalid(f"a bell begins at a multiple of {BELL_BYTES} bytes")
        self._counter = ctypes.c_uint64.from_address(pointer)
        self.address = pages.register(pointer)
        # The finaliser holds the memory: it must not be unmapped while the device may reach it.
        weakref.finalize(self, _unregister, pages, pointer, memory)

    @property
    def value(self) -> int:
        """The counter now, without `FAILED`."""
        return int(self._counter.value) & ~FAILED

    @property
    def failed(self) -> bool:
        """Whether somebody has given the walk up."""
        return bool(self._counter.value & FAILED)

    def fail(self) -> None:
        """Release every wait that is or will be enqueued; a stream's later write undoes it."""
        self._counter.value = FAILED


def _unregister(pages: Pages, pointer: int, memory: torch.Tensor) -> None:
    try:
        pages.release(pointer)
    except DriverError as error:
        log.debug("a page of bells: %s", error.message)


Mark = Any
"""A point in a stream; only `Streams.times` looks into it."""


class Streams(ABC):
    """A process's work on one device: where kernels run, and how they are ordered against a peer's."""

    handovers: tuple[pb.DeviceHandover.ValueType, ...] = ()
    """Ways that work here, best first."""
    sharing: pb.DeviceSharing.ValueType = pb.DEVICE_SHARING_UNSPECIFIED
    uuid: bytes = b""
    """Of the device."""

    @abstractmethod
    def entered(self) -> Any:
        """A context manager: kernels launched inside, by this thread, run on this stream."""

    @abstractmethod
    def idle(self) -> bool:
        """Whether everything enqueued so far has run.

        Raises:
            ServiceFault: a kernel has failed.
        """

    @abstractmethod
    def bell(self, memory: torch.Tensor) -> DeviceBell:
        """A counter in host memory [64]."""

    @abstractmethod
    def ring(self, bell: DeviceBell, value: int) -> None:
        """Enqueue: what came before is visible to the peer, then the counter is `value`."""

    @abstractmethod
    def wait(self, bell: DeviceBell, value: int) -> None:
        """Enqueue: go on once the counter is at least `value`."""

    @abstractmethod
    def event(self) -> Event:
        """A new event that the peer can wait for."""

    @abstractmethod
    def peer_event(self, handle: bytes) -> Event:
        """The peer's event."""

    @abstractmethod
    def mark(self) -> Mark:
        """Note when the stream gets here."""

    @abstractmethod
    def times(self, marks: Sequence[Mark], last: Mark, now_ns: int) -> list[int]:
        """When the stream got to each mark, nanoseconds of CLOCK_MONOTONIC; it was at `last` at `now_ns`."""

    def finish(self, check: Callable[[], None], timeout_s: float) -> None:
        """Wait until everything enqueued so far has run.

        Args:
            check: called every now and then; raises where the peer is gone.
            timeout_s: longest wait.

        Raises:
            StepTimeout: it did not run in time.
            ServiceFault: a kernel has failed.
        """
        self.until(self.idle, check, timeout_s)

    def until(self, ready: Callable[[], bool], check: Callable[[], None], timeout_s: float) -> None:
        """As `finish`, for any condition that the device brings about."""
        began = time.monotonic()
        while True:
            for _ in range(_LOOKS):
                if ready():
                    return
            check()
            took = time.monotonic() - began
            if took > timeout_s:
                raise StepTimeout(f"the device did not get there within {timeout_s:.0f} s")
            if took > _EAGER_S:
                time.sleep(_PAUSE_S)

    def drain(self, bells: Sequence[DeviceBell]) -> None:
        """Give up what waits for these bells, and wait until the stream has run dry.

        Written again and again: a peer that has not noticed yet may still write what it had enqueued.

        Raises:
            StepTimeout: the stream waits for something else.
            ServiceFault: a kernel has failed.
        """

        def release() -> None:
            for bell in bells:
                bell.fail()

        release()
        self.until(self.idle, release, _DRAIN_S)


class Event:
    """An event of this process or of its peer.

    Args:
        streams: whose stream records it or waits for it.
        context: of the device.
        number: the driver's.
    """

    def __init__(self, streams: CudaStreams, context: CudaContext, number: int) -> None:
        self._streams, self._context, self._number = streams, context, number
        weakref.finalize(self, _destroy, context, number)

    @property
    def handle(self) -> bytes:
        """64 bytes by which the peer opens it."""
        self._context.make_current()
        return self._context.driver.export_event(self._number)

    def record(self) -> None:
        """Enqueue: it happens here."""
        self._context.make_current()
        self._context.driver.record_event(self._number, self._streams.handle)

    def wait(self) -> None:
        """Enqueue: go on once its latest record, as of now, has happened."""
        self._context.make_current()
        self._context.driver.wait_event(self._streams.handle, self._number)


def _destroy(context: CudaContext, number: int) -> None:
    try:
        context.make_current()
        context.driver.destroy_event(number)
    except DriverError as error:
        log.debug("an event: %s", error.message)


class CudaStreams(Streams):
    """`Streams` of a CUDA device.

    Args:
        context: of the device.
        own: whether kernels run on a stream made for them; False: on whatever stream is torch's current one.
        handovers: known to work; None: they are tried now.
    """

    def __init__(
        self,
        context: CudaContext,
        own: bool,
        handovers: tuple[pb.DeviceHandover.ValueType, ...] | None = None,
    ) -> None:
        context.make_current()
        self._context = context
        self._pages = Pages(context)
        self._stream = torch.cuda.Stream(context.device) if own else None
        self.uuid = context.uuid
        self.sharing = sharing_of(context)
        self.handovers = handovers_of(context) if handovers is None else handovers

    @property
    def handle(self) -> int:
        """The driver's, of the stream."""
        stream = self._stream or torch.cuda.current_stream(self._context.device)
        return int(stream.cuda_stream)

    @contextmanager
    def entered(self) -> Iterator[None]:
        # Of a gRPC server's threads none has a context; torch binds the device, the driver's calls need it.
        self._context.make_current()
        with torch.cuda.device(self._context.device), torch.cuda.stream(self._stream):
            yield

    def idle(self) -> bool:
        self._context.make_current()  # threads that only look have none
        return self._context.driver.is_done(self.handle)

    def bell(self, memory: torch.Tensor) -> DeviceBell:
        return DeviceBell(memory, self._pages)

    def ring(self, bell: DeviceBell, value: int) -> None:
        self._context.make_current()
        self._context.driver.write_value(self.handle, bell.address, value)

    def wait(self, bell: DeviceBell, value: int) -> None:
        self._context.make_current()
        self._context.driver.wait_value(self.handle, bell.address, value)

    def event(self) -> Event:
        self._context.make_current()
        return Event(self, self._context, self._context.driver.create_event())

    def peer_event(self, handle: bytes) -> Event:
        self._context.make_current()
        return Event(self, self._context, self._context.driver.import_event(handle))

    def mark(self) -> Mark:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream or torch.cuda.current_stream(self._context.device))
        return event

    def times(self, marks: Sequence[Mark], last: Mark, now_ns: int) -> list[int]:
        return [now_ns - int(mark.elapsed_time(last) * 1e6) for mark in marks]


def streams_for(device: torch.device, own: bool) -> Streams | None:
    """The streams of a process on a device; None on a CPU.

    Args:
        device: of its arenas.
        own: as for `CudaStreams`.

    Raises:
        ArenaUnknown: there is no such device.
        ServiceFault: there is no CUDA driver.
    """
    return None if device.type == "cpu" else CudaStreams(context_of(device.index or 0), own)


def sharing_of(context: CudaContext) -> pb.DeviceSharing.ValueType:
    """Whether this process's kernels run beside those of others, by the driver's own word.

    A client that cannot reach the MPS server runs without one and says nothing, so the environment is no
    evidence.
    """
    found = context.driver.attribute(context.index, MPS_ENABLED)
    if found is None:
        return pb.DEVICE_SHARING_UNSPECIFIED
    return pb.DEVICE_SHARING_MPS if found else pb.DEVICE_SHARING_TIME_SLICED


def handovers_of(context: CudaContext) -> tuple[pb.DeviceHandover.ValueType, ...]:
    """The hand-overs that work on a device: what it declares is tried with real calls."""
    found = []
    context.make_current()
    if context.driver.attribute(context.index, CAN_STREAM_VALUES):
        try:
            if stream_values_work(context):
                found.append(pb.DEVICE_HANDOVER_STREAM_VALUES)
        except DriverError as error:
            log.warning("no stream values on %s: %s", context.device, error.message)
    try:
        event = context.driver.create_event()
        context.driver.export_event(event)
        context.driver.destroy_event(event)
        found.append(pb.DEVICE_HANDOVER_EVENTS)
    except DriverError as error:
        log.warning("no shared events on %s: %s", context.device, error.message)
    return tuple(found)


def stream_values_work(context: CudaContext, limit_s: float = _PROBE_S) -> bool:
    """Whether streams write and wait for a counter in host memory, and a wait ends when the host writes.

    Raises:
        DriverError: the driver refuses a call.
    """
    driver = context.driver
    context.make_current()
    buffer = mmap.mmap(-1, mmap.PAGESIZE)
    memory = torch.frombuffer(buffer, dtype=torch.uint8)
    pages = Pages(context)
    waited, written = (DeviceBell(memory[at : at + BELL_BYTES], pages) for at in (0, BELL_BYTES))
    stream = driver.create_stream()
    try:
        driver.write_value(stream, waited.address, 1)
        driver.wait_value(stream, waited.address, 1)
        driver.write_value(stream, written.address, 1)
        if not _within(limit_s, lambda: written.value == 1):
            return False
        driver.wait_value(stream, waited.address, 1 << 40)
        driver.write_value(stream, written.address, 2)
        held = not driver.is_done(stream)
        waited.fail()
        return _within(limit_s, lambda: driver.is_done(stream)) and written.value == 2 and held
    finally:
        waited.fail()
        if not _within(limit_s, lambda: driver.is_done(stream)):
            _LEFT.append((waited, written))  # the stream looks there still, or writes
        driver.destroy_stream(stream)


def _within(limit_s: float, ready: Callable[[], bool]) -> bool:
    """Whether something happens within a time, counted in pauses: one in which the machine gave this
    process no core at all is one pause, and what is waited for had no core either."""
    for _ in range(int(limit_s / _PROBE_PAUSE_S)):
        if ready():
            return True
        time.sleep(_PROBE_PAUSE_S)
    return ready()
