"""A CUDA driver without a GPU: host memory for device memory, and a thread for every stream.

`World` is the machine; each `FakeDriver` is one process's view of it. Nothing here is lenient: what the
real driver refuses, or leaves undefined, is an error.
"""

from __future__ import annotations

import ctypes
import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from braid.v1 import attention_pb2 as pb
from braid_wire.cuda_arena import CudaContext, Region
from braid_wire.cuda_doorbell import DeviceBell, Event, Mark, Pages, Streams
from braid_wire.cuda_driver import CAN_STREAM_VALUES, MPS_ENABLED, DriverError

UUID = bytes(range(16))
OTHER_UUID = bytes(range(16, 32))
LIMIT_S = 20.0


def failure(call: str, status: int, name: str) -> DriverError:
    return DriverError.of(call, status, f"CUDA_ERROR_{name}")


@dataclass
class Allocation:
    """Memory of a device."""

    buffer: ctypes.Array[ctypes.c_uint8]
    base: int
    size: int
    handle: bytes = b""
    freed: bool = False
    mapped_by: dict[FakeDriver, int] = field(default_factory=dict)


class World:
    """One machine: its devices' memory, and the processes that use it."""

    def __init__(self, uuids: Sequence[bytes] = (UUID,), capacity: int = 1 << 30) -> None:
        self.uuids = list(uuids)
        self.capacity = capacity
        self.allocations: list[Allocation] = []
        self.events: dict[bytes, FakeEvent] = {}
        self.numbers = itertools.count(1)
        self.refusal: DriverError | None = None
        """What the next import of memory fails with."""

    @property
    def live(self) -> list[Allocation]:
        return [one for one in self.allocations if not one.freed]


class FakeEvent:
    def __init__(self) -> None:
        self.records = 0
        self.happened = 0


class FakeStream:
    """Runs what is enqueued, in order, in a thread of its own."""

    def __init__(self) -> None:
        self.work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.enqueued = self.ran = 0
        threading.Thread(target=self._run, name=type(self).__name__, daemon=True).start()

    def put(self, work: Callable[[], None]) -> None:
        self.enqueued += 1
        self.work.put(work)

    def _run(self) -> None:
        while (work := self.work.get()) is not None:
            work()
            self.ran += 1


def reached(address: int, value: int) -> bool:
    """As the device compares: the difference, as a signed number, is not negative."""
    found = ctypes.c_uint64.from_address(address).value
    return ctypes.c_int64(found - value).value >= 0


def wait_until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError("a stream waits for ever")
        time.sleep(1e-4)


