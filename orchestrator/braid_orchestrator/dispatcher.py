"""Sends each layer of a step to the service that the plan names for it, by `layer_id`.

Nothing here looks at a layer's class, shape or attributes: the plan alone decides, an id that is
not in it is refused, and a step is not over before every layer of the plan has run once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from braid.v1 import attention_pb2 as pb
from braid.v1 import common_pb2
from braid_wire import convert, doorbell
from braid_wire.batch import Batch
from braid_wire.errors import (
    LayerPlanDisputed,
    LayerUnknown,
    StepOrder,
    ViewInvalid,
)
from braid_wire.layers import Kind, LayerPlan, LayerSpec, Role, digest
from braid_wire.metrics import LayerMetrics, ProcessMetrics

from braid_orchestrator.handover import Handover
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


@dataclass(frozen=True)
class Prepared:
    """One layer side, resolved for steps of a fixed number of rows."""

    point: Point
    index: int
    """Its place in the service's order."""
    ticket: pb.Ticket
    inputs: Mapping[str, torch.Tensor]
    output: torch.Tensor


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
        self._handovers: dict[Kind, Handover] = {}
        self._prepared: dict[tuple[Role, int], dict[tuple[int, Kind], Prepared]] = {}
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
            if self.links[kind].remote and self.descriptions[kind].doorbells and doorbell.available():
                walk = self._walks[kind]
                self._handovers[kind] = Handover(self.store, kind, walk, _LAYER_TIMEOUT_S)
        return self._walks[kind]

    def handover(self, kind: Kind) -> Handover | None:
        """The doorbells of the open stream to a service; None where layers go by messages."""
        return self._handovers.get(kind)

    def prepared(self, role: Role, rows: int) -> dict[tuple[int, Kind], Prepared]:
        """(layer id, side) → what a step of so many rows needs of it, in plan order."""
        key = (role, rows)
        if key not in self._prepared:
            if len(self._prepared) >= _PREPARED_SETS:
                self._prepared.pop(next(iter(self._prepared)))
            self._prepared[key] = {
                (spec.layer_id, side): self._prepare(role, spec, side, index, rows)
                for side in SIDES
                for index, spec in enumerate(self.store.plans[role].side(side))
            }
        return self._prepared[key]

    def record(self, point: Point, mode: str, elapsed_ns: int, compute_ns: int) -> None:
        """Count one dispatch: kernel time, and the rest of the time that the body waited."""
        compute = compute_ns * 1e-9
        overhead = max(elapsed_ns - compute_ns, 0) * 1e-9
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

    def _prepare(self, role: Role, spec: LayerSpec, side: Kind, index: int, rows: int) -> Prepared:
        buffers = self.store.buffers(spec, side, rows)
        ticket = pb.Ticket(
            layer_id=spec.layer_id,
            inputs={name: self.store.view(tensor) for name, tensor in buffers.inputs.items()},
            output=self.store.view(buffers.output),
        )
        return Prepared((role, spec.layer_id, side), index, ticket, buffers.inputs, buffers.output)

    def _forget_walks(self) -> None:
        walks, self._walks = self._walks, {}
        handovers, self._handovers = self._handovers, {}
        for handover in handovers.values():
            handover.release()
        for walk in walks.values():
            walk.close()


# Decode steps differ in their number of rows as requests come and go; this many sets are kept.
_PREPARED_SETS = 128
_LAYER_TIMEOUT_S = 120.0


