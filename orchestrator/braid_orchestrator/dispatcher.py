"""Sends each layer of a step to the service that the plan names for it, by `layer_id`.

Nothing here looks at a layer's class, shape or attributes: the plan alone decides, an id that is
not in it is refused, and a step is not over before every layer of the plan has run once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from enum import Enum

import torch
from braid.v1 import attention_pb2 as pb
from braid.v1 import common_pb2
from braid_wire import convert
from braid_wire.batch import Batch
from braid_wire.errors import (
    LayerPlanDisputed,
    LayerUnknown,
    StepOrder,
    ViewInvalid,
)
from braid_wire.layers import Kind, LayerPlan, LayerSpec, Role, digest
from braid_wire.metrics import LayerMetrics, ProcessMetrics

from braid_orchestrator.link import Link, Walk
from braid_orchestrator.plan_check import check_summary
from braid_orchestrator.store import Store

log = logging.getLogger(__name__)

SIDES = (Kind.FULL, Kind.LINEAR)


class Dispatch(Enum):
    """How a layer reaches its service: a call for each, or messages on one stream."""

    RPC = "rpc"
    WALK = "walk"


class LayerTotals:
    """What one layer side has cost so far, for Status."""

    def __init__(self) -> None:
        self.dispatches: dict[str, int] = {}
        self.compute_s = 0.0
        self.overhead_s = 0.0

    def add(self, mode: str, compute_s: float, overhead_s: float) -> None:
        """Count one dispatch."""
        self.dispatches[mode] = self.dispatches.get(mode, 0) + 1
        self.compute_s += compute_s
        self.overhead_s += overhead_s

    @property
    def count(self) -> int:
        """Dispatches in all modes."""
        return sum(self.dispatches.values())


Point = tuple[Role, int, Kind]
"""One side of one layer of one role."""

Observer = Callable[[Point, float, float], None]
"""Told of every dispatch: which layer, seconds in the kernel, seconds that the body waited besides."""


class Dispatcher:
    """Configures the two services and runs steps on them.

    Args:
        store: the cell's shared memory.
        links: the two services, by kind.
        dispatch: how layers reach them.
        metrics: of this process.
        cell: name of the cell, for the services' logs.
        plan_options: sent with every Plan; what a service does not have it ignores, which is logged once.
    """

    def __init__(
        self,
        store: Store,
        links: Mapping[Kind, Link],
        dispatch: Dispatch,
        metrics: ProcessMetrics,
        cell: str = "cell",
        plan_options: Mapping[str, str] | None = None,
    ) -> None:
        self.store = store
        self.links = links
        self.dispatch = dispatch
        self.metrics = metrics
        self.epoch = 0
        self.observer: Observer | None = None
        self.descriptions: dict[Kind, pb.DescribeResponse] = {}
        self.plan_options = dict(plan_options or {})
        self._ignored: set[tuple[Kind, str]] = set()
        self._cell = cell
        self._walks: dict[Kind, Walk] = {}
        self._specs: dict[tuple[Role, int], LayerSpec] = {}
        self.totals: dict[Point, LayerTotals] = {}
        self._children: dict[Point, LayerMetrics] = {}
        self._tickets: dict[tuple[Role, int], dict[tuple[int, Kind], pb.Ticket]] = {}
        for role, plan in store.plans.items():
            for spec in plan:
                self._specs[role, spec.layer_id] = spec
            for side in SIDES:
                for spec in plan.side(side):
                    self.totals[role, spec.layer_id, side] = LayerTotals()
                    self._children[role, spec.layer_id, side] = metrics.layer(role, spec, side)

    def connect(self, timeout_s: float = 30.0) -> None:
        """Wait for both services and configure them for a new epoch.

        Raises:
            ServiceLost: one did not come up in time.
            LayerPlanDisputed: what they accepted is not what the plan says; the ids are named.
        """
        self._forget_walks()
        for kind, link in self.links.items():
            link.wait_ready(timeout_s)
            self.descriptions[kind] = link.describe()
            _check_kind(kind, self.descriptions[kind], link)
        self.epoch = max([self.epoch, *(d.epoch for d in self.descriptions.values())]) + 1
        accepted: dict[Kind, pb.ConfigureResponse] = {}
        for kind, link in self.links.items():
            accepted[kind] = link.configure(self.store.configure_request(kind, self.epoch, self._cell))
        for role, plan in self.store.plans.items():
            check_coverage(plan, {kind: _accepted(answer, role) for kind, answer in accepted.items()})
        self.metrics.epoch.set(self.epoch)

    def begin(self, batch: Batch) -> Step:
        """Plan a batch with the services that have layers of its role.

        Raises:
            PlanMismatch: a plan does not cover the batch.
            BraidError: a service refused the batch, or was lost.
        """
        return Step(self, batch)

    def abort(self) -> None:
        """End the epoch: whatever a service still does for an older step counts no more."""
        self.epoch += 1
        self.metrics.epoch.set(self.epoch)
        self._forget_walks()

    def close(self) -> None:
        """Let go of the services."""
        self._forget_walks()
        for link in self.links.values():
            link.close()

    def spec(self, role: Role, layer_id: int) -> LayerSpec:
        """The plan's layer; `LayerUnknown` for an id that is not in it."""
        found = self._specs.get((role, layer_id))
        if found is None:
            raise LayerUnknown(
                f"layer {layer_id} is not in the {role.value} plan", layer_id=layer_id, role=role.value
            )
        return found

    def walk(self, kind: Kind) -> Walk:
        """The open stream to a service; one is opened where there is none."""
        if kind not in self._walks:
            self._walks[kind] = self.links[kind].walk()
        return self._walks[kind]

    def tickets(self, role: Role, rows: int) -> dict[tuple[int, Kind], pb.Ticket]:
        """(layer id, side) → ticket for steps of so many rows, in plan order."""
        key = (role, rows)
        if key not in self._tickets:
            if len(self._tickets) >= _TICKET_SETS:
                self._tickets.pop(next(iter(self._tickets)))
            self._tickets[key] = {
                (spec.layer_id, side): self._ticket(spec, side, rows)
                for side in SIDES
                for spec in self.store.plans[role].side(side)
            }
        return self._tickets[key]

    def record(self, point: Point, mode: str, elapsed_ns: int, timing: common_pb2.Timing) -> None:
        """Count one dispatch: kernel time, and the rest of the time that the body waited."""
        compute = (timing.finished_ns - timing.started_ns) * 1e-9
        overhead = max(elapsed_ns * 1e-9 - compute, 0.0)
        children = self._children[point]
        children.dispatch[mode].inc()
        children.seconds["compute"].observe(compute)
        children.seconds["hop"].observe(overhead)
        self.totals[point].add(mode, compute, overhead)
        if self.observer is not None:
            self.observer(point, compute, overhead)

    def note_ignored(self, side: Kind, options: Iterable[str]) -> None:
        """Log each plan option that a service does not have, the first time that it says so."""
        for option in options:
            if (side, option) not in self._ignored:
                self._ignored.add((side, option))
                log.info("the %s service has no plan option %s", self.links[side].name, option)

    def _ticket(self, spec: LayerSpec, side: Kind, rows: int) -> pb.Ticket:
        buffers = self.store.buffers(spec, side, rows)
        return pb.Ticket(
            layer_id=spec.layer_id,
            inputs={name: self.store.view(tensor) for name, tensor in buffers.inputs.items()},
            output=self.store.view(buffers.output),
        )

    def _forget_walks(self) -> None:
        walks, self._walks = self._walks, {}
        for walk in walks.values():
            walk.close()


