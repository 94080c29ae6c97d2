"""Requests on the small model: how they end, what they tell, and that seeds hold in any company."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from braid_orchestrator.cell import Cell, CellOptions
from braid_orchestrator.memory import Span
from braid_orchestrator.request import (
    Event,
    Failed,
    Finish,
    Finished,
    PromptLogprobs,
    Request,
    Scored,
    Token,
    fan_out,
    merged,
)
from braid_orchestrator.sampler import Choice
from braid_orchestrator.sampling import Sampling
from braid_orchestrator.store import Limits
from braid_orchestrator.text import TextStream, Tokenizer
from braid_wire.errors import PoolExhausted, RequestInvalid, ServiceFault, StepTimeout
from braid_wire.layers import Role
from cells import embedded_links

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
VOCAB = 2048
LIMITS = Limits(max_tokens=48, max_sequences=6, max_context=200, page_size=8)
WARM = Sampling(0.9, top_k=200, top_p=0.95, seed=5, repetition_penalty=1.1)


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cell]:
    made = Cell(
        TINY, embedded_links(), tmp_path_factory.mktemp("cell") / "a.sock", CellOptions(limits=LIMITS)
    )
    yield made
    made.close()


@pytest.fixture(autouse=True)
def nothing_left(cell: Cell) -> Iterator[None]:
    yield
    memory = cell.walker.memory(Role.TARGET)
    assert memory.pages is not None and memory.slots is not None
    assert (memory.pages.used, memory.slots.used) == (0, 0)


def encoded(cell: Cell, text: str = "def read(self, size=-1):\n    ") -> np.ndarray:
    assert cell.tokenizer is not None
    return np.array(cell.tokenizer.encode(text), dtype=np.int64)


def events(cell: Cell, *requests: Request) -> list[list[Event]]:
    """All that each of some requests tells, run side by side."""
    for request in requests:
        cell.engine.submit(request)
    return [list(request.stream()) for request in requests]


def tokens(told: Sequence[Event]) -> list[int]:
    return [event.token_id for event in told if isinstance(event, Token)]


def text_of(told: Sequence[Event]) -> str:
    return "".join(event.text for event in told if isinstance(event, Token | Finished))


def written(cell: Cell, **more: Any) -> list[Event]:
    """What a request with text tells."""
    given = {"max_tokens": 40, "sampling": WARM, "tokenizer": cell.tokenizer} | more
    (told,) = events(cell, Request("r", encoded(cell), **given))
    return told


def test_text_is_that_of_the_tokens(cell: Cell) -> None:
    told = written(cell)
    assert told[-1] == Finished(Finish.LENGTH)
    assert cell.tokenizer is not None
    assert text_of(told) == cell.tokenizer.decode(tokens(told))


def test_a_seed_holds_in_any_company_and_any_steps(cell: Cell) -> None:
    alone = tokens(written(cell))
    assert len(set(alone)) > 10
    crowd = [
        Request(f"c{n}", encoded(cell)[: 3 + n], Sampling(1.0, seed=n), max_tokens=25 + n) for n in range(4)
    ]
    for chunk in (0, 3):
        again = Request(f"again {chunk}", encoded(cell), WARM, max_tokens=40, chunk=chunk)
        fresh = [dataclasses.replace(one, request_id=f"{one.request_id}/{chunk}") for one in crowd]
        assert tokens(events(cell, *fresh[:2], again, *fresh[2:])[2]) == alone
    other = dataclasses.replace(WARM, seed=6)
    assert tokens(written(cell, sampling=other)) != alone


def test_what_comes_next_does_not_depend_on_how_the_request_came_there(cell: Cell) -> None:
    whole = tokens(written(cell))
    request = Request("r", encoded(cell), WARM, max_tokens=40)
    request.settle(VOCAB, 200)
    # As if its pages had been taken from it behind token 7, and all of it were fed again.
    request.tokens += whole[:7]
    assert tokens(events(cell, request)[0]) == whole[7:]


def test_a_stop_string_across_tokens_ends_the_text_before_it(cell: Cell) -> None:
    plain = written(cell)
    text = text_of(plain)
    pieces = [event.text for event in plain if isinstance(event, Token)]
    # From the middle of one token's text to the middle of another's.
    place = next(n for n in range(8, 30) if len(pieces[n]) > 1 and len(pieces[n + 1]) > 1)
    begin = len("".join(pieces[:place])) + len(pieces[place]) - 1
    stop = text[begin : begin + 2]
    end = text.find(stop)
    told = written(cell, stop_strings=(stop, "never to be seen"))
    assert told[-1] == Finished(Finish.STOP, stop)
    assert text_of(told) == text[:end]
    made = tokens(told)
    assert made == tokens(plain)[: len(made)]
    included = written(cell, stop_strings=(stop,), include_stop_str_in_output=True)
    assert text_of(included) == text[: end + len(stop)]
    assert tokens(included) == made


def test_what_was_held_back_comes_with_the_end(cell: Cell) -> None:
    plain = text_of(written(cell))
    told = written(cell, stop_strings=(plain[-3:] + "and no more",))
    assert told[-1] == Finished(Finish.LENGTH, text=plain[-3:])
    assert text_of(told) == plain


def test_min_tokens_hold_for_stop_strings_too(cell: Cell) -> None:
    plain = written(cell)
    first = next(event.text for event in plain if isinstance(event, Token) and event.text)
    assert len(tokens(written(cell, stop_strings=(first[0],)))) == 1
    longer = written(cell, stop_strings=(first[0],), sampling=dataclasses.replace(WARM, min_tokens=15))
    assert len(tokens(longer)) >= 15
    assert tokens(longer)[:15] == tokens(plain)[:15]


def forced(text: str, **more: Any) -> tuple[list[Event], list[int]]:
    """What a request tells when the tokens of a text are chosen, one after the other."""
    tokenizer = Tokenizer.load(TINY)
    assert tokenizer is not None
    ids = tokenizer.encode(text)
    request = Request("r", np.array([5, 6]), max_tokens=len(ids), tokenizer=tokenizer, **more)
    found: list[Event] = []
    for token in ids:
        end = request.advance(torch.empty(0, VOCAB), Choice(token))
        while not request.events.empty():
            found.append(request.events.get()[1])
        if end is not None:
            return [*found, end], ids
    raise AssertionError("the request did not end")


@pytest.mark.parametrize("stop", ["本", "é", "🙂", "日本", "o 日", " 🙂 ", "x"])
def test_stop_strings_of_characters_that_are_several_tokens(stop: str) -> None:
    text = "héllo 日本 🙂 x"
    told, ids = forced(text, stop_strings=(stop,))
    assert told[-1] == Finished(Finish.STOP, stop)
    assert text_of(told) == text[: text.index(stop)]
    assert tokens(told) == ids[: len(tokens(told))]


def test_a_character_that_never_became_whole_is_not_given_out() -> None:
    tokenizer = Tokenizer.load(TINY)
    assert tokenizer is not None
    half = tokenizer.encode("日")[:2]
    request = Request("r", np.array([5]), max_tokens=2, tokenizer=tokenizer)
    ends = [request.advance(torch.empty(0, VOCAB), Choice(token)) for token in half]
    assert ends == [None, Finished(Finish.LENGTH)]
    assert [request.events.get()[1] for _ in half] == [Token(half[0]), Token(half[1])]


def test_end_tokens_stop_unless_ignored(cell: Cell) -> None:
    certain = Sampling(logit_bias={2: 100})
    assert written(cell, sampling=certain, end_ids=frozenset({2})) == [Finished(Finish.STOP, 2)]
    for more in ({"ignore_eos": True, "end_ids": frozenset({2})}, {"end_ids": frozenset()}):
        assert tokens(written(cell, sampling=certain, max_tokens=5, **more)) == [2] * 5
    held = dataclasses.replace(certain, min_tokens=4)
    told = written(cell, sampling=held, stop_ids=frozenset({2}))
    assert told[-1] == Finished(Finish.STOP, 2) and len(tokens(told)) == 4
    assert 2 not in tokens(told)


def test_logprobs_are_those_of_scoring(cell: Cell) -> None:
    prompt = encoded(cell)
    wanted = dataclasses.replace(WARM, logprobs=4, prompt_logprobs=2)
    request = Request("r", prompt, wanted, max_tokens=20, chunk=3)
    crowd = Request("c", prompt[:2], Sampling(1.0, seed=1), max_tokens=30)
    told, _ = events(cell, request, crowd)
    made = tokens(told)
    (scored,) = events(cell, Request("s", np.array([*prompt, *made])))
    assert isinstance(scored[0], Scored)
    table = scored[0].logits.double().log_softmax(-1)
    assert isinstance(told[0], PromptLogprobs)
    assert [type(event) for event in told[1:]] == [Token] * 20 + [Finished]
    entries = [*told[0].entries, *((e.logprob, e.top) for e in told if isinstance(e, Token))]
    assert [len(top) for _, top in entries] == [2] * (len(prompt) - 1) + [4] * 20
    for row, following, (logprob, top) in zip(table[:-1], [*prompt[1:], *made], entries, strict=True):
        assert logprob == pytest.approx(float(row[following]), abs=1e-4)
        values = row.topk(len(top)).values.tolist()
        assert [value for _, value in top] == pytest.approx(values, abs=1e-4)
        assert [float(row[token]) for token, _ in top] == pytest.approx(values, abs=1e-4)


def test_prompt_logprobs_of_one_token_and_of_a_prompt_that_ends_at_once(cell: Cell) -> None:
    wanted = Sampling(prompt_logprobs=0, logit_bias={2: 100})
    stops = frozenset({2})
    one, several = events(
        cell,
        Request("a", np.array([9]), wanted, max_tokens=3, stop_ids=stops),
        Request("b", np.array([9, 8]), wanted, max_tokens=3, stop_ids=stops),
    )
    assert one == [PromptLogprobs(()), Finished(Finish.STOP, 2)]
    assert isinstance(several[0], PromptLogprobs) and len(several[0].entries) == 1
    assert several[0].entries[0][0] < 0 and several[0].entries[0][1] == ()


def test_completions_are_those_of_their_seeds(cell: Cell) -> None:
    wanted = dataclasses.replace(WARM, seed=2**64 - 2, prompt_logprobs=0)
    requests = fan_out(Request("r", encoded(cell), wanted, max_tokens=15), 3)
    for request in requests:
        cell.engine.submit(request)
    told: dict[int, list[Event]] = {0: [], 1: [], 2: []}
    for index, event in merged(requests):
        told[index].append(event)
    assert all(isinstance(events_[-1], Finished) for events_ in told.values())
    assert [any(isinstance(e, PromptLogprobs) for e in told[i]) for i in range(3)] == [True, False, False]
    for index, seed in enumerate((2**64 - 2, 2**64 - 1, 0)):
        alone = written(cell, sampling=dataclasses.replace(WARM, seed=seed), max_tokens=15)
        assert tokens(told[index]) == tokens(alone)
    assert len({tuple(tokens(events_)) for events_ in told.values()}) == 3


def test_completions_without_a_seed_differ() -> None:
    first, second = fan_out(Request("r", np.array([1]), Sampling(1.0), max_tokens=1), 2)
    assert first.sampler.uniform(0) != second.sampler.uniform(0)
    (only,) = fan_out(Request("r", np.array([1]), max_tokens=1), 1)
    assert (only.request_id, only.index) == ("r", 0)
    for wrong in (0, 129):
        with pytest.raises(RequestInvalid, match="128") as error:
            fan_out(only, wrong)
        assert error.value.metadata["field"] == "n"


def test_without_max_tokens_the_context_is_filled(cell: Cell) -> None:
    (told,) = events(cell, Request("r", np.full(LIMITS.max_context - 20, 5), max_tokens=None))
    assert told[-1] == Finished(Finish.LENGTH)
    assert len(tokens(told)) == 20
    with pytest.raises(PoolExhausted):
        cell.engine.submit(Request("long", np.full(LIMITS.max_context, 5), max_tokens=None))


def test_a_deadline_ends_what_runs_and_what_waits(cell: Cell) -> None:
    running = [Request(f"{n}", encoded(cell), max_tokens=40) for n in range(LIMITS.max_sequences)]
    late = Request("late", encoded(cell), max_tokens=160, deadline_s=0.03)
    in_time = Request("in time", encoded(cell), max_tokens=2, deadline_s=60)
    *others, first, second, last = events(cell, *running[1:], late, in_time, running[0])
    assert isinstance(first[-1], Failed) and isinstance(first[-1].error, StepTimeout)
    assert first[-1].error.metadata["field"] == "deadline_s" and "late" in first[-1].error.message
    assert second[-1] == Finished(Finish.LENGTH)
    assert all(len(tokens(one)) == 40 for one in (*others, last))
    waiting = Request("waiting", encoded(cell), max_tokens=160, deadline_s=0.02)
    *_, ended = events(
        cell, *(dataclasses.replace(one, request_id=f"{one.request_id}'") for one in running), waiting
    )
    assert tokens(ended) == [] and isinstance(ended[-1], Failed)


def test_a_fault_while_text_is_made_ends_one_request(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's thread lives on, and others have their tokens."""
    push = TextStream.push
    bad, good = (
        Request(name, encoded(cell), max_tokens=9, tokenizer=cell.tokenizer, ignore_eos=True)
        for name in ("bad", "good")
    )
    broken = bad._text

    def failing(self: TextStream, token: int) -> str:
        if self is broken:
            raise KeyError("no such piece")
        return push(self, token)

    monkeypatch.setattr(TextStream, "push", failing)
    first, second = events(cell, bad, good)
    (failed,) = first
    assert isinstance(failed, Failed) and isinstance(failed.error, ServiceFault)
    assert len(tokens(second)) == 9


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_fault_of_the_logits_ends_one_request(
    cell: Cell, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    import braid_orchestrator.engine as engine
    from braid_orchestrator.request import choose_next

    def poisoned(requests: Sequence[Request], spans: Sequence[Span], rows: Sequence[torch.Tensor]) -> Any:
        wrong = [
            torch.full_like(r, bad) if q.request_id == "bad" else r
            for q, r in zip(requests, rows, strict=True)
        ]
        return choose_next(requests, spans, wrong)

    monkeypatch.setattr(engine, "choose_next", poisoned)
    requests = (Request(name, encoded(cell), Sampling(0.5, seed=1), max_tokens=9) for name in ("bad", "good"))
    first, second = events(cell, *requests)
    (failed,) = first
    assert isinstance(failed, Failed) and isinstance(failed.error, ServiceFault)
    assert len(tokens(second)) == 9


PROMPT = np.array([5, 6, 7])


@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("deadline_s", {"deadline_s": 0.0}),
        ("deadline_s", {"deadline_s": math.nan}),
        ("deadline_s", {"deadline_s": math.inf}),
        ("max_tokens", {"max_tokens": -1}),
        ("stop_strings", {"stop_strings": ("x",), "tokenizer": None}),
        ("stop_strings", {"stop_strings": ("",)}),
        ("stop_strings", {"stop_strings": ("x" * 1025,)}),
        ("stop_strings", {"stop_strings": ("x",) * 65}),
        ("min_tokens", {"sampling": Sampling(min_tokens=6), "max_tokens": 5}),
        ("prompt_logprobs", {"sampling": Sampling(prompt_logprobs=0), "max_tokens": 0}),
        ("mtp", {"mtp": True}),
        ("prompt", {"prompt": np.array([], dtype=np.int64)}),
    ],
)
def test_a_bad_value_is_refused_by_name(cell: Cell, field: str, more: dict[str, Any]) -> None:
    given: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 5, "tokenizer": cell.tokenizer}
    with pytest.raises(RequestInvalid) as error:
        Request("r", **given | more)
    assert error.value.metadata["field"] == field


@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("prompt", {"prompt": np.array([VOCAB])}),
        ("prompt", {"prompt": np.array([-1])}),
        ("logit_bias", {"sampling": Sampling(logit_bias={VOCAB: 1.0})}),
        ("min_tokens", {"sampling": Sampling(min_tokens=1), "stop_ids": frozenset(range(VOCAB))}),
        ("min_tokens", {"sampling": Sampling(min_tokens=198), "max_tokens": None}),
    ],
)
def test_what_does_not_fit_the_model_is_refused_by_name(cell: Cell, field: str, more: dict[str, Any]) -> None:
    given: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 5, "tokenizer": cell.tokenizer}
    with pytest.raises(RequestInvalid) as error:
        cell.engine.submit(Request("r", **given | more))
    assert error.value.metadata["field"] == field
    assert cell.engine.load.running == cell.engine.load.waiting == 0
