"""The small model with a prefix cache and little memory: never another token than without."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from braid_orchestrator.cell import Cell
from braid_orchestrator.memory import SequenceMemory
from braid_orchestrator.request import Request
from braid_orchestrator.sampling import Sampling
from braid_wire.errors import QueueFull, RequestCancelled, StepTimeout
from braid_wire.layers import Role
from serving_harness import ask, counted, held, kept, limits, make_cell, prompt, tokens_of

WAITING = 20
WARM = {"temperature": 0.9, "top_k": 50, "top_p": 0.95}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="module")
def plain(place: Path) -> Iterator[Cell]:
    """Room for everything, and no cache: what it makes is right."""
    cell = make_cell(place, limits(200, 0), prefix_cache=False)
    yield cell
    cell.close()


@pytest.fixture(scope="module")
def tight(place: Path) -> Iterator[Cell]:
    """A cache, and pages for two long sequences; states are kept every 32 tokens."""
    cell = make_cell(place, limits(22, 4), state_spacing=32, max_waiting=WAITING)
    yield cell
    cell.close()


def works(cell: Cell, crowd: bool) -> list[list[int]]:
    """Conversations with one beginning, of which some are drawn; one after the other, or all together."""
    shared = prompt(50)
    requests, answers = [], []
    # The engine begins with none of a crowd before all are there.
    with cell.engine._change if crowd else nullcontext():
        for index in range(12):
            sampling = Sampling(seed=index, **WARM) if index % 2 else Sampling()
            begins = shared[: 50 - 7 * (index % 3)]
            request = ask(cell, f"{crowd}-{index}", [*begins, *prompt(10 + 9 * index, index)], 48, sampling)
            requests.append(request)
            if not crowd:
                answers.append(tokens_of(request))
    return answers or [tokens_of(request) for request in requests]


def test_pressure_costs_no_token(plain: Cell, tight: Cell) -> None:
    expected = works(plain, crowd=False)
    assert works(tight, crowd=True) == expected
    assert counted(tight, "braid_preemptions_total") > 0
    assert counted(tight, "braid_prefix_hits_total") > 0
    assert counted(tight, "braid_prefix_evicted_pages_total") > 0
    assert held(tight) == [0, 0]
    tight.engine.flush_cache()
    assert kept(tight) == [0, 0]


@pytest.mark.parametrize("seed", [None, 11], ids=["greedy", "drawn"])
def test_a_conversation_is_the_same_with_and_without_a_cache(
    plain: Cell, tight: Cell, seed: int | None
) -> None:
    sampling = Sampling() if seed is None else Sampling(seed=seed, **WARM)

    def turns(cell: Cell) -> tuple[list[int], list[int]]:
        history, cached = prompt(37, 5), []
        for turn in range(4):
            request = ask(cell, f"{seed}-{turn}", history, 23, sampling)
            history = [*history, *tokens_of(request), *prompt(11, turn)]
            cached.append(request.cached_tokens)
        return history, cached

    tight.engine.flush_cache()
    expected, never = turns(plain)
    found, cached = turns(tight)
    assert found == expected
    assert never == [0, 0, 0, 0]
    # 37 + 22 tokens were fed in the first turn, so that the state behind 48 is the last one kept, and so on.
    assert cached == [0, 48, 80, 112]


def test_a_prompt_in_chunks_goes_on_from_any_of_its_pages(plain: Cell, tight: Cell) -> None:
    whole = prompt(120, 3)
    expected = tokens_of(ask(plain, "whole", whole, 9))
    for chunk in (1, 7, 16, 33):
        tight.engine.flush_cache()
        assert tokens_of(ask(tight, f"c{chunk}", whole, 9, chunk=chunk)) == expected
        for cut in (17, 64, 100, 119):
            other = [*whole[:cut], 9, 10]
            assert tokens_of(ask(tight, f"o{chunk}-{cut}", other, 2)) == tokens_of(
                ask(plain, f"o{chunk}-{cut}", other, 2)
            )
            again = ask(tight, f"a{chunk}-{cut}", whole, 9)
            assert tokens_of(again) == expected
            assert again.cached_tokens > 0


def test_deadlines_and_cancels_of_those_that_wait_and_run(tight: Cell) -> None:
    running = [ask(tight, f"r{n}", prompt(60, n), 100, ignore_eos=True) for n in range(2)]
    doomed = [
        ask(tight, f"d{n}", prompt(60, 10 + n), 180, ignore_eos=True, deadline_s=0.05) for n in range(8)
    ]
    given_up = [ask(tight, f"c{n}", prompt(60, 20 + n), 180, ignore_eos=True) for n in range(4)]
    for request in given_up:
        tight.engine.cancel(request)
    for requests, error in ((doomed, StepTimeout), (given_up, RequestCancelled)):
        for request in requests:
            with pytest.raises(error):
                tokens_of(request)
    assert [len(tokens_of(request)) for request in running] == [100, 100]
    assert held(tight) == [0, 0]


def test_a_request_waits_while_others_hold_the_memory_and_its_time_runs(tight: Cell) -> None:
    tight.engine.flush_cache()
    memory, foreign = tight.walker.memory(Role.TARGET), SequenceMemory(1 << 50)
    assert memory.pages is not None
    memory.acquire(foreign, 16 * memory.pages.total)  # an engine with a body of its own
    late = ask(tight, "late", prompt(40), 5, deadline_s=0.1)
    patient = ask(tight, "patient", prompt(40), 5, ignore_eos=True)
    with pytest.raises(StepTimeout):
        tokens_of(late)
    assert tight.engine.load.waiting == 1
    memory.release(foreign)
    assert len(tokens_of(patient)) == 5
    assert held(tight) == [0, 0]


def test_the_queue_is_as_long_as_it_was_set(tight: Cell) -> None:
    tight.engine.flush_cache()
    memory, foreign = tight.walker.memory(Role.TARGET), SequenceMemory(1 << 51)
    assert memory.pages is not None
    memory.acquire(foreign, 16 * memory.pages.total)
    waiting = [ask(tight, f"w{n}", prompt(5, n), 1, ignore_eos=True) for n in range(WAITING)]
    with pytest.raises(QueueFull, match=f"{WAITING} requests"):
        ask(tight, "too many", prompt(5), 1)
    memory.release(foreign)
    assert [len(tokens_of(request)) for request in waiting] == [1] * WAITING


def test_what_a_request_tells_of_its_service(tight: Cell) -> None:
    requests: list[Request] = [ask(tight, f"s{n}", prompt(30, n), 20) for n in range(6)]
    for request in requests:
        tokens_of(request)
    for request in requests:
        assert request.ended is not None
        assert request.began is not None
        assert request.arrived <= request.began <= request.ended
        assert request.slowdown is not None
        assert request.slowdown >= 1.0
    assert counted(tight, "braid_request_slowdown_ratio_count") >= 6
    assert tight.walker.memory(Role.TARGET).pages is not None
