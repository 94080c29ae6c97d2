"""What the page shows, read from what a cell counts anyway: JSON that grows with its layers alone."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from braid_wire.errors import BraidError
from braid_wire.layers import Kind, LayerSpec

from braid_orchestrator.cell import Cell
from braid_orchestrator.dispatch import SIDES, Point
from braid_orchestrator.dispatcher import LayerTotals
from braid_orchestrator.page.windows import Percentiles, count_of
from braid_orchestrator.plan_view import short_geometry

MOST_REQUESTS = 24
"""Requests that are shown; the oldest."""

_WINDOW_FRAMES = 30
_PROBE_EVERY = 3
_PROBE_S = 0.5
_MICROSECONDS = 1e6

Json = dict[str, Any]


@dataclass(frozen=True)
class _Reading:
    """One layer side's totals at a moment."""

    count: int
    compute_s: float
    overhead_s: float
    queue_s: float

    @classmethod
    def of(cls, totals: LayerTotals) -> _Reading:
        return cls(totals.count, totals.compute_s, totals.overhead_s, totals.queue_s)

    def means(self, before: _Reading | None) -> Json:
        """Dispatches since `before` and their mean times, in microseconds."""
        earlier = before or _Reading(0, 0.0, 0.0, 0.0)
        count = self.count - earlier.count
        scale = _MICROSECONDS / max(count, 1)
        return {
            "count": count,
            "compute": round((self.compute_s - earlier.compute_s) * scale, 2),
            "hop": round((self.overhead_s - earlier.overhead_s) * scale, 2),
            "queue": round((self.queue_s - earlier.queue_s) * scale, 2),
        }


