"""Models without linear layers pass through one adapter, and the linear service stays idle."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import DENSE, Case
from harness import check


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_dense_model(case: Case, tmp_path: Path) -> None:
    found = check(case.save(tmp_path))
    assert found.mechanisms == ("gqa",)
