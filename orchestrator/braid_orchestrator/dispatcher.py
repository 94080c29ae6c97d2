"""Sends each layer of a step to the service that the plan names for it, by `layer_id`.

Nothing here looks at a layer's class, shape or attributes: the plan alone decides, an id that is
not in it is refused, and a step is not over before every layer of the plan has run once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from braid.v1 import attention_pb2 as pb
from braid.v1 import common_pb2
from braid_wire import convert, doorbell
from braid_wire.batch import Batch, IntArray
from braid_wire.cuda_doorbell import Streams, streams_for
from braid_wire.errors import (
    BraidError,
    LayerPlanDisputed,
    LayerUnknown,
    StepOrder,
    ViewInvalid,
)
from braid_wire.layers import Kind, LayerPlan, LayerSpec, Role, digest
from braid_wire.metrics import ProcessMetrics

from braid_orchestrator.handover import DeviceOrder, Handover, Kept
from braid_orchestrator.link import Link, Walk
from braid_orchestrator.plan_check import check_summary
from braid_orchestrator.store import Store
from braid_orchestrator.timings import LayerTimes, StepObserver, StepTimes

log = logging.getLogger(__name__)

SIDES = (Kind.FULL, Kind.LINEAR)


class Dispatch(Enum):
    """How a layer reaches its service: a call for each, or messages on one stream."""

    RPC = "rpc"
    WALK = "walk"


@dataclass(frozen=True)
class LayerTotals:
    """What one layer side has cost so far, for Status."""

    dispatches: Mapping[str, int]
    """By mode."""
    compute_s: float
    overhead_s: float
    queue_s: float
    """In the service before the kernel began; a part of `overhead_s`."""

    @property
    def count(self) -> int:
        """Dispatches in all modes."""
        return sum(self.dispatches.values())


Point = tuple[Role, int, Kind]
"""One side of one layer of one role."""


@dataclass(frozen=True)
class Prepared:
    """One layer side, resolved for steps of a fixed number of rows on one lane."""

    point: Point
    index: int
    """Its place in the service's order."""
    row: int
    """In the table of layers."""
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
        streams: this process's work on the device; None: of the store's device, if that is a GPU and a
            service is another process.
    """

    def __init__(
        self,
        store: Store,
        links: Mapping[Kind, Link],
        dispatch: Dispatch,
        metrics: ProcessMetrics,
        cell: str = "cell",
        plan_options: Mapping[str, str] | None = None,
        streams: Streams | None = None,
    ) -> None:
        self.store = store
        self.links = links
        self.dispatch = dispatch
        self.metrics = metrics
        self.epoch = 0
        self.cell = cell
        self.observer: StepObserver | None = None
        self.descriptions: dict[Kind, pb.DescribeResponse] = {}
        self.plan_options = dict(plan_options or {})
        self._ignored: set[tuple[Kind, str]] = set()
        self._walks: dict[Kind, Walk] = {}
        self._specs: dict[tuple[Role, int], LayerSpec] = {}
        self._rows: dict[Point, int] = {}
        self._handovers: dict[Kind, Handover] = {}
        self._kept: dict[Kind, Kept] = {}
        remote = any(link.remote for link in links.values())
        self.streams = streams_for(store.device, own=False) if streams is None and remote else streams
        self._prepared: dict[tuple[Role, int, int], dict[tuple[int, Kind], Prepared]] = {}
        self._tickets: dict[tuple[Role, int, int, Kind], pb.OpenStep] = {}
        self._sides: dict[Role, list[Kind]] = {}
        for role, plan in store.plans.items():
            begins = sorted(
                (plan.side(side)[0].layer_id, at) for at, side in enumerate(SIDES) if plan.side(side)
            )
            self._sides[role] = [SIDES[at] for _, at in begins]
            for spec in plan:
                self._specs[role, spec.layer_id] = spec
            for side in SIDES:
                for spec in plan.side(side):
                    self._rows[role, spec.layer_id, side] = metrics.layers.row(role, spec, side)

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
            accepted[kind] = link.configure(self.store.configure_request(kind, self.epoch, self.cell))
        for role, plan in self.store.plans.items():
            check_coverage(plan, {kind: _accepted(answer, role) for kind, answer in accepted.items()})
        self.metrics.epoch.set(self.epoch)

    def begin(self, batch: Batch) -> Step:
        """Plan a batch with the services that have layers of its role.

        Raises:
            PlanMismatch: a plan does not cover the batch.
            BraidError: a service refused the batch, or was lost.
        """
        (step,) = self.open([batch])
        step.opening.settle()
        return step

    def open(self, lanes: Sequence[Batch]) -> tuple[Step, ...]:
        """As `begin`, for the batches of one or two lanes, without waiting for the services' answers.

        The first `take` of a step waits for them, so that services plan while the body begins.
        """
        opening = Opening(self, lanes)
        return tuple(Step(self, batch, opening) for batch in lanes)

    def sides(self, role: Role) -> list[Kind]:
        """The services that have layers of a role, in the order in which they are first needed."""
        return list(self._sides[role])

    def announce(self, role: Role) -> None:
        """Let the service of a role's first layer wake up: a step will be opened soon."""
        for kind in self._sides[role][:1]:
            handover = self._handovers.get(kind)
            if handover is not None:
                handover.announce_step()

    def abort(self) -> None:
        """End the epoch: whatever a service still does for an older step counts no more."""
        self.epoch += 1
        self.metrics.epoch.set(self.epoch)
        self._forget_walks()

    def close(self) -> None:
        """Let go of the services; those that have mapped memory of a device give it up first."""
        self._forget_walks()
        self.metrics.layers.count()  # what waits for it keeps buffers alive
        if self.store.device.type != "cpu":
            self._unmap()
        for link in self.links.values():
            link.close()

    def _unmap(self) -> None:
        """Have both services forget every arena: its owner must not free what a peer has still mapped."""
        self.epoch += 1
        for kind, link in self.links.items():
            try:
                link.configure(self.store.empty_request(self.epoch, self.cell))
            except BraidError as error:  # one that is gone has nothing mapped
                log.info("the %s service did not give its memory up: %s", kind.value, error.message)

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
            self._kept[kind] = Kept()
            if self.links[kind].remote and self.descriptions[kind].doorbells and doorbell.available():
                walk, order = self._walks[kind], None
                if self.streams is not None:
                    offered = self.descriptions[kind].device_handovers
                    order = DeviceOrder.between(self.streams, offered)
                self._handovers[kind] = Handover(self.store, kind, walk, _LAYER_TIMEOUT_S, order)
        return self._walks[kind]

    def kept(self, kind: Kind) -> Kept:
        """What the service at the end of an open stream keeps."""
        return self._kept[kind]

    def handover(self, kind: Kind) -> Handover | None:
        """The doorbells of the open stream to a service; None where layers go by messages."""
        return self._handovers.get(kind)

    def prepared(self, role: Role, rows: int, lane: int = 0) -> dict[tuple[int, Kind], Prepared]:
        """(layer id, side) → what a step of so many rows on a lane needs of it, in plan order."""
        key = (role, rows, lane)
        if key not in self._prepared:
            if len(self._prepared) >= _PREPARED_SETS:
                self._prepared.pop(next(iter(self._prepared)))
            self._prepared[key] = {
                (spec.layer_id, side): self._prepare(role, spec, side, index, rows, lane)
                for side in SIDES
                for index, spec in enumerate(self.store.plans[role].side(side))
            }
        return self._prepared[key]

    def tickets(self, batch: Batch, side: Kind) -> pb.OpenStep:
        """The tickets of one service for a batch; not to be changed."""
        key = batch.role, batch.num_tokens, batch.lane, side
        if key not in self._tickets:
            if len(self._tickets) >= 2 * _PREPARED_SETS:
                self._tickets.pop(next(iter(self._tickets)))
            layers = self.prepared(batch.role, batch.num_tokens, batch.lane)
            tickets = [layer.ticket for (_, at), layer in layers.items() if at is side]
            self._tickets[key] = pb.OpenStep(tickets=tickets)
        return self._tickets[key]

    @property
    def totals(self) -> dict[Point, LayerTotals]:
        """What each layer side has cost so far."""
        table, found = self.metrics.layers, {}
        for point, row in self._rows.items():
            seconds = table.seconds(row)
            found[point] = LayerTotals(
                table.dispatches(row), seconds["compute"], seconds["hop"], seconds["queue"]
            )
        return found

    def record(self, step: Step, finished: int) -> None:
        """Count the layers of one lane of a step, and tell whoever looks.

        Args:
            step: all its layers have run.
            finished: CLOCK_MONOTONIC, nanoseconds.
        """
        ran = step.ran()
        if self.metrics.recording:
            self.metrics.layers.note(step.batch.mode, ran)
        if self.observer is not None:
            self.observer(step.times(ran, finished))

    def note_ignored(self, side: Kind, options: Iterable[str]) -> None:
        """Log each plan option that a service does not have, the first time that it says so."""
        for option in options:
            if (side, option) not in self._ignored:
                self._ignored.add((side, option))
                log.info("the %s service has no plan option %s", self.links[side].name, option)

    def _prepare(self, role: Role, spec: LayerSpec, side: Kind, index: int, rows: int, lane: int) -> Prepared:
        buffers = self.store.buffers(spec, side, rows, lane)
        ticket = pb.Ticket(
            layer_id=spec.layer_id,
            inputs={name: self.store.view(tensor) for name, tensor in buffers.inputs.items()},
            output=self.store.view(buffers.output),
        )
        point = role, spec.layer_id, side
        return Prepared(point, index, self._rows[point], ticket, buffers.inputs, buffers.output)

    def _forget_walks(self) -> None:
        walks, self._walks = self._walks, {}
        handovers, self._handovers = self._handovers, {}
        self._kept.clear()
        for handover in handovers.values():
            handover.release()
        if self.streams is not None and handovers:
            bells = [bell for handover in handovers.values() for bell in handover.device_bells]
            try:
                self.streams.drain(bells)
            except BraidError as error:
                log.error("the device does not come to rest: %s", error.message)
        for walk in walks.values():
            walk.close()


