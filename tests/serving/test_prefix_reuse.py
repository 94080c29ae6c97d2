"""What a prefix cache is worth: the time to the first token, and how much need not be computed again."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import time
from collections.abc import Iterator

import pytest
from braid_orchestrator.cell import Cell
from braid_orchestrator.request import Token
from braid_orchestrator.store import Limits
from serving_harness import ask, counted, held, kept, make_cell, prompt, tokens_of

SHARED = 2048
ROOM = Limits(max_tokens=1024, max_sequences=8, max_context=4096, page_size=16)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, Cell]]:
    """One without and one with a cache."""
    place = tmp_path_factory.mktemp("reuse")
    made = {on: make_cell(place, ROOM, prefix_cache=on) for on in (False, True)}
    yield made
    for cell in made.values():
        cell.close()


def first_token(cell: Cell, name: str, tokens: list[int]) -> tuple[float, int]:
    """Seconds until it is told, and which it is."""
    began = time.monotonic()
    request = ask(cell, name, tokens, 1)
    event = next(iter(request.stream()))
    took = time.monotonic() - began
    assert isinstance(event, Token)
    return took, event.token_id


def test_the_first_token_comes_five_times_sooner(cells: dict[bool, Cell]) -> None:
    shared = prompt(SHARED)
    took: dict[bool, list[float]] = {}
    tokens: dict[bool, list[int]] = {}
    for on, cell in cells.items():
        first_token(cell, "first", [*shared, 9])
        runs = [first_token(cell, f"{n}", [*shared, *prompt(16, n)]) for n in range(4)]
        took[on], tokens[on] = [seconds for seconds, _ in runs], [token for _, token in runs]
    assert tokens[True] == tokens[False]
    off, on = min(took[False]) * 1e3, min(took[True]) * 1e3
    print(f"first token behind {SHARED} shared tokens: {off:.1f} ms without, {on:.1f} ms with a cache")
    assert off >= 5 * on


def test_most_of_a_conversation_is_found_again(cells: dict[bool, Cell]) -> None:
    cell = cells[True]
    cell.engine.flush_cache()
    before = {name: counted(cell, f"braid_{name}_total") for name in ("prefix_hit_tokens", "prompt_tokens")}
    system = prompt(200, 99)
    histories = {user: list(system) for user in range(6)}
    for turn in range(6):
        requests = {}
        for user, history in histories.items():
            history += prompt(20, 100 * user + turn)
            requests[user] = ask(cell, f"{user}-{turn}", history, 30, ignore_eos=True)
        for user, request in requests.items():
            histories[user] += tokens_of(request)
    found = {name: counted(cell, f"braid_{name}_total") - before[name] for name in before}
    rate = found["prefix_hit_tokens"] / (found["prefix_hit_tokens"] + found["prompt_tokens"])
    print(f"{rate:.0%} of the prompts' tokens were found in the cache")
    assert rate > 0.85
    assert held(cell) == [0, 0]
    assert min(kept(cell)) > 0
    cell.engine.flush_cache()
    assert kept(cell) == [0, 0]
