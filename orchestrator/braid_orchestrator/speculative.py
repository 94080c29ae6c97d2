"""Speculative decoding: a draft guesses the next tokens, and one step of the target checks them all.

What counts of the guesses `guesses.judge` says, so that what is made does not depend on them: what the
draft is worth decides about speed and about nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from braid_wire.batch import IntArray
from braid_wire.errors import BraidError, ConfigInvalid, PoolExhausted, ServiceFault
from braid_wire.layers import Mode, Role

from braid_orchestrator.body.base import Body, Output
from braid_orchestrator.guesses import Guess, guess
from braid_orchestrator.memory import SequenceMemory
from braid_orchestrator.metrics import CellMetrics
from braid_orchestrator.request import Request
from braid_orchestrator.sampler import Turn
from braid_orchestrator.settings import MOST_GUESSES
from braid_orchestrator.walker import Walker

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """What a committed step did for one request.

    Args:
        request: its tokens are told already.
        hidden: [n, hidden], the target's final hidden states of the n tokens that were committed.
    """

    request: Request
    hidden: torch.Tensor


@dataclass
class _Draft:
    """What the draft holds of one request: its rows are the tokens from `first` on."""

    request: Request
    memory: SequenceMemory
    first: int

    @property
    def end(self) -> int:
        """The token whose hidden state its next row takes."""
        return self.first + self.memory.length


@dataclass
class _Guessing:
    """A request whose next tokens are being guessed."""

    draft: _Draft
    most: int
    made: Sequence[int]
    guesses: list[Guess] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)
    """[1, hidden]: what the draft made of every row that led to a guess."""

    @property
    def tokens(self) -> list[int]:
        """The guesses as tokens."""
        return [guess.token_id for guess in self.guesses]

    @property
    def turn(self) -> Turn:
        """Who is to guess, and behind what."""
        return Turn(self.draft.request.sampler, [*self.made, *self.tokens])

    def add(self, guess: Guess, hidden: torch.Tensor) -> bool:
        """Leave one more guess with the request; whether another may follow.

        A token that ends the request is a guess like any other: a random one that were left out for
        what it is would bend the distribution of what is made.
        """
        self.guesses.append(guess)
        self.hidden.append(hidden)
        self.draft.request.guesses = self.guesses
        return len(self.guesses) < self.most and guess.token_id not in self.draft.request.stops


class Speculator:
    """Guesses ahead for the requests of an engine.

    Each request has memory of its own in the draft role. It takes the target's hidden states of all
    tokens that were committed, and only these: rows that guess on from the draft's own hidden states
    are forgotten. A draft that missed tokens (a cached prefix, or a time without memory) begins at the
    first that it sees; it then knows less, and guesses less well.

    Args:
        walker: runs steps of the draft.
        most: tokens that are guessed ahead, as `check_speculative` allows.
        metrics: of this process.
    """

    def __init__(self, walker: Walker, most: int, metrics: CellMetrics) -> None:
        self._walker = walker
        self._most = most
        self._metrics = metrics
        self._memory = walker.memory(Role.DRAFT)
        self._drafts: dict[int, _Draft] = {}

    def count(self, verified: int, right: int) -> None:
        """Note that so many guesses were verified, and how many of them were right."""
        self._metrics.accepted_tokens.inc(right)
        self._metrics.rejected_tokens.inc(verified - right)

    def follow(self, progress: Sequence[Progress]) -> None:
        """Follow a committed step of the target, and leave guesses with the requests that decode next.

        A draft that fails costs its guesses and nothing else.
        """
        self._forget_restarted()
        followed = [one for one in progress if self._takes_part(one)]
        try:
            self._run(followed)
        except BraidError as error:
            log.warning("nothing is guessed for %d requests: %s", len(followed), error)
            for one in followed:
                self.forget(one.request)

    def forget(self, request: Request) -> None:
        """Free what the draft holds of a request."""
        request.guesses = ()
        draft = self._drafts.pop(request.memory.sequence_id, None)
        if draft is not None:
            self._memory.release(draft.memory)

    def _forget_restarted(self) -> None:
        """Free what is held for requests that gave their memory back and begin again."""
        for draft in list(self._drafts.values()):
            if draft.request.memory.length < draft.end:
                self.forget(draft.request)

    def _takes_part(self, progress: Progress) -> bool:
        """Whether the draft is to see a request's step; it then holds the memory for it."""
        request = progress.request
        if request.scores or request.memory.released or request.rest < 2:
            return False
        key, begin = request.memory.sequence_id, request.memory.length - len(progress.hidden)
        draft = self._drafts.get(key)
        if draft is None or draft.end != begin:
            self.forget(request)
            draft = self._drafts[key] = _Draft(request, SequenceMemory(key), begin)
        try:
            self._memory.acquire(
                draft.memory, draft.memory.length + len(progress.hidden) + min(self._most, request.rest)
            )
        except PoolExhausted:
            self.forget(request)
            return False
        return True

    def _run(self, followed: Sequence[Progress]) -> None:
        """Feed the draft what was committed, then let it go on alone where the next token is known."""
        if not followed:
            return
        drafts = [self._drafts[one.request.memory.sequence_id] for one in followed]
        spans = []
        for draft, one in zip(drafts, followed, strict=True):
            begin, count = draft.end, len(one.hidden)
            tokens = one.request.tokens[begin + 1 : begin + 1 + count]
            mode = Mode.DECODE if count == 1 else Mode.EXTEND
            spans.append(one.request.span(draft.memory, begin, tokens, mode))
        decodes = [one.request.memory.length == len(one.request.tokens) - 1 for one in followed]
        rows = np.cumsum([len(span.tokens) for span in spans])[decodes] - 1
        output = self._walker.draft(spans, torch.cat([one.hidden for one in followed]), rows)
        guessing = [self._begin(draft) for draft, ready in zip(drafts, decodes, strict=True) if ready]
        self._go_on(guessing, *_rows(output, rows))

    def _begin(self, draft: _Draft) -> _Guessing:
        request = draft.request
        # The target's own choice behind the last guess may still be made, so one less than that.
        most = min(self._most, request.rest - 1)
        return _Guessing(draft, most, request.tokens[len(request.prompt) :])

    def _go_on(self, guessing: list[_Guessing], hidden: torch.Tensor, logits: torch.Tensor) -> None:
        """Guess from a step's last rows, then feed the guesses, until each has its number.

        Args:
            hidden: [n, hidden], of the rows behind which each guesses.
            logits: float32 [n, V], likewise.
        """
        while guessing:
            found = guess([one.turn for one in guessing], logits)
            guessing = [
                one
                for one, row, new in zip(guessing, hidden.split(1), found, strict=True)
                if not isinstance(new, ServiceFault) and one.add(new, row)
            ]
            if guessing:
                hidden, logits = self._look_ahead(guessing)

    def _look_ahead(self, guessing: Sequence[_Guessing]) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and logits behind the last guess of each, in a step that is forgotten again.

        All rows since what was committed are fed anew: they are few, and no state is held for them.
        """
        spans = [
            one.draft.request.span(
                one.draft.memory,
                one.draft.end,
                one.tokens,
                Mode.DECODE if len(one.guesses) == 1 else Mode.EXTEND,
            )
            for one in guessing
        ]
        rows = np.cumsum([len(span.tokens) for span in spans]) - 1
        hidden = torch.cat([row for one in guessing for row in one.hidden])
        output = self._walker.draft(spans, hidden, rows, forget=True)
        return _rows(output, rows)


def _rows(output: Output, rows: IntArray) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and logits of a step's rows; copies, because the next step's will lie where they are."""
    return output.hidden[torch.from_numpy(rows)], output.logits


def check_speculative(most: int, body: Body) -> None:
    """Hold a number of tokens to guess ahead against a model; 0: nothing is guessed.

    Raises:
        ConfigInvalid: it is out of range, or the model has no draft.
    """
    if not 0 <= most <= MOST_GUESSES:
        raise ConfigInvalid(
            f"speculative is {most}; it must be 0 (off) or in [1, {MOST_GUESSES}]",
            field="speculative",
            value=most,
        )
    if most and not body.has_draft:
        raise ConfigInvalid(
            f"speculative is {most}, but the model has no draft layers", field="speculative", value=most
        )
