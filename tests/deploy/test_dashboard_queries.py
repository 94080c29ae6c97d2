"""Every query of every dashboard gives data where Prometheus scrapes a cell that works."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from dashboard_files import NAMES, Target, read, resolved, substituted, targets
from scraped_cell import LOAD_S, PROMETHEUS, SCRAPE_MS, Prometheus, finite, load, served

pytestmark = pytest.mark.deploy


@dataclass(frozen=True)
class Measured:
    """A Prometheus that has seen a cell under load, and when that was."""

    prometheus: Prometheus
    began: float
    ended: float


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measured]:
    """The load is over; the cell still runs."""
    if not PROMETHEUS.exists():
        pytest.skip(f"{PROMETHEUS} is not installed (Debian's package prometheus)")
    place = tmp_path_factory.mktemp("p")
    with served(place) as cell:
        prometheus = Prometheus(place, list(cell.metrics.values()))
        try:
            # Rates need a scrape from before.
            time.sleep(4 * SCRAPE_MS / 1000)
            began = time.time()
            load(cell, LOAD_S)
            ended = time.time()
            time.sleep(2 * SCRAPE_MS / 1000)
            yield Measured(prometheus, began, ended)
        finally:
            prometheus.close()


@pytest.mark.parametrize("name", NAMES)
def test_variables_have_values(measured: Measured, name: str) -> None:
    values = resolved(read(name), measured.prometheus.label_values)
    assert values["model"] == ["tiny"]
    assert values["role"] == ["draft", "target"]
    assert len(values["instance"]) == 3
    assert len(values["orchestrator"]) == 1 and len(values["services"]) == 2
    assert {*values["orchestrator"], *values["services"]} == set(values["instance"])


@pytest.mark.parametrize("target", targets(), ids=lambda target: f"{target.dashboard}/{target.panel}")
def test_queries_give_data(measured: Measured, target: Target) -> None:
    values = resolved(read(target.dashboard), measured.prometheus.label_values)
    expr = substituted(target.expr, values)
    if target.instant:
        found = measured.prometheus.instant(expr, measured.ended)
    else:
        found = measured.prometheus.series(expr, measured.began, measured.ended)
    assert found, expr
    numbers = finite(found)
    assert numbers, expr
    assert min(numbers) >= 0, expr
    for series in found:
        assert target.legend_labels <= series["metric"].keys(), expr


def test_rows_of_the_heat_map_are_in_the_order_of_the_layers(measured: Measured) -> None:
    (target,) = [target for target in targets() if target.panel == "Latency of every layer"]
    values = resolved(read("routing"), measured.prometheus.label_values)
    found = measured.prometheus.series(substituted(target.expr, values), measured.began, measured.ended)
    rows = [series["metric"]["row"] for series in found]
    assert rows == ["draft 000 full"] + [
        f"target {place:03d} {'full' if place % 4 == 3 else 'linear'}" for place in range(8)
    ]
    assert all(0 < value < 1 for value in finite(found))
