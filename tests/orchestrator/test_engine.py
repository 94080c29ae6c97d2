"""Requests through the engine: exact, independent of each other, and gone when they are gone."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from braid_orchestrator.cell import Cell
from braid_orchestrator.request import Failed, Finish, Finished, Request, Scored, Token
from braid_orchestrator.sampling import Sampling
from braid_orchestrator.store import Limits
from braid_wire.errors import (
    BraidError,
    ConfigInvalid,
    Draining,
    PoolExhausted,
    RequestCancelled,
    RequestInvalid,
)
from braid_wire.layers import Role
from cells import LIMITS, CellMaker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

VOCAB = 199


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(8, VOCAB, length)


def tokens(work: Request) -> list[int]:
    found = []
    for event in work.stream():
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Token):
            found.append(event.token_id)
    return found


def scores(work: Request) -> torch.Tensor:
    for event in work.stream():
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Scored):
            return event.logits
    raise AssertionError("no scores")


def in_use(cell: Cell) -> tuple[int, int]:
    memory = cell.walker.memory(Role.TARGET)
    assert memory.pages is not None
    assert memory.slots is not None
    return memory.pages.used, memory.slots.used


def greedy(model: PreTrainedModel, ids: np.ndarray, count: int) -> list[int]:
    """Greedy tokens by full forwards without a cache: the safe oracle."""
    row = torch.tensor(ids)[None]
    for _ in range(count):
        with torch.no_grad():
            row = torch.cat([row, model(row, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
        if row[0, -1] == 7:
            return row[0, len(ids) : -1].tolist()
    return row[0, len(ids) :].tolist()


@pytest.fixture
def cell(make_cell: CellMaker) -> Cell:
    return make_cell()


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    chunk=st.sampled_from([0, 1, 7, 64]),
    tail=st.integers(0, 5),
)
def test_scores_equal_transformers(
    cell: Cell, reference: PreTrainedModel, lengths: list[int], chunk: int, tail: int
) -> None:
    works = [
        Request(f"{i}", prompt(length, i), chunk=chunk, decode_tail=tail) for i, length in enumerate(lengths)
    ]
    for work in works:
        cell.engine.submit(work)
    for work in works:
        with torch.no_grad():
            expected = reference(torch.tensor(work.prompt)[None], use_cache=False).logits[0]
        found = scores(work)
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    assert in_use(cell) == (0, 0)


def test_greedy_equals_transformers_alone_and_in_a_crowd(cell: Cell, reference: PreTrainedModel) -> None:
    lengths = (1, 3, 17, 40, 70, 5, 9, 33)  # more than run at once
    works = [Request(f"{n}", prompt(n, n), max_tokens=20, stop_ids=frozenset({7})) for n in lengths]
    for work in works:
        cell.engine.submit(work)
    for work in works:
        assert tokens(work) == greedy(reference, work.prompt, 20)
    assert in_use(cell) == (0, 0)


def test_a_seed_gives_the_same_tokens_whatever_else_runs(cell: Cell) -> None:
    def sampled(name: str) -> Request:
        return Request(name, prompt(12), Sampling(0.8, top_k=20, top_p=0.9, seed=3), max_tokens=15)

    alone = sampled("alone")
    cell.engine.submit(alone)
    expected = tokens(alone)
    crowd = [Request(f"c{i}", prompt(30 + i, i), Sampling(1.0, seed=i), max_tokens=25) for i in range(4)]
    again = sampled("again")
    for work in (*crowd, again):
        cell.engine.submit(work)
    assert tokens(again) == expected


def test_stop_tokens_end_a_request_and_are_not_given_out(cell: Cell) -> None:
    first = Request("a", prompt(10), max_tokens=10)
    cell.engine.submit(first)
    made = tokens(first)
    stop = made[4]
    second = Request("b", prompt(10), max_tokens=10, stop_ids=frozenset({stop}))
    cell.engine.submit(second)
    events = list(second.stream())
    assert events[-1] == Finished(Finish.STOP, stop)
    assert [e.token_id for e in events if isinstance(e, Token)] == made[: made.index(stop)]


def test_a_cancelled_request_frees_what_it_holds(make_cell: CellMaker) -> None:
    cell = make_cell(limits=Limits(max_tokens=64, max_sequences=6, max_context=1024, page_size=8))
    work = Request("a", prompt(10), max_tokens=1000)
    cell.engine.submit(work)
    events = work.stream()
    next(events)
    cell.engine.cancel(work)
    last = list(events)[-1]
    assert isinstance(last, Failed)
    assert isinstance(last.error, RequestCancelled)
    assert in_use(cell) == (0, 0)
    cell.engine.cancel(work)  # once more does nothing


def test_cancel_of_a_waiting_request(make_cell: CellMaker) -> None:
    cell = make_cell(limits=Limits(max_tokens=64, max_sequences=1, max_context=256, page_size=8))
    first, second = (Request(name, prompt(10), max_tokens=240) for name in "ab")
    cell.engine.submit(first)
    cell.engine.submit(second)
    cell.engine.cancel(second)
    assert isinstance(list(second.stream())[-1], Failed)
    assert len(tokens(first)) == 240


def test_draining_finishes_what_was_accepted_and_takes_nothing_new(cell: Cell) -> None:
    work = Request("a", prompt(10), max_tokens=60)
    cell.engine.submit(work)
    left: list[int] = []
    waiter = threading.Thread(target=lambda: left.append(cell.engine.drain(30)))
    waiter.start()
    while not cell.engine.draining:
        time.sleep(0.001)
    with pytest.raises(Draining):
        cell.engine.submit(Request("b", prompt(3), max_tokens=1))
    assert len(tokens(work)) == 60
    waiter.join()
    assert left == [0]


@pytest.mark.parametrize(
    ("error", "build"),
    [
        (RequestInvalid, lambda: Request("a", np.array([], dtype=np.int64), max_tokens=1)),
        (RequestInvalid, lambda: Request("a", np.array([VOCAB]), max_tokens=1)),
        (RequestInvalid, lambda: Request("a", np.array([-1]), max_tokens=1)),
        (RequestInvalid, lambda: Request("a", prompt(3), max_tokens=-1)),
        (PoolExhausted, lambda: Request("a", prompt(3), max_tokens=10_000)),
    ],
    ids=["empty prompt", "token id too high", "negative token id", "negative max_tokens", "too long"],
)
def test_bad_requests_are_refused_and_nothing_is_held(
    cell: Cell, error: type[BraidError], build: object
) -> None:
    with pytest.raises(error):
        cell.engine.submit(build())  # type: ignore[operator]
    assert in_use(cell) == (0, 0)
    good = Request("good", prompt(5), max_tokens=2)
    cell.engine.submit(good)
    assert len(tokens(good)) == 2


def test_a_live_request_id_cannot_be_used_again(cell: Cell) -> None:
    first = Request("same", prompt(5), max_tokens=240)
    cell.engine.submit(first)
    with pytest.raises(RequestInvalid, match="same"):
        cell.engine.submit(Request("same", prompt(5), max_tokens=1))
    assert len(tokens(first)) == 240
    again = Request("same", prompt(5), max_tokens=1)
    cell.engine.submit(again)  # free again after its end
    assert len(tokens(again)) == 1


def test_little_memory_makes_requests_wait_and_all_finish(make_cell: CellMaker) -> None:
    # Pages for two whole requests and a bit: the others wait for memory, not for a place.
    page_bytes = 8 * 2 * 2 * 36 * 4
    cell = make_cell()
    assert cell.walker.memory(Role.TARGET).pages.unit_bytes == page_bytes  # type: ignore[union-attr]
    slot_bytes = cell.walker.memory(Role.TARGET).slots.unit_bytes  # type: ignore[union-attr]
    pool_bytes = 12 * slot_bytes + 33 * page_bytes
    tight = make_cell(limits=Limits(64, 6, 256, 8, pool_bytes))
    works = [Request(f"{i}", prompt(90, i), max_tokens=30) for i in range(6)]
    for work in works:
        tight.engine.submit(work)
    assert [len(tokens(work)) for work in works] == [30] * 6
    assert in_use(tight) == (0, 0)


def test_a_pool_too_small_for_one_sequence_is_refused(make_cell: CellMaker) -> None:
    with pytest.raises(ConfigInvalid, match="pool_bytes"):
        make_cell(limits=Limits(64, 6, 256, 8, pool_bytes=1000))


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigInvalid, match="page_size"):
        Limits(page_size=0)
    assert LIMITS.max_tokens == 64
