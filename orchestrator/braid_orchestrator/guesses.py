"""Guesses at the tokens that requests make next, and which of them count.

What is made is distributed as if nothing had been guessed, in one of two ways. A request that is
greedy or has a seed makes the very tokens that it would make alone: a guess is what its sampler would
choose from the draft's logits, and it is right where the choice from the target's is the same. Where
nobody can ask for the same random numbers again, guesses are drawn from the draft's distribution and
taken or replaced by rejection sampling, which takes more of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from braid_wire.errors import ServiceFault

from braid_orchestrator.sampler import Choice, Distribution, Turn, choose, distributions, told

GUESS_STREAM = 1
"""The stream of uniforms that guesses are drawn with."""
TAKE_STREAM = 2
"""The stream of uniforms that say whether they are taken."""

Run = Sequence[Choice | ServiceFault]
"""What a step chose for a request: tokens that follow each other, and at the end perhaps a fault."""


@dataclass(frozen=True)
class Guess:
    """A token that may come next.

    Args:
        token_id: which.
        drawn: what it was drawn from; None: it is right where the target's choice is the same.
    """

    token_id: int
    drawn: Distribution | None = None


@dataclass(frozen=True)
class Trial:
    """Guesses of one request that a step verified.

    Args:
        turns: what chooses at the place of each guess, and one behind the last.
        guesses: one less than turns.
    """

    turns: Sequence[Turn]
    guesses: Sequence[Guess] = ()

    @property
    def drawn(self) -> bool:
        """Whether its guesses are random."""
        return any(guess.drawn is not None for guess in self.guesses)


def guess(turns: Sequence[Turn], logits: torch.Tensor) -> list[Guess | ServiceFault]:
    """A guess for each request; a fault where its logits leave none.

    Args:
        turns: n requests.
        logits: [n, V], the draft's, of each.
    """
    random = [turn.sampler.unrepeatable for turn in turns]
    choices = iter(choose(*_those(turns, logits, [not one for one in random])))
    supports = iter(distributions(*_those(turns, logits, random)))
    found: list[Guess | ServiceFault] = []
    for turn, drawn in zip(turns, random, strict=True):
        if drawn:
            support = next(supports)
            found.append(support if isinstance(support, ServiceFault) else _drawn(turn, support))
        else:
            choice = next(choices)
            found.append(choice if isinstance(choice, ServiceFault) else Guess(choice.token_id))
    return found


def judge(trials: Sequence[Trial], logits: torch.Tensor) -> list[Run]:
    """What each request makes: the guesses that count, and one token behind them.

    Args:
        trials: of some requests.
        logits: [n, V], the target's, of all their turns in order.
    """
    turns = [turn for trial in trials for turn in trial.turns]
    random = [trial.drawn for trial in trials for _ in trial.turns]
    choices = iter(choose(*_those(turns, logits, [not one for one in random])))
    supports = iter(distributions(*_those(turns, logits, random)))
    runs: list[Run] = []
    for trial, rows in zip(trials, logits.split([len(trial.turns) for trial in trials]), strict=True):
        if trial.drawn:
            runs.append(_taken(trial, [next(supports) for _ in trial.turns], rows))
        else:
            runs.append(_matched(trial, [next(choices) for _ in trial.turns]))
    return runs


def _those(
    turns: Sequence[Turn], logits: torch.Tensor, wanted: Sequence[bool]
) -> tuple[list[Turn], torch.Tensor]:
    """Some turns, and their rows of [n, V]; not a copy where it is all of them."""
    chosen = [turn for turn, one in zip(turns, wanted, strict=True) if one]
    return chosen, logits if len(chosen) == len(turns) else logits[list(wanted)]


def _drawn(turn: Turn, support: Distribution) -> Guess:
    return Guess(support.draw(turn.sampler.uniform(len(turn.tokens), GUESS_STREAM)), support)


def _matched(trial: Trial, choices: Run) -> Run:
    """The target's choices, as far as each stands behind right guesses."""
    for place, (choice, guessed) in enumerate(zip(choices, trial.guesses, strict=False)):
        if isinstance(choice, ServiceFault) or choice.token_id != guessed.token_id:
            return choices[: place + 1]
    return choices


def _taken(trial: Trial, supports: Sequence[Distribution | ServiceFault], rows: torch.Tensor) -> Run:
    """The guesses that are taken, and a token in place of the first that is not, or behind them all.

    A guess x from q is taken with the chance min(1, p(x) / q(x)); what replaces it is drawn from the
    part of p that q leaves out. Together that is a draw from p.
    """
    tokens: list[int] = []
    fault: list[ServiceFault] = []
    for place, (turn, target) in enumerate(zip(trial.turns, supports, strict=True)):
        if isinstance(target, ServiceFault):
            fault.append(target)
            break
        sampler, position = turn.sampler, len(turn.tokens)
        guessed = trial.guesses[place] if place < len(trial.guesses) else None
        if guessed is not None and guessed.drawn is not None:
            chance = guessed.drawn.probability(guessed.token_id)
            wanted = target.probability(guessed.token_id)
            if sampler.uniform(position, TAKE_STREAM) * chance < wanted:
                tokens.append(guessed.token_id)
                continue
            target = target.beyond(guessed.drawn)
        tokens.append(target.draw(sampler.uniform(position)))
        break
    samplings = [turn.sampler.sampling for turn in trial.turns[: len(tokens)]]
    return [*told(samplings, rows[: len(tokens)], tokens), *fault]
