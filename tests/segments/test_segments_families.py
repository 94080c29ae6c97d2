"""Every family: segments run operator by operator give the bits of the body as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import mamba_checkpoints
import pytest
import torch
from braid_orchestrator.body.family import family_names
from braid_orchestrator.segments.check import check
from braid_orchestrator.segments.eager import EagerCompiler
from braid_wire.layers import Role
from checkpoints import CASES, QWEN
from drafts import save_with_mtp
from goldens import GOLDENS, NAMES
from published import save_as_published
from walks import COUNTS, MAX_TOKENS, PoisonedBuffers, Step, as_it_is, cut_of, in_segments, load

Save = Callable[[Path], Path]


def checkpoints() -> Iterator[tuple[str, Save]]:
    """One of each family."""
    seen: set[str] = set()
    for case in CASES:
        if case.family not in seen:
            seen.add(case.family)
            yield case.family, case.save
    for name in mamba_checkpoints.FAMILIES:
        yield name, partial(mamba_checkpoints.save, name)
    yield "minimax_text_01", lambda directory: save_as_published(directory)[0]
    if GOLDENS.is_dir():
        yield "bailing_moe_v2_5", lambda _: GOLDENS / NAMES[-1]


FAMILIES = dict(checkpoints())
WITH_DRAFT = {case.family: case for case in QWEN}


def compare(model: Path, role_of: Role, dtype: torch.dtype = torch.float32) -> None:
    """Steps of several sizes; bits are equal, and nothing is written beyond a step's tokens."""
    role = load(model, dtype).roles[role_of]
    buffers = PoisonedBuffers(role)
    body = EagerCompiler().compile(cut_of(role), buffers, MAX_TOKENS)
    for tokens in COUNTS:
        buffers.poison()
        step = Step.random(role, tokens, seed=tokens)
        hidden, logits = in_segments(role, body, buffers, step)
        wanted_hidden, wanted_logits = as_it_is(role, step)
        assert torch.equal(hidden, wanted_hidden), f"{tokens} tokens"
        assert torch.equal(logits, wanted_logits), f"{tokens} tokens"
        assert not buffers.written_from(tokens)


def test_every_family_is_here() -> None:
    missing = set(family_names()) - FAMILIES.keys()
    assert missing <= ({"bailing_moe_v2_5"} if not GOLDENS.is_dir() else set())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_in_segments(name: str, tmp_path: Path) -> None:
    compare(FAMILIES[name](tmp_path), Role.TARGET)


@pytest.mark.parametrize("name", WITH_DRAFT)
def test_a_draft_in_segments(name: str, tmp_path: Path) -> None:
    compare(save_with_mtp(WITH_DRAFT[name], tmp_path, ("full", "linear")), Role.DRAFT)


@pytest.mark.parametrize("name", ["qwen3_5", "deepseek_v3", "falcon_h1"])
def test_a_family_in_bfloat16(name: str, tmp_path: Path) -> None:
    compare(FAMILIES[name](tmp_path), Role.TARGET, torch.bfloat16)


def test_text_positions_are_three_equal_rows_of_mrope(tmp_path: Path) -> None:
    role = load(FAMILIES["qwen3_5"](tmp_path)).roles[Role.TARGET]
    buffers = PoisonedBuffers(role)
    whole = cut_of(role)
    check(role, whole)
    body = EagerCompiler().compile(whole, buffers, MAX_TOKENS)
    ids, row = torch.arange(9), torch.arange(100, 109)
    once = in_segments(role, body, buffers, Step(ids, row, None))
    thrice = in_segments(role, body, buffers, Step(ids, row.expand(3, -1), None))
    assert torch.equal(once[1], thrice[1])
    assert torch.equal(once[1], as_it_is(role, Step(ids, row, None))[1])
