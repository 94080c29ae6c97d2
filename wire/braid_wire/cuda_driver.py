"""The CUDA driver, as far as shared memory and hand-overs need it: a protocol, and NVIDIA's bindings of it.

Everything above speaks `Driver`, so that it can be tested without a GPU. Pointers, contexts, streams and
events are plain integers, as the driver's C interface has them.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, Protocol

from braid_wire.errors import ServiceFault

HANDLE_BYTES = 64
"""Of an IPC handle, of memory or of an event."""

CAN_STREAM_VALUES, MPS_ENABLED = 122, 133
"""Attributes of a device: whether it has 64-bit stream memory operations, and whether contexts on it are
shared by MPS (CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS and …_MPS_ENABLED)."""

_LAZY_PEER_ACCESS = 0x1
_REGISTER_PORTABLE_MAPPED = 0x1 | 0x2
_EVENT_IPC, _EVENT_WITHOUT_TIMING = 0x4, 0x2
_GEQ = 0x0  # (int64)(*address - value) >= 0
_NOT_READY = 600


class DriverError(ServiceFault):
    """A call of the driver failed; `metadata` has the call, its CUresult and the result's name."""

    reason = "CUDA_DRIVER"

    @classmethod
    def of(cls, call: str, status: int, name: str) -> DriverError:
        """The error of one call.

        Args:
            call: its name in C.
            status: its CUresult.
            name: of the status ("CUDA_ERROR_INVALID_VALUE").
        """
        return cls(f"{call} failed with {name} ({status})", call=call, status=status, name=name)

    @property
    def name(self) -> str:
        """Of the status; empty where the error came from another process without one."""
        return self.metadata.get("name", "")


