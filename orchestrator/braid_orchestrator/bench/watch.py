"""Where the time of a cell's layers went, while somebody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from braid_wire.layers import Kind

from braid_orchestrator.cell import Cell
from braid_orchestrator.timings import StepTimes

_KINDS = (Kind.FULL, Kind.LINEAR)


def _lists() -> dict[Kind, list[float]]:
    return {kind: [] for kind in _KINDS}


@dataclass
class LayerSeconds:
    """Of every layer that ran, by the service that ran it."""

    hops: dict[Kind, list[float]] = field(default_factory=_lists)
    """Seconds that the body waited beyond the kernel."""
    kernels: dict[Kind, list[float]] = field(default_factory=_lists)

    def all_hops(self) -> list[float]:
        """Of both services."""
        return [value for kind in _KINDS for value in self.hops[kind]]

    def add(self, times: StepTimes) -> None:
        """Count a step."""
        for layer in times.layers:
            self.hops[layer.side].append(layer.hop_ns * 1e-9)
            self.kernels[layer.side].append(layer.compute_ns * 1e-9)


@contextmanager
def watched(cell: Cell, note: Callable[[StepTimes], None]) -> Iterator[None]:
    """Tell `note` of every step that runs inside the block."""
    cell.dispatcher.observer = note
    try:
        yield
    finally:
        cell.dispatcher.observer = None
