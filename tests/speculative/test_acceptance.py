"""Guesses leave the distribution of what is made as it is, and with a seed the tokens too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from braid_orchestrator.guesses import Guess, Trial, guess, judge
from braid_orchestrator.request import Finished, Request, choose_next
from braid_orchestrator.sampler import Choice, Distribution, Sampler, Turn, choose, distributions
from braid_orchestrator.sampling import Sampling
from braid_wire.errors import ServiceFault
from braid_wire.layers import Mode

VOCAB = 5
LENGTH = 3
PROMPT = np.array([0, 1])
COUNT = 1_200
RNG = np.random.default_rng(3)
TARGET = torch.from_numpy(RNG.normal(size=(VOCAB, VOCAB)) * 1.5).float()
"""[V, V]: logits behind each last token."""
DRAFT = TARGET + torch.from_numpy(RNG.normal(size=(VOCAB, VOCAB))).float()
MANNERS: Mapping[str, Mapping[str, Any]] = {
    "free": {"temperature": 1.0},
    "filtered": {"temperature": 0.8, "top_p": 0.85},
    "penalised": {"temperature": 1.0, "frequency_penalty": 1.0, "repetition_penalty": 1.4},
    "few": {"temperature": 1.3, "top_k": 3, "min_p": 0.1},
}


def settled(how: Mapping[str, Any], count: int, seeded: bool, stops: frozenset[int]) -> list[Request]:
    """Requests with random numbers of their own, whether their callers chose them or not."""
    found = []
    for seed in range(count):
        sampling = Sampling(**how, seed=seed if seeded else None)
        request = Request(str(seed), PROMPT, sampling, LENGTH, decode_tail=1, stop_ids=stops)
        request.sampler._seed = seed
        found.append(request)
    return found


def rows(tokens: Sequence[int], table: torch.Tensor) -> torch.Tensor:
    return table[list(tokens)]


def speculating(requests: Sequence[Request]) -> int:
    """Let each make its tokens, two of them guessed ahead each time; returns how many guesses counted."""
    right = 0
    under_way = list(requests)
    while under_way:
        ahead: list[list[Guess]] = [[] for _ in under_way]
        for _ in range(2):
            made = [
                [*r.tokens[2:], *(g.token_id for g in own)] for r, own in zip(under_way, ahead, strict=True)
            ]
            turns = [Turn(r.sampler, tokens) for r, tokens in zip(under_way, made, strict=True)]
            found = guess(turns, rows([[1, *tokens][-1] for tokens in made], DRAFT))
            for own, one in zip(ahead, found, strict=True):
                assert isinstance(one, Guess)
                own.append(one)
        spans, wanted = [], []
        for request, own in zip(under_way, ahead, strict=True):
            request.memory.length = len(request.tokens) - 1
            request.guesses = own[: request.rest - 1]
            spans.append(request.next_span(3))
            assert (spans[-1].mode is Mode.VERIFY) == (request.rest > 1)
            wanted.append(rows(spans[-1].tokens.tolist(), TARGET))
        left = []
        for request, run, piece in zip(under_way, choose_next(under_way, spans, wanted), wanted, strict=True):
            right += len(run) - 1
            ends = [request.advance(piece, choice) for choice in run]
            assert not any(ends[:-1])
            if ends[-1] is None:
                left.append(request)
            else:
                assert isinstance(ends[-1], Finished)
        under_way = left
    return right


def exact(
    sampler: Sampler, stops: frozenset[int], made: tuple[int, ...] = ()
) -> dict[tuple[int, ...], float]:
    """The probability of each completion."""
    if len(made) == LENGTH:
        return {made: 1.0}
    found: dict[tuple[int, ...], float] = {}
    chances = sampler.distribution(TARGET[[1, *made][-1]], made)
    for token, chance in enumerate(chances.tolist()):
        further = {made: 1.0} if token in stops else exact(sampler, stops, (*made, token))
        for one, other in further.items():
            found[one] = found.get(one, 0.0) + chance * other
    return found


@pytest.mark.parametrize(
    ("name", "seeded", "stops"),
    [
        ("free", False, ()),
        ("free", False, (2,)),
        ("filtered", False, (0,)),
        ("penalised", False, ()),
        ("few", False, (3,)),
        ("filtered", True, ()),
        ("penalised", True, (2,)),
    ],
)
def test_the_distribution_is_the_targets(name: str, seeded: bool, stops: tuple[int, ...]) -> None:
    requests = settled(MANNERS[name], COUNT, seeded, frozenset(stops))
    right = speculating(requests)
    counts = Counter(tuple(request.tokens[2:]) for request in requests)
    chances = exact(requests[0].sampler, frozenset(stops))
    assert sum(chances.values()) == pytest.approx(1)
    assert 0.2 * COUNT < right < 1.9 * COUNT  # guesses count, and not all of them are right
    assert all(chances[one] > 0 for one in counts)
    likely = [one for one, chance in chances.items() if chance * COUNT >= 5]
    seen = [counts[one] for one in likely]
    wanted = [chances[one] * COUNT for one in likely]
    seen.append(COUNT - sum(seen))
    wanted.append(COUNT - sum(wanted))
    terms = [(a - b) ** 2 / b for a, b in zip(seen, wanted, strict=True) if b > 1]
    # The statistic has a mean of n − 1 and a variance of 2 (n − 1); five deviations are out of reach.
    freedom = len(terms) - 1
    assert sum(terms) < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("name", MANNERS)
def test_every_seed_makes_what_it_makes_alone(name: str) -> None:
    requests = settled(MANNERS[name], 100, True, frozenset())
    speculating(requests)
    for request in requests:
        made: list[int] = []
        while len(made) < LENGTH:
            (choice,) = choose([Turn(request.sampler, made)], rows([[1, *made][-1]], TARGET))
            assert isinstance(choice, Choice)
            made.append(choice.token_id)
        assert request.tokens[2:] == made


def test_rejection_takes_as_many_as_the_distributions_share() -> None:
    """The share of first guesses taken is the mass that both have, which no other way exceeds."""
    sampler = Sampler(Sampling(1.0))
    target, draft = (table[1].double().softmax(-1) for table in (TARGET, DRAFT))
    shared = float(torch.minimum(target, draft).sum())
    taken = 0
    for seed in range(COUNT):
        sampler._seed = seed
        turn = Turn(sampler, [])
        (one,) = guess([turn], DRAFT[1:2])
        assert isinstance(one, Guess) and one.drawn is not None
        (run,) = judge([Trial([turn, Turn(sampler, [one.token_id])], [one])], rows([1, one.token_id], TARGET))
        taken += len(run) == 2
    deviation = np.sqrt(shared * (1 - shared) / COUNT)
    assert abs(taken / COUNT - shared) < 5 * deviation


@pytest.mark.parametrize("name", MANNERS)
def test_distributions_are_those_of_one_row(name: str) -> None:
    """The batched form, of what filters leave, against the plain one over the whole vocabulary."""
    samplers = [Sampler(Sampling(**MANNERS[name]), PROMPT), Sampler(Sampling(0.5))]
    logits = torch.from_numpy(RNG.normal(size=(2, 3000)) * 2).float()
    turns = [Turn(sampler, [3, 3, 7]) for sampler in samplers]
    for turn, row, found in zip(turns, logits, distributions(turns, logits), strict=True):
        assert isinstance(found, Distribution)
        dense = torch.zeros(3000, dtype=torch.float64)
        dense[found.ids] = found.chances
        assert bool((found.ids.diff() > 0).all())
        torch.testing.assert_close(dense, turn.sampler.distribution(row, turn.tokens), atol=1e-12, rtol=1e-6)
        for token in [*found.ids[:3].tolist(), 0, 2999]:
            assert found.probability(token) == float(dense[token])


def test_what_lies_beyond_another_distribution() -> None:
    def of(chances: Mapping[int, float]) -> Distribution:
        return Distribution(
            torch.tensor(list(chances)), torch.tensor(list(chances.values()), dtype=torch.float64)
        )

    one, other = of({1: 0.5, 4: 0.25, 9: 0.25}), of({0: 0.1, 4: 0.5, 9: 0.05, 12: 0.35})
    rest = one.beyond(other)
    assert [rest.probability(token) for token in (0, 1, 4, 9, 12)] == pytest.approx([0, 5 / 7, 0, 2 / 7, 0])
    assert {rest.draw(uniform) for uniform in (0.0, 0.3, 0.71)} == {1}
    assert {rest.draw(uniform) for uniform in (0.72, 0.99, 1 - 2**-52)} == {9}
    assert one.beyond(one) == one


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("seed", [None, 5])
def test_faulty_logits_count_only_where_a_token_would_stand(bad: float, seed: int | None) -> None:
    sampler = Sampler(Sampling(1.0, seed=seed))
    sampler._seed = 5
    sure = torch.full((VOCAB,), -50.0)
    sure[3] = 50.0
    turn = Turn(sampler, [])
    (one,) = guess([turn], sure[None])
    assert isinstance(one, Guess) and one.token_id == 3
    (fault,) = guess([turn], torch.full((1, VOCAB), bad))
    assert isinstance(fault, ServiceFault)
    turns = [turn, Turn(sampler, [3])]
    wrong = torch.full((VOCAB,), bad)
    (run,) = judge([Trial(turns, [one])], torch.stack([sure, wrong]))
    assert [type(choice) for choice in run] == [Choice, ServiceFault]
    (run,) = judge([Trial(turns, [one])], torch.stack([wrong, sure]))
    assert [type(choice) for choice in run] == [ServiceFault]
    (run,) = judge([Trial(turns, [one])], torch.stack([sure.roll(1), wrong]))
    assert [choice.token_id for choice in run if isinstance(choice, Choice)] == [4] and len(run) == 1


def test_log_probabilities_are_the_targets_own() -> None:
    sampler = Sampler(Sampling(0.7, top_p=0.8, logprobs=2, logit_bias={2: -3.0}))
    turn = Turn(sampler, [])
    (one,) = guess([turn], DRAFT[1:2])
    assert isinstance(one, Guess)
    logits = rows([1, one.token_id], TARGET)
    (run,) = judge([Trial([turn, Turn(sampler, [one.token_id])], [one])], logits)
    assert run
    for choice, row in zip(run, logits, strict=False):
        assert isinstance(choice, Choice)
        table = row.log_softmax(-1)
        assert choice.logprob == pytest.approx(float(table[choice.token_id]), abs=1e-6)
        assert [token for token, _ in choice.top] == table.topk(2).indices.tolist()
