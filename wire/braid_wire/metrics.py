"""Prometheus conventions: names, labels, buckets, and the endpoint of a process.

Every process has a registry of its own and serves it on `/metrics`. Label sets are bounded by the
layer plan.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from http.server import HTTPServer
from itertools import accumulate

import numpy as np
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from braid_wire.errors import BraidError, RequestInvalid, table
from braid_wire.layer_table import MODES, LayerTable, PhasesOf, Stamps

disable_created_metrics()

__all__ = [
    "LATENCY_BUCKETS",
    "MODES",
    "PORTS",
    "TOKEN_BUCKETS",
    "MetricsEndpoint",
    "ProcessMetrics",
    "versions",
]

PORTS = {"orchestrator": 9400, "full": 9401, "linear": 9402}
"""Default port of each process's endpoint."""

LATENCY_BUCKETS = tuple(
    base * scale for scale in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0) for base in (1, 2.5, 5)
)
"""Seconds: from a microsecond to five seconds, three per decade."""

TOKEN_BUCKETS = tuple(float(2**power) for power in range(17))


_Buckets = list[tuple[str, float]]
"""(upper bound, how many values lie at or below it), as the exposition format has them."""


def _in_service(stamps: Stamps) -> Stamps:
    """Of received, started and finished: queue and compute."""
    return np.diff(stamps, axis=1)


def _in_orchestrator(stamps: Stamps) -> Stamps:
    """Of posted, waited, taken, received, started and finished: compute, hop and queue."""
    posted, waited, taken, received, started, finished = stamps.T
    before, after = started - posted, taken - np.maximum(waited, finished)
    hop = np.maximum(before, 0) + np.maximum(after, 0)
    return np.stack([finished - started, hop, np.maximum(started - received, 0)], axis=1)


MEASURED: Mapping[str, tuple[tuple[str, ...], PhasesOf, int]] = {
    "orchestrator": (("compute", "hop", "queue"), _in_orchestrator, 2),
    "full": (("queue", "compute"), _in_service, 2),
    "linear": (("queue", "compute"), _in_service, 2),
}
"""Service → the phases of a layer that it knows, what they follow from, and how many of them `/metrics`
has: the queue of a layer is the service's to tell."""


class ProcessMetrics:
    """The registry of one process and what every process counts.

    Args:
        service: "orchestrator", "full" or "linear".
        version: of Braid, for `braid_build_info`.
    """

    def __init__(self, service: str, version: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._service = service
        self.recording = True
        """Whether steps and layers are counted; off only where that cost is measured."""
        self._refused = Counter(
            "braid_refused",
            "Requests refused, by reason of the error table.",
            ["reason"],
            registry=self.registry,
        )
        for reason in table():
            self._refused.labels(reason)  # a counter that begins with its first event hides it from rates
        info = Gauge(
            "braid_build_info",
            "Always 1; the labels say what runs.",
            ["service", "version"],
            registry=self.registry,
        )
        info.labels(service, version).set(1)
        self._model = Gauge(
            "braid_model_info",
            "Always 1; the labels say which model the process works for.",
            ["service", "model"],
            registry=self.registry,
        )
        self.epoch = Gauge("braid_epoch", "Current epoch; 0: not configured.", registry=self.registry)
        self.plan_seconds = Histogram(
            "braid_plan_seconds",
            "Time to check and plan a batch.",
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.layers = LayerTable(*MEASURED[service], LATENCY_BUCKETS)
        self.registry.register(self.layers)

    def refused(self, error: BraidError) -> None:
        """Count a request that an error ended."""
        self._refused.labels(error.reason).inc()

    def model(self, name: str) -> None:
        """Publish the model that this process works for from now on."""
        self._model.clear()
        self._model.labels(self._service, name).set(1)

    def serve(self, port: int, host: str = "127.0.0.1") -> MetricsEndpoint:
        """Serve `/metrics`; port 0 picks a free one.

        Raises:
            RequestInvalid: the port is taken.
        """
        try:
            server, thread = start_http_server(port, host, self.registry)
        except OSError as error:
            raise RequestInvalid(
                f"metrics port {host}:{port} cannot be used: {error}", field="metrics_port", value=port
            ) from error
        return MetricsEndpoint(server, thread)


class Tally:
    """A histogram that costs a third of the client library's: for what is counted with every token.

    Args:
        bounds: upper bounds of its buckets, ascending; one without bound comes behind them.
    """

    __slots__ = ("_bounds", "_counts", "_lock", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        """Count one value."""
        with self._lock:
            self._counts[bisect_left(self._bounds, value)] += 1
            self._sum += value

    def read(self) -> tuple[_Buckets, float]:
        """Its buckets, and the sum of all values."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        return _buckets(self._bounds, counts), total


class TallyMetric(Tally, Collector):
    """A `Tally` under a name.

    Args:
        name: of the metric.
        text: that explains it.
        bounds: as of `Tally`.
        registry: that publishes it.
    """

    def __init__(self, name: str, text: str, bounds: Sequence[float], registry: CollectorRegistry) -> None:
        super().__init__(bounds)
        self._name, self._text = name, text
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        family = HistogramMetricFamily(self._name, self._text)
        family.add_metric((), *self.read())
        yield family


def _buckets(bounds: Sequence[float], counts: Sequence[int]) -> _Buckets:
    names = [*map(floatToGoString, bounds), "+Inf"]
    return list(zip(names, map(float, accumulate(counts)), strict=True))


@dataclass(frozen=True)
class MetricsEndpoint:
    """A running `/metrics` endpoint."""

    server: HTTPServer
    thread: threading.Thread

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server.server_port)

    def close(self) -> None:
        """Stop serving."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@cache
def versions(names: Iterable[str]) -> dict[str, str]:
    """Installed version of each distribution, for Describe and build info."""
    from importlib import metadata

    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found
