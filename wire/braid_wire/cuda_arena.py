"""Arenas in a GPU's memory, shared between processes by legacy CUDA IPC handles.

A handle names a whole allocation, so a message carries the handle of the allocation and the arena's
offset in it. What an importer maps stays mapped until its last tensor is gone, and the owner must not free
the allocation before that: whoever shares an arena has its peers let go of it first.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from braid.v1 import common_pb2

from braid_wire import cuda_driver
from braid_wire.arena import Arena
from braid_wire.cuda_driver import HANDLE_BYTES, Driver, DriverError
from braid_wire.errors import ArenaUnknown, BraidError, PoolExhausted, ServiceFault, ViewInvalid

log = logging.getLogger(__name__)

GRANULARITY = 2 << 20
"""Bytes. The driver packs smaller allocations into one block of this size, and a handle to one of them
would give the others away."""

_OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"
_NO_PEER_ACCESS = frozenset(
    {"CUDA_ERROR_PEER_ACCESS_UNSUPPORTED", "CUDA_ERROR_TOO_MANY_PEERS", "CUDA_ERROR_NOT_PERMITTED"}
)
_NOT_INITIALISED = frozenset(
    {"CUDA_ERROR_NOT_INITIALIZED", "CUDA_ERROR_DEINITIALIZED", "CUDA_ERROR_NO_DEVICE"}
)
_OWN_PROCESS = frozenset({"CUDA_ERROR_INVALID_CONTEXT", "CUDA_ERROR_ALREADY_MAPPED"})


class CudaContext:
    """A device's primary context, which is also torch's; kept as long as the process lives.

    Args:
        driver: of this process.
        index: of the device, as this process counts.

    Raises:
        ArenaUnknown: there is no such device.
        ServiceFault: the driver refuses.
    """

    def __init__(self, driver: Driver, index: int) -> None:
        count = driver.device_count()
        if not 0 <= index < count:
            raise ArenaUnknown(
                f"there is no device cuda:{index}; this process sees {count}", device=f"cuda:{index}"
            )
        self.driver = driver
        self.device = torch.device("cuda", index)
        self.uuid = driver.uuid(index)
        self._handle = driver.retain_context(index)

    @property
    def index(self) -> int:
        """Of the device."""
        return int(self.device.index)

    def make_current(self) -> None:
        """Bind this thread to the device: a gRPC server's threads have no context of their own."""
        if self.driver.current_context() != self._handle:
            self.driver.set_context(self._handle)


class Region:
    """Device memory as `__cuda_array_interface__` describes it; torch keeps it alive with its tensors.

    Args:
        pointer: its first byte.
        size: bytes.
    """

    def __init__(self, pointer: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (pointer, False),
            "strides": None,
            "version": 2,
        }
        self.pointer = pointer
        self.size = size


AsTensor = Callable[[Region, torch.device], torch.Tensor]


def as_tensor(region: Region, device: torch.device) -> torch.Tensor:
    """uint8 [size] on the device, without a copy."""
    found = torch.as_tensor(region, device=device)
    if found.data_ptr() != region.pointer:
        raise ServiceFault(f"torch copied device memory at {region.pointer:#x} instead of wrapping it")
    return found


class Imports:
    """The allocations of other processes that this one has mapped, each once however often it is needed."""

    def __init__(self) -> None:
        self._open: dict[tuple[int, bytes], tuple[int, int]] = {}
        """(device index, handle) → base here, users."""
        self._lock = threading.Lock()

    def open(self, context: CudaContext, handle: bytes) -> int:
        """Map an allocation; its base. Raises DriverError."""
        with self._lock:
            key = context.index, handle
            base, users = self._open.get(key, (0, 0))
            if not users:
                context.make_current()
                base = context.driver.import_memory(handle)
            self._open[key] = base, users + 1
            return base

    def close(self, context: CudaContext, handle: bytes) -> None:
        """Undo one `open`; the last one gives the mapping up. Raises DriverError."""
        with self._lock:
            key = context.index, handle
            base, users = self._open[key]
            if users > 1:
                self._open[key] = base, users - 1
                return
            del self._open[key]
            context.make_current()
            context.driver.close_memory(base)

    def __len__(self) -> int:
        return len(self._open)


