"""Pages and slots: nothing leaks, nothing is shared, and a step that is forgotten never counts."""

from __future__ import annotations

import numpy as np
import pytest
from braid_orchestrator.memory import VERSIONS, RoleMemory, SequenceMemory, Span, Staged
from braid_orchestrator.pool import Pool
from braid_wire.batch import NO_PAGE, NO_SLOT, Pools, check
from braid_wire.errors import PoolExhausted, ReferenceStale, StepOrder
from braid_wire.layers import Mode, Role
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

PAGE_SIZE = 4


def make(pages: int = 32, slots: int = 8) -> RoleMemory:
    return RoleMemory(
        Role.TARGET,
        Pool("pages", np.zeros(pages, dtype=np.int64), 64),
        Pool("slots", np.zeros(slots, dtype=np.int64), 128),
        PAGE_SIZE,
    )


def span(memory: SequenceMemory, tokens: int, mode: Mode = Mode.EXTEND) -> Span:
    return Span(memory, np.arange(tokens, dtype=np.int64), mode)


def valid(memory: RoleMemory, staged: Staged) -> None:
    """The batch obeys the contract that services enforce."""
    assert memory.pages is not None
    assert memory.slots is not None
    pools = Pools(PAGE_SIZE, memory.pages.generation, memory.slots.generation)
    check(staged.batch.shared(), staged.batch.num_tokens, pools)


def test_commit_swaps_versions_and_advances() -> None:
    memory, sequence = make(), SequenceMemory(1)
    first = memory.stage([span(sequence, 5)], epoch=1, step=1)
    valid(memory, first)
    assert first.batch.state_in is not None
    assert list(first.batch.state_in) == [NO_SLOT]
    memory.commit(first)
    held = sequence.slot
    second = memory.stage([span(sequence, 1, Mode.DECODE)], epoch=1, step=2)
    valid(memory, second)
    assert second.batch.state_in is not None
    assert second.batch.state_out is not None
    assert list(second.batch.state_in) == [held]
    assert second.batch.state_out[-1] != held
    assert list(second.batch.positions) == [5]
    memory.commit(second)
    assert (sequence.length, sequence.slot) == (6, second.batch.state_out[-1])


def test_abort_leaves_the_committed_state_current() -> None:
    memory, sequence = make(), SequenceMemory(1)
    memory.commit(memory.stage([span(sequence, 3)], 1, 1))
    before = (sequence.length, sequence.slot, list(sequence.pages))
    staged = memory.stage([span(sequence, 6)], 1, 2)
    memory.abort(staged)
    assert (sequence.length, sequence.slot) == before[:2]
    assert sequence.pages[: len(before[2])] == before[2]
    with pytest.raises(ReferenceStale):  # a late writer of the aborted step is refused
        valid(memory, staged)


def test_a_replayed_step_reads_what_the_first_try_read() -> None:
    memory, sequence = make(), SequenceMemory(1)
    memory.commit(memory.stage([span(sequence, 3)], 1, 1))
    first = memory.stage([span(sequence, 2)], 1, 2)
    memory.abort(first)
    second = memory.stage([span(sequence, 2)], 2, 3)
    valid(memory, second)
    for name in ("state_in", "page_table", "positions", "context_lens"):
        assert np.array_equal(getattr(first.batch, name), getattr(second.batch, name)), name


def test_the_state_that_a_commit_replaced_is_stale() -> None:
    memory, sequence = make(), SequenceMemory(1)
    memory.commit(memory.stage([span(sequence, 3)], 1, 1))
    second = memory.stage([span(sequence, 1)], 1, 2)
    memory.commit(second)
    with pytest.raises(ReferenceStale):
        valid(memory, second)


def test_a_sequence_released_inside_a_step_is_freed_when_it_is_settled() -> None:
    memory, sequence = make(), SequenceMemory(1)
    staged = memory.stage([span(sequence, 3)], 1, 1)
    memory.release(sequence)
    valid(memory, staged)  # the step that is under way still owns what it writes
    memory.commit(staged)
    assert memory.pages is not None
    assert memory.slots is not None
    assert (memory.pages.used, memory.slots.used) == (0, 0)
    with pytest.raises(ReferenceStale):
        memory.stage([span(sequence, 1)], 1, 2)