class Step:
    """One walk of a batch through all layers of its role."""

    def __init__(self, dispatcher: Dispatcher, batch: Batch) -> None:
        self.batch = batch
        self.summaries: dict[Kind, pb.PlanSummary] = {}
        self._dispatcher = dispatcher
        self._mode = batch.mode
        self._layers = dispatcher.prepared(batch.role, batch.num_tokens)
        self._next = dict.fromkeys((side for _, side in self._layers), 0)
        self._ran: dict[tuple[int, Kind], int] = {}
        """(layer id, side) → nanoseconds that the body waited."""
        self._times: dict[tuple[int, Kind], common_pb2.Timing] = {}
        self._plan()

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
        layer = self._layer(layer_id, side)
        if inputs.keys() != layer.inputs.keys():
            raise ViewInvalid(
                f"layer {layer_id} takes {sorted(layer.inputs)}, not {sorted(inputs)}", layer_id=layer_id
            )
        for name, target in layer.inputs.items():
            source = inputs[name]
            if source.shape != target.shape or source.dtype is not target.dtype:
                raise ViewInvalid(
                    f"layer {layer_id} takes {name} {target.dtype} {list(target.shape)}, "
                    f"not {source.dtype} {list(source.shape)}",
                    layer_id=layer_id,
                    field=name,
                )
            target.copy_(source)
        self._run(layer)
        return layer.output

    def run(self, layer_id: int, side: Kind | None = None) -> common_pb2.Timing:
        """As `attend`, for a layer whose input buffers are written already; when it ran."""
        layer = self._layer(layer_id, side)
        self._run(layer)
        received, started, finished = self._times_of(layer)
        return common_pb2.Timing(received_ns=received, started_ns=started, finished_ns=finished)

    def finish(self) -> None:
        """Close the step and count its layers.

        Raises:
            StepOrder: a layer of the plan has not run.
        """
        left = [f"{side.value} {layer_id}" for layer_id, side in self._layers.keys() - self._ran.keys()]
        if left:
            raise StepOrder(f"the step ends but layers have not run: {', '.join(sorted(left))}")
        for key, elapsed in self._ran.items():
            layer = self._layers[key]
            _, started, finished = self._times_of(layer)
            self._dispatcher.record(layer.point, self._mode, elapsed, finished - started)
        if self._dispatcher.dispatch is Dispatch.WALK:
            close = pb.WalkRequest(close=pb.CloseStep(step=self.batch.step, lane=self.batch.lane))
            for side in self._next:
                self._dispatcher.walk(side).send(close)

    def _plan(self) -> None:
        """Have every service that has layers of this role plan the batch, all at the same time."""
        dispatcher, batch = self._dispatcher, self.batch
        began = time.monotonic()
        request = pb.PlanRequest(batch=dispatcher.store.publish(batch), options=dispatcher.plan_options)
        if dispatcher.dispatch is Dispatch.WALK:
            for side in self._next:
                dispatcher.walk(side).send(pb.WalkRequest(open=self._opening(side, request)))
        for side in self._next:
            if dispatcher.dispatch is Dispatch.WALK:
                summary = dispatcher.walk(side).receive().opened.summary
            else:
                summary = dispatcher.links[side].plan(request).summary
            self.summaries[side] = summary
            check_summary(summary, batch, side, dispatcher.links[side].name)
            dispatcher.note_ignored(side, summary.ignored_options)
        dispatcher.metrics.plan_seconds.observe(time.monotonic() - began)

    def _opening(self, side: Kind, request: pb.PlanRequest) -> pb.OpenStep:
        tickets = [layer.ticket for (_, at), layer in self._layers.items() if at is side]
        handover = self._dispatcher.handover(side)
        bells = handover.begin(len(tickets)) if handover is not None else None
        return pb.OpenStep(plan=request, tickets=tickets, doorbells=bells)

    def _layer(self, layer_id: int, side: Kind | None) -> Prepared:
        """The layer, which must be due."""
        if side is None or (layer_id, side) not in self._layers:
            side = _side(self._dispatcher.spec(self.batch.role, layer_id), side)
        layer = self._layers[layer_id, side]
        if (layer_id, side) in self._ran:
            raise StepOrder(f"layer {layer_id} ({side.value}) ran already in this step", layer_id=layer_id)
        if self._dispatcher.dispatch is Dispatch.WALK and layer.index != self._next[side]:
            raise StepOrder(f"layer {layer_id} ({side.value}) is not the next one", layer_id=layer_id)
        return layer

    def _run(self, layer: Prepared) -> None:
        _, layer_id, side = layer.point
        began = time.monotonic_ns()
        handover = self._dispatcher.handover(side)
        if handover is not None:
            handover.run(layer.index)
        else:
            self._times[layer_id, side] = self._send(side, layer)
        self._ran[layer_id, side] = time.monotonic_ns() - began
        self._next[side] += 1

    def _times_of(self, layer: Prepared) -> tuple[int, int, int]:
        """When the service received, started and finished a layer, nanoseconds of CLOCK_MONOTONIC."""
        _, layer_id, side = layer.point
        handover = self._dispatcher.handover(side)
        if handover is not None:
            return handover.times(layer.index)
        timing = self._times[layer_id, side]
        return timing.received_ns, timing.started_ns, timing.finished_ns

    def _send(self, side: Kind, layer: Prepared) -> common_pb2.Timing:
        """Have a layer run by a message."""
        dispatcher, batch = self._dispatcher, self.batch
        if dispatcher.dispatch is Dispatch.RPC:
            request = pb.AttendRequest(
                role=convert.ROLES[batch.role],
                epoch=batch.epoch,
                step=batch.step,
                lane=batch.lane,
                ticket=layer.ticket,
            )
            return dispatcher.links[side].attend(request).timing
        run = pb.RunTicket(step=batch.step, lane=batch.lane, index=layer.index)
        answer = dispatcher.walk(side).call(pb.WalkRequest(run=run))
        if answer.step != batch.step or answer.lane != batch.lane or answer.done.index != layer.index:
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
