"""Reads `/metrics` endpoints, and puts together what three of them say about each layer."""

from __future__ import annotations

import http.client
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from braid_wire.errors import ServiceFault, ServiceLost
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

_TIMEOUT_S = 5.0

Point = tuple[str, int, str]
"""(role, layer id, "full" or "linear")."""


@dataclass
class LayerTimes:
    """One side of one layer, as the endpoints tell it; seconds are means over all dispatches."""

    role: str
    layer_id: int
    side: str
    mechanism: str
    dispatches: dict[str, int] = field(default_factory=dict)
    """By mode, as the service counts them."""
    queue_s: float = 0.0
    compute_s: float = 0.0
    hop_s: float = 0.0
    """As the orchestrator sees it: all that it waited, less the kernel."""

    @property
    def count(self) -> int:
        """Dispatches in all modes."""
        return sum(self.dispatches.values())


def scrape(port: int, host: str = "127.0.0.1") -> list[Sample]:
    """The samples of one endpoint.

    Raises:
        ServiceLost: nobody answers there.
        ServiceFault: it answers, but not with metrics.
    """
    # Not through urllib: a proxy from the environment has no business between two local processes.
    connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        text = response.read().decode()
    except (OSError, http.client.HTTPException) as error:
        raise ServiceLost(f"http://{host}:{port}/metrics does not answer: {error}") from error
    finally:
        connection.close()
    if response.status != http.HTTPStatus.OK:
        raise ServiceFault(f"http://{host}:{port}/metrics answers with {response.status} {response.reason}")
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def total(samples: Iterable[Sample], name: str) -> float:
    """The sum of a metric over all its labels."""
    return sum(sample.value for sample in samples if sample.name == name)


def layer_times(ports: Mapping[str, int], host: str = "127.0.0.1") -> list[LayerTimes]:
    """What each layer cost: counts, queue and compute from its service, hop from the orchestrator.

    Args:
        ports: of "full", "linear" and "orchestrator".
        host: of all three.
    """
    found: dict[Point, LayerTimes] = {}
    for service in ("full", "linear"):
        samples = scrape(ports[service], host)
        for sample in _named(samples, "braid_layer_dispatch_total"):
            _layer(found, sample).dispatches[sample.labels["mode"]] = int(sample.value)
        for phase in ("queue", "compute"):
            for sample, mean in _means(samples, phase):
                setattr(_layer(found, sample), f"{phase}_s", mean)
    for sample, mean in _means(scrape(ports["orchestrator"], host), "hop"):
        _layer(found, sample).hop_s = mean
    return [found[point] for point in sorted(found, key=lambda point: (point[0] != "target", *point))]


def _named(samples: Iterable[Sample], name: str) -> Iterator[Sample]:
    return (sample for sample in samples if sample.name == name)


def _means(samples: list[Sample], phase: str) -> Iterator[tuple[Sample, float]]:
    """Sum over count of a phase's histogram, for each layer that ran."""
    counts = {
        _point(sample): sample.value
        for sample in _named(samples, "braid_layer_seconds_count")
        if sample.labels["phase"] == phase
    }
    for sample in _named(samples, "braid_layer_seconds_sum"):
        if sample.labels["phase"] == phase and counts.get(_point(sample)):
            yield sample, sample.value / counts[_point(sample)]


def _point(sample: Sample) -> Point:
    labels = sample.labels
    return labels["role"], int(labels["layer_id"]), labels["kind"]


def _layer(found: dict[Point, LayerTimes], sample: Sample) -> LayerTimes:
    role, layer_id, side = point = _point(sample)
    return found.setdefault(point, LayerTimes(role, layer_id, side, sample.labels["mechanism"]))
