"""Where a step is split, and when."""

from __future__ import annotations

import numpy as np
from braid_orchestrator.memory import SequenceMemory, Span
from braid_orchestrator.overlap import ALIGNMENT, Overlap, OverlapMode, divide
from braid_wire.layers import Mode, Role
from hypothesis import given
from hypothesis import strategies as st


def span(tokens: int, mode: Mode = Mode.EXTEND) -> Span:
    return Span(SequenceMemory(tokens), np.arange(tokens, dtype=np.int64), mode)


def steps() -> st.SearchStrategy[list[Span]]:
    decode = st.just(1).map(lambda n: span(n, Mode.DECODE))
    prompt = st.integers(1, 5 * ALIGNMENT).map(span)
    return st.lists(st.one_of(decode, prompt), min_size=1, max_size=12)


@given(steps())
def test_a_division_keeps_every_token_in_its_place(spans: list[Span]) -> None:
    found = divide(spans)
    if found is None:
        assert len(spans) == 1
        assert len(spans[0].tokens) < 2 * ALIGNMENT + ALIGNMENT // 2
        return
    assert 0 < found.sequences < len(found.spans)
    joined: dict[int, list[int]] = {}
    for part in found.spans:
        joined.setdefault(id(part.memory), []).extend(part.tokens.tolist())
    assert list(joined.values()) == [one.tokens.tolist() for one in spans]
    cut = [part for part in found.spans if part.follows]
    assert len(cut) <= 1
    for part in cut:
        assert found.spans[found.sequences] is part  # lane 1 begins with it
        assert part.follows % ALIGNMENT == 0


@given(st.integers(2, 64))
def test_equal_spans_are_halved(count: int) -> None:
    found = divide([span(1, Mode.DECODE) for _ in range(count)])
    assert found is not None
    assert abs(2 * found.sequences - count) <= 1


def test_a_long_prompt_is_cut_in_its_middle() -> None:
    found = divide([span(8 * ALIGNMENT)])
    assert found is not None
    assert [len(part.tokens) for part in found.spans] == [4 * ALIGNMENT, 4 * ALIGNMENT]
    assert divide([span(1, Mode.DECODE)]) is None


def drive(
    overlap: Overlap, seconds: dict[int, float], count: int, tokens: int = 1, mode: Mode = Mode.DECODE
) -> list[int]:
    """Lanes of each step of a run in which a way takes so long; each step is the first of new sequences."""
    ways = []
    for _ in range(count):
        spans = [span(tokens, mode) for _ in range(8)]
        choice = overlap.choose(Role.TARGET, spans)
        lanes = 1 if choice.division is None else 2
        for one in spans:
            one.memory.length += tokens  # as the commit does
        choice.took(lanes, seconds[lanes])
        ways.append(lanes)
    return ways


def test_the_faster_way_is_found_and_kept() -> None:
    for faster, seconds in ((2, {1: 1.0, 2: 0.7}), (1, {1: 1.0, 2: 0.99}), (1, {1: 1.0, 2: 1.6})):
        for tokens, mode in ((1, Mode.DECODE), (64, Mode.EXTEND)):
            ways = drive(Overlap(OverlapMode.AUTO), seconds, 1000, tokens, mode)
            assert ways[20:500] == [faster] * 480
            assert ways.count(3 - faster) < 20


def test_a_way_that_becomes_faster_is_noticed() -> None:
    overlap = Overlap(OverlapMode.AUTO)
    assert drive(overlap, {1: 1.0, 2: 1.5}, 600)[-1] == 1
    assert drive(overlap, {1: 1.0, 2: 0.5}, 3000)[-1] == 2


def test_on_splits_whatever_can_be_split() -> None:
    assert drive(Overlap(OverlapMode.ON), {1: 1.0, 2: 9.0}, 50) == [2] * 50
