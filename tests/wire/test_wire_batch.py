"""Batches: the rules of the contract, and the one table by which they are split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
from braid_wire.batch import FIELDS, NO_SLOT, SHARED_DTYPES, Axis, Batch, Pools, check, cut_field, mode_label
from braid_wire.errors import BatchInvalid, BraidError, FieldUndeclared, ReferenceStale
from braid_wire.layers import Role
from hypothesis import given, settings
from hypothesis import strategies as st

PAGE_SIZE = 4
POOLS = Pools(PAGE_SIZE, np.full(64, 2), np.full(64, 3))


def make(lengths: list[int], contexts: list[int], mrope: bool = False) -> Batch:
    """A correct batch: sequence b has pages 8·b …, state slots b and 20 + b."""
    total, sequences = sum(lengths), len(lengths)
    ends = np.cumsum([0, *lengths])
    out = np.full(total, NO_SLOT, np.int32)
    for b, length in enumerate(lengths):
        if length:
            out[ends[b + 1] - 1] = 20 + b
    pages = np.arange(sequences * 8, dtype=np.int32).reshape(sequences, 8)
    state_in = np.array([b if context else NO_SLOT for b, context in enumerate(contexts)], np.int32)
    return Batch(
        role=Role.TARGET,
        epoch=1,
        step=1,
        lane=0,
        input_ids=np.arange(total),
        positions=np.arange(total) + 100,
        cu_seqlens=ends.astype(np.int32),
        context_lens=np.array(contexts, np.int32),
        modes=np.array(
            [int(length == 1 and context > 0) for length, context in zip(lengths, contexts, strict=True)],
            np.uint8,
        ),
        sequence_ids=np.arange(sequences) + 50,
        mrope_positions=np.arange(3 * total).reshape(3, total) if mrope else None,
        page_table=pages,
        page_generations=np.full_like(pages, 2, dtype=np.int64),
        state_in=state_in,
        state_in_generations=np.where(state_in >= 0, 3, 0),
        state_out=out,
        state_out_generations=np.where(out >= 0, 3, 0),
    )


def verify(batch: Batch) -> None:
    check(batch.shared(), batch.num_tokens, POOLS)


def test_a_correct_batch_passes() -> None:
    batch = make([3, 1, 0, 2], [0, 7, 4, 6])
    verify(batch)
    for name, array in batch.shared().items():
        assert str(SHARED_DTYPES[name]).removeprefix("torch.") == array.dtype.name


def put(name: str, at: int | tuple[int, int], value: int) -> Callable[[Batch], Batch]:
    def change(batch: Batch) -> Batch:
        array = getattr(batch, name).copy()
        array[at] = value
        return replace(batch, **{name: array})

    return change


def narrow(batch: Batch) -> Batch:
    if batch.page_table is None or batch.page_generations is None:
        raise ValueError("the batch has no pages")
    return replace(batch, page_table=batch.page_table[:, :1], page_generations=batch.page_generations[:, :1])


def drop(name: str) -> Callable[[Batch], Batch]:
    return lambda batch: replace(batch, **{name: None})


RULES: list[tuple[str, Callable[[Batch], Batch], type[BraidError]]] = [
    ("cu_seqlens starts late", put("cu_seqlens", 0, 1), BatchInvalid),
    ("cu_seqlens ends early", put("cu_seqlens", -1, 5), BatchInvalid),
    ("cu_seqlens falls", put("cu_seqlens", 1, 5), BatchInvalid),
    ("context negative", put("context_lens", 0, -1), BatchInvalid),
    ("context huge", put("context_lens", 1, 2**31 - 1), BatchInvalid),
    ("mode unknown", put("modes", 0, 3), BatchInvalid),
    ("decode of three", put("modes", 0, 1), BatchInvalid),
    ("decode of none", put("modes", 2, 1), BatchInvalid),
    ("sequence twice", put("sequence_ids", 1, 50), BatchInvalid),
    ("page missing", put("page_table", (1, 1), -1), BatchInvalid),
    ("page too high", put("page_table", (1, 0), 64), BatchInvalid),
    ("pages too few", narrow, BatchInvalid),
    ("page written twice", put("page_table", (1, 1), 0), BatchInvalid),
    ("page recycled", put("page_generations", (1, 1), 1), ReferenceStale),
    ("no pages", drop("page_table"), BatchInvalid),
    ("state_in without context", put("context_lens", 1, 0), BatchInvalid),
    ("context without state_in", put("state_in", 1, -1), BatchInvalid),
    ("state_in too high", put("state_in", 1, 64), BatchInvalid),
    ("state_in below −1", put("state_in", 1, -2), BatchInvalid),
    ("state_in recycled", put("state_in_generations", 1, 4), ReferenceStale),
    ("state_out too high", put("state_out", 2, 64), BatchInvalid),
    ("state_out twice", put("state_out", 2, 21), BatchInvalid),
    ("state_out reads", put("state_out", 2, 1), BatchInvalid),
    ("state_out recycled", put("state_out_generations", 2, 4), ReferenceStale),
    ("no states", drop("state_out"), BatchInvalid),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule[0])
def test_rules(rule: tuple[str, Callable[[Batch], Batch], type[BraidError]]) -> None:
    _, spoil, error = rule
    with pytest.raises(error):
        verify(spoil(make([3, 1, 0, 2], [0, 7, 4, 6])))


def test_lengths_do_not_wrap() -> None:
    """In 32 bits every one of these differences is positive."""
    batch = make([3, 1, 0, 2], [0, 7, 4, 6])
    wraps = np.array([0, 1431655766, 2863311532 - 2**32, 6, 6], np.int64).astype(np.int32)
    with pytest.raises(BatchInvalid, match="cu_seqlens"):
        verify(replace(batch, cu_seqlens=wraps))


def test_unneeded_pages_may_be_anything() -> None:
    batch = make([3, 1], [0, 7])
    verify(put("page_table", (0, 5), -1)(put("page_generations", (0, 5), 99)(batch)))


def test_sequences_may_share_a_prefix_but_not_a_written_page() -> None:
    batch = make([1, 1], [4, 4])
    shared = put("page_table", (1, 0), 0)(batch)
    verify(shared)
    with pytest.raises(BatchInvalid):
        verify(put("page_table", (1, 1), 1)(shared))


def test_pools_that_a_service_lacks_are_not_checked() -> None:
    arrays = make([3, 1], [0, 7]).shared()
    states = {name: array for name, array in arrays.items() if not name.startswith("page_")}
    check(states, 4, Pools(0, None, POOLS.slot_generation))
    pages = {name: array for name, array in arrays.items() if not name.startswith("state_")}
    check(pages, 4, Pools(PAGE_SIZE, POOLS.page_generation, None))


# Splitting.

spans = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=2, max_size=6).filter(
    lambda found: sum(length for length, _ in found) > 0
)


@settings(max_examples=200, deadline=None)
@given(spans, st.data())
def test_halves_concatenate_back(found: list[tuple[int, int]], data: st.DataObject) -> None:
    batch = make([length for length, _ in found], [context for _, context in found], mrope=True)
    at = data.draw(st.integers(1, len(found) - 1))
    if batch.cu_seqlens[at] in (0, batch.num_tokens):
        return  # an empty half is no batch
    first, second = batch.split(at)
    assert (first.lane, second.lane) == (0, 1)
    for half in (first, second):
        verify(half)
    assert (first.num_sequences, second.num_sequences) == (at, len(found) - at)
    for item in fields(Batch):
        whole, parts = getattr(batch, item.name), [getattr(half, item.name) for half in (first, second)]
        axis = FIELDS[item.name]
        if axis in (Axis.TOKEN, Axis.SEQUENCE):
            assert np.array_equal(np.concatenate(parts), whole), item.name
        elif axis is Axis.TOKEN_DIM1:
            assert np.array_equal(np.concatenate(parts, axis=1), whole)
        elif axis is Axis.COPIED:
            assert parts == [whole, whole]
    assert np.array_equal(
        np.concatenate([first.cu_seqlens, second.cu_seqlens[1:] + first.num_tokens]), batch.cu_seqlens
    )


def test_mrope_is_cut_on_its_second_axis() -> None:
    """Three tokens in three sequences: cut on axis 0 it would fit just as well, and be wrong."""
    batch = make([1, 1, 1], [0, 0, 0], mrope=True)
    first, second = batch.split(1)
    assert first.mrope_positions is not None and second.mrope_positions is not None
    assert first.mrope_positions.tolist() == [[0], [3], [6]]
    assert second.mrope_positions.tolist() == [[1, 2], [4, 5], [7, 8]]


def test_a_field_without_an_axis_cannot_have_a_value() -> None:
    @dataclass(frozen=True)
    class Extended(Batch):
        mystery: np.ndarray | None = None

    cut = {Axis.TOKEN: 1, Axis.SEQUENCE: 1}
    assert cut_field("mystery", None, cut) == (None, None)
    with pytest.raises(FieldUndeclared, match="mystery"):
        cut_field("mystery", np.zeros(4), cut)
    batch = make([1, 2], [0, 0])
    values = {item.name: getattr(batch, item.name) for item in fields(Batch)}
    with pytest.raises(FieldUndeclared, match="mystery"):
        Extended(**values, mystery=np.zeros(3)).split(1)


def test_every_field_has_an_axis() -> None:
    assert {item.name for item in fields(Batch)} <= set(FIELDS)
    assert set(SHARED_DTYPES) <= set(FIELDS)


@pytest.mark.parametrize("at", [-1, 0, 2, 3])
def test_no_half_may_be_empty(at: int) -> None:
    with pytest.raises(BatchInvalid):
        make([1, 2], [0, 0]).split(at)


def test_fields_that_are_too_short_or_no_arrays() -> None:
    cut = {Axis.TOKEN: 3, Axis.SEQUENCE: 2}
    for name, value in (
        ("positions", np.zeros(3)),
        ("mrope_positions", np.zeros(9)),
        ("mrope_positions", np.zeros((3, 3))),
        ("modes", [1, 2, 3, 4]),
    ):
        with pytest.raises(BatchInvalid):
            cut_field(name, value, cut)


def test_mode_labels() -> None:
    assert [mode_label(np.array(modes)) for modes in ([0, 0], [1], [2, 2], [0, 1])] == [
        "extend",
        "decode",
        "verify",
        "mixed",
    ]
    assert make([1, 1], [3, 3]).mode == "decode"