# Decode steps differ in their number of rows as requests come and go; this many sets are kept.
_PREPARED_SETS = 128
_LAYER_TIMEOUT_S = 120.0


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


@dataclass
class _Stamps:
    """When the orchestrator handed a layer over, waited for it and had it; of a message, the rest too."""

    posted_ns: int
    waited_ns: int = 0
    taken_ns: int = 0
    timing: common_pb2.Timing | None = None


class Step:
    """One lane's walk of a batch through all layers of its role."""

    def __init__(self, dispatcher: Dispatcher, batch: Batch, opening: Opening) -> None:
        self.batch = batch
        self.opening = opening
        self._dispatcher = dispatcher
        self._layers = dispatcher.prepared(batch.role, batch.num_tokens, batch.lane)
        self._next = dict.fromkeys((side for _, side in self._layers), 0)
        self._ran: dict[tuple[int, Kind], _Stamps] = {}
        self._began = time.monotonic_ns()

    @property
    def summaries(self) -> Mapping[Kind, pb.PlanSummary]:
        """What each service planned."""
        return self.opening.summaries[self.batch.lane]

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
        self._post(layer)
        self._take(layer)
        return layer.output

    def run(self, layer_id: int, side: Kind | None = None) -> common_pb2.Timing:
        """As `attend`, for a layer whose input buffers are written already; when it ran."""
        layer = self._layer(layer_id, side)
        self._post(layer)
        self._take(layer)
        self.arrive()
        rung = {side: times.tolist() for side, times in self._rung().items()}
        received, started, finished = _times(self._ran[layer.point[1:]], layer, rung)
        return common_pb2.Timing(received_ns=received, started_ns=started, finished_ns=finished)

    def announce(self, layer_id: int, side: Kind) -> None:
        """Let the service of a layer that will be posted soon wake up by then."""
        handover = self._dispatcher.handover(side)
        if handover is not None:
            handover.announce(self._layers[layer_id, side].index, self.batch.lane)

    def announce_next(self) -> None:
        """Let the service that the next step begins with wake up: this one is nearly over."""
        self._dispatcher.announce(self.batch.role)

    def post(self, layer_id: int, side: Kind) -> None:
        """Hand a layer over whose input buffers are written; `take` waits for it. Raises as `attend`."""
        self._post(self._layer(layer_id, side))

    def take(self, layer_id: int, side: Kind) -> None:
        """Wait until the output buffer of a layer that was posted is written. Raises as `attend`."""
        self._take(self._layers[layer_id, side])

    def arrive(self) -> None:
        """Wait until the device has run the step, and see what has gone wrong; on a CPU nothing is left.

        Raises:
            BraidError: why the step failed, or that a service was lost.
        """
        for side in self._next:
            handover = self._dispatcher.handover(side)
            if handover is not None:
                handover.arrive()

    def finish(self) -> None:
        """Close the step and count its layers.

        Raises:
            StepOrder: a layer of the plan has not run.
        """
        if len(self._ran) != len(self._layers):
            left = [f"{side.value} {layer_id}" for layer_id, side in self._layers.keys() - self._ran.keys()]
            raise StepOrder(f"the step ends but layers have not run: {', '.join(sorted(left))}")
        self.opening.settle()  # of a service without layers here nobody has waited
        for side in self._next:
            handover = self._dispatcher.handover(side)
            if handover is not None:
                handover.settle()
        finished = time.monotonic_ns()
        batch = self.batch
        self._dispatcher.record(self, finished)
        if self._dispatcher.dispatch is Dispatch.WALK:
            close = pb.WalkRequest(close=pb.CloseStep(step=batch.step, lane=batch.lane))
            for side in self._next:
                # A step that is handed over by doorbells ends with its last layer.
                if self._dispatcher.handover(side) is None:
                    self._dispatcher.walk(side).send(close)

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

    def _post(self, layer: Prepared) -> None:
        _, layer_id, side = layer.point
        dispatcher, batch = self._dispatcher, self.batch
        self.opening.ask(side)
        stamps = self._ran[layer_id, side] = _Stamps(time.monotonic_ns())
        self._next[side] += 1
        handover = dispatcher.handover(side)
        if handover is None and dispatcher.streams is not None:
            # A message says nothing of streams: what it announces must be there.
            dispatcher.streams.finish(lambda: None, _LAYER_TIMEOUT_S)
        if handover is not None:
            handover.post(layer.index, batch.lane)
            self.opening.proceed()
        elif dispatcher.dispatch is Dispatch.WALK:
            self.opening.settle(side)  # a stream's answers come in order
            run = pb.RunTicket(step=batch.step, lane=batch.lane, index=layer.index)
            dispatcher.walk(side).send(pb.WalkRequest(run=run))
        else:
            self.opening.settle(side)
            request = pb.AttendRequest(
                role=convert.ROLES[batch.role],
                epoch=batch.epoch,
                step=batch.step,
                lane=batch.lane,
                ticket=layer.ticket,
            )
            stamps.timing = dispatcher.links[side].attend(request).timing
            # A call is waited for from its beginning on, whatever is asked for behind it.
            stamps.waited_ns, stamps.taken_ns = stamps.posted_ns, time.monotonic_ns()

    def _take(self, layer: Prepared) -> None:
        _, layer_id, side = layer.point
        dispatcher, batch = self._dispatcher, self.batch
        stamps = self._ran[layer_id, side]
        if stamps.timing is not None:
            return  # the answer of a call is here
        self.opening.settle(side)
        stamps.waited_ns = time.monotonic_ns()
        handover = dispatcher.handover(side)
        if handover is not None:
            handover.take(layer.index, batch.lane)
        elif dispatcher.dispatch is Dispatch.WALK:
            answer = dispatcher.walk(side).receive()
            if answer.step != batch.step or answer.lane != batch.lane or answer.done.index != layer.index:
                raise StepOrder(f"the {side.value} service answered for step {answer.step}, not {batch.step}")
            stamps.timing = answer.done.timing
        stamps.taken_ns = time.monotonic_ns()

    def ran(self) -> Ran:
        """When the layers that have run did so; only before the service's next step."""
        return Ran(self._ran, self._layers, self._rung(), self._streamed())

    def times(self, ran: Ran, finished: int) -> StepTimes:
        """The step, as an observer is told."""
        batch = self.batch
        layers = ran.times(batch.lane)
        return StepTimes(
            batch.role, batch.step, batch.lane, batch.mode, batch.num_tokens, self._began, finished, layers
        )

    def _rung(self) -> dict[Kind, IntArray]:
        """The times of the layers that were handed over by doorbells, by service."""
        found = {}
        for side in self._next:
            handover = self._dispatcher.handover(side)
            if handover is not None:
                found[side] = handover.times(self.batch.lane)
        return found

    def _streamed(self) -> dict[Kind, Mapping[int, tuple[int, int]]]:
        """When this process's stream handed layers over and had their outputs, by service and index."""
        if self._dispatcher.streams is None:
            return {}
        handovers = {side: self._dispatcher.handover(side) for side in self._next}
        lane = self.batch.lane
        return {side: one.device_stamps(lane) for side, one in handovers.items() if one is not None}


