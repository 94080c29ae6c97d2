"""One lane's walk through all layers of its role: each handed over, waited for, and timed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from braid.v1 import attention_pb2 as pb
from braid.v1 import common_pb2
from braid_wire import convert
from braid_wire.batch import Batch, IntArray
from braid_wire.errors import StepOrder, ViewInvalid
from braid_wire.layers import Kind, LayerSpec

from braid_orchestrator.dispatch import LAYER_TIMEOUT_S, SIDES, Dispatch, Prepared
from braid_orchestrator.opening import Opening
from braid_orchestrator.timings import LayerTimes, StepTimes

if TYPE_CHECKING:
    from braid_orchestrator.dispatcher import Dispatcher


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
            dispatcher.streams.finish(lambda: None, LAYER_TIMEOUT_S)
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


def _side(spec: LayerSpec, side: Kind | None) -> Kind:
    """The side to run: the named one, or the only one."""
    if side is None:
        if spec.kind is Kind.PARALLEL:
            raise StepOrder(f"layer {spec.layer_id} is PARALLEL; name the side", layer_id=spec.layer_id)
        side = spec.kind if spec.kind in SIDES else Kind.FULL
    spec.geometry(side)  # refuses a side that the layer has not
    return side