class Snapshots:
    """Reads a cell.

    Args:
        cell: that is shown.
    """

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._began = time.monotonic()
        self._layers: dict[Point, _Reading] = {}
        self._counters: tuple[float, dict[str, float]] | None = None
        self._services: list[Json] = []
        self._probed: tuple[int, int] | None = None
        self._frames = 0
        metrics = cell.metrics
        self._percentiles = {
            "first_token": Percentiles(metrics.time_to_first, _WINDOW_FRAMES),
            "inter_token": Percentiles(metrics.inter_token, _WINDOW_FRAMES),
            "queue": Percentiles(metrics.queue_seconds, _WINDOW_FRAMES),
        }

    def description(self) -> Json:
        """What stays the same: the model, its layers, the limits."""
        cell, options = self._cell, self._cell.options
        return {
            "model": cell.model.name,
            "family": cell.plans.family,
            "version": metadata.version("braid-attention"),
            "dtype": str(options.dtype).removeprefix("torch."),
            "state_dtype": str(options.state_dtype).removeprefix("torch."),
            "dispatch": options.dispatch.value,
            "pid": os.getpid(),
            "limits": {
                **asdict(options.limits),
                "max_waiting": cell.engine.max_waiting,
                "speculative": options.speculative,
            },
            "roles": [
                {"role": role.value, "layers": [_layer(spec) for spec in plan]}
                for role, plan in cell.store.plans.items()
            ],
        }

    def restart(self) -> None:
        """Forget the frames so far: the next one tells of everything since the cell began."""
        self._layers.clear()
        self._counters = None
        self._frames = 0

    def frame(self) -> Json:
        """What is now, and what happened since the frame before."""
        cell = self._cell
        load, requests = cell.engine.in_hand(MOST_REQUESTS)
        state, epoch, replays = self._state(), cell.dispatcher.epoch, cell.walker.replays
        if self._services_may_have_changed(state, (epoch, replays)):
            self._services = [self._service(kind) for kind in cell.dispatcher.links]
        self._frames += 1
        return {
            "time": time.time(),
            "uptime": time.monotonic() - self._began,
            "state": state,
            "epoch": epoch,
            "replays": replays,
            "steps": cell.walker.steps,
            "preemptions": cell.engine.preemptions,
            **self._rates(),
            "latency": {name: found.read((0.5, 0.95)) for name, found in self._percentiles.items()},
            "layers": self._layer_frames(),
            "pools": self._pools(),
            "prefix": self._prefix(),
            "drafts": self._drafts(),
            "running": load.running,
            "waiting": load.waiting,
            "requests": [asdict(request) for request in requests],
            "errors": [asdict(error) for error in cell.metrics.errors.newest_first()],
            "services": self._services,
        }

    def _services_may_have_changed(self, state: str, recoveries: tuple[int, int]) -> bool:
        """Whether services are asked anew: now and then, and around a recovery with every frame.

        The cell's own state is read before they are asked. So a frame never tells of a recovery that is
        done and, next to it, of the process from before it.
        """
        before, self._probed = self._probed, recoveries
        unsure = state == "recovering" or any(service["state"] != "ready" for service in self._services)
        return unsure or recoveries != before or self._frames % _PROBE_EVERY == 0

    def _state(self) -> str:
        if self._cell.engine.draining:
            return "draining"
        return "recovering" if self._cell.walker.recovering else "serving"

    def _rates(self) -> Json:
        """Of each counter, its value and how fast it grew since the frame before."""
        metrics = self._cell.metrics
        now = time.monotonic()
        values = {
            "steps": float(self._cell.walker.steps),
            "generated_tokens": count_of(metrics.generated_tokens),
            "prompt_tokens": count_of(metrics.prompt_tokens),
            "finished": count_of(metrics.finished),
        }
        before, self._counters = self._counters, (now, values)
        if before is None:
            return {"totals": values, "rates": None, "elapsed": None}
        then, earlier = before
        elapsed = max(now - then, 1e-6)
        rates = {name: (value - earlier[name]) / elapsed for name, value in values.items()}
        return {"totals": values, "rates": rates, "elapsed": elapsed}

    def _layer_frames(self) -> list[Json]:
        frames = []
        for point, totals in self._cell.dispatcher.totals.items():
            role, layer_id, side = point
            before, now = self._layers.get(point), _Reading.of(totals)
            self._layers[point] = now
            frames.append(
                {
                    "role": role.value,
                    "id": layer_id,
                    "side": side.value,
                    "modes": dict(totals.dispatches),
                    **now.means(before),
                }
            )
        return frames

    def _pools(self) -> list[Json]:
        return [
            {
                "role": role.value,
                "name": pool.name,
                "used": pool.used,
                "cached": pool.cached,
                "total": pool.total,
                "unit_bytes": pool.unit_bytes,
            }
            for role, memory in self._cell.store.memory.items()
            for pool in (memory.pages, memory.slots)
            if pool is not None
        ]

    def _prefix(self) -> Json | None:
        stats = self._cell.engine.prefix_stats
        return None if stats is None else asdict(stats)

    def _drafts(self) -> Json | None:
        if not self._cell.options.speculative:
            return None
        metrics = self._cell.metrics
        return {
            "accepted": count_of(metrics.accepted_tokens),
            "rejected": count_of(metrics.rejected_tokens),
        }

    def _service(self, kind: Kind) -> Json:
        """Whether a service answers, and who it is."""
        link, known = self._cell.dispatcher.links[kind], self._cell.dispatcher.descriptions.get(kind)
        found: Json = {"name": link.name, "address": link.address, "pid": known.pid if known else 0}
        try:
            said = link.describe(_PROBE_S)
        except BraidError as error:
            return {**found, "state": "lost", "why": error.message, "backend": known.backend if known else ""}
        state = "ready" if said.epoch > 0 else "unconfigured"
        return {**found, "pid": said.pid, "state": state, "why": "", "backend": said.backend}


def _layer(spec: LayerSpec) -> Json:
    return {"id": spec.layer_id, "kind": spec.kind.value, "sides": _sides(spec)}


def _sides(spec: LayerSpec) -> list[Mapping[str, str]]:
    geometries = {Kind.FULL: spec.full, Kind.LINEAR: spec.linear}
    return [
        {"side": side.value, "mechanism": geometry.mechanism, "shape": short_geometry(geometry)}
        for side in SIDES
        if (geometry := geometries[side]) is not None
    ]
