"""When a step and its layers ran: CLOCK_MONOTONIC, nanoseconds, one clock for all processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from braid_wire.layers import Kind, Role


@dataclass(frozen=True)
class LayerTimes:
    """One dispatch."""

    role: Role
    layer_id: int
    side: Kind
    lane: int
    posted_ns: int
    """The orchestrator handed it over."""
    received_ns: int
    """The service had it."""
    started_ns: int
    """Its kernel began."""
    finished_ns: int
    """Its output was written."""
    waited_ns: int
    """The body had nothing else to do and waited for it."""
    taken_ns: int
    """The body had its output."""

    @property
    def queue_ns(self) -> int:
        """In the service, before the kernel began; a part of the hop."""
        return self.started_ns - self.received_ns

    @property
    def compute_ns(self) -> int:
        """In the kernel."""
        return self.finished_ns - self.started_ns

    @property
    def hop_ns(self) -> int:
        """From the hand-over until the kernel began, and from its end until the body noticed."""
        before = self.started_ns - self.posted_ns
        after = self.taken_ns - max(self.waited_ns, self.finished_ns)
        return max(before, 0) + max(after, 0)


@dataclass(frozen=True)
class StepTimes:
    """One lane of a step."""

    role: Role
    step: int
    lane: int
    mode: str
    num_tokens: int
    began_ns: int
    finished_ns: int
    layers: tuple[LayerTimes, ...]
    """In the order in which they were posted."""


StepObserver = Callable[[StepTimes], None]
