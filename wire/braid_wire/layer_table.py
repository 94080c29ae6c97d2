"""What layers have cost: dispatches and times of each, for `/metrics` and Status.

A step leaves one record of raw time stamps here, which costs an append. Counts and histograms are
worked out of many records at once, when somebody reads them or enough have come together, so that a
layer's bookkeeping stays far below a microsecond.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from braid_wire.layers import Kind, LayerSpec, Role

Stamps = npt.NDArray[np.int64]
"""int64 [layers, k]: nanoseconds of CLOCK_MONOTONIC."""

Noted = Callable[[], tuple[Sequence[int], Sequence[Sequence[int]]]]
"""Rows and stamps of layers that ran, worked out when they are counted."""

PhasesOf = Callable[[Stamps], npt.NDArray[np.int64]]
"""[layers, k] → [layers, phases], nanoseconds."""

MODES = ("extend", "decode", "verify", "mixed")

_LAYER = ("role", "layer_id", "kind", "mechanism")
_MODE_INDEX = {mode: index for index, mode in enumerate(MODES)}
# Records that may wait: few enough that counting them is no pause that anybody notices.
_MOST_WAITING = 16


class LayerTable(Collector):
    """Dispatches and times of every layer of one process.

    Args:
        phases: names of the times that this process measures of a layer.
        phases_of: works them out of the stamps in a record.
        published: how many of them `/metrics` has, from the first on.
        buckets: upper bounds of the histogram, seconds, growing.
    """

    def __init__(
        self, phases: Sequence[str], phases_of: PhasesOf, published: int, buckets: Sequence[float]
    ) -> None:
        self.phases = tuple(phases)
        self._phases_of = phases_of
        self._published = published
        self._bounds_ns = np.rint(np.array(buckets) * 1e9)
        self._le = [*(floatToGoString(bound) for bound in buckets), "+Inf"]
        self._rows: dict[tuple[Role, int, Kind], int] = {}
        self._labels: list[tuple[str, str, str, str]] = []
        self._dispatches = np.zeros((0, len(MODES)), dtype=np.int64)
        self._counts = np.zeros((0, len(self.phases), len(self._le)), dtype=np.int64)
        self._sums_ns = np.zeros((0, len(self.phases)), dtype=np.int64)
        self._waiting: deque[tuple[str, Noted]] = deque()
        self._lock = threading.Lock()

    def row(self, role: Role, spec: LayerSpec, side: Kind) -> int:
        """The number of one side of one layer; the same one whenever it is asked for."""
        key = role, spec.layer_id, side
        with self._lock:
            found = self._rows.get(key)
            if found is None:
                found = self._rows[key] = len(self._labels)
                self._labels.append(
                    (role.value, str(spec.layer_id), side.value, spec.geometry(side).mechanism)
                )
                self._dispatches = _grown(self._dispatches)
                self._counts = _grown(self._counts)
                self._sums_ns = _grown(self._sums_ns)
            return found

    def note(self, mode: str, noted: Noted) -> None:
        """Record layers that ran.

        Args:
            mode: of all their sequences, or "mixed".
            noted: called once, later and from any thread: the row and the k stamps of each layer.
        """
        self._waiting.append((mode, noted))
        if len(self._waiting) >= _MOST_WAITING:
            self.count()

    def count(self) -> None:
        """Count the records that wait."""
        with self._lock:
            ids, modes, times = list[int](), list[int](), list[Sequence[int]]()
            while self._waiting:
                mode, noted = self._waiting.popleft()
                ran, its = noted()
                ids += ran
                modes += [_MODE_INDEX[mode]] * len(ran)
                times += its
            if not ids:
                return
            rows, stamps = np.array(ids), np.array(times, dtype=np.int64)
            elapsed = self._phases_of(stamps)
            np.add.at(self._dispatches, (rows, np.array(modes)), 1)
            np.add.at(self._sums_ns, rows, elapsed)
            buckets = np.searchsorted(self._bounds_ns, elapsed)
            for phase in range(len(self.phases)):
                np.add.at(self._counts[:, phase], (rows, buckets[:, phase]), 1)

    def dispatches(self, row: int) -> dict[str, int]:
        """Mode → dispatches so far, of the modes that a layer has run in."""
        self.count()
        return {mode: int(n) for mode, n in zip(MODES, self._dispatches[row], strict=True) if n}

    def seconds(self, row: int) -> Mapping[str, float]:
        """Phase → seconds so far."""
        self.count()
        return dict(zip(self.phases, (self._sums_ns[row] * 1e-9).tolist(), strict=True))

    def collect(self) -> Iterator[CounterMetricFamily | HistogramMetricFamily]:
        self.count()
        with self._lock:
            labels = list(self._labels)
            dispatches, sums = self._dispatches.tolist(), (self._sums_ns * 1e-9).tolist()
            counts = self._counts.cumsum(axis=2).tolist()
        dispatched = CounterMetricFamily(
            "braid_layer_dispatch", "Layers dispatched.", labels=(*_LAYER, "mode")
        )
        seconds = HistogramMetricFamily(
            "braid_layer_seconds",
            "Time of a layer: queue (waiting in the service), compute (in the kernel), hop (the rest).",
            labels=(*_LAYER, "phase"),
        )
        for row, layer in enumerate(labels):
            for mode, n in zip(MODES, dispatches[row], strict=True):
                dispatched.add_metric((*layer, mode), n)
            for phase, name in enumerate(self.phases[: self._published]):
                buckets = list(zip(self._le, counts[row][phase], strict=True))
                seconds.add_metric((*layer, name), buckets, sums[row][phase])
        yield dispatched
        yield seconds


def _grown(table: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """With one more row of zeros."""
    return np.concatenate([table, np.zeros((1, *table.shape[1:]), dtype=table.dtype)])
