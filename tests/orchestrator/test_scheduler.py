"""Who takes part in a step: everybody in the end, the oldest always, and nobody at another's cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from braid_orchestrator.memory import Span
from braid_orchestrator.request import PromptLogprobs, Request, Scored, Token
from braid_orchestrator.sampling import Sampling
from braid_orchestrator.scheduler import shares
from braid_orchestrator.store import Limits
from braid_wire.errors import PoolExhausted, QueueFull
from braid_wire.layers import Mode
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import VOCAB, Holder, Simulation, answer, told

LIMITS = Limits(max_tokens=32, max_sequences=8, max_context=256, page_size=4)


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, length)


def request(name: object, length: int, made: int = 1, seed: int = 0, **more: object) -> Request:
    return Request(str(name), prompt(length, seed), max_tokens=made, **more)  # type: ignore[arg-type]


@given(st.lists(st.integers(1, 50), max_size=12), st.integers(0, 64), st.integers(0, 16))
def test_shares_are_equal_and_waste_nothing(wanted: list[int], budget: int, least: int) -> None:
    given_ = shares(wanted, budget, least)
    assert sum(given_) == min(sum(wanted), budget)
    assert all(0 <= part <= most for part, most in zip(given_, wanted, strict=True))
    if least <= 1 and wanted:
        # Whoever gets less than he wants gets within two of the most that anybody gets.
        short = [part for part, most in zip(given_, wanted, strict=True) if part < most]
        assert not short or min(short) >= max(given_) - 2


def test_a_long_prompt_delays_neither_decodes_nor_short_prompts() -> None:
    simulation = Simulation(LIMITS, pages=400, slots=40)
    decoding = simulation.add(request("decoding", 4, made=200, seed=1))
    simulation.step()
    long = simulation.add(request("long", 250, made=1, seed=2))
    simulation.step()
    short = simulation.add(request("short", 8, made=1, seed=3))
    steps = 0
    while long.request_id in simulation.live:
        before = decoding.made
        simulation.step()
        steps += 1
        assert decoding.made == before + 1  # one token in each step
        if steps == 1:
            assert short.request_id not in simulation.live  # done in the first step it could take part in
    assert steps <= 250 // (LIMITS.max_tokens - 1) + 2


def test_short_prompts_that_keep_coming_do_not_starve_a_long_one() -> None:
    simulation = Simulation(LIMITS, pages=400, slots=40)
    long = simulation.add(request("long", 240, seed=1))
    for steps in range(200):
        if long.request_id not in simulation.live:
            break
        for index in range(4):  # 32 tokens: as many as a step takes
            simulation.add(request(f"{steps}-{index}", 8, seed=10 + 4 * steps + index))
        simulation.step()
    assert steps < 80


def test_more_to_decode_than_a_step_takes_goes_round() -> None:
    limits = Limits(max_tokens=16, max_sequences=24, max_context=256, page_size=4)
    simulation = Simulation(limits, pages=800, slots=60)
    crowd = [simulation.add(request(index, 1, made=100, seed=index)) for index in range(20)]
    while min(one.made for one in crowd) < 5:
        simulation.step()
    late = simulation.add(request("late", 30, seed=99))
    for _ in range(40):
        simulation.step()
    made = [one.made for one in crowd]
    assert max(made) - min(made) <= 3
    assert late.request_id not in simulation.live  # an eighth of each step is the prompts'


def test_a_prompt_of_three_tokens_is_no_decode() -> None:
    simulation = Simulation(LIMITS)
    simulation.add(request("a", 3, made=2))
    simulation.add(request("b", 1, made=2))
    modes = {part.request.request_id: part.span.mode for part in simulation.step()}
    assert modes == {"a": Mode.EXTEND, "b": Mode.EXTEND}
    modes = {part.request.request_id: part.span.mode for part in simulation.step()}
    assert modes == {"a": Mode.DECODE, "b": Mode.DECODE}


def test_a_prompt_with_one_token_left_behind_a_cached_prefix_is_no_decode() -> None:
    simulation = Simulation(LIMITS)
    simulation.add(request("a", 9))
    simulation.run()
    again = simulation.add(request("b", 9))
    (part,) = simulation.step()
    assert (len(part.span.tokens), part.span.mode) == (1, Mode.EXTEND)
    assert again.cached_tokens == 8


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=2, max_size=8),
    pages=st.integers(20, 40),
)
def test_little_memory_costs_time_and_no_token(
    cached: bool, sizes: list[tuple[int, int]], pages: int
) -> None:
    simulation = Simulation(LIMITS, pages=pages, slots=17, cached=cached)
    works = [simulation.add(request(i, *size, seed=i)) for i, size in enumerate(sizes)]
    simulation.run(2000)
    for work in works:
        assert told(work) == answer(work.prompt.tolist(), len(work.tokens) - len(work.prompt))
        assert work.made == work.max_tokens


def test_the_youngest_gives_way_and_waits_at_the_head_of_the_queue() -> None:
    # Two prompts of 8 pages fit beside each other; what they make does not.
    simulation = Simulation(LIMITS, pages=20, slots=16, cached=False)
    old, young, waiting = (simulation.add(request(name, 32, made=40, seed=i)) for i, name in enumerate("oyw"))
    while not simulation.scheduler.preemptions:
        simulation.step()
    assert [seat.request for seat in simulation.scheduler.running] == [old]
    assert [seat.request for seat in simulation.scheduler.waiting] == [young, waiting]
    made = young.made
    assert made > 0
    simulation.run()
    for work in (old, young, waiting):
        assert told(work) == answer(work.prompt.tolist(), 40)


def test_a_seed_draws_the_same_tokens_when_a_request_gave_way() -> None:
    def tokens(pages: int) -> tuple[list[list[int]], int]:
        simulation = Simulation(LIMITS, pages=pages, slots=16, cached=False)
        works = [
            simulation.add(request(i, 32, made=40, seed=i, sampling=Sampling(temperature=2.0, seed=i)))
            for i in range(3)
        ]
        simulation.run()
        return [told(work) for work in works], simulation.scheduler.preemptions

    plenty, never = tokens(200)
    little, often = tokens(20)
    assert (never, plenty) == (0, little)
    assert often > 0


def test_a_scored_prompt_that_gave_way_is_scored_once() -> None:
    simulation = Simulation(LIMITS, pages=18, slots=16, cached=False)
    decoding = simulation.add(request("old", 10, made=60))
    simulation.step()
    scored = simulation.add(request("scored", 36, made=0, chunk=1))
    while not simulation.scheduler.preemptions and scored.request_id in simulation.live:
        simulation.step()
    assert simulation.scheduler.preemptions
    simulation.run()
    found = []
    while not scored.events.empty():
        _, event = scored.events.get()
        if isinstance(event, Scored):
            found.append(event)
    (only,) = found
    assert only.logits.shape == (36, VOCAB)
    assert only.logits.argmax(-1).tolist() == [
        answer(scored.prompt[: n + 1].tolist(), 1)[0] for n in range(36)
    ]
    assert told(decoding) == answer(decoding.prompt.tolist(), 60)


def test_a_prompt_that_gave_way_is_told_its_logprobs_once() -> None:
    simulation = Simulation(LIMITS, pages=18, slots=16)
    simulation.add(request("old", 10, made=60))
    simulation.step()
    wanted = Sampling(prompt_logprobs=0)
    work = simulation.add(request("young", 36, made=3, chunk=1, sampling=wanted))
    while not simulation.scheduler.preemptions:
        simulation.step()
    assert work.made == 0
    simulation.run()
    events = [work.events.get()[1] for _ in range(work.events.qsize())]
    (prompt_logprobs,) = [event for event in events if isinstance(event, PromptLogprobs)]
    assert len(prompt_logprobs.entries) == 35
    assert [event.token_id for event in events if isinstance(event, Token)] == answer(work.prompt.tolist(), 3)


def test_guesses_are_left_out_rather_than_that_somebody_gives_way() -> None:
    class Guessing(Request):
        """Wants three tokens verified in each step."""

        def next_span(self, budget: int) -> Span:
            found = super().next_span(budget)
            if not self.decoding or budget < 4:
                return found
            return replace(found, tokens=np.append(found.tokens, [1, 2, 3]), mode=Mode.VERIFY)

    for slots, mode in ((5, Mode.VERIFY), (4, Mode.DECODE)):
        simulation = Simulation(LIMITS, slots=slots, cached=False)
        simulation.add(Guessing("a", prompt(5), max_tokens=9))
        simulation.step()
        (part,) = simulation.scheduler.next()
        assert part.span.mode is mode
        assert simulation.scheduler.preemptions == 0


def test_free_slots_without_free_pages_and_the_reverse_admit_nobody() -> None:
    for pages, slots, takes in ((12, 16, 40), (40, 4, 1)):
        simulation = Simulation(LIMITS, pages=pages, slots=slots, cached=False)
        holders = [Holder(simulation.memory, 100 + index) for index in range(1 if takes > 1 else 2)]
        for holder in holders:
            holder.grow(takes)
        work = simulation.add(request("a", 20, made=3))
        assert simulation.step() == []
        before = simulation.in_use()
        assert simulation.step() == []
        assert simulation.in_use() == before  # a request that is not admitted holds nothing
        holders[0].release()
        simulation.run()
        assert told(work) == answer(work.prompt.tolist(), 3)


def test_what_could_never_fit_is_refused_and_so_is_a_full_queue() -> None:
    simulation = Simulation(LIMITS, pages=10)
    with pytest.raises(PoolExhausted, match="pages"):
        simulation.add(request("a", 30, made=20))
    with pytest.raises(PoolExhausted, match="256"):
        simulation.add(request("a", 250, made=20))
    simulation.scheduler._max_waiting = 1
    simulation.add(request("b", 5))
    with pytest.raises(QueueFull):
        simulation.add(request("c", 5))
    simulation.run()


def test_a_request_that_was_preempted_can_be_cancelled() -> None:
    simulation = Simulation(LIMITS, pages=20, slots=16)
    old, young = (simulation.add(request(name, 32, made=40, seed=i)) for i, name in enumerate("oy"))
    while not simulation.scheduler.preemptions:
        simulation.step()
    simulation.cancel(young)
    simulation.run()
    assert told(old) == answer(old.prompt.tolist(), 40)
