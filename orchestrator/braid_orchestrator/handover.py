"""Handing the layers of a step over to one service by doorbells."""

from __future__ import annotations

from braid.v1 import attention_pb2 as pb
from braid_wire.doorbell import Doorbell
from braid_wire.errors import ServiceFault
from braid_wire.layers import Kind

from braid_orchestrator.link import Walk
from braid_orchestrator.store import Bells, Store


class Handover:
    """One service's pair of doorbells, for as long as its walk is open.

    Args:
        store: where the bells lie.
        kind: of the service.
        walk: the stream on which the service says why a step failed.
        timeout_s: longest time that one layer may take.
    """

    def __init__(self, store: Store, kind: Kind, walk: Walk, timeout_s: float) -> None:
        self._bells: Bells = store.bells(kind)
        self._request = Doorbell(self._bells.request)
        self._done = Doorbell(self._bells.done)
        self._times = self._bells.timings.numpy()
        self._walk = walk
        self._timeout = timeout_s
        self._base = 0
        self._tickets = 0

    def begin(self, tickets: int) -> pb.Doorbells:
        """The message that has a step of so many tickets handed over by these bells."""
        self._base += self._tickets
        self._tickets = tickets
        return self._bells.message(self._base, tickets)

    def run(self, index: int) -> None:
        """Have a ticket run, and wait until its output is written.

        Raises:
            BraidError: why the step failed, or that the service was lost.
        """
        value = self._base + index + 1
        self._request.ring(value)
        self._done.wait(value, self._walk.check, self._timeout)
        if self._done.failed:
            self._walk.receive()  # raises what went wrong
            raise ServiceFault("a service gave a step up and did not say why")

    def times(self, index: int) -> tuple[int, int, int]:
        """When a ticket that has run was received, started and finished, nanoseconds of CLOCK_MONOTONIC."""
        received, started, finished = self._times[index]
        return int(received), int(started), int(finished)

    def release(self) -> None:
        """Let the service stop waiting: the step is given up."""
        self._request.fail()