IMPORTS = Imports()
"""Of this process."""

_OWN: weakref.WeakValueDictionary[bytes, Region] = weakref.WeakValueDictionary()
"""Handle → the region that this process exports under it: what is embedded here shares the pointer."""


class CudaArena(Arena):
    """Device memory that this process owns, or that it has mapped.

    Args:
        arena_id: its name within the cell.
        context: of the device.
        region: the arena's bytes.
        label: for people.
        release: gives the memory back; called once, when the last tensor over the region is gone. None:
            that is somebody else's to do.
        wrap: makes a tensor of the region.
    """

    def __init__(
        self,
        arena_id: int,
        context: CudaContext,
        region: Region,
        label: str,
        release: Callable[[], None] | None,
        wrap: AsTensor = as_tensor,
    ) -> None:
        super().__init__(arena_id, region.size, context.device, label)
        self._context = context
        self._region: Region | None = region
        if release is not None:
            # Bound to the region, not to this object: tensors outlive the arena that they were cut from.
            weakref.finalize(region, _quietly, release, label)
        context.make_current()
        self._memory: torch.Tensor | None = wrap(region, context.device)

    @classmethod
    def create(
        cls, arena_id: int, size_bytes: int, label: str, context: CudaContext, wrap: AsTensor = as_tensor
    ) -> CudaArena:
        """Allocate zeroed memory of its own, in whole units of `GRANULARITY`.

        Raises:
            PoolExhausted: the device has not that much memory.
            ViewInvalid: no bytes are asked for.
        """
        if size_bytes < 1:
            raise ViewInvalid(f"arena {label!r} has {size_bytes} bytes; it needs at least 1", label=label)
        driver, whole = context.driver, -(-size_bytes // GRANULARITY) * GRANULARITY
        context.make_current()
        try:
            pointer = driver.allocate(whole)
        except DriverError as error:
            if error.name != _OUT_OF_MEMORY:
                raise
            free, total = driver.memory_info()
            raise PoolExhausted(
                f"arena {label!r} of {whole} bytes cannot be allocated on {context.device}: "
                f"{free} of {total} bytes are free",
                label=label,
            ) from error
        driver.zero(pointer, whole)

        def release() -> None:
            context.make_current()
            driver.free(pointer)

        return cls(arena_id, context, Region(pointer, size_bytes), label, release, wrap)

    @property
    def memory(self) -> torch.Tensor:
        if self._memory is None:
            raise ArenaUnknown(f"arena {self.arena_id} ({self.label}) is closed", arena_id=self.arena_id)
        return self._memory

    def describe(self, handover: str) -> common_pb2.Arena:
        region = self._region
        if region is None:
            raise ArenaUnknown(f"arena {self.arena_id} ({self.label}) is closed", arena_id=self.arena_id)
        driver = self._context.driver
        self._context.make_current()
        base, _ = driver.allocation(region.pointer)
        handle = driver.export_memory(base)
        _OWN[handle] = region
        return common_pb2.Arena(
            arena_id=self.arena_id,
            size_bytes=self.size_bytes,
            device=str(self.device),
            label=self.label,
            cuda_ipc_handle=handle,
            cuda=common_pb2.CudaAllocation(
                offset=region.pointer - base,
                device_uuid=self._context.uuid,
                owner_pid=os.getpid(),
                owner_pid_namespace=pid_namespace(),
            ),
        )

    def close(self) -> None:
        self._memory = self._region = None


def _quietly(release: Callable[[], None], label: str) -> None:
    """Give memory back from wherever the last tensor died, perhaps behind the end of the driver."""
    try:
        release()
    except DriverError as error:
        log.debug("arena %r: %s", label, error.message)


@functools.cache
def pid_namespace() -> int:
    """Inode number of this process's PID namespace."""
    return Path("/proc/self/ns/pid").stat().st_ino


@functools.cache
def context_of(index: int) -> CudaContext:
    """The context of a device of this process.

    Raises:
        ArenaUnknown: there is no such device.
        ServiceFault: there is no driver.
    """
    return CudaContext(cuda_driver.load(), index)


def visible() -> list[CudaContext]:
    """The contexts of all devices that this process sees. Raises ServiceFault without a driver."""
    return [context_of(index) for index in range(cuda_driver.load().device_count())]


def map_cuda(
    described: common_pb2.Arena,
    devices: Callable[[], Iterable[CudaContext]] = visible,
    imports: Imports = IMPORTS,
    wrap: AsTensor = as_tensor,
) -> CudaArena:
    """Map an arena that another process has allocated on a device, or share one that this process has.

    Args:
        described: what the owner said of it.
        devices: where it may lie.
        imports: notes what is mapped.
        wrap: makes tensors.

    Raises:
        ArenaUnknown: it cannot be opened; `metadata["cause"]` is one of "not_initialised", "wrong_device",
            "same_process", "pid_namespace", "no_peer_access", "owner_gone" and "malformed".
        ViewInvalid: the allocation is smaller than announced.
    """
    context = _device_of(described, devices)
    where, handle = described.cuda, described.cuda_ipc_handle
    if (where.owner_pid, where.owner_pid_namespace) == (os.getpid(), pid_namespace()):
        own = _OWN.get(handle)
        if own is None:
            raise _refusal(
                described, "same_process", "a process cannot open its own handle, and has freed it"
            )
        if own.size < described.size_bytes:
            raise _too_small(described, own.size)
        return CudaArena(described.arena_id, context, own, described.label, None, wrap)
    try:
        base = imports.open(context, handle)
    except DriverError as error:
        raise _refusal(described, *_cause(described, error)) from error
    closing = functools.partial(imports.close, context, handle)
    _, size = context.driver.allocation(base)
    if described.size_bytes < 1 or where.offset + described.size_bytes > size:
        closing()
        raise _too_small(described, size)
    region = Region(base + where.offset, described.size_bytes)
    return CudaArena(described.arena_id, context, region, described.label, closing, wrap)


def _device_of(described: common_pb2.Arena, devices: Callable[[], Iterable[CudaContext]]) -> CudaContext:
    if len(described.cuda_ipc_handle) != HANDLE_BYTES or not described.HasField("cuda"):
        raise _refusal(
            described,
            "malformed",
            f"its handle has {len(described.cuda_ipc_handle)} bytes instead of {HANDLE_BYTES}, "
            "or its allocation is not described",
        )
    try:
        found = list(devices())
    except BraidError as error:
        raise _refusal(described, "not_initialised", error.message) from error
    for context in found:
        if context.uuid == described.cuda.device_uuid:
            return context
    raise _refusal(
        described,
        "wrong_device",
        f"its device {described.cuda.device_uuid.hex()} is none of the {len(found)} that this process sees "
        "(CUDA_VISIBLE_DEVICES, or a container's devices)",
    )


def _cause(described: common_pb2.Arena, error: DriverError) -> tuple[str, str]:
    """Why a handle could not be opened: a word, and a sentence with what the driver said."""
    if error.name in _NOT_INITIALISED:
        return "not_initialised", f"CUDA is not initialised in this process: {error.message}"
    if described.cuda.owner_pid_namespace != pid_namespace():
        return "pid_namespace", (
            f"its owner, process {described.cuda.owner_pid}, is in another PID namespace; containers of a "
            f"cell must share one: {error.message}"
        )
    if error.name in _NO_PEER_ACCESS:
        return "no_peer_access", f"the device cannot reach the memory of its owner's: {error.message}"
    if error.name in _OWN_PROCESS:
        return "same_process", f"the handle is this context's own: {error.message}"
    return "owner_gone", (
        f"its owner, process {described.cuda.owner_pid}, has freed it or ended: {error.message}"
    )


def _too_small(described: common_pb2.Arena, size: int) -> ViewInvalid:
    return ViewInvalid(
        f"arena {described.arena_id} is announced with {described.size_bytes} bytes at "
        f"{described.cuda.offset}, but its allocation has {size}",
        arena_id=described.arena_id,
    )


def _refusal(described: common_pb2.Arena, cause: str, why: str) -> ArenaUnknown:
    return ArenaUnknown(
        f"arena {described.arena_id} ({described.label}) on {described.device} cannot be mapped: {why}",
        arena_id=described.arena_id,
        device=described.device,
        cause=cause,
    )
