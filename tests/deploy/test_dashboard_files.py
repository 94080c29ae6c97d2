"""The committed dashboards are what their script gives, and hold to the rules for dashboards."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from braid_orchestrator.metrics import CellMetrics
from dashboard_files import FOLDER, NAMES, panels, read, targets

SCRIPT = FOLDER.parent / "dashboards.py"


def test_files_are_up_to_date() -> None:
    pytest.importorskip("grafana_foundation_sdk", reason="grafana-foundation-sdk is not installed")
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_panels_say_what_they_show(name: str) -> None:
    dashboard = read(name)
    assert dashboard["uid"] == f"braid-{name}"
    assert {variable["name"] for variable in dashboard["templating"]["list"]} >= {"model", "instance", "role"}
    ids, places = [], []
    for panel in panels(dashboard):
        assert panel["datasource"]["uid"] == "braid-prometheus"
        assert panel["fieldConfig"]["defaults"]["unit"] and panel["description"].endswith(".")
        ids.append(panel["id"])
        at = panel["gridPos"]
        places += [
            (x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
        ]
        assert at["x"] + at["w"] <= 24
    assert len(set(ids)) == len(ids)
    assert len(set(places)) == len(places)


def test_rates_use_the_interval_of_the_view_and_queries_the_variables() -> None:
    for target in targets():
        windows = set(re.findall(r"\[([^]]+)\]", re.sub(r'"[^"]*"', "", target.expr)))
        assert windows <= {"$__rate_interval", "$__range"}, target
        assert re.search(r'instance=~"\$(instance|orchestrator|services)"', target.expr), target


def test_metrics_that_they_name_exist() -> None:
    own = {family.name for family in CellMetrics("0").registry.collect()}
    # Those that appear with the cell's memory and scheduler, and Prometheus's own.
    later = {"up", "braid_preemptions", "braid_state_versions"}
    later |= {
        f"braid_prefix_{name}" for name in ("hits", "misses", "hit_tokens", "evicted_pages", "evicted_states")
    }
    later |= {f"braid_{name}_{what}" for name in ("pages", "slots") for what in ("used", "total")}
    later |= {f"braid_prefix_cache_{name}_bytes" for name in ("pages", "slots")}
    for target in targets():
        for metric in re.findall(r"\b(?:braid|process)_\w+(?=\{|$)", target.expr):
            base = re.sub(r"_(bucket|sum|count)$", "", metric)
            assert {base, metric, metric.removesuffix("_total")} & (own | later), metric
