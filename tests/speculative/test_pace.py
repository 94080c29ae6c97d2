"""How many tokens are guessed: the number that makes most tokens in a second, none where that is fastest."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from braid_orchestrator import speculative
from braid_orchestrator.pace import Pace
from braid_orchestrator.request import Request
from braid_orchestrator.speculative import Speculator
from braid_wire.layers import Role
from checkpoints import QWEN
from drafts import save_with_mtp
from harness import sequences
from hypothesis import given, settings
from hypothesis import strategies as st
from spec_cells import cell, idle, poison, submit, tokens_of

MOST = 4
TRIALS = 5 * (MOST + 1)


def drive(
    pace: Pace, steps: int, requests: int, rate: float, seconds: Callable[[int], float], seed: int = 0
) -> list[int]:
    """Steps of so many requests whose guesses are right at a rate; the number that each step guessed."""
    chance, found = random.Random(seed), []
    for _ in range(steps):
        number = pace.guesses(requests)
        found.append(number)
        for _ in range(requests if number else 0):
            right = next((n for n in range(number) if chance.random() >= rate), number)
            pace.verified(number, right)
        pace.took(requests, number, seconds(number))
    return found


def test_what_was_learned_is_what_a_request_makes() -> None:
    pace = Pace(MOST)
    drive(pace, 400, 4, 0.7, lambda number: 1.0)
    exact = [sum(0.7**n for n in range(number + 1)) for number in range(MOST + 1)]
    assert pace.expected() == pytest.approx(exact, rel=0.2)


# What is drawn decides whether the limit is kept, in all but one of a thousand cases: the same ones always.
@settings(max_examples=30, deadline=None, derandomize=True)
@given(rate=st.floats(0, 1), guess=st.floats(0.01, 2), verify=st.floats(0, 0.5), seed=st.integers(0, 99))
def test_the_best_number_is_found(rate: float, guess: float, verify: float, seed: int) -> None:
    def seconds(number: int) -> float:
        return 1 + number * (guess + verify)

    found = drive(Pace(MOST), 240, 8, rate, seconds, seed)
    assert Counter(found[:TRIALS]) == dict.fromkeys(range(MOST + 1), 5)
    worth = [sum(rate**n for n in range(number + 1)) / seconds(number) for number in range(MOST + 1)]
    chosen = np.array([worth[number] for number in found[TRIALS:]])
    # Acceptance is known to some per cent.
    assert chosen.mean() > 0.9 * max(worth)


def test_guesses_that_are_never_right_are_left_out() -> None:
    assert set(drive(Pace(MOST), 200, 1, 0.0, lambda number: 1.0)[TRIALS:]) == {0}


def test_each_number_of_requests_has_a_pace_of_its_own() -> None:
    pace = Pace(MOST)
    few = drive(pace, 100, 1, 0.8, lambda number: 1 + 0.05 * number)
    many = drive(pace, 100, 16, 0.8, lambda number: 1 + 2.0 * number)
    assert min(few[TRIALS:]) >= 3
    assert set(many[TRIALS:]) == {0}
    assert pace.guesses(1) >= 3


def test_what_lost_is_looked_at_again() -> None:
    pace = Pace(MOST)
    assert set(drive(pace, 200, 1, 0.9, lambda number: 1 + 3.0 * number)[TRIALS:]) == {0}
    # The machine is free again: guesses cost little now.
    later = drive(pace, 800, 1, 0.9, lambda number: 1 + 0.1 * number)
    assert later[-1] >= 3


def test_a_trial_ends_where_requests_are_too_short_for_some_numbers() -> None:
    """Steps with three guesses or more are never seen whole; the others are compared all the same."""
    pace, found = Pace(MOST), []
    for _ in range(200):
        number = pace.guesses(1)
        found.append(number)
        pace.verified(min(number, 2), min(number, 2))
        if number <= 2:
            pace.took(1, number, 1 + 0.1 * number)
    assert set(found[60:]) == {2}
    pace = Pace(MOST)
    assert [pace.guesses(1) for _ in range(100)][60:] == [0] * 40  # where nothing is seen, nothing is guessed


def test_a_fixed_number_is_kept() -> None:
    assert set(drive(Pace(3, adaptive=False), 50, 1, 0.0, lambda number: 1.0 + number)) == {3}


def test_a_cell_finds_out_and_makes_the_same_tokens(tmp_path: Path) -> None:
    """A random draft is hardly ever right: the cell gives it up, and looks at it again.

    Every step, of the target or the draft, takes a second: what else the machine does decides nothing.
    """
    model = save_with_mtp(QWEN[2], tmp_path)
    prompts = sequences(2000, [20, 33, 7], seed=4)

    def run(guesses_ahead: int) -> tuple[list[list[int]], list[int]]:
        chosen: list[int] = []
        guesses = Pace.guesses

        def noted(self: Pace, requests: int) -> int:
            chosen.append(guesses(self, requests))
            return chosen[-1]

        with (
            pytest.MonkeyPatch.context() as patch,
            cell(model, speculative=guesses_ahead, speculative_adaptive=True) as running,
        ):
            patch.setattr(Pace, "guesses", noted)
            clock = SimpleNamespace(monotonic=lambda: float(running.walker.steps))
            patch.setattr(speculative, "time", clock)
            poison(running)
            vocab = running.plans.vocab_size
            works = [Request(f"{n}", one % vocab, max_tokens=100) for n, one in enumerate(prompts)]
            submit(running, works)
            found = [tokens_of(work) for work in works]
            assert idle(running)
            return found, chosen

    plain, none = run(0)
    found, chosen = run(3)
    assert found == plain
    assert none == []
    assert set(chosen) == {0, 1, 2, 3}
    assert chosen[40:].count(0) > len(chosen[40:]) // 2


def test_a_fault_of_the_draft_of_any_kind_costs_its_guesses_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is raised while guessing, the engine goes on, and the draft holds nothing."""
    model = save_with_mtp(QWEN[2], tmp_path)
    (prompt,) = sequences(90, [20])
    with cell(model) as alone:
        work = Request("a", prompt, max_tokens=20)
        alone.engine.submit(work)
        wanted = tokens_of(work)
    go_on, calls = Speculator._look_ahead, itertools.count()

    def failing(self: Speculator, guessing: object) -> object:
        if next(calls) % 2:
            raise IndexError("a mistake")
        return go_on(self, guessing)  # type: ignore[arg-type]

    monkeypatch.setattr(Speculator, "_look_ahead", failing)
    with cell(model, speculative=3) as running:
        work = Request("a", prompt, max_tokens=20)
        running.engine.submit(work)
        assert tokens_of(work) == wanted
        assert idle(running)
        memory = running.walker.memory(Role.DRAFT)
        assert memory.pages is not None
        assert memory.pages.used == 0
    assert next(calls) > 4
