"""The quick check passes what the rules pass, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from braid_wire.batch import NO_PAGE, NO_SLOT, SHARED_DTYPES, Pools, check
from braid_wire.batch_check import BatchCheck
from braid_wire.errors import BatchInvalid, BraidError
from hypothesis import given, settings
from hypothesis import strategies as st

PAGES, SLOTS, PAGE_SIZE = 24, 12, 4
Arrays = dict[str, torch.Tensor]


def batch(spans: list[tuple[int, int]]) -> Arrays:
    """A correct batch of (context, tokens) spans; sequence b has six pages and two slots of its own."""
    lengths = [tokens for _, tokens in spans]
    ends = np.cumsum([0, *lengths])
    out = np.full(int(ends[-1]), NO_SLOT)
    for b, (_, tokens) in enumerate(spans):
        if tokens:
            out[ends[b + 1] - 1] = 2 * b + 1
    state_in = np.array([2 * b if context else NO_SLOT for b, (context, _) in enumerate(spans)])
    table = np.full((len(spans), 6), NO_PAGE)
    for b, (context, tokens) in enumerate(spans):
        needed = -(-(context + tokens) // PAGE_SIZE)
        table[b, :needed] = np.arange(6 * b, 6 * b + needed)
    values = {
        "cu_seqlens": ends,
        "context_lens": [context for context, _ in spans],
        "modes": [int(tokens == 1 and context > 0) for context, tokens in spans],
        "sequence_ids": np.arange(len(spans)) + 50,
        "page_table": table,
        "page_generations": np.where(table >= 0, 2, 0),
        "state_in": state_in,
        "state_in_generations": np.where(state_in >= 0, 3, 0),
        "state_out": out,
        "state_out_generations": np.where(out >= 0, 3, 0),
    }
    return {name: torch.tensor(np.array(value)).to(SHARED_DTYPES[name]) for name, value in values.items()}


def pools(pages: bool = True, slots: bool = True) -> Pools:
    return Pools(
        PAGE_SIZE,
        np.full(PAGES, 2, np.int64) if pages else None,
        np.full(SLOTS, 3, np.int64) if slots else None,
    )


def obeys(arrays: Arrays, tokens: int, against: Pools) -> bool:
    try:
        check({name: array.numpy() for name, array in arrays.items()}, tokens, against)
    except BraidError:
        return False
    return True


SPANS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 8)), min_size=1, max_size=4).filter(
    lambda spans: sum(tokens for _, tokens in spans) > 0
)
VALUES = st.sampled_from([-(2**31), -2, -1, 0, 1, 2, 3, 4, 5, 7, 11, 12, 23, 24, 2**31 - 1])


@settings(max_examples=400, deadline=None)
@given(spans=SPANS, data=st.data(), pages=st.booleans(), slots=st.booleans())
def test_both_checks_agree(
    spans: list[tuple[int, int]], data: st.DataObject, pages: bool, slots: bool
) -> None:
    arrays, against = batch(spans), pools(pages, slots)
    quick, tokens = BatchCheck(against), sum(count for _, count in spans)
    assert quick.holds(arrays, tokens)
    assert obeys(arrays, tokens, against)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(arrays)))
        flat = arrays[name].view(-1)
        value = data.draw(VALUES)
        if arrays[name].dtype is torch.uint8:
            value = abs(value) % 256
        flat[data.draw(st.integers(0, len(flat) - 1))] = value
        assert quick.holds(arrays, tokens) == obeys(arrays, tokens, against)


@given(spans=SPANS, delta=st.sampled_from([-1, 1]))
def test_another_number_of_tokens_is_refused(spans: list[tuple[int, int]], delta: int) -> None:
    arrays, tokens = batch(spans), sum(count for _, count in spans)
    assert not BatchCheck(pools()).holds(arrays, tokens + delta)


@pytest.mark.parametrize("name", sorted(SHARED_DTYPES))
def test_arrays_of_another_make_are_not_read(name: str) -> None:
    arrays = batch([(0, 3), (5, 1)])
    quick = BatchCheck(pools())
    for wrong in (arrays[name][:-1], arrays[name].double(), arrays[name][None], None):
        changed = (
            {**arrays, name: wrong} if wrong is not None else {k: v for k, v in arrays.items() if k != name}
        )
        assert not quick.holds(changed, 4)


def test_what_is_wrong_is_named() -> None:
    arrays = batch([(0, 3), (5, 1)])
    arrays["state_out"][2] = 3
    with pytest.raises(BatchInvalid, match="state_out names a slot twice"):
        BatchCheck(pools())(arrays, 4)
