"""Sends each layer of a step to the service that the plan names for it, by `layer_id`.

Nothing here looks at a layer's class, shape or attributes: the plan alone decides, an id that is
not in it is refused, and a step is not over before every layer of the plan has run once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from braid.v1 import attention_pb2 as pb
from braid_wire import convert, doorbell
from braid_wire.batch import Batch
from braid_wire.cuda_doorbell import Streams, streams_for
from braid_wire.errors import (
    BraidError,
    LayerPlanDisputed,
    LayerUnknown,
)
from braid_wire.layers import Kind, LayerPlan, LayerSpec, Role, digest
from braid_wire.metrics import ProcessMetrics

from braid_orchestrator.dispatch import LAYER_TIMEOUT_S, SIDES, Dispatch, Point, Prepared
from braid_orchestrator.handover import DeviceOrder, Handover, Kept
from braid_orchestrator.link import Link, Walk
from braid_orchestrator.opening import Opening
from braid_orchestrator.step import Step
from braid_orchestrator.store import Store
from braid_orchestrator.timings import StepObserver

log = logging.getLogger(__name__)

# Decode steps differ in their number of rows as requests come and go; this many sets are kept.
_PREPARED_SETS = 128


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
                self._handovers[kind] = Handover(self.store, kind, walk, LAYER_TIMEOUT_S, order)
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
