"""The scheduler against a model of it: those that came first run, in order, and the others wait.

The model is a list of live requests by arrival. A prefix of it runs; every step feeds no more than its
budget, and no less than there is to feed; the oldest is never put off. `Simulation` checks beside it what
every step reads and writes, and in the end everybody has the tokens that he would get alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from braid_orchestrator.request import Failed, Request, Scored
from braid_orchestrator.sampling import Sampling
from braid_orchestrator.scheduler import Part
from braid_orchestrator.store import Limits
from braid_wire.errors import PoolExhausted, QueueFull, StepTimeout
from braid_wire.layers import Mode
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from simulation import VOCAB, Holder, Simulation, answer, told

LIMITS = Limits(max_tokens=12, max_sequences=5, max_context=96, page_size=4)
MAX_WAITING = 12


class SchedulerMachine(RuleBasedStateMachine):
    """Submissions, steps, cancels, deadlines, faults, replays, flushes and drains, in any order."""

    cached, guesses, lanes = False, 0, None
    pages, slots = 16, 9

    def __init__(self) -> None:
        super().__init__()
        self.simulation = Simulation(
            LIMITS, self.pages, self.slots, self.cached, spacing=8, seed=self.lanes, guesses=self.guesses
        )
        self.simulation.scheduler._max_waiting = MAX_WAITING
        self.requests: list[Request] = []
        self.ended_early: set[str] = set()
        self.holder: Holder | None = None

    @property
    def live(self) -> list[Request]:
        """By arrival."""
        return [one for one in self.requests if one.request_id in self.simulation.live]

    @property
    def running(self) -> list[Request]:
        return [seat.request for seat in self.simulation.scheduler.running]

    @property
    def waiting(self) -> list[Request]:
        return [seat.request for seat in self.simulation.scheduler.waiting]

    @rule(
        sizes=st.lists(
            st.tuples(st.sampled_from([1, 3, 4, 5, 9, 17, 30]), st.sampled_from([0, 1, 4, 12, 30])),
            min_size=1,
            max_size=4,
        ),
        seed=st.integers(0, 2),
        chunk=st.sampled_from([0, 0, 0, 3]),
        tail=st.sampled_from([0, 0, 2]),
        reads=st.booleans(),
        salt=st.sampled_from(["", "", "salt"]),
    )
    def submit(
        self, sizes: list[tuple[int, int]], seed: int, chunk: int, tail: int, reads: bool, salt: str
    ) -> None:
        for length, made in sizes:
            request = Request(
                f"{len(self.requests)}",
                np.random.default_rng(seed).integers(0, VOCAB, length),
                Sampling(prompt_logprobs=0) if reads and made else Sampling(),
                max_tokens=made,
                chunk=chunk,
                decode_tail=tail if made else 0,
                cache_salt=salt,
            )
            waited = len(self.waiting)
            try:
                self.simulation.add(request)
            except QueueFull:
                assert waited >= MAX_WAITING  # those that gave way wait beyond it
            else:
                assert waited < MAX_WAITING
                self.requests.append(request)

    @rule(tokens=st.integers(LIMITS.max_context + 1, 2 * LIMITS.max_context))
    def submit_what_never_fits(self, tokens: int) -> None:
        before = self.simulation.in_use(), len(self.simulation.live)
        with pytest.raises(PoolExhausted):
            self.simulation.add(Request("never", np.zeros(tokens - 5, np.int64), max_tokens=5))
        assert (self.simulation.in_use(), len(self.simulation.live)) == before

    @precondition(lambda self: self.live)
    @rule(outcome=st.sampled_from(["commit"] * 8 + ["replay", "fail"]), count=st.integers(1, 5))
    def step(self, outcome: str, count: int) -> None:
        for _ in range(count):
            if not self.live:
                return
            parts = self._checked_step(outcome)
            if outcome == "fail":
                self.ended_early |= {part.request.request_id for part in parts}
                return

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end_one(self, data: st.DataObject) -> None:
        """Given up by its caller, or by its deadline, while it waits or between two steps."""
        request = data.draw(st.sampled_from(self.live))
        self.ended_early.add(request.request_id)
        if data.draw(st.booleans()):
            self.simulation.cancel(request)
        else:
            self.simulation.end(request, Failed(StepTimeout("its time is over")))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end_one_inside_a_step(self, data: st.DataObject) -> None:
        def during(parts: Sequence[Part]) -> None:
            request = data.draw(st.sampled_from([part.request for part in parts]))
            self.ended_early.add(request.request_id)
            self.simulation.cancel(request)

        self._checked_step("commit", during)

    @precondition(lambda self: self.simulation.cache is not None)
    @rule()
    def flush(self) -> None:
        assert self.simulation.cache is not None
        self.simulation.cache.flush()
        assert [pool.cached for pool in self.simulation.pools] == [0] * len(self.simulation.pools)

    @precondition(lambda self: self.holder is None)
    @rule(tokens=st.integers(1, 40))
    def hold(self, tokens: int) -> None:
        holder = Holder(self.simulation.memory, 1 << 30)
        try:
            holder.grow(tokens)
        except PoolExhausted:
            return
        self.holder = holder

    @precondition(lambda self: self.holder is not None)
    @rule()
    def let_go(self) -> None:
        assert self.holder is not None
        self.holder.release()
        self.holder = None

    @rule()
    def drain(self) -> None:
        """Nothing new comes: all that was accepted ends, in a bounded number of steps."""
        if self.holder is not None:
            self.let_go()
        # Every step feeds a token at least; who gives way is fed again, and never the oldest.
        most = sum(one.total_tokens for one in self.live) * (1 + len(self.live))
        for _ in range(most + 1):
            if not self.live:
                break
            self._checked_step()
        assert not self.live
        assert [pool.used for pool in self.simulation.pools] == [0] * len(self.simulation.pools)

    def _checked_step(self, outcome: str = "commit", during: object = None) -> list[Part]:
        """One step, and what the model says of it."""
        scheduler = self.simulation.scheduler
        oldest, preemptions = self.live[0], scheduler.preemptions
        was_running = oldest in self.running
        fed, made = oldest.memory.length, oldest.made
        parts = self.simulation.step(outcome, during)  # type: ignore[arg-type]
        if self.holder is not None:
            return parts  # others than requests may hold what the oldest needs
        assert parts
        if was_running and outcome != "fail" and oldest.request_id in self.simulation.live:
            assert oldest in self.running
            assert oldest.memory.length > fed or oldest.made > made
        if not self.cached and scheduler.preemptions == preemptions:
            self._expect_full(parts)
        return parts

    def _expect_full(self, parts: Sequence[Part]) -> None:
        """A step that has room left gave everybody all that he wanted."""
        left = LIMITS.max_tokens - sum(len(part.span.tokens) for part in parts)
        if left == 0:
            return
        mine = {part.request.request_id: part for part in parts}
        for request in self.running:
            assert request.request_id in mine
        for part in parts:
            request, count = part.request, len(part.span.tokens)
            if part.span.mode is Mode.EXTEND and not request.chunk and not request.memory.released:
                assert request.decoding or request.memory.length == len(request.tokens) or count >= left

    @invariant()
    def those_that_came_first_run(self) -> None:
        order = [request.request_id for request in self.live]
        running = sorted((request.request_id for request in self.running), key=order.index)
        waiting = [request.request_id for request in self.waiting]
        assert running + waiting == order
        assert len(running) <= LIMITS.max_sequences

    @invariant()
    def who_waits_holds_nothing(self) -> None:
        for request in self.waiting:
            memory = request.memory
            assert (memory.pages, memory.spares, memory.kept) == ([], [], {})
            assert memory.slot < 0 and memory.length == 0

    @invariant()
    def prompts_are_served_alike(self) -> None:
        """No prompt got more than a step's tokens ahead of another one, beyond what it asked for."""
        if self.cached:
            return  # what is cached is no service, and a follower waits for its leader
        seats = [
            seat
            for seat in self.simulation.scheduler.running
            if not seat.request.decoding and not seat.request.chunk
        ]
        services = [seat.service for seat in seats]
        assert not services or max(services) - min(services) <= LIMITS.max_tokens

    @invariant()
    def units_belong_to_those_that_live(self) -> None:
        held = [request.memory for request in self.live]
        held += [self.holder.held] if self.holder is not None else []
        memory = self.simulation.memory
        if memory.pages is not None:
            assert memory.pages.used == len({page for one in held for page in one.pages})
        if memory.slots is not None:
            slots = [slot for one in held for slot in (one.slot, *one.spares, *one.kept.values())]
            assert memory.slots.used == len({slot for slot in slots if slot >= 0})

    def teardown(self) -> None:
        self.drain()
        for request in self.requests:
            if request.request_id in self.ended_early:
                tokens = told(request)
                assert tokens == answer(request.prompt.tolist(), len(tokens))
            elif request.scores:
                self._expect_scores(request)
            else:
                assert told(request) == answer(request.prompt.tolist(), request.max_tokens or 0)
        if self.simulation.cache is not None:
            self.simulation.cache.flush()
        assert [pool.free for pool in self.simulation.pools] == [pool.total for pool in self.simulation.pools]

    def _expect_scores(self, request: Request) -> None:
        events = [request.events.get()[1] for _ in range(request.events.qsize())]
        (scored,) = [event for event in events if isinstance(event, Scored)]
        prompt = request.prompt.tolist()
        wanted = [answer(prompt[:end], 1)[0] for end in range(1, len(prompt) + 1)]
        assert scored.logits.argmax(-1).tolist() == wanted


class CachedMachine(SchedulerMachine):
    """With a prefix cache."""

    cached = True


class DraftingMachine(SchedulerMachine):
    """Steps with and without guesses."""

    guesses = 3


class EverythingMachine(SchedulerMachine):
    """Guesses behind cached prefixes, and prompts in two lanes."""

    cached, guesses, lanes = True, 3, 5


class FullLayersMachine(SchedulerMachine):
    """A model without linear layers."""

    cached, guesses, slots = True, 3, 0


class LinearLayersMachine(SchedulerMachine):
    """A model without full layers."""

    cached, guesses, pages = True, 3, 0


MACHINES = [
    SchedulerMachine,
    CachedMachine,
    DraftingMachine,
    EverythingMachine,
    FullLayersMachine,
    LinearLayersMachine,
]


@pytest.mark.parametrize("machine", MACHINES)
def test_any_order_of_events(machine: type[SchedulerMachine]) -> None:
    case = machine.TestCase()
    case.settings = settings(
        max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    case.runTest()
