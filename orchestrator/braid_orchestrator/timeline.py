"""Steps as a Chrome trace, for ui.perfetto.dev: who computed, who waited and what a hop cost.

Each process has its tracks, one for each lane. All times are of one clock, so that slices of
different processes can be compared; an arrow leads from the orchestrator's ring to the service's
kernel and back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from braid_wire.layers import Kind, LayerPlan, Role

from braid_orchestrator.timings import LayerTimes, StepTimes

Event = dict[str, Any]

_NS_PER_US = 1000


@dataclass(frozen=True)
class Processes:
    """The three processes of a cell, by process id."""

    orchestrator: int
    services: Mapping[Kind, int]


@dataclass(frozen=True)
class _Track:
    """Where slices go: a process, and a line in it."""

    pid: int
    tid: int

    def slice(self, name: str, category: str, begin: int, end: int, args: Mapping[str, Any]) -> Event:
        """What lasted from `begin` to `end`, nanoseconds behind the trace's zero."""
        return {
            "name": name,
            "cat": category,
            "ph": "X",
            "pid": self.pid,
            "tid": self.tid,
            "ts": begin / _NS_PER_US,
            "dur": (end - begin) / _NS_PER_US,
            "args": dict(args),
        }


class Timeline:
    """Collects steps; `add` is a step observer of the dispatcher.

    Args:
        plans: the layers of each role.
        processes: who ran them.
    """

    def __init__(self, plans: Mapping[Role, LayerPlan], processes: Processes) -> None:
        self._plans = plans
        self._processes = processes
        self._steps: list[StepTimes] = []

    def add(self, times: StepTimes) -> None:
        """One lane of a step."""
        self._steps.append(times)

    def to_json(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """The trace in the Trace Event Format; times begin at the first step.

        Args:
            about: kept beside the events.
        """
        zero = min((step.began_ns for step in self._steps), default=0)
        events = list(self._names())
        arrows = count(1)
        for lanes in self._whole_steps():
            for lane in lanes:
                others = [layer for other in lanes if other is not lane for layer in other.layers]
                events += self._lane(lane, others, zero, arrows)
        return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": dict(about)}

    def shares(self) -> dict[str, float]:
        """Seconds of all steps, and of them in the body and in waiting for layers.

        Beside them those of all kernels and hops, which in two lanes run while the body does.
        """
        layers = [layer for step in self._steps for layer in step.layers]
        whole = sum(
            max(lane.finished_ns for lane in lanes) - min(lane.began_ns for lane in lanes)
            for lanes in self._whole_steps()
        )
        waits = sum(layer.taken_ns - layer.waited_ns for layer in layers)
        found = {
            "steps": whole,
            "body": whole - waits,
            "waits": waits,
            "kernels": sum(layer.compute_ns for layer in layers),
            "hops": sum(layer.hop_ns for layer in layers),
        }
        return {name: nanoseconds * 1e-9 for name, nanoseconds in found.items()}

    def _whole_steps(self) -> list[list[StepTimes]]:
        """Each step's lanes."""
        found: dict[tuple[Role, int], list[StepTimes]] = {}
        for step in self._steps:
            found.setdefault((step.role, step.step), []).append(step)
        return list(found.values())

    def _names(self) -> Iterator[Event]:
        """What the viewer calls processes and their tracks, and in which order it shows them."""
        named = {self._processes.orchestrator: "orchestrator"}
        named |= {pid: f"{kind.value}-attention service" for kind, pid in self._processes.services.items()}
        lanes = sorted({step.lane for step in self._steps})
        for order, (pid, name) in enumerate(named.items()):
            yield _metadata("process_name", pid, 0, {"name": name})
            yield _metadata("process_sort_index", pid, 0, {"sort_index": order})
            for lane in lanes:
                track = _track(pid, lane)
                yield _metadata("thread_name", pid, track.tid, {"name": f"lane {lane}"})

    def _lane(
        self, step: StepTimes, others: Sequence[LayerTimes], zero: int, arrows: Iterator[int]
    ) -> Iterator[Event]:
        """The orchestrator's track first: the step, in it the body and the waits for its layers.

        Args:
            step: one lane of it.
            others: the layers of its other lane, which the body runs meanwhile.
            zero: what all times count from.
            arrows: their numbers.
        """
        track = _track(self._processes.orchestrator, step.lane)
        about: dict[str, Any] = {
            "role": step.role.value,
            "step": step.step,
            "lane": step.lane,
            "mode": step.mode,
            "num_tokens": step.num_tokens,
        }
        yield track.slice(f"{step.mode} step", "step", step.began_ns - zero, step.finished_ns - zero, about)
        taken, before = step.began_ns, None
        # A layer may be posted before an earlier one is taken; the body waits for one at a time.
        for layer in sorted(step.layers, key=lambda layer: layer.waited_ns):
            args = {**about, "after_layer": before, "before_layer": layer.layer_id}
            begin = max([taken, *(one.posted_ns for one in others if one.posted_ns < layer.posted_ns)])
            if layer.posted_ns > begin:
                yield track.slice("body", "body", begin - zero, layer.posted_ns - zero, args)
            # A body that has no other lane waits from the moment that it has handed the layer over.
            waited = layer.waited_ns if others else max(layer.posted_ns, taken)
            args = {**about, **self._facts(layer)}
            yield from self._layer(track, layer, waited - zero, zero, args, arrows)
            taken, before = layer.taken_ns, layer.layer_id
        args = {**about, "after_layer": before, "before_layer": None}
        end = min([step.finished_ns, *(one.waited_ns for one in others if one.waited_ns > taken)])
        yield track.slice("body", "body", taken - zero, end - zero, args)

    def _facts(self, layer: LayerTimes) -> dict[str, Any]:
        """What a slice of a layer says of it."""
        spec = self._plans[layer.role].layer(layer.layer_id)
        return {
            "layer_id": layer.layer_id,
            "kind": spec.kind.value,
            "side": layer.side.value,
            "mechanism": spec.geometry(layer.side).mechanism,
            "queue_us": (layer.started_ns - layer.received_ns) / _NS_PER_US,
            "compute_us": layer.compute_ns / _NS_PER_US,
            "hop_us": layer.hop_ns / _NS_PER_US,
        }

    def _layer(
        self,
        track: _Track,
        layer: LayerTimes,
        waited: int,
        zero: int,
        args: Mapping[str, Any],
        arrows: Iterator[int],
    ) -> Iterator[Event]:
        """A layer on both tracks: the orchestrator's wait, the service's queue and kernel."""
        service = _track(self._processes.services[layer.side], layer.lane)
        posted, received = layer.posted_ns - zero, layer.received_ns - zero
        started, finished = layer.started_ns - zero, layer.finished_ns - zero
        taken = layer.taken_ns - zero
        name = f"layer {layer.layer_id} {args['mechanism']}"
        yield track.slice(name, "wait", waited, taken, args)
        if started > waited:
            yield track.slice("hop", "hop", waited, started, args)
        back = max(waited, finished)
        yield track.slice("hop", "hop", back, taken, args)
        yield service.slice(name, "layer", received, finished, args)
        yield service.slice("queue", "queue", received, started, args)
        yield service.slice("compute", "compute", started, finished, args)
        # A nanosecond inside, so that the ends lie on slices.
        yield from _arrow(next(arrows), (track, posted - 1), (service, received))
        yield from _arrow(next(arrows), (service, finished - 1), (track, taken - 1))


def _track(pid: int, lane: int) -> _Track:
    """A lane's line in a process."""
    return _Track(pid, lane + 1)


def _metadata(name: str, pid: int, tid: int, args: Mapping[str, Any]) -> Event:
    return {"name": name, "ph": "M", "pid": pid, "tid": tid, "args": dict(args)}


def _arrow(number: int, tail: tuple[_Track, int], head: tuple[_Track, int]) -> Iterator[Event]:
    """From a moment on one track to a moment on another."""
    for (track, at), end in ((tail, {"ph": "s"}), (head, {"ph": "f", "bp": "e"})):
        yield {
            "name": "handover",
            "cat": "handover",
            "id": number,
            "pid": track.pid,
            "tid": track.tid,
            "ts": at / _NS_PER_US,
            **end,
        }
