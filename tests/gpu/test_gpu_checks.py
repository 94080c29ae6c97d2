"""The checks of `make gpu-check` that tell right from wrong, as tests; its figures of speed are left to it.

One command runs all: python -m pytest tests/gpu/test_gpu_checks.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from braid_orchestrator.bench.gpu.__main__ import CHECKS
from braid_orchestrator.bench.gpu.outcome import PASSED, SKIPPED
from braid_orchestrator.bench.gpu.runner import Check, run_one

RIGHT_OR_WRONG = ("arenas", "doorbells", "linear", "full", "cell", "kill")


@pytest.mark.parametrize(
    "check", [pytest.param(one, id=one.name) for one in CHECKS if one.name in RIGHT_OR_WRONG]
)
def test_check(check: Check, tmp_path: Path) -> None:
    outcome = run_one(check, tmp_path, check.limit_s)
    if outcome.status == SKIPPED:
        pytest.skip(outcome.cause)
    assert outcome.status == PASSED, outcome.cause
    assert outcome.measures
