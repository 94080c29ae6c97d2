"""What a cell is doing, in the numbers that balancing between cells goes by."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from braid_wire.layers import Role

from braid_orchestrator.cell import Cell

_WINDOW_S = 1.0
"""A rate is measured over at least so long."""


@dataclass(frozen=True)
class Loads:
    """A moment of a cell."""

    running: int
    waiting: int
    most_running: int
    used_tokens: int
    """Positions of the pages that sequences hold."""
    total_tokens: int
    """Positions of all pages; 0: the model has no full attention."""
    memory: float
    """Share of the pages that is held, in [0, 1]; of the slots, where the model has no full attention."""
    tokens_per_second: float
    """Made, lately; 0 until it is known."""


class LoadMeter:
    """Reads a cell's load."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._lock = threading.Lock()
        self._since = (time.monotonic(), self._made())
        self._rate = 0.0

    def read(self) -> Loads:
        """Now."""
        cell, load = self._cell, self._cell.engine.load
        memory, limits = cell.store.memory[Role.TARGET], cell.options.limits
        pages, slots = memory.pages, memory.slots
        # Slots run out whenever as many sequences run as a step takes, which is no lack of memory.
        pool = pages if pages is not None else slots
        return Loads(
            running=load.running,
            waiting=load.waiting,
            most_running=limits.max_sequences,
            used_tokens=pages.used * limits.page_size if pages is not None else 0,
            total_tokens=pages.total * limits.page_size if pages is not None else 0,
            memory=pool.used / pool.total if pool is not None else 0.0,
            tokens_per_second=self._tokens_per_second(),
        )

    def _tokens_per_second(self) -> float:
        with self._lock:
            now, made = time.monotonic(), self._made()
            then, before = self._since
            if now - then >= _WINDOW_S:
                self._rate, self._since = (made - before) / (now - then), (now, made)
            return self._rate

    def _made(self) -> float:
        (family,) = self._cell.metrics.generated_tokens.collect()
        return next(sample.value for sample in family.samples if sample.name.endswith("_total"))
