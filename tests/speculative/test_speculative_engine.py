"""Requests whose tokens are guessed ahead: the same tokens, the same ends, and nothing held behind them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from braid_orchestrator.body.base import Output
from braid_orchestrator.cell import Cell
from braid_orchestrator.memory import Span
from braid_orchestrator.request import Event, Failed, Finish, Finished, Request, Token
from braid_orchestrator.sampling import Sampling
from braid_orchestrator.speculative import Speculator
from braid_orchestrator.store import Limits
from braid_orchestrator.text import Tokenizer
from braid_orchestrator.walker import Keep, Walker
from braid_wire.errors import ConfigInvalid, RequestCancelled, ServiceFault, StepTimeout
from braid_wire.layers import Mode, Role
from checkpoints import QWEN
from drafts import save_with_mtp
from harness import sequences
from spec_cells import Script, cell, idle, poison, submit, tokens_of

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
GUESSES = 4
COUNT = 24
MANNERS = {
    "greedy": Sampling(),
    "warm": Sampling(0.9, top_p=0.9, seed=1),
    "free": Sampling(1.2, seed=2),
    "penalised": Sampling(
        0.7, seed=3, top_k=50, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.6
    ),
    "told": Sampling(0.8, seed=4, logprobs=3, logit_bias={5: 2.0, 9: -100.0}),
    "greedy, penalised": Sampling(frequency_penalty=1.5, logprobs=0),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_mtp(QWEN[2], tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shared(model: Path) -> Iterator[Cell]:
    with cell(model, speculative=GUESSES) as running:
        poison(running)
        yield running


@pytest.fixture
def running(shared: Cell) -> Iterator[Cell]:
    yield shared
    assert idle(shared)


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, list[Event]]:
    """What each manner makes without guesses."""
    with cell(model) as alone:
        requests = works(alone)
        for work in requests:
            alone.engine.submit(work)
        return {work.request_id: list(work.stream()) for work in requests}


def works(running: Cell, names: Iterable[str] = MANNERS, **more: Any) -> list[Request]:
    prompts = dict(zip(MANNERS, sequences(running.plans.vocab_size, [20, 33, 7, 1, 12, 50]), strict=True))
    return [Request(name, prompts[name], MANNERS[name], **{"max_tokens": COUNT, **more}) for name in names]


def made(events: Sequence[Event]) -> list[int]:
    return [event.token_id for event in events if isinstance(event, Token)]


Play = Callable[..., Script]


@pytest.fixture
def play(expected: dict[str, list[Event]], monkeypatch: pytest.MonkeyPatch) -> Play:
    """Puts a script in the place of the draft."""

    def put(pattern: Iterable[int | None]) -> Script:
        truths = {name: made(events) for name, events in expected.items()}
        script = Script(truths, itertools.cycle(pattern))
        monkeypatch.setattr(Speculator, "follow", lambda self, progress: script.follow(self, progress))
        return script

    return put


def same(found: Sequence[Event], wanted: Sequence[Event]) -> None:
    """Tokens alike to the last one, log-probabilities but for rounding."""
    assert made(found) == made(wanted)
    assert found[-1] == wanted[-1]
    for one, other in zip(found, wanted, strict=True):
        if isinstance(one, Token) and isinstance(other, Token):
            assert (one.logprob is None) == (other.logprob is None)
            if one.logprob is not None and other.logprob is not None:
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
                assert [token for token, _ in one.top] == [token for token, _ in other.top]


PATTERNS: dict[str, list[int | None]] = {
    "all right": [GUESSES],
    "all wrong": [0],
    "every number": [0, 1, 2, 3, 4],
    "now and then": [None, 3, None, None, 0, 2],
}


@pytest.mark.parametrize("name", PATTERNS)
def test_every_manner_makes_what_it_makes_alone(
    name: str, running: Cell, expected: dict[str, list[Event]], play: Play
) -> None:
    script = play(PATTERNS[name])
    before = running.walker.steps
    requests = works(running)
    submit(running, requests)
    for work in requests:
        same(list(work.stream()), expected[work.request_id])
    assert script.verified
    steps = running.walker.steps - before
    if name == "all right":
        # The first token, then five in a step.
        assert steps <= 1 + len(requests) + -(-(COUNT - 1) // (GUESSES + 1))
    else:
        assert steps <= COUNT + len(requests)


def test_the_models_own_draft(running: Cell, expected: dict[str, list[Event]]) -> None:
    for names in (MANNERS, ["warm"], ["greedy", "told"]):
        requests = works(running, names)
        submit(running, requests)
        for work in requests:
            same(list(work.stream()), expected[work.request_id])
    counts = running.metrics.accepted_tokens._value.get(), running.metrics.rejected_tokens._value.get()
    assert all(counts)


@pytest.mark.parametrize("at", [0, 1, 3, 4, 7])
def test_a_stop_token_among_right_guesses_ends_the_request(
    at: int, running: Cell, expected: dict[str, list[Event]], play: Play
) -> None:
    play([GUESSES])
    (work,) = works(running, ["warm"])
    truth = made(expected["warm"])
    work = Request("warm", work.prompt, work.sampling, COUNT, frozenset({truth[at]}))
    running.engine.submit(work)
    events = list(work.stream())
    assert made(events) == truth[: truth.index(truth[at])]
    assert events[-1] == Finished(Finish.STOP, truth[at])


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7])
def test_the_length_ends_a_request_among_right_guesses(
    count: int, running: Cell, expected: dict[str, list[Event]], play: Play
) -> None:
    play([GUESSES])
    (work,) = works(running, ["warm"], max_tokens=count)
    running.engine.submit(work)
    events = list(work.stream())
    assert made(events) == made(expected["warm"])[:count]
    assert events[-1] == Finished(Finish.LENGTH)


def test_a_stop_string_among_right_guesses_ends_the_request(
    running: Cell, expected: dict[str, list[Event]], play: Play
) -> None:
    play([GUESSES])
    tokenizer = Tokenizer.load(TINY)
    assert tokenizer is not None
    (work,) = works(running, ["free"], tokenizer=tokenizer)
    running.engine.submit(work)
    texts = [event.text for event in work.stream() if isinstance(event, Token)]
    at = next(
        index for index, text in enumerate(texts) if index > 6 and text and text not in "".join(texts[:index])
    )
    whole = "".join(texts[: at + 1])
    (again,) = works(running, ["free"], tokenizer=tokenizer, stop_strings=(texts[at],))
    running.engine.submit(again)
    events = list(again.stream())
    found = "".join(event.text for event in events if isinstance(event, Token))
    assert events[-1] == Finished(Finish.STOP, texts[at])
    assert found == whole[: whole.index(texts[at])]
    assert len(made(events)) == at + 1


Target = Callable[[Walker, Sequence[Span], Any, Keep | None], Output]


def during_verification(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Do something inside the first step that verifies, before it is committed."""
    target, left = Walker.target, [act]

    def wrapped(self: Walker, spans: Sequence[Span], rows: Any, keep: Keep | None = None) -> Output:
        def later(output: Output) -> Sequence[int]:
            if any(span.mode is Mode.VERIFY for span in spans) and left:
                left.pop()()
            assert keep is not None
            return keep(output)

        return target(self, spans, rows, later)

    monkeypatch.setattr(Walker, "target", wrapped)


