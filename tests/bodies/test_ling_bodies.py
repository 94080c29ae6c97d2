"""Ling-2.5/2.6 and Ring-2.5 against the publisher's logits, and a plain float64 model of our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ling_naive
import pytest
from goldens import NAMES, compare_golden, golden_mtp_errors, needs_goldens
from harness import CROWD_ABSOLUTE, FLOAT32_ABSOLUTE, SCHEDULES, cell, score, score_mtp, sequences, worst


@needs_goldens
@pytest.mark.parametrize(("name", "backend"), [(NAMES[0], "cpp"), (NAMES[1], "cpp"), (NAMES[1], "reference")])
def test_goldens(name: str, backend: str) -> None:
    found = compare_golden(name, backend)
    assert found.error <= FLOAT32_ABSOLUTE, found.errors
    assert found.crowd <= CROWD_ABSOLUTE


@needs_goldens
def test_golden_mtp_logits() -> None:
    errors = golden_mtp_errors()
    assert max(errors.values()) <= FLOAT32_ABSOLUTE, errors


VARIANTS: list[dict[str, Any]] = [
    {},
    {"q_lora_rank": 9, "num_attention_heads": 4, "group_norm_size": 1},
    {"use_qk_norm": False, "num_experts_per_tok": 1, "partial_rotary_factor": 1.0, "layer_group_size": 2},
    {"num_nextn_predict_layers": 1, "num_hidden_layers": 4},
    {"num_nextn_predict_layers": 1, "mtp_layer_types": ["linear_attention"], "layer_group_size": 4},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: "+".join(changes) or "usual")
def test_variants_that_no_golden_has(changes: dict[str, Any], tmp_path: Path) -> None:
    model = ling_naive.save(tmp_path, **changes)
    naive = ling_naive.Naive(model)
    with cell(model) as running:
        prompts = sequences(running.plans.vocab_size)
        wanted = [naive.logits(prompt) for prompt in prompts]
        for schedule in SCHEDULES:
            error = worst(score(running, prompts, schedule), [logits for logits, _ in wanted])
            assert error <= FLOAT32_ABSOLUTE, schedule
            if running.body.has_draft:
                found = score_mtp(running, prompts, schedule)[1:]
                drafted = [logits for _, logits in wanted[1:]]
                assert worst(found, drafted) <= FLOAT32_ABSOLUTE, schedule  # type: ignore[arg-type]
        assert running.body.has_draft == bool(changes.get("num_nextn_predict_layers"))


def test_several_mtp_layers_are_left_out(tmp_path: Path) -> None:
    with cell(ling_naive.save(tmp_path, num_nextn_predict_layers=2)) as running:
        assert not running.body.has_draft