@dataclass(frozen=True)
class Ran:
    """When the layers of a step ran; called, it is a record for the table of layers."""

    stamps: Mapping[tuple[int, Kind], _Stamps]
    prepared: Mapping[tuple[int, Kind], Prepared]
    rung: Mapping[Kind, IntArray]
    streamed: Mapping[Kind, Mapping[int, tuple[int, int]]]
    """Of layers that streams handed over."""

    def __call__(self) -> tuple[list[int], list[tuple[int, ...]]]:
        rows, stamps = list[int](), list[tuple[int, ...]]()
        rung = {side: times.tolist() for side, times in self.rung.items()}
        for key, found in self.stamps.items():
            layer = self.prepared[key]
            its = _times(found, layer, rung)
            device = self.streamed.get(layer.point[2], {}).get(layer.index)
            rows.append(layer.row)
            if device is not None:
                stamps.append(_on_device(device, its))
            else:
                stamps.append((found.posted_ns, found.waited_ns, found.taken_ns, *its))
        return rows, stamps

    def times(self, lane: int) -> tuple[LayerTimes, ...]:
        """Each layer, as an observer is told."""
        layers = []
        for key, (posted, waited, taken, *its) in zip(self.stamps, self()[1], strict=True):
            received, started, ended = its
            point = self.prepared[key].point
            layers.append(LayerTimes(*point, lane, posted, received, started, ended, waited, taken))
        return tuple(layers)


def _times(
    found: _Stamps, layer: Prepared, rung: Mapping[Kind, Sequence[Sequence[int]]]
) -> tuple[int, int, int]:
    """When the service received, started and finished a layer, nanoseconds of CLOCK_MONOTONIC."""
    if found.timing is not None:
        return found.timing.received_ns, found.timing.started_ns, found.timing.finished_ns
    _, layer_id, side = layer.point
    if side not in rung:
        raise StepOrder(f"layer {layer_id} ({side.value}) has no times: its walk has ended")
    received, started, finished = rung[side][layer.index]
    return received, started, finished


def _on_device(stamps: tuple[int, int], its: tuple[int, int, int]) -> tuple[int, ...]:
    """Posted, waited, taken, received, started and finished of a layer that streams handed over.

    Both sides' streams were timed by themselves: their differences are exact, and against each other they
    may be off by what it took a process to notice that its stream had ended.
    """
    (posted, taken), (_, started, finished) = stamps, its
    compute = finished - started
    began = max(min(started, taken - compute), posted)
    return posted, posted, taken, began, began, began + compute


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