def test_a_sequence_released_while_it_verifies_keeps_its_slots_until_the_step_is_settled() -> None:
    """Whatever the step still writes for it, nobody else owns; afterwards every reference is stale."""
    for settle in ("commit", "abort"):
        memory, sequence = make(slots=6), SequenceMemory(1)
        memory.commit(memory.stage([span(sequence, 3)], 1, 1))
        staged = memory.stage([span(sequence, 4, Mode.VERIFY)], 1, 2)
        memory.release(sequence)
        assert memory.slots is not None
        assert staged.batch.state_out is not None
        written = set(staged.batch.state_out.tolist())
        assert len(written) == 4
        others = memory.slots.take(memory.slots.available)
        assert not written & set(others)
        memory.slots.give(others)
        valid(memory, staged)
        if settle == "commit":
            memory.commit(staged, [2])
        else:
            memory.abort(staged)
        assert memory.slots.used == 0
        with pytest.raises(ReferenceStale):
            valid(memory, staged)


def test_a_sequence_is_in_one_step_at_a_time() -> None:
    memory, sequence = make(), SequenceMemory(1)
    memory.stage([span(sequence, 3)], 1, 1)
    with pytest.raises(StepOrder):
        memory.stage([span(sequence, 1)], 1, 2)


@pytest.mark.parametrize(("pages", "slots", "pool"), [(2, 8, "pages"), (32, 1, "slots")])
def test_exhaustion_takes_nothing(pages: int, slots: int, pool: str) -> None:
    memory, sequence = make(pages, slots), SequenceMemory(1)
    with pytest.raises(PoolExhausted) as error:
        memory.acquire(sequence, 12)
    assert error.value.metadata["pool"] == pool
    assert memory.pages is not None
    assert memory.slots is not None
    assert (memory.pages.used, memory.slots.used) == (0, 0)
    assert not sequence.pages
    assert not sequence.spares


def test_pages_beyond_the_span_stay_out_of_the_table() -> None:
    memory, long, short = make(), SequenceMemory(1), SequenceMemory(2)
    memory.acquire(long, 60)
    staged = memory.stage([span(long, 2), span(short, 9)], 1, 1)
    assert staged.batch.page_table is not None
    assert staged.batch.page_table.shape == (2, 3)
    assert list(staged.batch.page_table[0, 1:]) == [NO_PAGE, NO_PAGE]


