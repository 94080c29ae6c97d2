"""Speculative decoding: a draft guesses the next tokens, and one step of the target checks them all.

What counts of the guesses `guesses.judge` says, so that what is made does not depend on them: what the
draft is worth decides about speed and about nothing else. How many tokens are guessed, `pace` says.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from braid_wire.batch import IntArray
from braid_wire.errors import BraidError, ConfigInvalid, PoolExhausted, ServiceFault
from braid_wire.layers import Mode, Role

from braid_orchestrator.body.base import Body, Output
from braid_orchestrator.guesses import Guess, guess
from braid_orchestrator.memory import SequenceMemory, Span
from braid_orchestrator.metrics import CellMetrics
from braid_orchestrator.pace import Pace
from braid_orchestrator.request import Request
from braid_orchestrator.sampler import Turn
from braid_orchestrator.settings import MOST_GUESSES
from braid_orchestrator.walker import Walker

log = logging.getLogger(__name__)


_MOST_PENDING = 256
"""Hidden states of a request that wait for the draft; with as many, it is fed whether it guesses or not."""


@dataclass(frozen=True)
class Progress:
    """What a committed step did for one request.

    Args:
        request: its tokens are told already.
        span: what it fed.
        hidden: [n, hidden], the target's final hidden states of the n tokens that were committed.
    """

    request: Request
    span: Span
    hidden: torch.Tensor

    @property
    def guessed(self) -> int:
        """Guesses that the step verified."""
        return len(self.span.tokens) - 1 if self.span.mode is Mode.VERIFY else 0

    @property
    def right(self) -> int:
        """How many of them counted."""
        return len(self.hidden) - 1 if self.guessed else 0

    @property
    def ready(self) -> bool:
        """Whether its next token is known and the one behind it can be guessed."""
        return self.request.memory.length == len(self.request.tokens) - 1


@dataclass(eq=False)
class _Draft:
    """What the draft holds of one request: its rows are the tokens from `first` on."""

    request: Request
    memory: SequenceMemory
    first: int
    pending: list[torch.Tensor] = field(default_factory=list)
    """[n, hidden] of the tokens behind `end`: committed by the target, not yet fed to the draft."""
    waiting: int = 0
    """Rows of them in all."""

    @property
    def end(self) -> int:
        """The token whose hidden state its next row takes."""
        return self.first + self.memory.length

    def add(self, hidden: torch.Tensor) -> None:
        """Let rows wait."""
        self.pending.append(hidden.clone())  # the next step's will lie where they are
        self.waiting += len(hidden)

    def take(self, most: int) -> tuple[Span, torch.Tensor]:
        """The next rows that it is to be fed, at most so many, as a span and hidden states [n, hidden]."""
        hidden = torch.cat(self.pending)
        self.pending = [hidden[most:]] if len(hidden) > most else []
        hidden, begin = hidden[:most], self.end
        self.waiting -= len(hidden)
        tokens = self.request.tokens[begin + 1 : begin + 1 + len(hidden)]
        mode = Mode.DECODE if len(tokens) == 1 else Mode.EXTEND
        return self.request.span(self.memory, begin, tokens, mode), hidden


@dataclass(frozen=True)
class _Left:
    """What the last call left with the requests that decode.

    Args:
        requests: how many of them.
        number: guesses that each was to have.
        began: when it began, of `time.monotonic`.
    """

    requests: int
    number: int
    began: float


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
    first that it sees; it then knows less, and guesses less well. Where nothing is guessed for a while,
    hidden states wait, and the draft takes many of them in a step.

    Args:
        walker: runs steps of the draft.
        most: tokens that are guessed ahead, as `check_speculative` allows.
        metrics: of this process.
        max_tokens: rows that a step can have.
        adaptive: whether fewer are guessed where fewer pay.
    """

    def __init__(
        self, walker: Walker, most: int, metrics: CellMetrics, max_tokens: int, adaptive: bool = True
    ) -> None:
        self._walker = walker
        self._most = most
        self._metrics = metrics
        self._max_tokens = max_tokens
        self._pace = Pace(most, adaptive)
        self._memory = walker.memory(Role.DRAFT)
        self._drafts: dict[int, _Draft] = {}
        self._left: _Left | None = None

    def learn(self, progress: Sequence[Progress]) -> None:
        """Note what a committed step verified, and how long it took with the guesses before it."""
        for one in progress:
            if one.guessed:
                self._metrics.accepted_tokens.inc(one.right)
                self._metrics.rejected_tokens.inc(one.guessed - one.right)
                self._pace.verified(one.guessed, one.right)
        left, self._left = self._left, None
        # Prompts beside them, or requests near their ends, say nothing of what guesses cost.
        steady = all(one.span.mode is not Mode.EXTEND for one in progress)
        if left is not None and steady and [one.guessed for one in progress] == [left.number] * left.requests:
            # All that a round takes: the draft, the step, and whatever comes between.
            self._pace.took(left.requests, left.number, time.monotonic() - left.began)

    def follow(self, progress: Sequence[Progress]) -> None:
        """Follow a committed step of the target, and leave guesses with the requests that decode next.

        A draft that fails costs its guesses and nothing else.
        """
        began = time.monotonic()
        self._forget_restarted()
        followed = [one for one in progress if self._takes_part(one)]
        ready = [self._of(one) for one in followed if one.ready]
        number = self._pace.guesses(len(ready)) if ready else 0
        due = ready if number else []
        due += [d for d in map(self._of, followed) if d.waiting >= _MOST_PENDING and d not in due]
        try:
            self._run(due, number)
        except BraidError as error:
            log.warning("nothing is guessed for %d requests: %s", len(due), error)
            self._forget_all(due)
        except Exception:
            log.exception("nothing is guessed for %d requests by our own fault", len(due))
            self._forget_all(due)
        if ready:
            self._left = _Left(len(ready), number, began)

    def forget(self, request: Request) -> None:
        """Free what the draft holds of a request."""
        request.guesses = ()
        draft = self._drafts.pop(request.memory.sequence_id, None)
        if draft is not None:
            self._memory.release(draft.memory)

    def _of(self, progress: Progress) -> _Draft:
        return self._drafts[progress.request.memory.sequence_id]

    def _forget_all(self, drafts: Sequence[_Draft]) -> None:
        for draft in drafts:
            self.forget(draft.request)

    def _forget_restarted(self) -> None:
        """Free what is held for requests that gave their memory back and begin again."""
        for draft in list(self._drafts.values()):
            if draft.request.memory.length < draft.end + draft.waiting:
                self.forget(draft.request)

    def _takes_part(self, progress: Progress) -> bool:
        """Whether the draft is to see a request's step; it then holds the memory and the rows for it."""
        request = progress.request
        if request.scores or request.memory.released or request.rest < 2:
            return False
        key, begin = request.memory.sequence_id, request.memory.length - len(progress.hidden)
        draft = self._drafts.get(key)
        if draft is None or draft.end + draft.waiting != begin:
            self.forget(request)
            draft = self._drafts[key] = _Draft(request, SequenceMemory(key), begin)
        rows = draft.waiting + len(progress.hidden)
        try:
            self._memory.acquire(draft.memory, draft.memory.length + rows + min(self._most, request.rest))
        except PoolExhausted:
            self.forget(request)
            return False
        draft.add(progress.hidden)
        return True

    def _run(self, due: list[_Draft], number: int) -> None:
        """Feed the draft what was committed, then let it go on alone where the next token is known."""
        while sum(draft.waiting for draft in due) > self._max_tokens:
            longest = max(due, key=lambda draft: draft.waiting)
            self._feed([longest], min(longest.waiting - 1, self._max_tokens))
        if not due:
            return
        output, ends = self._feed(due, self._max_tokens)
        guessing = [self._begin(draft, number) for draft in due]
        ready = [place for place, one in enumerate(guessing) if one is not None]
        if ready:
            hidden, logits = _rows(output, ends)
            self._go_on([one for one in guessing if one is not None], hidden[ready], logits[ready])

    def _feed(self, drafts: Sequence[_Draft], most: int) -> tuple[Output, IntArray]:
        """One step with rows that wait, at most so many of each, and the last row of each."""
        spans, hidden = zip(*(draft.take(most) for draft in drafts), strict=True)
        rows = np.cumsum([len(span.tokens) for span in spans]) - 1
        return self._walker.draft(spans, torch.cat(hidden), rows), rows

    def _begin(self, draft: _Draft, number: int) -> _Guessing | None:
        request = draft.request
        if request.memory.length < len(request.tokens) - 1:
            return None
        # The target's own choice behind the last guess may still be made, so one less than that.
        most = min(number, request.rest - 1)
        return _Guessing(draft, most, request.tokens[len(request.prompt) :]) if most else None

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
            # Those for which there is no row left have guesses enough.
            while sum(len(one.guesses) for one in guessing) > self._max_tokens:
                guessing.pop()
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
