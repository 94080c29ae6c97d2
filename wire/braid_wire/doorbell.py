"""Doorbells: monotonic counters in shared memory, for handing a layer over without a message.

One process writes a bell, one waits for it. What was written to shared memory before a ring is
visible to whoever has waited for it. The code is C++ (`cpp/doorbell.cpp` of the kernels), because
Python has neither the atomics nor the futex; where it cannot be built there are no doorbells, and a
walk sends messages instead.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable

import torch
from braid_kernels.build import WIRE, build
from braid_kernels.errors import BuildError

from braid_wire.errors import ServiceFault, StepTimeout, ViewInvalid

log = logging.getLogger(__name__)

BELL_BYTES = 64
"""A bell is one cache line, aligned to its size."""

FAILED = 1 << 63
"""Set in the value of a bell whose writer has given up; every waiter is released."""

_SLICE_NS = 20_000_000
# Longer than the body's work between two layers, so that a waiter whose core nobody else wants does
# not go to sleep in the middle of a step.
_SPIN_NS = 800_000
_RUNG, _TIMEOUT, _GIVEN_UP = 0, 1, 3


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The C interface; None, with one warning, where it cannot be built."""
    try:
        lib = ctypes.CDLL(str(build(WIRE)))
    except (BuildError, OSError) as error:
        log.warning("no doorbells, layers are handed over by messages: %s", error)
        return None
    lib.braid_bell_size.restype = ctypes.c_int64
    lib.braid_bell_value.restype = ctypes.c_uint64
    lib.braid_bell_value.argtypes = [ctypes.c_void_p]
    lib.braid_bell_ring.restype = None
    lib.braid_bell_ring.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    lib.braid_bell_announce.restype = None
    lib.braid_bell_announce.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    lib.braid_bell_wait.restype = ctypes.c_int32
    lib.braid_bell_wait.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint64,
        ctypes.c_int32,
        ctypes.c_int64,
        ctypes.c_int64,
    ]
    if lib.braid_bell_size() != BELL_BYTES:
        raise ServiceFault(f"a bell is {lib.braid_bell_size()} bytes in the library, {BELL_BYTES} here")
    return lib


def available() -> bool:
    """Whether this process has doorbells."""
    return _library() is not None


def spin_ns() -> int:
    """How long a waiter looks before it sleeps: nothing where there is a single core to share."""
    return _SPIN_NS if len(os.sched_getaffinity(0)) > 1 else 0


class Doorbell:
    """One bell.

    Args:
        memory: uint8 [64] of an arena, 64-byte aligned; kept alive by this object.

    Raises:
        ViewInvalid: the memory is no bell.
        ServiceFault: this process has no doorbells.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        library = _library()
        if library is None:
            raise ServiceFault("this process has no doorbells")
        if memory.dtype is not torch.uint8 or memory.shape != (BELL_BYTES,) or not memory.is_contiguous():
            raise ViewInvalid(f"a bell is uint8 [{BELL_BYTES}], not {memory.dtype} {list(memory.shape)}")
        if memory.device.type != "cpu":
            raise ViewInvalid(f"a bell lies in host memory, not on {memory.device}")
        if memory.data_ptr() % BELL_BYTES:
            raise ViewInvalid(f"a bell begins at a multiple of {BELL_BYTES} bytes")
        self._memory = memory
        self._at = memory.data_ptr()
        self._spin = spin_ns()
        self._ring, self._announce = library.braid_bell_ring, library.braid_bell_announce
        self._wait, self._value = library.braid_bell_wait, library.braid_bell_value

    @property
    def value(self) -> int:
        """The counter now, without `FAILED`."""
        return int(self._value(self._at)) & ~FAILED

    @property
    def failed(self) -> bool:
        """Whether the writer has given up."""
        return bool(self._value(self._at) & FAILED)

    def ring(self, value: int) -> None:
        """Set the counter; it must not fall."""
        self._ring(self._at, value)

    def announce(self, value: int) -> None:
        """Say that the counter will be `value` soon, so that a waiter that sleeps wakes up by then."""
        self._announce(self._at, value)

    def fail(self) -> None:
        """Release every waiter, now and later."""
        self._ring(self._at, FAILED)

    def wait(
        self, target: int, check: Callable[[], None], timeout_s: float, *, expected: bool = False
    ) -> bool:
        """Wait until the counter is at least `target`, or the writer has given up.

        Args:
            target: the value to wait for.
            check: called every 20 ms meanwhile; raises where the writer is gone.
            timeout_s: longest wait.
            expected: whether the ring counts as announced: it is a few microseconds away.

        Returns:
            Whether the counter got there; False where the writer has given up.

        Raises:
            StepTimeout: the counter did not get there in time.
        """
        status = self._wait(self._at, target, expected, self._spin, _SLICE_NS)
        if status == _RUNG:
            return True
        for _ in range(max(int(timeout_s * 1e9 / _SLICE_NS), 1)):
            if status == _GIVEN_UP:
                return False
            if status != _TIMEOUT:
                raise ServiceFault("the system refused to wait for a doorbell")
            check()
            # An announcement is looked out for in every slice: the spin follows it.
            status = self._wait(self._at, target, False, self._spin, _SLICE_NS)
            if status == _RUNG:
                return True
        raise StepTimeout(f"a doorbell stands at {self.value}, not {target}, after {timeout_s:.0f} s")
