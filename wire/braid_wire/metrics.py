"""Prometheus conventions: names, labels, buckets, and the endpoint of a process.

Every process has a registry of its own and serves it on `/metrics`. Label sets are bounded by the
layer plan, and a layer's children are looked up once, so that counting it costs a microsecond.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from http.server import HTTPServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    start_http_server,
)

from braid_wire.errors import RequestInvalid
from braid_wire.layers import Kind, LayerSpec, Role

disable_created_metrics()

PORTS = {"orchestrator": 9400, "full": 9401, "linear": 9402}
"""Default port of each process's endpoint."""

LATENCY_BUCKETS = tuple(
    base * scale for scale in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0) for base in (1, 2.5, 5)
)
"""Seconds: from a microsecond to five seconds, three per decade."""

TOKEN_BUCKETS = tuple(float(2**power) for power in range(17))

MODES = ("extend", "decode", "verify", "mixed")


class ProcessMetrics:
    """The registry of one process and what every process counts.

    Args:
        service: "orchestrator", "full" or "linear".
        version: of Braid, for `braid_build_info`.
    """

    def __init__(self, service: str, version: str) -> None:
        self.registry = CollectorRegistry()
        self._refused = Counter(
            "braid_refused",
            "Requests refused, by reason of the error table.",
            ["reason"],
            registry=self.registry,
        )
        info = Gauge(
            "braid_build_info",
            "Always 1; the labels say what runs.",
            ["service", "version"],
            registry=self.registry,
        )
        info.labels(service, version).set(1)
        self.epoch = Gauge("braid_epoch", "Current epoch; 0: not configured.", registry=self.registry)
        self.plan_seconds = Histogram(
            "braid_plan_seconds",
            "Time to check and plan a batch.",
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self._dispatch = Counter(
            "braid_layer_dispatch",
            "Layers dispatched.",
            ["role", "layer_id", "kind", "mechanism", "mode"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "braid_layer_seconds",
            "Time of a layer: queue (waiting in the service), compute (in the kernel), hop (the rest).",
            ["role", "layer_id", "kind", "mechanism", "phase"],
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )

    def refused(self, reason: str) -> None:
        """Count a refused request."""
        self._refused.labels(reason).inc()

    def layer(self, role: Role, spec: LayerSpec, side: Kind) -> LayerMetrics:
        """The cached children of one side of one layer."""
        mechanism = spec.geometry(side).mechanism
        labels = (role.value, str(spec.layer_id), side.value, mechanism)
        return LayerMetrics(
            dispatch={mode: self._dispatch.labels(*labels, mode) for mode in MODES},
            seconds={phase: self._seconds.labels(*labels, phase) for phase in ("queue", "compute", "hop")},
        )

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


@dataclass(frozen=True)
class LayerMetrics:
    """Counters and histograms of one layer side, ready to use."""

    dispatch: dict[str, Counter]
    seconds: dict[str, Histogram]


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
