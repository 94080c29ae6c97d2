"""The catalogue names every family that has a body, and what is said of it was measured."""

from __future__ import annotations

from pathlib import Path

import mamba_checkpoints
import pytest
from braid_orchestrator.body import catalog
from braid_orchestrator.body.family import family_names
from braid_orchestrator.layer_plan import build_plans, load_config
from checkpoints import CASES, Case
from harness import CROWD_ABSOLUTE, FLOAT32_ABSOLUTE

ENTRIES = {entry.family: entry for entry in catalog.ENTRIES}
FIRST = list({case.family: case for case in reversed(CASES)}.values())


def test_every_family_with_a_body_is_listed_once() -> None:
    assert sorted(ENTRIES) == sorted(entry.family for entry in catalog.ENTRIES) == list(family_names())


def test_every_family_was_compared_and_lies_within_the_bounds() -> None:
    found = catalog.verified()
    assert sorted(found) == sorted(ENTRIES)
    for name, row in found.items():
        assert row.checkpoints > 0, name
        assert row.error <= FLOAT32_ABSOLUTE, name
        assert row.crowd <= CROWD_ABSOLUTE, name
        assert (row.draft_error is not None) == bool(ENTRIES[name].draft), name
        assert row.draft_error is None or row.draft_error <= FLOAT32_ABSOLUTE, name


def test_the_table_has_a_row_for_each() -> None:
    lines = catalog.markdown().splitlines()
    assert len(lines) == 2 + len(ENTRIES)
    assert not [line for line in lines if "not measured" in line]


def mechanisms(model: Path) -> set[str]:
    plan = build_plans(load_config(model)).target
    return {one.mechanism for spec in plan for one in (spec.linear, spec.full) if one is not None}


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_mechanisms_are_those_of_the_plan(case: Case, tmp_path: Path) -> None:
    assert mechanisms(case.save(tmp_path)) == set(ENTRIES[case.family].mechanisms)


@pytest.mark.parametrize("family", mamba_checkpoints.FAMILIES)
def test_mechanisms_of_mamba_families_are_those_of_the_plan(family: str, tmp_path: Path) -> None:
    assert mechanisms(mamba_checkpoints.save(family, tmp_path)) == set(ENTRIES[family].mechanisms)