def test_a_request_cancelled_during_verification_makes_no_more(
    running: Cell, expected: dict[str, list[Event]], play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    play([GUESSES])
    (work, other) = works(running, ["warm", "greedy"])
    during_verification(monkeypatch, lambda: running.engine.cancel(work))
    submit(running, (work, other))
    *before, last = list(work.stream())
    assert isinstance(last, Failed) and isinstance(last.error, RequestCancelled)
    # Nothing of the step that verified is given out: only what was made before it.
    assert len(before) < GUESSES
    assert made(before) == made(expected["warm"])[: len(before)]
    assert tokens_of(other) == made(expected["greedy"])


def test_a_deadline_during_verification_ends_the_request(
    running: Cell, expected: dict[str, list[Event]], play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    play([GUESSES])
    (work,) = works(running, ["warm"], deadline_s=20.0)

    def pass_time() -> None:
        work.deadline_s = time.monotonic() - work.arrived

    during_verification(monkeypatch, pass_time)
    running.engine.submit(work)
    *before, last = list(work.stream())
    assert isinstance(last, Failed) and isinstance(last.error, StepTimeout)
    assert made(before) == made(expected["warm"])[: len(before)]
    assert len(before) < GUESSES


def test_what_was_verified_in_vain_is_never_written_again(
    running: Cell, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots that a step verified into are stale for whoever is late, whether they were kept or not."""
    play([2])
    stale: list[tuple[Any, Any]] = []
    stage = type(running.walker.memory(Role.TARGET)).stage

    def noted(self: Any, *args: Any) -> Any:
        staged = stage(self, *args)
        if any(span.mode is Mode.VERIFY for span in staged.spans):
            stale.append((staged.batch.state_out, staged.batch.state_out_generations))
        return staged

    monkeypatch.setattr(type(running.walker.memory(Role.TARGET)), "stage", noted)
    (work,) = works(running, ["warm"])
    running.engine.submit(work)
    tokens_of(work)
    slots = running.walker.memory(Role.TARGET).slots
    assert slots is not None and stale
    for written, generations in stale:
        assert (slots.generation[written] != generations).all()


def test_without_slots_for_guesses_a_step_does_without(
    model: Path, expected: dict[str, list[Event]], play: Play
) -> None:
    script = play([GUESSES])
    with cell(model, Limits(96, 2, 160, 8, 1 << 28), speculative=1, prefix_cache=False) as tight:
        slots = tight.walker.memory(Role.TARGET).slots
        assert slots is not None and slots.total == 6
        requests = works(tight, ["warm", "greedy", "free"])
        submit(tight, requests)
        for work in requests:
            same(list(work.stream()), expected[work.request_id])
        counts = tight.metrics.accepted_tokens._value.get(), tight.metrics.rejected_tokens._value.get()
        assert idle(tight)
    # Four guesses need four slots more: two requests beside each other leave two.
    assert script.verified and counts[0] < len(script.verified) * GUESSES


def test_a_draft_without_memory_begins_again_later(
    model: Path, expected: dict[str, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with cell(model, speculative=2) as running:
        poison(running)
        pool = running.walker.memory(Role.DRAFT).pages
        assert pool is not None
        taken = pool.take(pool.free)
        first, second = works(running, ["warm", "greedy"])
        running.engine.submit(first)
        same(list(first.stream()), expected["warm"])
        assert running.metrics.accepted_tokens._value.get() == 0
        follow, calls = Speculator.follow, itertools.count()

        def freed_later(self: Speculator, progress: Any) -> None:
            if next(calls) == 5:
                pool.give(taken)
            follow(self, progress)

        monkeypatch.setattr(Speculator, "follow", freed_later)
        running.engine.submit(second)
        same(list(second.stream()), expected["greedy"])
        verified = running.metrics.accepted_tokens._value.get() + running.metrics.rejected_tokens._value.get()
        assert verified > 0
        assert idle(running)


def test_a_draft_that_fails_costs_no_token(
    running: Cell, expected: dict[str, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    draft, calls = Walker.draft, itertools.count()

    def failing(self: Walker, *args: Any, **more: Any) -> Output:
        if next(calls) % 3 == 1:
            raise ServiceFault("no draft today")
        return draft(self, *args, **more)

    monkeypatch.setattr(Walker, "draft", failing)
    requests = works(running)
    submit(running, requests)
    for work in requests:
        same(list(work.stream()), expected[work.request_id])
    assert next(calls) > 3


def test_prompts_that_come_while_others_verify(
    running: Cell, expected: dict[str, list[Event]], play: Play
) -> None:
    play([GUESSES, 1, None])
    (first,) = works(running, ["greedy"])
    running.engine.submit(first)
    events = first.stream()
    found = [next(events), next(events)]
    late = works(running, ["warm", "free", "told"], chunk=3)
    for work in late:
        running.engine.submit(work)
    same([*found, *events], expected["greedy"])
    for work in late:
        same(list(work.stream()), expected[work.request_id])


def test_with_little_memory_some_give_way_and_all_make_the_same(
    model: Path, expected: dict[str, list[Event]]
) -> None:
    with cell(model, speculative=2) as running:
        memory = running.walker.memory(Role.TARGET)
        assert memory.pages is not None and memory.slots is not None
        page = memory.pages.unit_bytes + running.walker.memory(Role.DRAFT).pages.unit_bytes  # type: ignore[union-attr]
        slot = memory.slots.unit_bytes
    few = Limits(96, 6, 96, 8, 4 * 6 * slot + 22 * page)
    with cell(model, few, speculative=2, prefix_cache=False) as tight:
        poison(tight)
        requests = works(tight)
        submit(tight, requests)
        for work in requests:
            same(list(work.stream()), expected[work.request_id])
        counts = tight.metrics.accepted_tokens._value.get(), tight.metrics.rejected_tokens._value.get()
        assert all(counts)
        assert tight.engine._scheduler.preemptions > 0
        assert idle(tight)


def test_a_model_without_a_draft_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="no draft") as error, cell(QWEN[2].save(tmp_path), speculative=2):
        pass
    assert error.value.metadata["field"] == "speculative"


@pytest.mark.parametrize("wrong", [-1, 17])
def test_a_number_of_guesses_out_of_range_is_refused(wrong: int, model: Path) -> None:
    with pytest.raises(ConfigInvalid, match="speculative is"), cell(model, speculative=wrong):
        pass


def test_logits_that_leave_no_choice_end_the_request_at_their_place(
    running: Cell, expected: dict[str, list[Event]], play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault behind a wrong guess does not count; one behind right guesses ends the request there."""
    target = Walker.target

    def poisoned(self: Walker, spans: Sequence[Span], rows: Any, keep: Keep | None = None) -> Output:
        def later(output: Output) -> Sequence[int]:
            if spans[0].mode is Mode.VERIFY and len(spans[0].tokens) > 2:
                wrong = torch.arange(len(output.logits))[:, None] > 1
                output = Output(output.hidden, output.logits.masked_fill(wrong, float("nan")))
            assert keep is not None
            return keep(output)

        return target(self, spans, rows, later)

    monkeypatch.setattr(Walker, "target", poisoned)
    play([1])
    (work,) = works(running, ["warm"])
    running.engine.submit(work)
    same(list(work.stream()), expected["warm"])
    play([GUESSES])
    (work,) = works(running, ["warm"])
    running.engine.submit(work)
    *before, last = list(work.stream())
    assert isinstance(last, Failed) and isinstance(last.error, ServiceFault)
    assert made(before) == made(expected["warm"])[: len(before)]
    assert len(before) == 3  # the first of all, and two of the step that went wrong


def test_a_draft_begins_behind_a_cached_prefix(running: Cell, model: Path) -> None:
    (prompt,) = sequences(running.plans.vocab_size, [70], seed=9)
    with cell(model) as alone:
        work = Request("a", prompt, Sampling(0.8, seed=8), COUNT)
        alone.engine.submit(work)
        wanted = tokens_of(work)
    counter = running.metrics.rejected_tokens
    for name in ("first", "second"):
        before = counter._value.get()
        work = Request(name, prompt, Sampling(0.8, seed=8), COUNT)
        running.engine.submit(work)
        assert tokens_of(work) == wanted
        assert counter._value.get() > before
    assert work.cached_tokens >= 64
