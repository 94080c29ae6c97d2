"""A body gives the same whatever kernels run its layers, and however they are reached."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from braid_orchestrator.dispatch import Dispatch
from checkpoints import DENSE, HYBRID, LATENT, QWEN, Case
from harness import FLOAT32_ABSOLUTE, SCHEDULES, cell, check, score, sequences

SOME = [DENSE[4], QWEN[2], HYBRID[0], HYBRID[2], HYBRID[5], HYBRID[6], LATENT[1]]


@pytest.mark.parametrize("case", SOME, ids=str)
def test_the_reference_kernels_match_too(case: Case, tmp_path: Path) -> None:
    found = check(
        case.save(tmp_path), backend="reference", lengths=(1, 9, 30), schedules=(SCHEDULES[2], SCHEDULES[4])
    )
    assert found.error <= FLOAT32_ABSOLUTE


@pytest.mark.parametrize("case", SOME, ids=str)
def test_rpc_and_walk_are_bitwise_equal(case: Case, tmp_path: Path) -> None:
    model = case.save(tmp_path)
    found = []
    for dispatch in Dispatch:
        with cell(model, dispatch=dispatch) as running:
            prompts = sequences(running.plans.vocab_size, (1, 9, 30))
            found.append(score(running, prompts, SCHEDULES[4]))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