class FakeDriver:
    """One process's driver; contexts are bound to threads."""

    def __init__(self, world: World, attributes: dict[int, int] | None = None, broken: bool = False) -> None:
        self.world = world
        self.attributes = {CAN_STREAM_VALUES: 1, MPS_ENABLED: 0} if attributes is None else attributes
        self.broken = broken
        """Whether stream values are declared but do nothing."""
        self.threads = threading.local()
        self.registered: set[int] = set()
        self.streams: dict[int, FakeStream] = {}
        self.own_events: dict[int, FakeEvent] = {}
        self.calls: list[str] = []

    def _need_context(self, call: str) -> None:
        self.calls.append(call)
        if self.current_context() == 0:
            raise failure(call, 201, "INVALID_CONTEXT")

    def device_count(self) -> int:
        return len(self.world.uuids)

    def uuid(self, index: int) -> bytes:
        return self.world.uuids[index]

    def attribute(self, index: int, attribute: int) -> int | None:
        return self.attributes.get(attribute)

    def retain_context(self, index: int) -> int:
        return 1000 + index

    def release_context(self, index: int) -> None:
        return

    def current_context(self) -> int:
        return int(self.threads.__dict__.get("context", 0))

    def set_context(self, context: int) -> None:
        self.threads.context = context

    def allocate(self, size: int) -> int:
        self._need_context("cuMemAlloc")
        if sum(one.size for one in self.world.live) + size > self.world.capacity:
            raise failure("cuMemAlloc", 2, "OUT_OF_MEMORY")
        # Device memory is not zero by itself.
        room = (ctypes.c_uint8 * (size + (2 << 20)))()
        base = -(-ctypes.addressof(room) // (2 << 20)) * (2 << 20)
        ctypes.memset(base, 0xA5, size)
        handle = next(self.world.numbers).to_bytes(64, "little")
        self.world.allocations.append(Allocation(room, base, size, handle))
        return base

    def _find(self, pointer: int) -> Allocation:
        for one in self.world.live:
            if one.base <= pointer < one.base + one.size:
                return one
        raise failure("cuMemGetAddressRange", 1, "INVALID_VALUE")

    def free(self, pointer: int) -> None:
        self._need_context("cuMemFree")
        found = self._find(pointer)
        if any(found.mapped_by.values()):
            raise AssertionError("memory is freed while a peer has it mapped")
        found.freed = True

    def zero(self, pointer: int, size: int) -> None:
        self._need_context("cuMemsetD8")
        ctypes.memset(pointer, 0, size)

    def memory_info(self) -> tuple[int, int]:
        return self.world.capacity - sum(one.size for one in self.world.live), self.world.capacity

    def allocation(self, pointer: int) -> tuple[int, int]:
        found = self._find(pointer)
        return found.base, found.size

    def export_memory(self, pointer: int) -> bytes:
        self._need_context("cuIpcGetMemHandle")
        return self._find(pointer).handle

    def import_memory(self, handle: bytes) -> int:
        self._need_context("cuIpcOpenMemHandle")
        if self.world.refusal is not None:
            raise self.world.refusal
        for one in self.world.live:
            if one.handle == handle:
                one.mapped_by[self] = one.mapped_by.get(self, 0) + 1
                return one.base
        raise failure("cuIpcOpenMemHandle", 400, "INVALID_HANDLE")

    def close_memory(self, pointer: int) -> None:
        self._need_context("cuIpcCloseMemHandle")
        self._find(pointer).mapped_by[self] -= 1

    def register_host(self, pointer: int, size: int) -> int:
        self._need_context("cuMemHostRegister")
        if pointer in self.registered:
            raise failure("cuMemHostRegister", 712, "HOST_MEMORY_ALREADY_REGISTERED")
        self.registered.add(pointer)
        return pointer

    def unregister_host(self, pointer: int) -> None:
        self._need_context("cuMemHostUnregister")
        self.registered.remove(pointer)

    def write_value(self, stream: int, address: int, value: int) -> None:
        self._need_context("cuStreamWriteValue64")

        def write() -> None:
            if not self.broken:
                ctypes.c_uint64.from_address(address).value = value

        self.streams[stream].put(write)

    def wait_value(self, stream: int, address: int, value: int) -> None:
        self._need_context("cuStreamWaitValue64")
        self.streams[stream].put(lambda: wait_until(lambda: reached(address, value)))

    def create_stream(self) -> int:
        self._need_context("cuStreamCreate")
        number = next(self.world.numbers)
        self.streams[number] = FakeStream()
        return number

    def destroy_stream(self, stream: int) -> None:
        self.streams.pop(stream).work.put(None)

    def is_done(self, stream: int) -> bool:
        self._need_context("cuStreamQuery")
        found = self.streams[stream]
        return found.ran == found.enqueued

    def create_event(self) -> int:
        self._need_context("cuEventCreate")
        number = next(self.world.numbers)
        self.own_events[number] = FakeEvent()
        self.world.events[number.to_bytes(64, "little")] = self.own_events[number]
        return number

    def destroy_event(self, event: int) -> None:
        del self.own_events[event]

    def record_event(self, event: int, stream: int) -> None:
        found = self.own_events[event]
        found.records += 1
        number = found.records

        def happen() -> None:
            found.happened = number

        self.streams[stream].put(happen)

    def wait_event(self, stream: int, event: int) -> None:
        found = self.own_events[event]
        number = found.records  # bound to the latest record: none counts as done
        self.streams[stream].put(lambda: wait_until(lambda: found.happened >= number))

    def export_event(self, event: int) -> bytes:
        return event.to_bytes(64, "little")

    def import_event(self, handle: bytes) -> int:
        number = next(self.world.numbers)
        self.own_events[number] = self.world.events[handle]
        return number


def as_host_tensor(region: Region, device: torch.device) -> torch.Tensor:
    """What `as_tensor` does, for memory that is the host's in truth; keeps the region, as torch does."""
    shape = type("Memory", (ctypes.c_uint8 * region.size,), {})
    buffer = shape.from_address(region.pointer)
    buffer.region = region
    return torch.frombuffer(buffer, dtype=torch.uint8)


class HostStreams(Streams):
    """A stream that runs everything at once, in the thread that enqueues it: waits hold that thread.

    Enough of a device to run both sides of a walk in one process, each in a thread of its own.
    """

    uuid = UUID
    sharing = pb.DEVICE_SHARING_TIME_SLICED

    def __init__(
        self,
        handovers: tuple[pb.DeviceHandover.ValueType, ...] = (pb.DEVICE_HANDOVER_STREAM_VALUES,),
        world: World | None = None,
    ) -> None:
        self.handovers = handovers
        self.context = CudaContext(FakeDriver(world or World()), 0)
        self.pages = Pages(self.context)
        self.rung: list[int] = []
        self.waited: list[int] = []
        self.drained = 0
        self.fault: DriverError | None = None

    def entered(self) -> AbstractContextManager[None]:
        return nullcontext()

    def idle(self) -> bool:
        if self.fault is not None:
            raise self.fault
        return True

    def bell(self, memory: torch.Tensor) -> DeviceBell:
        return DeviceBell(memory, self.pages)

    def ring(self, bell: DeviceBell, value: int) -> None:
        self.rung.append(value)
        ctypes.c_uint64.from_address(bell.address).value = value

    def wait(self, bell: DeviceBell, value: int) -> None:
        self.waited.append(value)
        wait_until(lambda: reached(bell.address, value))

    def event(self) -> Event:
        return HostEvent(FakeEvent())

    def peer_event(self, handle: bytes) -> Event:
        return HostEvent(_EVENTS[handle])

    def mark(self) -> Mark:
        return time.monotonic_ns()

    def times(self, marks: Sequence[Mark], last: Mark, now_ns: int) -> list[int]:
        return [int(mark) for mark in marks]

    def drain(self, bells: Sequence[DeviceBell]) -> None:
        self.drained += 1
        super().drain(bells)


_EVENTS: dict[bytes, FakeEvent] = {}


class HostEvent(Event):
    """An event of `HostStreams`."""

    def __init__(self, event: FakeEvent) -> None:
        self.fake = event

    @property
    def handle(self) -> bytes:
        number = id(self.fake).to_bytes(64, "little")
        _EVENTS[number] = self.fake
        return number

    def record(self) -> None:
        self.fake.records += 1

    def wait(self) -> None:
        if self.fake.records == 0:
            raise AssertionError("an event is waited for before it was recorded")
