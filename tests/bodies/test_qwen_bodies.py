"""qwen3_next and qwen3_5 against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import QWEN, Case
from harness import check


@pytest.mark.parametrize("case", QWEN, ids=str)
def test_qwen(case: Case, tmp_path: Path) -> None:
    found = check(case.save(tmp_path))
    assert found.mechanisms == ("gated_delta", "gqa")
