"""What is counted by hand comes out as the client library's own metrics would."""

from __future__ import annotations

import pytest
from braid_wire.errors import RequestInvalid, table
from braid_wire.layers import Gqa, Kind, LayerSpec, Role
from braid_wire.metrics import LATENCY_BUCKETS, MODES, ProcessMetrics, TallyMetric
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

VALUES = [0.0, 1e-6, 1.1e-6, 2.5e-6, 3e-3, 0.1, 5.0, 5.1, 1e9, *LATENCY_BUCKETS]
SPEC = LayerSpec(3, Kind.FULL, full=Gqa(4, 2, 64, 64, 0.125))


def test_a_tally_reads_as_a_histogram() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    tally = TallyMetric("x_seconds", "Text.", LATENCY_BUCKETS, ours)
    histogram = Histogram("x_seconds", "Text.", buckets=LATENCY_BUCKETS, registry=theirs)
    assert generate_latest(ours) == generate_latest(theirs)
    for value in VALUES:
        tally.observe(value)
        histogram.observe(value)
    assert generate_latest(ours) == generate_latest(theirs)


@pytest.mark.parametrize(
    ("service", "phases"), [("orchestrator", ("compute", "hop")), ("full", ("queue", "compute"))]
)
def test_layers_read_as_counters_and_histograms(service: str, phases: tuple[str, str]) -> None:
    metrics, theirs = ProcessMetrics(service, "0"), CollectorRegistry()
    names = ["role", "layer_id", "kind", "mechanism"]
    labels = ("draft", "3", "full", "gqa")
    dispatch = Counter("braid_layer_dispatch", "Layers dispatched.", [*names, "mode"], registry=theirs)
    seconds = Histogram(
        "braid_layer_seconds",
        "Time of a layer: queue (waiting in the service), compute (in the kernel), hop (the rest).",
        [*names, "phase"],
        buckets=LATENCY_BUCKETS,
        registry=theirs,
    )
    for mode in MODES:
        dispatch.labels(*labels, mode)
    row = metrics.layers.row(Role.DRAFT, SPEC, Kind.FULL)
    # Not right at a bound, which as a fraction of a second is not the same number for everybody.
    values = [0.0, 1.1e-6, 3e-3, 0.12, 5.1, 1e9, *(1.02 * bound for bound in LATENCY_BUCKETS)]
    for place, value in enumerate(values):
        first, second = round(value * 1e9), round(value * 5e8)
        if service == "full":  # received, started, finished
            stamps = (0, first, first + second)
        else:  # posted, waited, taken, received, started, finished
            stamps = (0, 0, second + first, second, second, second + first)
        metrics.layers.note(MODES[place % 2], lambda stamps=stamps: ([row], [stamps]))  # type: ignore[misc]
        dispatch.labels(*labels, MODES[place % 2]).inc()
        for phase, nanoseconds in zip(phases, (first, second), strict=True):
            seconds.labels(*labels, phase).observe(nanoseconds / 1e9)
    expected = [sample for family in theirs.collect() for sample in family.samples]
    found = [sample for family in metrics.layers.collect() for sample in family.samples]
    assert [sample[:2] for sample in found] == [sample[:2] for sample in expected]
    assert [sample.value for sample in found] == pytest.approx([sample.value for sample in expected])


def test_every_reason_is_there_from_the_start() -> None:
    metrics = ProcessMetrics("full", "0")
    for reason in table():
        assert metrics.registry.get_sample_value("braid_refused_total", {"reason": reason}) == 0
    metrics.refused(RequestInvalid("no"))
    assert metrics.registry.get_sample_value("braid_refused_total", {"reason": "REQUEST_INVALID"}) == 1


def test_the_model_is_the_one_of_now() -> None:
    metrics = ProcessMetrics("full", "0")
    for name in ("first", "second"):
        metrics.model(name)
    found = [line for line in generate_latest(metrics.registry).splitlines() if b"braid_model_info{" in line]
    assert found == [b'braid_model_info{model="second",service="full"} 1.0']
