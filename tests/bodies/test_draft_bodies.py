"""MTP heads run in the draft role, through the same services, beside their targets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from braid_orchestrator.request import Failed, Request
from braid_wire.errors import ConfigInvalid, RequestInvalid
from braid_wire.layers import Kind, Role
from checkpoints import QWEN, Case
from drafts import load_head, save_with_mtp
from grids import with_image
from harness import FLOAT32_ABSOLUTE, LENGTHS, SCHEDULES, cell, load_reference, score_mtp, sequences, worst
from safetensors.torch import load_file, save_file

NEXT, QWEN35 = QWEN[0], QWEN[2]
HEADS = [
    (NEXT, ("full",)),
    (QWEN35, ("full",)),
    (QWEN[3], ("full",)),
    (QWEN[4], ("full",)),
    (QWEN35, ("linear",)),
    (NEXT, ("linear", "full")),
]


@pytest.mark.parametrize(("case", "kinds"), HEADS, ids=lambda value: str(value))
def test_mtp_logits(case: Case, kinds: tuple[str, ...], tmp_path: Path) -> None:
    model = save_with_mtp(case, tmp_path, kinds)
    target, head = load_reference(model), load_head(model, kinds)
    with cell(model) as running:
        plan = running.store.plans[Role.DRAFT]
        assert [(spec.layer_id, spec.kind.value) for spec in plan] == list(enumerate(kinds))
        prompts = sequences(running.plans.vocab_size, LENGTHS)
        wanted = [head.logits(target, prompt) for prompt in prompts if len(prompt) > 1]
        for schedule in SCHEDULES:
            found = score_mtp(running, prompts, schedule)
            assert found[0] is None  # one token: nothing follows its hidden state
            error = worst([logits for logits in found if logits is not None], wanted)
            assert error <= FLOAT32_ABSOLUTE, schedule
        memory = running.store.memory
        for role in (Role.TARGET, Role.DRAFT):
            pools = (memory[role].pages, memory[role].slots)
            assert [pool.used for pool in pools if pool is not None] == [0] * len(
                [pool for pool in pools if pool is not None]
            )
        assert (memory[Role.DRAFT].slots is None) == ("linear" not in kinds)
        assert (memory[Role.DRAFT].pages is None) == ("full" not in kinds)
        counts = {
            point: totals.count
            for point, totals in running.dispatcher.totals.items()
            if point[0] is Role.DRAFT
        }
        assert {(layer, side.value) for _, layer, side in counts} == set(enumerate(kinds))
        assert len(set(counts.values())) == 1 and min(counts.values()) > 0


def test_layer_0_of_the_draft_is_routed_by_the_drafts_own_plan(tmp_path: Path) -> None:
    # The target's layer 0 is linear and the draft's is full.
    with cell(save_with_mtp(QWEN35, tmp_path)) as running:
        assert running.store.plans[Role.TARGET].layer(0).kind is Kind.LINEAR
        assert running.store.plans[Role.DRAFT].layer(0).kind is Kind.FULL
        score_mtp(running, sequences(running.plans.vocab_size, [5]))
        totals = running.dispatcher.totals
        assert totals[Role.TARGET, 0, Kind.LINEAR].count == 1
        assert totals[Role.DRAFT, 0, Kind.FULL].count == 1
        assert (Role.DRAFT, 0, Kind.LINEAR) not in totals


def test_the_draft_rotates_by_the_positions_of_its_hidden_states(tmp_path: Path) -> None:
    model = save_with_mtp(QWEN[3], tmp_path)
    target, head = load_reference(model), load_head(model)
    grids = [with_image(4, 3, 5, 9), None, with_image(0, 5, 4, 1)]
    with cell(model) as running:
        prompts = sequences(running.plans.vocab_size, [28, 17, 21])
        wanted = [head.logits(target, prompt, grid) for prompt, grid in zip(prompts, grids, strict=True)]
        for schedule in SCHEDULES:
            found = score_mtp(running, prompts, schedule, grids)
            assert worst(found, wanted) <= FLOAT32_ABSOLUTE, schedule  # type: ignore[arg-type]


def test_a_draft_scores_and_makes_nothing() -> None:
    with pytest.raises(RequestInvalid, match="max_tokens must be 0"):
        Request("r", np.arange(3), max_tokens=1, mtp=True)


def test_a_sequence_gives_both_roles_memory_back_when_it_is_cancelled(tmp_path: Path) -> None:
    with cell(save_with_mtp(QWEN35, tmp_path, ("linear",))) as running:
        (prompt,) = sequences(running.plans.vocab_size, [120])
        for attempt in range(20):  # a machine that is busy may be done with it before it is cancelled
            request = Request(f"r{attempt}", prompt, chunk=1, mtp=True)
            running.engine.submit(request)
            running.engine.cancel(request)
            if isinstance(list(request.stream())[-1], Failed):
                break
        else:
            pytest.fail("no request was cancelled in time")
        for memory in running.store.memory.values():
            assert all(pool.used == 0 for pool in (memory.pages, memory.slots) if pool is not None)


def test_a_declared_draft_without_weights_is_left_out(tmp_path: Path) -> None:
    model = QWEN35.save(tmp_path)
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "mtp_num_hidden_layers": 1}))
    with cell(model) as running:
        assert list(running.store.plans) == [Role.TARGET]
        with pytest.raises(RequestInvalid, match="no draft"):
            running.engine.submit(Request("r", np.arange(3), mtp=True))


@pytest.mark.parametrize("lost", ["mtp.fc.weight", "mtp.norm.weight", "mtp.layers.0.self_attn.q_norm.weight"])
def test_a_draft_that_lacks_a_weight_is_refused(lost: str, tmp_path: Path) -> None:
    model = save_with_mtp(QWEN35, tmp_path)
    weights = load_file(model / "model.safetensors")
    del weights[lost]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigInvalid, match=lost.removeprefix("mtp.").replace(".", r"\.")), cell(model):
        pass
