"""The report of a run, as JSON and as a page to read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from braid_orchestrator.bench.gpu.outcome import Measure, Outcome
from braid_orchestrator.bench.gpu.runner import Check
from braid_orchestrator.bench.record import record

NAME = "gpu-check"


def write(
    directory: Path,
    command: str,
    checks: Sequence[Check],
    outcomes: Sequence[Outcome],
    facts: Mapping[str, Any],
) -> tuple[Path, Path]:
    """Write both; their paths.

    Args:
        directory: made where it is missing.
        command: what was typed.
        checks: that were asked for.
        outcomes: of each, in the same order.
        facts: of the device.
    """
    directory.mkdir(parents=True, exist_ok=True)
    found = record(NAME, command, [one.to_json() for one in outcomes])
    found["device"] = dict(facts)
    paths = directory / f"{NAME}.json", directory / f"{NAME}.md"
    paths[0].write_text(json.dumps(found, indent=1) + "\n")
    paths[1].write_text(page(found, checks, outcomes))
    return paths


def page(found: Mapping[str, Any], checks: Sequence[Check], outcomes: Sequence[Outcome]) -> str:
    """The report in Markdown."""
    device = ", ".join(f"{name} {value}" for name, value in found["device"].items())
    lines = [
        "# GPU check",
        "",
        f"`{found['command']}` on {found['date']}: {device}.",
        "",
        "| check | outcome | seconds | cause |",
        "|---|---|---|---|",
    ]
    lines += [f"| {one.check} | {one.status} | {one.seconds} | {_cell(one.cause)} |" for one in outcomes]
    for check, outcome in zip(checks, outcomes, strict=True):
        if outcome.measures:
            lines += ["", f"## {check.name}", "", check.about, "", "| figure | value | promised | kept |"]
            lines += ["|---|---|---|---|", *(_row(measure) for measure in outcome.measures)]
    return "\n".join(lines) + "\n"


def _row(measure: Measure) -> str:
    kept = ("yes" if measure.holds else "**no**") if measure.bound else ""
    value = f"{measure.value:,.4g}" if isinstance(measure.value, float) else str(measure.value)
    return f"| {_cell(measure.name)} | {value} {measure.unit}".rstrip() + f" | {measure.bound} | {kept} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