class MemoryMachine(RuleBasedStateMachine):
    """Random steps, commits, aborts and releases against what a plain model of them says."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = make(pages=24, slots=10)
        self.sequences: list[SequenceMemory] = []
        self.lengths: dict[int, int] = {}
        self.staged: list[Staged] = []
        self.steps = 0

    @rule()
    def open(self) -> None:
        sequence = SequenceMemory(len(self.lengths))
        self.sequences.append(sequence)
        self.lengths[sequence.sequence_id] = 0

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def stage(self, data: st.DataObject) -> None:
        free = [s for s in self.sequences if not s.staged and not s.released]
        if not free:
            return
        chosen = data.draw(st.lists(st.sampled_from(free), min_size=1, max_size=3, unique_by=id))
        spans = [span(s, data.draw(st.integers(1, 9))) for s in chosen]
        self.steps += 1
        try:
            staged = self.memory.stage(spans, 1, self.steps)
        except PoolExhausted:
            assert not any(s.staged for s in chosen)
            return
        valid(self.memory, staged)
        self.staged.append(staged)

    @precondition(lambda self: self.staged)
    @rule(commit=st.booleans())
    def settle(self, commit: bool) -> None:
        staged = self.staged.pop(0)
        if commit:
            for part in staged.spans:
                self.lengths[part.memory.sequence_id] += len(part.tokens)
            self.memory.commit(staged)
        else:
            self.memory.abort(staged)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        self.memory.release(sequence)
        if not sequence.staged:
            self.sequences.remove(sequence)

    @invariant()
    def books_balance(self) -> None:
        assert self.memory.pages is not None
        assert self.memory.slots is not None
        self.sequences = [s for s in self.sequences if s.staged or not s.released]
        pages = [page for s in self.sequences for page in s.pages]
        slots = [x for s in self.sequences for x in (*s.spares, s.slot) if x != NO_SLOT]
        assert len(set(pages)) == len(pages) == self.memory.pages.used
        assert len(set(slots)) == len(slots) == self.memory.slots.used
        for sequence in self.sequences:
            assert sequence.length == self.lengths[sequence.sequence_id]
            assert (sequence.slot != NO_SLOT) == (sequence.length > 0)
            assert len(sequence.spares) + (sequence.slot != NO_SLOT) in (0, VERSIONS)


TestMemoryMachine = MemoryMachine.TestCase
TestMemoryMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def lanes_valid(memory: RoleMemory, staged: Staged, sequences: int) -> None:
    """Both lanes of a step obey the contract, each by itself."""
    assert memory.pages is not None
    assert memory.slots is not None
    pools = Pools(PAGE_SIZE, memory.pages.generation, memory.slots.generation)
    for lane in staged.batch.split(sequences):
        check(lane.shared(), lane.num_tokens, pools)


@pytest.mark.parametrize("fed", [0, 5])
def test_a_prompt_in_both_lanes_hands_its_state_over(fed: int) -> None:
    memory, sequence, other = make(), SequenceMemory(1), SequenceMemory(2)
    if fed:
        memory.commit(memory.stage([span(sequence, fed)], 1, 1))
    committed = sequence.slot
    first, second = span(sequence, 7).cut(3)
    staged = memory.stage([first, second, span(other, 2)], 1, 2)
    lanes_valid(memory, staged, 1)
    batch = staged.batch
    assert batch.state_in is not None
    assert batch.state_out is not None
    assert list(batch.positions) == [*range(fed, fed + 7), 0, 1]
    assert list(batch.context_lens) == [fed, fed + 3, 0]
    assert batch.state_in[0] == committed
    assert batch.state_out[2] == batch.state_in[1] != NO_SLOT
    assert len({committed, batch.state_out[2], batch.state_out[6], batch.state_out[8]}) == 4
    memory.commit(staged)
    assert (sequence.length, sequence.slot) == (fed + 7, batch.state_out[6])
    assert len(sequence.spares) + 1 == VERSIONS  # the slot between the lanes is free again
    for one in (sequence, other):
        memory.release(one)
    assert (memory.pages.used, memory.slots.used) == (0, 0)  # type: ignore[union-attr]


def test_a_step_in_two_lanes_that_is_forgotten_leaves_what_was() -> None:
    memory, sequence = make(), SequenceMemory(1)
    memory.commit(memory.stage([span(sequence, 3)], 1, 1))
    before = sequence.slot, sequence.length
    staged = memory.stage(list(span(sequence, 6).cut(2)), 1, 2)
    memory.abort(staged)
    assert (sequence.slot, sequence.length) == before
    with pytest.raises(ReferenceStale):
        lanes_valid(memory, staged, 1)  # late writers of the forgotten step are refused
    again = memory.stage(list(span(sequence, 6).cut(2)), 1, 3)
    lanes_valid(memory, again, 1)
    memory.release(sequence)
    memory.commit(again)
    assert (memory.pages.used, memory.slots.used) == (0, 0)  # type: ignore[union-attr]


def test_only_prompts_are_cut() -> None:
    sequence = SequenceMemory(1)
    for wrong in (
        span(sequence, 1, Mode.DECODE),
        span(sequence, 3, Mode.VERIFY),
        span(sequence, 4).cut(2)[1],
    ):
        with pytest.raises(StepOrder):
            wrong.cut(1)
    for at in (0, 4, -1):
        with pytest.raises(StepOrder):
            span(sequence, 4).cut(at)


@pytest.mark.parametrize("kept", [1, 2, 3, 4])
def test_verifying_keeps_the_state_after_the_last_token_kept(kept: int) -> None:
    memory, sequence, other = make(), SequenceMemory(1), SequenceMemory(2)
    memory.commit(memory.stage([span(sequence, 5), span(other, 2)], 1, 1))
    staged = memory.stage([span(sequence, 4, Mode.VERIFY), span(other, 1, Mode.DECODE)], 1, 2)
    valid(memory, staged)
    out = staged.batch.state_out
    assert out is not None
    assert len(set(out.tolist()) | {sequence.slot, other.slot}) == 7  # every state in a slot of its own
    memory.commit(staged, [kept, 1])
    assert (sequence.length, sequence.slot) == (5 + kept, out[kept - 1])
    assert (other.length, other.slot) == (3, out[4])
    assert len(sequence.spares) + 1 == VERSIONS
    for one in (sequence, other):
        memory.release(one)
    assert (memory.pages.used, memory.slots.used) == (0, 0)  # type: ignore[union-attr]


def test_a_count_that_cannot_be_kept_commits_nothing() -> None:
    memory, sequence, other = make(), SequenceMemory(1), SequenceMemory(2)
    memory.commit(memory.stage([span(sequence, 5), span(other, 2)], 1, 1))
    staged = memory.stage([span(sequence, 3, Mode.VERIFY), span(other, 2)], 1, 2)
    for wrong in ([0, 2], [4, 2], [3, 1]):
        with pytest.raises(StepOrder):
            memory.commit(staged, wrong)
    assert (sequence.length, other.length) == (5, 2)
    memory.commit(staged, [1, 2])
    assert (sequence.length, other.length) == (6, 4)


def test_units_are_free_when_nobody_holds_them_and_nothing_keeps_them() -> None:
    pool = Pool("pages", np.zeros(4, dtype=np.int64), 64)
    one, two = pool.take(2)
    pool.hold([one])
    assert not pool.writable(one)
    pool.give([one])
    assert pool.writable(one)
    pool.keep(one)
    assert not pool.writable(one)
    before = pool.generation.copy()
    pool.give([one])
    assert (pool.used, pool.cached, pool.free, pool.available) == (1, 1, 2, 3)
    pool.hold([one])  # from the cache alone
    assert (pool.used, pool.cached) == (2, 0)
    pool.drop(one)
    assert np.array_equal(pool.generation, before)  # its holder reads it still
    pool.give([one, two])
    assert (pool.used, pool.cached, pool.free) == (0, 0, 4)
    assert (pool.generation[[one, two]] > before[[one, two]]).all()


def test_room_is_made_for_what_is_wanted_and_only_where_that_is_enough() -> None:
    pool = Pool("slots", np.zeros(3, dtype=np.int64), 64)
    units = pool.take(2)
    for unit in units:
        pool.keep(unit)
    pool.give(units)
    asked: list[int] = []

    def make_room(count: int) -> None:
        asked.append(count)
        for _ in range(count):
            pool.drop(units.pop())

    pool.make_room = make_room
    with pytest.raises(PoolExhausted):
        pool.take(4)
    assert asked == []  # nothing is dropped in vain
    assert len(pool.take(2)) == 2
    assert asked == [1]


def test_states_are_kept_behind_the_tokens_that_a_span_names() -> None:
    memory, sequence = make(), SequenceMemory(1)
    memory.commit(memory.stage([span(sequence, 2)], 1, 1))
    asked = Span(sequence, np.arange(10, dtype=np.int64), Mode.EXTEND, keep=(2, 6, 10))
    staged = memory.stage([asked], 1, 2)
    valid(memory, staged)
    out = staged.batch.state_out
    assert out is not None
    assert np.flatnonzero(out != NO_SLOT).tolist() == [1, 5, 9]
    assert sequence.kept == {}  # nothing counts before the commit
    memory.commit(staged)
    assert sequence.kept == {4: out[1], 8: out[5], 12: out[9]}
    assert sequence.slot == out[9]
    memory.commit(memory.stage([span(sequence, 1, Mode.DECODE)], 1, 3))
    assert memory.slots is not None
    # The one that was current is kept: no step writes to it, and its references stay good.
    assert out[9] not in (*sequence.spares, sequence.slot)
    assert memory.slots.generation[out[9]] == staged.batch.state_out_generations[9]  # type: ignore[index]
    memory.release(sequence)
    assert memory.slots.used == 0


def test_a_step_that_is_forgotten_keeps_no_states() -> None:
    memory, sequence = make(), SequenceMemory(1)
    staged = memory.stage([Span(sequence, np.arange(8, dtype=np.int64), Mode.EXTEND, keep=(4, 8))], 1, 1)
    memory.abort(staged)
    assert (sequence.kept, sequence.slot, len(sequence.spares)) == ({}, NO_SLOT, VERSIONS)
    with pytest.raises(ReferenceStale):
        valid(memory, staged)
    memory.release(sequence)
    assert memory.slots is not None
    assert memory.slots.used == 0


def test_kept_states_of_a_prompt_in_both_lanes() -> None:
    for at, numbers in ((4, [[4], [4, 7]]), (5, [[4, 5], [3, 6]])):
        memory, sequence = make(), SequenceMemory(1)
        whole = Span(sequence, np.arange(11, dtype=np.int64), Mode.EXTEND, keep=(4, 8))
        pieces = whole.cut(at)
        assert [list(piece.states) for piece in pieces] == numbers
        staged = memory.stage(pieces, 1, 1)
        lanes_valid(memory, staged, 1)
        out = staged.batch.state_out
        assert out is not None
        memory.commit(staged)
        assert sequence.kept == {4: out[3], 8: out[7]}
        assert (sequence.length, sequence.slot) == (11, out[10])
        assert len(sequence.spares) + 1 == VERSIONS
        memory.release(sequence)
        assert memory.slots is not None
        assert memory.slots.used == 0


@pytest.mark.parametrize("counted", [1, 2, 3, 4])
def test_verified_states_are_kept_as_far_as_their_tokens_count(counted: int) -> None:
    memory, sequence = make(), SequenceMemory(1)
    memory.commit(memory.stage([span(sequence, 6)], 1, 1))
    asked = Span(sequence, np.arange(4, dtype=np.int64), Mode.VERIFY, keep=(2, 4))
    staged = memory.stage([asked], 1, 2)
    out = staged.batch.state_out
    assert out is not None
    memory.commit(staged, [counted])
    assert sequence.kept == {6 + number: out[number - 1] for number in (2, 4) if number <= counted}
    assert sequence.slot == out[counted - 1]
    memory.release(sequence)
    assert memory.slots is not None
    assert memory.slots.used == 0


def shared_prefix(memory: RoleMemory) -> tuple[SequenceMemory, list[int], int]:
    """A sequence of 10 tokens, its two whole pages and the state behind them."""
    first = SequenceMemory(1)
    memory.commit(memory.stage([Span(first, np.arange(10, dtype=np.int64), Mode.EXTEND, keep=(8,))], 1, 1))
    return first, first.pages[:2], first.kept[8]


def test_a_sequence_behind_a_shared_prefix_writes_elsewhere() -> None:
    memory, second = make(), SequenceMemory(2)
    first, pages, slot = shared_prefix(memory)
    memory.adopt(second, 8, pages, slot)
    memory.release(first)
    staged = memory.stage([span(second, 3)], 1, 2)
    valid(memory, staged)
    batch = staged.batch
    assert batch.page_table is not None
    assert batch.state_in is not None
    assert batch.state_out is not None
    assert batch.page_table[0, :2].tolist() == pages
    assert batch.page_table[0, 2] not in pages
    assert (batch.state_in[0], batch.context_lens[0]) == (slot, 8)
    assert slot not in batch.state_out
    assert memory.slots is not None
    memory.slots.keep(slot)
    before = memory.slots.generation[slot]
    memory.commit(staged)
    assert memory.slots.generation[slot] == before
    assert (memory.slots.cached, second.length) == (1, 11)
    memory.commit(memory.stage([span(second, 1, Mode.DECODE)], 1, 3))
    assert slot not in (*second.spares, second.slot)
    memory.release(second)
    memory.slots.drop(slot)
    assert memory.pages is not None
    assert (memory.pages.used, memory.slots.used) == (0, 0)


def test_a_step_that_is_forgotten_leaves_the_shared_prefix_as_it_was() -> None:
    memory, second = make(), SequenceMemory(2)
    _, pages, slot = shared_prefix(memory)
    memory.adopt(second, 8, pages, slot)
    before = memory.slots.generation[slot]  # type: ignore[union-attr]
    memory.abort(memory.stage([span(second, 3)], 1, 2))
    again = memory.stage([span(second, 3)], 2, 3)
    valid(memory, again)
    assert again.batch.state_in is not None
    assert again.batch.state_in[0] == slot
    assert memory.slots.generation[slot] == before  # type: ignore[union-attr]


def test_a_prefix_is_adopted_whole_and_between_steps() -> None:
    memory, second = make(), SequenceMemory(2)
    _, pages, slot = shared_prefix(memory)
    with pytest.raises(StepOrder, match="pages"):
        memory.adopt(second, 7, pages, slot)  # it would end inside a page
    memory.acquire(second, 8)
    own = list(second.pages)
    memory.adopt(second, 8, pages, slot)
    assert second.pages == pages
    assert memory.pages is not None
    assert all(memory.pages.idle(page) for page in own)  # given back
    with pytest.raises(StepOrder):
        memory.adopt(second, 8, pages, slot)  # it is as long already
    memory.stage([span(second, 1)], 1, 2)
    with pytest.raises(StepOrder):
        memory.adopt(second, 12, [*pages, 30], slot)
    with pytest.raises(StepOrder):
        memory.restart(second)


def test_a_sequence_begins_again_with_nothing() -> None:
    memory, sequence = make(), SequenceMemory(1)
    memory.commit(memory.stage([Span(sequence, np.arange(9, dtype=np.int64), Mode.EXTEND, keep=(4,))], 1, 1))
    memory.restart(sequence)
    assert (sequence.length, sequence.slot, sequence.pages, sequence.kept) == (0, NO_SLOT, [], {})
    assert (memory.pages.used, memory.slots.used) == (0, 0)  # type: ignore[union-attr]
    valid(memory, memory.stage([span(sequence, 3)], 1, 2))


def test_room_for_a_step_is_known_before_it_is_staged() -> None:
    memory, sequence, other = make(slots=5), SequenceMemory(1), SequenceMemory(2)
    memory.acquire(other, 1)
    pieces = span(sequence, 6).cut(2)
    assert memory.has_room(pieces)
    memory.acquire(SequenceMemory(3), 1, versions=1)
    assert memory.has_room([span(sequence, 6)])
    assert not memory.has_room(pieces)
    with pytest.raises(PoolExhausted):
        memory.stage(pieces, 1, 1)


def test_a_page_is_left_for_others_where_that_is_asked() -> None:
    memory = make(pages=4)
    with pytest.raises(PoolExhausted, match="2 for others"):
        memory.acquire(SequenceMemory(1), 12, margin=2)
    memory.acquire(SequenceMemory(1), 12, margin=1)


def test_versions_are_counted_by_what_became_of_them() -> None:
    memory, sequence = make(), SequenceMemory(1)

    def counted() -> tuple[int, int, int]:
        return memory.versions.committed, memory.versions.dropped, memory.versions.aborted

    memory.commit(memory.stage([span(sequence, 5)], 1, 1))
    assert counted() == (1, 0, 0)
    # A guess that is verified writes a version behind every token; the last that counts is taken.
    memory.commit(memory.stage([span(sequence, 4, Mode.VERIFY)], 1, 2), [2])
    assert counted() == (2, 3, 0)
    memory.abort(memory.stage([span(sequence, 3, Mode.VERIFY)], 1, 3))
    assert counted() == (2, 3, 3)
    # What the prefix cache has asked to be kept is taken too.
    memory.commit(memory.stage([Span(sequence, np.arange(6, dtype=np.int64), Mode.EXTEND, keep=(2,))], 1, 4))
    assert counted() == (4, 3, 3)
