"""Memory that is read from end to end: on large pages, where the system has them to give."""

from __future__ import annotations

import contextlib
import mmap
import threading

import torch
from torch import Tensor

LARGE_PAGE = 2 << 20
_LINE = 64
_BLOCK = 16 * LARGE_PAGE


class LargePages:
    """Gives out bytes from blocks of large pages; a block is free when all that was given of it is.

    A step reads each weight once, in the order in which it lies. On pages of 4 KiB the processor looks up
    an address every 64 lines, through two tables where it is a guest, and stops fetching ahead there: it
    reads more slowly than memory gives (`benchmarks/pages.py`).

    Args:
        advice: what the system is told of the memory, as of madvise(2).
    """

    def __init__(self, advice: int = mmap.MADV_HUGEPAGE) -> None:
        self._advice = advice
        self._lock = threading.Lock()
        self._rest = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """`size` bytes that begin at a cache line, zeros."""
        with self._lock:
            if size > len(self._rest):
                self._rest = _block(max(size, _BLOCK), self._advice)
            given, behind = self._rest[:size], -(-size // _LINE) * _LINE
            self._rest = self._rest[min(behind, len(self._rest)) :]
            return given


def _block(size: int, advice: int) -> Tensor:
    """Whole large pages; small ones where the system has no others."""
    size = -(-size // LARGE_PAGE) * LARGE_PAGE
    memory = mmap.mmap(-1, size + LARGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(advice)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -whole.data_ptr() % LARGE_PAGE
    return whole[begin : begin + size]