# Decode steps differ in their number of rows as requests come and go; this many sets are kept.
_TICKET_SETS = 128


class Step:
    """One walk of a batch through all layers of its role."""

    def __init__(self, dispatcher: Dispatcher, batch: Batch) -> None:
        self.batch = batch
        self.summaries: dict[Kind, pb.PlanSummary] = {}
        self._dispatcher = dispatcher
        self._mode = batch.mode
        self._plan: LayerPlan = dispatcher.store.plans[batch.role]
        self._tickets = dispatcher.tickets(batch.role, batch.num_tokens)
        self._left: dict[Kind, list[int]] = {}
        request = pb.PlanRequest(batch=dispatcher.store.publish(batch), options=dispatcher.plan_options)
        for side in SIDES:
            layers = [spec.layer_id for spec in self._plan.side(side)]
            if layers:
                self._left[side] = layers
                self.summaries[side] = self._open(side, request, layers)
                check_summary(self.summaries[side], batch, side, dispatcher.links[side].name)

    def attend(
        self, layer_id: int, inputs: Mapping[str, torch.Tensor], side: Kind | None = None
    ) -> torch.Tensor:
        """Run one layer.

        Args:
            layer_id: inside the batch's role.
            inputs: as the layer's geometry names them, [T, …] each.
            side: FULL or LINEAR, for a PARALLEL layer.

        Returns:
            [T, …] as the geometry says; shared memory that the next layer will write over.

        Raises:
            LayerUnknown, LayerMisrouted: the plan has no such layer, or none of that side.
            ViewInvalid: an input is missing, unknown or has another shape or dtype.
            StepOrder: the layer ran already, or one that comes before it did not.
            BraidError: the service refused, or was lost.
        """
        spec = self._dispatcher.spec(self.batch.role, layer_id)
        buffers = self._dispatcher.store.buffers(spec, _side(spec, side), self.batch.num_tokens)
        if inputs.keys() != buffers.inputs.keys():
            raise ViewInvalid(
                f"layer {layer_id} takes {sorted(buffers.inputs)}, not {sorted(inputs)}", layer_id=layer_id
            )
        for name, target in buffers.inputs.items():
            source = inputs[name]
            if source.shape != target.shape or source.dtype is not target.dtype:
                raise ViewInvalid(
                    f"layer {layer_id} takes {name} {target.dtype} {list(target.shape)}, "
                    f"not {source.dtype} {list(source.shape)}",
                    layer_id=layer_id,
                    field=name,
                )
            target.copy_(source)
        self.run(layer_id, side)
        return buffers.output

    def run(self, layer_id: int, side: Kind | None = None) -> common_pb2.Timing:
        """As `attend`, for a layer whose input buffers are written already."""
        dispatcher = self._dispatcher
        spec = dispatcher.spec(self.batch.role, layer_id)
        side = _side(spec, side)
        index = self._take(layer_id, side)
        began = time.monotonic_ns()
        timing = self._send(side, layer_id, index)
        elapsed = time.monotonic_ns() - began
        dispatcher.record((self.batch.role, layer_id, side), self._mode, elapsed, timing)
        return timing

    def finish(self) -> None:
        """Close the step.

        Raises:
            StepOrder: a layer of the plan has not run.
        """
        left = {side.value: layers for side, layers in self._left.items() if layers}
        if left:
            raise StepOrder(f"the step ends but layers have not run: {left}")
        if self._dispatcher.dispatch is Dispatch.WALK:
            close = pb.WalkRequest(close=pb.CloseStep(step=self.batch.step, lane=self.batch.lane))
            for side in self._left:
                self._dispatcher.walk(side).post(close)

    def _open(self, side: Kind, request: pb.PlanRequest, layers: list[int]) -> pb.PlanSummary:
        dispatcher = self._dispatcher
        began = time.monotonic()
        if dispatcher.dispatch is Dispatch.RPC:
            summary = dispatcher.links[side].plan(request).summary
        else:
            tickets = [self._tickets[layer_id, side] for layer_id in layers]
            message = pb.WalkRequest(open=pb.OpenStep(plan=request, tickets=tickets))
            summary = dispatcher.walk(side).call(message).opened.summary
        dispatcher.metrics.plan_seconds.observe(time.monotonic() - began)
        dispatcher.note_ignored(side, summary.ignored_options)
        return summary

    def _take(self, layer_id: int, side: Kind) -> int:
        """Mark a layer as run and give its position in the service's order."""
        left = self._left[side]
        if layer_id not in left:
            raise StepOrder(f"layer {layer_id} ({side.value}) ran already in this step", layer_id=layer_id)
        index = len(self._plan.side(side)) - len(left)
        if self._dispatcher.dispatch is Dispatch.WALK and left[0] != layer_id:
            raise StepOrder(
                f"layer {layer_id} ({side.value}) is not the next one; {left[0]} is", layer_id=layer_id
            )
        left.remove(layer_id)
        return index

    def _send(self, side: Kind, layer_id: int, index: int) -> common_pb2.Timing:
        dispatcher, batch = self._dispatcher, self.batch
        if dispatcher.dispatch is Dispatch.RPC:
            request = pb.AttendRequest(
                role=convert.ROLES[batch.role],
                epoch=batch.epoch,
                step=batch.step,
                lane=batch.lane,
                ticket=self._tickets[layer_id, side],
            )
            return dispatcher.links[side].attend(request).timing
        run = pb.RunTicket(step=batch.step, lane=batch.lane, index=index)
        answer = dispatcher.walk(side).call(pb.WalkRequest(run=run))
        if answer.step != batch.step or answer.lane != batch.lane or answer.done.index != index:
            raise StepOrder(f"the {side.value} service answered for step {answer.step}, not {batch.step}")
        return answer.done.timing