class Driver(Protocol):
    """What is asked of the CUDA driver. Every method may raise `DriverError`.

    Those that touch memory, streams or events need a context that is current in the calling thread.
    """

    def device_count(self) -> int:
        """Devices that this process sees."""

    def uuid(self, index: int) -> bytes:
        """16 bytes that name a device whatever its index is in some process."""

    def attribute(self, index: int, attribute: int) -> int | None:
        """One of the attributes above; None where the driver does not know it."""

    def retain_context(self, index: int) -> int:
        """The device's primary context, which torch uses too; kept until `release_context`."""

    def release_context(self, index: int) -> None:
        """Give a retained context back."""

    def current_context(self) -> int:
        """Of this thread; 0: none."""

    def set_context(self, context: int) -> None:
        """Make a context current in this thread."""

    def allocate(self, size: int) -> int:
        """Device memory that legacy IPC handles can name."""

    def free(self, pointer: int) -> None:
        """Give allocated memory back."""

    def zero(self, pointer: int, size: int) -> None:
        """Fill with zeros, and wait for it."""

    def memory_info(self) -> tuple[int, int]:
        """Free and total bytes of the current context's device."""

    def allocation(self, pointer: int) -> tuple[int, int]:
        """Base and size of the allocation that an address lies in."""

    def export_memory(self, pointer: int) -> bytes:
        """The handle of a whole allocation."""

    def import_memory(self, handle: bytes) -> int:
        """Map an allocation of another process; its base here."""

    def close_memory(self, pointer: int) -> None:
        """Give a mapping up."""

    def register_host(self, pointer: int, size: int) -> int:
        """Let the device reach host memory; its device address."""

    def unregister_host(self, pointer: int) -> None:
        """Undo `register_host`."""

    def write_value(self, stream: int, address: int, value: int) -> None:
        """Enqueue: what came before in the stream is visible to all, then *address = value."""

    def wait_value(self, stream: int, address: int, value: int) -> None:
        """Enqueue: the stream goes on once *address >= value (as a cyclic 64-bit difference)."""

    def create_stream(self) -> int:
        """A stream that does not wait for the default one."""

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream; what is enqueued still runs."""

    def is_done(self, stream: int) -> bool:
        """Whether everything enqueued so far has run."""

    def create_event(self) -> int:
        """An event that other processes may wait for."""

    def destroy_event(self, event: int) -> None:
        """Destroy an event, created or imported."""

    def record_event(self, event: int, stream: int) -> None:
        """Enqueue: the event happens here."""

    def wait_event(self, stream: int, event: int) -> None:
        """Enqueue: the stream goes on once the latest record of the event, as of now, has happened."""

    def export_event(self, event: int) -> bytes:
        """The handle of an event."""

    def import_event(self, handle: bytes) -> int:
        """An event of another process."""


class BindingsDriver:
    """`Driver` on the package cuda-bindings.

    Raises:
        ServiceFault: the package is not installed, or the machine has no driver.
    """

    def __init__(self) -> None:
        try:
            self._cuda: Any = importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            raise ServiceFault(f"CUDA memory needs the package cuda-bindings: {error}") from error
        try:
            self._call("cuInit", 0)
        except RuntimeError as error:  # what the bindings raise where libcuda cannot be loaded
            raise ServiceFault(f"this machine has no CUDA driver: {error}") from error
        attributes = self._cuda.CUdevice_attribute
        self._attributes = {int(item): item for item in attributes}
        # Resolved once: these run twice for every layer of every step.
        self._write, self._wait = self._cuda.cuStreamWriteValue64, self._cuda.cuStreamWaitValue64

    def _call(self, name: str, *args: object) -> Any:
        """Call the driver; what it gives beside the status: nothing, one value or a tuple."""
        status, *found = getattr(self._cuda, name)(*args)
        self._check(name, status)
        return found[0] if len(found) == 1 else tuple(found)

    def _check(self, name: str, status: Any) -> None:
        if int(status):
            raise DriverError.of(name, int(status), status.name)

    def device_count(self) -> int:
        return int(self._call("cuDeviceGetCount"))

    def uuid(self, index: int) -> bytes:
        found: bytes = self._call("cuDeviceGetUuid", self._device(index)).bytes
        return bytes(found)

    def attribute(self, index: int, attribute: int) -> int | None:
        known = self._attributes.get(attribute)
        if known is None:  # bindings older than the attribute
            return None
        try:
            return int(self._call("cuDeviceGetAttribute", known, self._device(index)))
        except DriverError as error:
            if error.name == "CUDA_ERROR_INVALID_VALUE":  # a driver older than the attribute
                return None
            raise

    def retain_context(self, index: int) -> int:
        return int(self._call("cuDevicePrimaryCtxRetain", self._device(index)))

    def release_context(self, index: int) -> None:
        self._call("cuDevicePrimaryCtxRelease", self._device(index))

    def current_context(self) -> int:
        return int(self._call("cuCtxGetCurrent"))

    def set_context(self, context: int) -> None:
        self._call("cuCtxSetCurrent", context)

    def allocate(self, size: int) -> int:
        return int(self._call("cuMemAlloc", size))

    def free(self, pointer: int) -> None:
        self._call("cuMemFree", pointer)

    def zero(self, pointer: int, size: int) -> None:
        self._call("cuMemsetD8", pointer, 0, size)
        self._call("cuCtxSynchronize")

    def memory_info(self) -> tuple[int, int]:
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    def allocation(self, pointer: int) -> tuple[int, int]:
        base, size = self._call("cuMemGetAddressRange", pointer)
        return int(base), int(size)

    def export_memory(self, pointer: int) -> bytes:
        return bytes(self._call("cuIpcGetMemHandle", pointer).reserved)

    def import_memory(self, handle: bytes) -> int:
        named = self._cuda.CUipcMemHandle()
        named.reserved = handle
        return int(self._call("cuIpcOpenMemHandle", named, _LAZY_PEER_ACCESS))

    def close_memory(self, pointer: int) -> None:
        self._call("cuIpcCloseMemHandle", pointer)

    def register_host(self, pointer: int, size: int) -> int:
        self._call("cuMemHostRegister", pointer, size, _REGISTER_PORTABLE_MAPPED)
        return int(self._call("cuMemHostGetDevicePointer", pointer, 0))

    def unregister_host(self, pointer: int) -> None:
        self._call("cuMemHostUnregister", pointer)

    def write_value(self, stream: int, address: int, value: int) -> None:
        (status,) = self._write(stream, address, value, 0)
        self._check("cuStreamWriteValue64", status)

    def wait_value(self, stream: int, address: int, value: int) -> None:
        (status,) = self._wait(stream, address, value, _GEQ)
        self._check("cuStreamWaitValue64", status)

    def create_stream(self) -> int:
        return int(self._call("cuStreamCreate", 1))  # CU_STREAM_NON_BLOCKING

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy", stream)

    def is_done(self, stream: int) -> bool:
        (status,) = self._cuda.cuStreamQuery(stream)
        if int(status) == _NOT_READY:
            return False
        self._check("cuStreamQuery", status)
        return True

    def create_event(self) -> int:
        return int(self._call("cuEventCreate", _EVENT_IPC | _EVENT_WITHOUT_TIMING))

    def destroy_event(self, event: int) -> None:
        self._call("cuEventDestroy", event)

    def record_event(self, event: int, stream: int) -> None:
        self._call("cuEventRecord", event, stream)

    def wait_event(self, stream: int, event: int) -> None:
        self._call("cuStreamWaitEvent", stream, event, 0)

    def export_event(self, event: int) -> bytes:
        return bytes(self._call("cuIpcGetEventHandle", event).reserved)

    def import_event(self, handle: bytes) -> int:
        named = self._cuda.CUipcEventHandle()
        named.reserved = handle
        return int(self._call("cuIpcOpenEventHandle", named))

    def _device(self, index: int) -> Any:
        return self._call("cuDeviceGet", index)


@functools.cache
def load() -> Driver:
    """The driver of this process.

    Raises:
        ServiceFault: cuda-bindings is not installed, or the machine has no driver.
    """
    return BindingsDriver()
