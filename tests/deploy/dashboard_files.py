"""The committed dashboards: their queries, and what Grafana puts in the place of variables."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "grafana" / "dashboards"
NAMES = ("overview", "routing", "state")

Json = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """One query of a panel."""

    dashboard: str
    panel: str
    expr: str
    legend: str
    instant: bool

    @property
    def legend_labels(self) -> set[str]:
        """Labels that the legend names."""
        return set(re.findall(r"{{(\w+)}}", self.legend))


def read(name: str) -> Json:
    """A dashboard."""
    found: Json = json.loads((FOLDER / f"{name}.json").read_text())
    return found


def panels(dashboard: Json) -> Iterator[Json]:
    """Its panels without headings."""
    return (panel for panel in dashboard["panels"] if panel["type"] != "row")


def targets() -> list[Target]:
    """All queries of all dashboards."""
    return [
        Target(
            name, panel["title"], target["expr"], target.get("legendFormat", ""), target.get("instant", False)
        )
        for name in NAMES
        for panel in panels(read(name))
        for target in panel["targets"]
    ]


def resolved(dashboard: Json, label_values: Callable[[str, str], list[str]]) -> dict[str, list[str]]:
    """The values of each variable, with all of them chosen."""
    values: dict[str, list[str]] = {}
    for variable in dashboard["templating"]["list"]:
        found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
        assert found is not None, variable["name"]
        values[variable["name"]] = label_values(substituted(found[1], values), found[2])
    return values


def substituted(expr: str, values: dict[str, list[str]], window: str = "4s", span: str = "8s") -> str:
    """An expression as Grafana sends it: several values as a regular expression."""
    expr = expr.replace("$__rate_interval", window).replace("$__range", span)
    for name, chosen in values.items():
        pattern = "|".join(re.escape(value).replace("\\", "\\\\") for value in chosen)
        expr = re.sub(rf"\${name}\b", lambda _, pattern=pattern: f"({pattern})", expr)
    return expr
