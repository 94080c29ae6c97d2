"""How a step begins: both services plan its lanes, one after the other and beside the body."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from braid.v1 import attention_pb2 as pb
from braid_wire.batch import Batch
from braid_wire.layers import Kind

from braid_orchestrator.dispatch import Dispatch
from braid_orchestrator.plan_check import check_summary

if TYPE_CHECKING:
    from braid_orchestrator.dispatcher import Dispatcher


class Opening:
    """The plans of a step's lanes, asked for and then answered, service by service.

    The service of the first layer is asked at once, the other when the first layer is under way: then
    no service plans while the body waits for the other one.

    Args:
        dispatcher: whose services plan.
        lanes: one batch, or those of lanes 0 and 1.
    """

    def __init__(self, dispatcher: Dispatcher, lanes: Sequence[Batch]) -> None:
        self.summaries: list[dict[Kind, pb.PlanSummary]] = [{} for _ in lanes]
        self._dispatcher = dispatcher
        self._lanes = lanes
        self._unsent = dispatcher.sides(lanes[0].role)
        self._unsettled = list(self._unsent)
        self._published = [dispatcher.store.publish(batch) for batch in lanes]
        self._ask()

    def ask(self, side: Kind) -> None:
        """Ask a service that may not have been asked yet; its layers are about to run."""
        while side in self._unsent:
            self._ask()

    def proceed(self) -> None:
        """Ask the services that have not been asked yet."""
        while self._unsent:
            self._ask()

    def settle(self, side: Kind | None = None) -> None:
        """Wait until a service, or each of them, has planned every lane; check the plans.

        Raises:
            PlanMismatch: a plan does not cover its batch.
            BraidError: a service refused a batch, or was lost.
        """
        if not self._unsettled or (side is not None and side not in self._unsettled):
            return
        self.proceed()
        dispatcher = self._dispatcher
        for one in [side] if side is not None else list(self._unsettled):
            self._unsettled.remove(one)
            began = time.monotonic()
            found = self._receive(one)
            for batch, summary, summaries in zip(self._lanes, found, self.summaries, strict=True):
                summaries[one] = summary
                check_summary(summary, batch, one, dispatcher.links[one].name)
                dispatcher.note_ignored(one, summary.ignored_options)
            dispatcher.metrics.plan_seconds.observe(time.monotonic() - began)

    def _ask(self) -> None:
        if self._unsent:
            side, *self._unsent = self._unsent
            if self._dispatcher.dispatch is Dispatch.WALK:
                self._send(side)

    def _send(self, side: Kind) -> None:
        """Open the lanes of the step at one service, in their order."""
        dispatcher = self._dispatcher
        walk, handover = dispatcher.walk(side), dispatcher.handover(side)
        if handover is None:
            for lane in range(len(self._lanes)):
                walk.send(self._message(side, lane, None))
            return
        batch = self._lanes[0]
        tickets = len(dispatcher.store.plans[batch.role].side(side))
        base = handover.begin(tickets, len(self._lanes))
        handover.send([self._message(side, lane, base) for lane in range(len(self._lanes))])

    def _message(self, side: Kind, lane: int, base: int | None) -> pb.WalkRequest:
        """What opens one lane at one service: all of it the first time, then its numbers alone."""
        dispatcher, batch, published = self._dispatcher, self._lanes[lane], self._published[lane]
        number, known = 0, False
        # On a device all is said anew: what a service keeps would hold memory that its owner wants to free.
        if dispatcher.streams is None:
            number, known = dispatcher.kept(side).number((published, len(self._lanes), base is None))
        if known:
            again = pb.OpenAgain(kept=number, epoch=batch.epoch, step=batch.step, base=base or 0)
            return pb.WalkRequest(again=again)
        message = pb.WalkRequest(open=dispatcher.tickets(batch, side))
        message.open.keep = number
        message.open.plan.CopyFrom(self._request(lane))
        handover = dispatcher.handover(side)
        if handover is not None:
            message.open.doorbells.CopyFrom(handover.bells()[lane])
        return message

    def _request(self, lane: int) -> pb.PlanRequest:
        batch = self._published[lane].message(self._lanes[lane])
        return pb.PlanRequest(batch=batch, options=self._dispatcher.plan_options)

    def _receive(self, side: Kind) -> list[pb.PlanSummary]:
        """What one service planned for each lane."""
        dispatcher = self._dispatcher
        if dispatcher.dispatch is Dispatch.RPC:
            link = dispatcher.links[side]
            return [link.plan(self._request(lane)).summary for lane in range(len(self._lanes))]
        handover = dispatcher.handover(side)
        if handover is not None:
            return [answer.opened.summary for answer in handover.receive(len(self._lanes))]
        return [dispatcher.walk(side).receive().opened.summary for _ in self._lanes]
