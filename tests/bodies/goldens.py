"""Ling and Ring goldens: small checkpoints with logits that the publisher's own code computed.

They lie beside the repository; where they are not, what needs them is skipped.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from braid_wire.layers import Role
from harness import LIMITS, SCHEDULES, Comparison, cell, score, score_mtp, smaller, worst
from safetensors.torch import load_file

GOLDENS = Path(__file__).resolve().parents[3] / "shared" / "goldens"
NAMES = ("ring_2_5_tiny", "ling_2_6_tiny")
WITH_MTP = "ling_2_6_tiny"

needs_goldens = pytest.mark.skipif(not GOLDENS.is_dir(), reason="no golden checkpoints")

_LIMITS = smaller(LIMITS, max_tokens=256, max_context=256)


def golden(name: str, prefix: str) -> list[torch.Tensor]:
    """The tensors `prefix_0`, `prefix_1`, … of a golden case."""
    found = load_file(GOLDENS / name / "case.safetensors")
    return [found[key] for key in sorted(found) if key.startswith(f"{prefix}_")]


def compare_golden(name: str, backend: str = "cpp") -> Comparison:
    """Logits of a golden checkpoint on every schedule against the publisher's."""
    prompts, wanted = [ids.numpy() for ids in golden(name, "ids")], golden(name, "logits")
    with cell(GOLDENS / name, backend, limits=_LIMITS) as running:
        errors = {s.name: worst(score(running, prompts, s), wanted) for s in SCHEDULES}
        alone = [score(running, [prompt])[0] for prompt in prompts]
        crowd = worst(alone, score(running, prompts))
    return Comparison(errors, crowd, float(wanted[0].max() - wanted[0].min()), ("lightning", "mla"))


def golden_mtp_errors(backend: str = "cpp") -> dict[str, float]:
    """Schedule → error of the draft's logits against the publisher's."""
    prompts = [ids.numpy() for ids in golden(WITH_MTP, "ids")]
    wanted = golden(WITH_MTP, "mtp_logits")
    errors = {}
    with cell(GOLDENS / WITH_MTP, backend, limits=_LIMITS) as running:
        assert [spec.layer_id for spec in running.store.plans[Role.DRAFT]] == [0]
        for schedule in SCHEDULES:
            found = [logits for logits in score_mtp(running, prompts, schedule) if logits is not None]
            errors[schedule.name] = worst(found, wanted)
    return errors
