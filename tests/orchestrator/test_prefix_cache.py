"""The prefix cache: what is shared is right, at the right position, and gone when it is in the way."""

from __future__ import annotations

import numpy as np
import pytest
from braid_orchestrator.memory import SequenceMemory
from braid_orchestrator.request import Failed, Request
from braid_orchestrator.store import Limits
from braid_wire.batch import NO_SLOT
from braid_wire.errors import PoolExhausted, ServiceFault
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from simulation import VOCAB, Holder, Simulation, answer, told

LIMITS = Limits(max_tokens=32, max_sequences=4, max_context=128, page_size=4)
FAR = 1000
"""A spacing of states that no prompt here reaches."""


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def serve(simulation: Simulation, tokens: list[int], made: int = 1, **more: object) -> Request:
    """One request from its beginning to its end, alone."""
    name = f"{len(tokens)}-{simulation.fed}-{made}"
    request = simulation.add(Request(name, np.array(tokens), max_tokens=made, **more))  # type: ignore[arg-type]
    simulation.run(500)
    assert told(request) == answer(tokens, made)
    return request


def test_the_next_turn_of_a_conversation_goes_on_behind_what_was_made() -> None:
    simulation = Simulation(LIMITS, spacing=FAR)
    first = serve(simulation, prompt(21), made=14)
    # 34 tokens were fed; the last state at the end of a page is the one behind 32.
    second = serve(simulation, [*first.tokens, *prompt(9, 1)], made=7)
    assert (first.cached_tokens, second.cached_tokens) == (0, 32)
    third = serve(simulation, [*second.tokens, *prompt(3, 2)])
    assert third.cached_tokens == 48


def test_the_same_prompt_again_computes_its_last_tokens_only() -> None:
    for length, cached in ((1, 0), (4, 0), (5, 4), (8, 4), (27, 24), (28, 24), (29, 28)):
        simulation = Simulation(LIMITS, spacing=FAR)
        tokens = prompt(length, length)
        assert serve(simulation, tokens).cached_tokens == 0
        fed = simulation.fed
        assert serve(simulation, tokens).cached_tokens == cached
        assert simulation.fed - fed == length - cached


def test_a_prefix_whose_state_was_not_kept_is_computed_once_more_and_then_kept() -> None:
    simulation = Simulation(LIMITS, spacing=FAR)
    shared = prompt(30)
    found = [serve(simulation, [*shared, seed % VOCAB, *prompt(20, seed)]).cached_tokens for seed in range(3)]
    # The branch lies at 30, the last whole page of it ends at 28: never the state of 30 or 32.
    assert found == [0, 0, 28]


@pytest.mark.parametrize("chunk", [0, 1, 3, 5])
def test_a_checkpoint_is_the_state_of_its_exact_position(chunk: int) -> None:
    """However a prompt is cut into steps, and wherever another one leaves it."""
    for length in (11, 12, 13):
        simulation = Simulation(LIMITS, slots=40, spacing=4)
        tokens = prompt(length)
        serve(simulation, tokens, made=6, chunk=chunk)
        for cut in range(1, length):
            # `Simulation` compares the state that is read with the one of exactly these tokens.
            again = serve(simulation, [*tokens[:cut], (tokens[cut] + 1) % VOCAB, 1, 2], made=3)
            assert again.cached_tokens == cut // 4 * 4