def check_coverage(plan: LayerPlan, accepted: Mapping[Kind, pb.AcceptedLayers]) -> None:
    """FULL + LINEAR + NONE cover every id of a plan once, PARALLEL in both, with equal digests.

    Raises:
        LayerPlanDisputed: naming the layer ids that no service, or the wrong one, took.
    """
    for side in SIDES:
        wanted = [spec.layer_id for spec in plan.side(side)]
        got = list(accepted[side].layer_ids)
        wrong = sorted(set(wanted) ^ set(got)) or (wanted if wanted != got else [])
        if wrong:
            raise LayerPlanDisputed(
                f"{plan.role.value} layers {wrong}: the plan sends {wanted} to the {side.value} service, "
                f"which accepted {got}",
                role=plan.role.value,
                layer_ids=wrong,
            )
        if accepted[side].digest != digest(plan.side(side)):
            raise LayerPlanDisputed(
                f"the {side.value} service has another digest of {plan.role.value} layers {wanted}",
                role=plan.role.value,
                layer_ids=wanted,
            )


def _accepted(answer: pb.ConfigureResponse, role: Role) -> pb.AcceptedLayers:
    for layers in answer.accepted:
        if layers.role == convert.ROLES[role]:
            return layers
    return pb.AcceptedLayers(role=convert.ROLES[role], digest=digest(()))


def _check_kind(kind: Kind, description: pb.DescribeResponse, link: Link) -> None:
    if description.kind != convert.KINDS[kind]:
        raise LayerPlanDisputed(
            f"the service at {link.address} is of kind {description.kind}, not {kind.value}",
            address=link.address,
        )


def _side(spec: LayerSpec, side: Kind | None) -> Kind:
    """The side to run: the named one, or the only one."""
    if side is None:
        if spec.kind is Kind.PARALLEL:
            raise StepOrder(f"layer {spec.layer_id} is PARALLEL; name the side", layer_id=spec.layer_id)
        side = spec.kind if spec.kind in SIDES else Kind.FULL
    spec.geometry(side)  # refuses a side that the layer has not
    return side
