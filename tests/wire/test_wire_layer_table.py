"""Layers counted from records: the same numbers as one by one, whenever they are read."""

from __future__ import annotations

import threading

import pytest
from braid_wire.layer_table import LayerTable
from braid_wire.layers import Kind, LayerSpec, Lightning, Role
from braid_wire.metrics import LATENCY_BUCKETS, MEASURED
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

SPECS = [LayerSpec(layer_id, Kind.LINEAR, linear=Lightning(1, 2, scale=1.0)) for layer_id in (3, 4)]
LABELS = {"role": "target", "kind": "linear", "mechanism": "lightning"}
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["extend", "decode", "mixed"]),
        st.lists(st.tuples(st.integers(0, 1), st.integers(0, 10**10), st.integers(0, 10**10)), max_size=4),
    ),
    max_size=40,
)


def table_of(service: str) -> tuple[LayerTable, CollectorRegistry]:
    table, registry = LayerTable(*MEASURED[service], LATENCY_BUCKETS), CollectorRegistry()
    assert [table.row(Role.TARGET, spec, Kind.LINEAR) for spec in SPECS] == [0, 1]
    assert table.row(Role.TARGET, SPECS[1], Kind.LINEAR) == 1  # the same one again
    registry.register(table)
    return table, registry


@settings(deadline=None)
@given(STEPS)
def test_counts_are_those_of_each_layer(steps: list[tuple[str, list[tuple[int, int, int]]]]) -> None:
    table, registry = table_of("linear")
    for mode, layers in steps:
        rows = [row for row, _, _ in layers]
        stamps = [(5, 5 + queue, 5 + queue + compute) for _, queue, compute in layers]
        table.note(mode, lambda rows=rows, stamps=stamps: (rows, stamps))  # type: ignore[misc]
    ran = [(mode, *layer) for mode, layers in steps for layer in layers]
    for row, spec in enumerate(SPECS):
        mine = [layer for layer in ran if layer[1] == row]
        labels = {**LABELS, "layer_id": str(spec.layer_id)}
        for mode in ("extend", "decode", "mixed"):
            sample = registry.get_sample_value("braid_layer_dispatch_total", {**labels, "mode": mode})
            assert sample == sum(layer[0] == mode for layer in mine)
        for phase, at in (("queue", 2), ("compute", 3)):
            seconds = [layer[at] * 1e-9 for layer in mine]
            phased = {**labels, "phase": phase}
            assert registry.get_sample_value("braid_layer_seconds_count", phased) == len(mine)
            assert abs(registry.get_sample_value("braid_layer_seconds_sum", phased) - sum(seconds)) < 1e-6
            for bound in (1e-6, 1e-3, 5.0):
                # As a histogram has it: values up to the bound; those right at it are too close to call.
                found = registry.get_sample_value("braid_layer_seconds_bucket", {**phased, "le": str(bound)})
                assert sum(s < bound - 1e-12 for s in seconds) <= found
                assert found <= sum(s < bound + 1e-12 for s in seconds)


def test_the_orchestrator_measures_compute_and_hop() -> None:
    table, _ = table_of("orchestrator")
    # Posted, waited, taken, received, started, finished: 3 until it began, 10 in the kernel, and 2 from its
    # end until the body noticed. In the second the body was busy for 40, and lost nothing behind it.
    stamps = [(100, 101, 115, 102, 103, 113), (100, 150, 151, 102, 104, 110)]
    table.note("decode", lambda: ([0, 1], stamps))
    assert table.seconds(0) == pytest.approx({"compute": 10e-9, "hop": 5e-9, "queue": 1e-9})
    assert table.seconds(1) == pytest.approx({"compute": 6e-9, "hop": 5e-9, "queue": 2e-9})
    assert table.dispatches(0) == {"decode": 1}


def test_readers_and_writers_lose_nothing() -> None:
    table, registry = table_of("linear")
    steps = 3000

    def write() -> None:
        for _ in range(steps):
            table.note("decode", lambda: ([0, 1], [(0, 1, 2), (0, 2, 3)]))

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        generate_latest(registry)
    for writer in writers:
        writer.join()
    assert table.dispatches(0) == table.dispatches(1) == {"decode": 3 * steps}