@pytest.mark.parametrize("page_size", [1, 3, 5, 16])
@pytest.mark.parametrize("spacing", [1, 7, 20])
def test_any_page_size_and_spacing(page_size: int, spacing: int) -> None:
    """Sizes that divide nothing: what one sequence reads is never another one's."""
    limits = Limits(max_tokens=19, max_sequences=4, max_context=128, page_size=page_size)
    simulation = Simulation(limits, pages=-(-220 // page_size), slots=24, spacing=spacing)
    shared = prompt(33)
    works = [
        simulation.add(Request(f"{n}", np.array([*shared[: 33 - n], *prompt(9, n)]), max_tokens=12))
        for n in range(6)
    ]
    simulation.run()
    for work in works:
        assert told(work) == answer(work.prompt.tolist(), 12)
    again = serve(simulation, [*shared, *prompt(9, 0)], made=3)
    assert again.cached_tokens == 41 // page_size * page_size
    assert not any(pool.used for pool in simulation.pools)


def test_evenly_spaced_states_serve_the_first_branch() -> None:
    simulation = Simulation(LIMITS, slots=40, spacing=8)
    shared = prompt(30)
    found = [serve(simulation, [*shared, seed % VOCAB, *prompt(20, seed)]).cached_tokens for seed in range(2)]
    assert found == [0, 24]


def test_models_with_one_kind_of_layers_need_only_its_memory() -> None:
    shared = prompt(30)
    only_full = Simulation(LIMITS, slots=0)
    found = [serve(only_full, [*shared, seed % VOCAB, *prompt(20, seed)]).cached_tokens for seed in range(2)]
    assert found == [0, 28]
    only_linear = Simulation(LIMITS, pages=0, spacing=FAR)
    first = serve(only_linear, prompt(21), made=14)
    assert serve(only_linear, [*first.tokens, 1, 2, 3]).cached_tokens == 32
    for simulation in (only_full, only_linear):
        simulation.cache.flush()  # type: ignore[union-attr]
        assert not any(simulation.in_use())


def test_nothing_is_shared_across_salts_grids_drafts_and_reads_of_the_whole_prompt() -> None:
    simulation = Simulation(LIMITS)
    tokens = prompt(20)
    serve(simulation, tokens)
    assert serve(simulation, tokens, cache_salt="other").cached_tokens == 0
    assert serve(simulation, tokens, cache_salt="other").cached_tokens == 16
    assert serve(simulation, tokens).cached_tokens == 16
    grid = Request("g", np.array(tokens), max_tokens=1, mrope_positions=np.zeros((3, 20), np.int64))
    draft = Request("d", np.array(tokens), mtp=True)
    assert grid.cache_namespace is draft.cache_namespace is None
    scored = simulation.add(Request("s", np.array(tokens)))
    simulation.run()
    assert scored.cached_tokens == 0


def test_a_snapshot_is_never_taken_before_its_step_is_committed() -> None:
    simulation = Simulation(LIMITS, spacing=4)
    cache, memory = simulation.cache, simulation.memory
    assert cache is not None
    request = simulation.add(Request("a", np.array(prompt(20)), max_tokens=5))

    def found() -> int:
        lease, probe = cache.open(20), SequenceMemory(99)
        gained = cache.attach(lease, request.tokens, probe)
        cache.close(lease)
        memory.release(probe)
        return gained

    spans = [part.span for part in simulation.scheduler.next()]
    staged = memory.stage(spans, 1, 1)
    assert found() == 0
    memory.abort(staged)
    assert found() == 0
    staged = memory.stage(spans, 2, 2)
    memory.commit(staged)
    simulation.scheduler.settle(request)
    assert found() == 16


def test_a_shared_state_is_neither_written_nor_void_while_it_is_used() -> None:
    simulation = Simulation(LIMITS, slots=20, spacing=FAR)
    serve(simulation, prompt(21), made=14)
    slots = simulation.memory.slots
    assert slots is not None
    sharers = [
        simulation.add(Request(f"{seed}", np.array([*prompt(21), *prompt(8, seed)]), max_tokens=9))
        for seed in range(4)
    ]
    (shared,) = {part.span.memory.slot for part in simulation.scheduler.next()}
    before = slots.generation[shared]
    assert shared != NO_SLOT
    simulation.run()
    assert slots.generation[shared] == before  # only its holders are gone
    for request in sharers:
        assert request.cached_tokens == 20
        assert told(request) == answer(request.prompt.tolist(), 9)


def test_requests_that_begin_together_compute_what_they_share_about_once() -> None:
    limits = Limits(max_tokens=64, max_sequences=8, max_context=256, page_size=4)
    simulation = Simulation(limits, pages=400, slots=80, spacing=8)
    shared = prompt(120)
    crowd = [Request(f"{i}", np.array([*shared, i % VOCAB, i // VOCAB]), max_tokens=2) for i in range(8)]
    for request in crowd:
        simulation.add(request)
    while not all(request.made for request in crowd):
        simulation.step()
    assert simulation.fed < 1.5 * 120
    assert simulation.memory.pages is not None
    assert simulation.memory.pages.used <= 30 + 8  # one copy of what they share
    simulation.run()
    for request in crowd:
        assert told(request) == answer(request.prompt.tolist(), 2)


def test_one_state_of_a_growing_answer_is_kept() -> None:
    simulation = Simulation(LIMITS, pages=64, slots=20, spacing=FAR)
    serve(simulation, prompt(5), made=90)
    assert simulation.memory.slots is not None
    # Behind the prompt's last page, and behind the last page of all.
    assert simulation.memory.slots.cached <= 2


def test_what_was_not_used_for_longest_goes_first_and_requests_come_before_all_of_it() -> None:
    simulation = Simulation(LIMITS, pages=30, slots=12, spacing=FAR)
    prompts = [prompt(29, seed) for seed in range(3)]
    for tokens in prompts:
        serve(simulation, tokens)
    assert serve(simulation, prompts[0]).cached_tokens == 28  # used again: prompt 1 is the oldest now
    serve(simulation, prompt(40, 9))
    assert simulation.cache is not None
    assert simulation.cache.stats.evicted_pages > 0
    assert [serve(simulation, prompts[index]).cached_tokens for index in (0, 2)] == [28, 28]
    works = [simulation.add(Request(f"w{i}", np.array(prompt(28, 20 + i)), max_tokens=2)) for i in range(4)]
    simulation.run()
    assert simulation.scheduler.preemptions == 0
    for request in works:
        assert told(request) == answer(request.prompt.tolist(), 2)


def test_states_are_dropped_for_sequences_that_need_slots() -> None:
    simulation = Simulation(LIMITS, pages=200, slots=8, spacing=4)
    for seed in range(6):
        serve(simulation, prompt(30, seed))
    works = [simulation.add(Request(f"w{i}", np.array(prompt(28, 20 + i)), max_tokens=30)) for i in range(4)]
    simulation.run()
    assert simulation.scheduler.preemptions == 0
    assert simulation.cache is not None
    assert simulation.cache.stats.evicted_states > 0
    for request in works:
        assert told(request) == answer(request.prompt.tolist(), 30)


def test_a_flush_drops_everything_and_what_runs_leaves_nothing() -> None:
    simulation = Simulation(LIMITS)
    cache = simulation.cache
    assert cache is not None
    serve(simulation, prompt(21), made=5)
    running = simulation.add(Request("r", np.array([*prompt(21), 1, 2, 3]), max_tokens=20))
    simulation.step()
    assert running.cached_tokens == 20
    cache.flush()
    assert [pool.cached for pool in simulation.pools] == [0, 0]
    simulation.run()
    assert told(running) == answer(running.prompt.tolist(), 20)
    assert not any(simulation.in_use())
    assert serve(simulation, prompt(21)).cached_tokens == 0


def test_what_a_faulty_request_computed_or_used_is_forgotten() -> None:
    simulation = Simulation(LIMITS)
    serve(simulation, prompt(21), made=5)
    faulty = simulation.add(Request("f", np.array([*prompt(21), 1, 2, 3]), max_tokens=20))
    other = simulation.add(Request("o", np.array([*prompt(21), 4, 4, 4]), max_tokens=20))
    simulation.step()
    simulation.step()
    simulation.end(faulty, Failed(ServiceFault("no token to choose")))
    simulation.run()
    assert told(other) == answer(other.prompt.tolist(), 20)
    assert not any(simulation.in_use())  # nor does what the other one built on it stay
    assert serve(simulation, prompt(21)).cached_tokens == 0


def test_a_salt_leaves_nothing_behind() -> None:
    simulation = Simulation(LIMITS, pages=20, slots=8)
    for salt in range(50):
        serve(simulation, prompt(20), cache_salt=str(salt))
    assert simulation.cache is not None
    assert len(simulation.cache._roots) < 10


def test_what_an_aborted_load_left_is_never_seen() -> None:
    """Units of a request whose first step behind a prefix failed go to others, who see nothing of it."""
    simulation = Simulation(LIMITS, pages=14, slots=8, spacing=FAR)
    first = serve(simulation, prompt(21), made=3)
    simulation.add(Request("f", np.array([*first.tokens, *prompt(9, 3)]), max_tokens=4))
    (part,) = simulation.step("fail")
    assert part.request.cached_tokens > 0
    for seed in range(4):
        serve(simulation, prompt(30, 40 + seed), made=9)
    again = serve(simulation, [*first.tokens, *prompt(9, 3)], made=4)
    assert again.cached_tokens in (0, 20)


class CacheMachine(RuleBasedStateMachine):
    """Requests, cancels, faults, replays, flushes and other holders, in any order.

    `Simulation` checks what each step reads and writes; here the books are checked, and in the end that
    everybody got the tokens that he would get alone.
    """

    pages, slots, lanes = 24, 11, None

    def __init__(self) -> None:
        super().__init__()
        self.simulation = Simulation(LIMITS, self.pages, self.slots, spacing=8, seed=self.lanes)
        self.requests: list[Request] = []
        self.cancelled: set[str] = set()
        self.holders: list[Holder] = []
        self.histories: list[list[int]] = [prompt(26, seed) for seed in range(2)]

    @rule(
        history=st.integers(0, 5),
        cut=st.integers(0, 30),
        own=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9),
        made=st.integers(1, 14),
        salt=st.sampled_from(["", "", "salt"]),
        chunk=st.sampled_from([0, 0, 3]),
    )
    def add(self, history: int, cut: int, own: list[int], made: int, salt: str, chunk: int) -> None:
        past = self.histories[history % len(self.histories)][:cut]
        tokens = np.array([*past, *own][:50])
        request = Request(f"{len(self.requests)}", tokens, max_tokens=made, cache_salt=salt, chunk=chunk)
        self.requests.append(self.simulation.add(request))

    @precondition(lambda self: not self.simulation.scheduler.idle)
    @rule(outcome=st.sampled_from(["commit"] * 6 + ["replay", "fail"]), count=st.integers(1, 6))
    def step(self, outcome: str, count: int) -> None:
        for _ in range(count):
            parts = self.simulation.step(outcome)
            if outcome == "fail":
                self.cancelled |= {part.request.request_id for part in parts}
                return
        done = [one for one in self.requests if one.made == one.max_tokens]
        if done:
            self.histories = [*self.histories[-3:], done[-1].tokens[:40]]

    @precondition(lambda self: self.simulation.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.simulation.live)))
        self.cancelled.add(name)
        self.simulation.cancel(self.simulation.live[name])

    @rule()
    def flush(self) -> None:
        assert self.simulation.cache is not None
        self.simulation.cache.flush()
        assert [pool.cached for pool in self.simulation.pools] == [0] * len(self.simulation.pools)

    @rule(tokens=st.integers(1, 40))
    def hold(self, tokens: int) -> None:
        holder = Holder(self.simulation.memory, 1000 + len(self.holders))
        try:
            holder.grow(tokens)
        except PoolExhausted:
            return
        self.holders.append(holder)

    @precondition(lambda self: self.holders)
    @rule()
    def let_go(self) -> None:
        self.holders.pop(0).release()

    @invariant()
    def books_balance(self) -> None:
        simulation = self.simulation
        held = [holder.held for holder in self.holders]
        held += [request.memory for request in simulation.live.values()]
        nodes = [node for root in simulation.cache._roots.values() for node in below(root)]  # type: ignore[union-attr]
        if (pages := simulation.memory.pages) is not None:
            own = [page for one in held for page in one.pages]
            kept = [node.page for node in nodes if node.parent is not None]
            assert len(set(kept)) == len(kept)
            assert set(own) == {page for page in range(pages.total) if not pages.idle(page)}
            assert pages.used == len(set(own))
            assert pages.cached == len(set(kept) - set(own))
        if (slots := simulation.memory.slots) is not None:
            own = [slot for one in held for slot in (*one.spares, one.slot, *one.kept.values()) if slot >= 0]
            kept = [node.slot for node in nodes if node.slot != NO_SLOT]
            assert len(set(kept)) == len(kept)
            assert slots.used == len(set(own))
            assert slots.cached == len(set(kept) - set(own))
        for node in nodes:
            # Whatever is idle can be dropped: nothing that somebody holds lies behind it.
            if pages is not None and node.parent is not None and pages.idle(node.page):
                assert all(pages.idle(other.page) for other in below(node))

    def teardown(self) -> None:
        for holder in self.holders:
            holder.release()
        self.simulation.run(3000)
        for request in self.requests:
            tokens = told(request)
            assert tokens == answer(request.prompt.tolist(), len(tokens))
            assert request.request_id in self.cancelled or len(tokens) == request.max_tokens
        assert [pool.used for pool in self.simulation.pools] == [0] * len(self.simulation.pools)
        self.flush()
        assert [pool.free for pool in self.simulation.pools] == [pool.total for pool in self.simulation.pools]


def below(node: object) -> list:
    """A node and all behind it."""
    nodes = [node]
    for one in nodes:
        nodes.extend(one.children.values())  # type: ignore[attr-defined]
    return nodes


class TwoLanesMachine(CacheMachine):
    """Prompts lie in both lanes of a step."""

    lanes = 7


class FullMachine(CacheMachine):
    """A model without linear layers."""

    slots = 0


class LinearMachine(CacheMachine):
    """A model without full layers."""

    pages = 0


MACHINES = settings(max_examples=25, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("machine", [CacheMachine, TwoLanesMachine, FullMachine, LinearMachine])
def test_any_order_of_events(machine: type[CacheMachine]) -> None:
    case = machine.TestCase()
    case.settings = MACHINES
    case.runTest()
