"""Requests: what a caller asked for, how far it has come, and how it hears of it."""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import torch
from braid_wire.batch import IntArray
from braid_wire.errors import BraidError, RequestInvalid
from braid_wire.layers import Mode

from braid_orchestrator.memory import SequenceMemory, Span
from braid_orchestrator.sampling import Sampler, Sampling

_sequence_ids = itertools.count(1)


class Finish(Enum):
    """Why a request ended well."""

    STOP = "stop"
    LENGTH = "length"
    SCORED = "scored"


@dataclass(frozen=True)
class Token:
    """A token was made."""

    token_id: int


@dataclass(frozen=True)
class Scored:
    """Every token was fed; float32 [L, V]: the logits after each."""

    logits: torch.Tensor


@dataclass(frozen=True)
class Finished:
    """The request ended well."""

    reason: Finish


@dataclass(frozen=True)
class Failed:
    """The request ended with an error."""

    error: BraidError


Event = Token | Scored | Finished | Failed


@dataclass
class Request:
    """One sequence under way.

    Args:
        request_id: unique among live requests.
        prompt: token ids, at least one.
        sampling: how tokens are chosen.
        max_tokens: most tokens to make; 0: score the prompt instead.
        stop_ids: tokens that end the request and are not given out.
        chunk: most prompt tokens of one step; 0: as many as the budget allows.
        decode_tail: last prompt tokens that are fed one at a time, as if they had been made.

    Raises:
        RequestInvalid: a value breaks its rule.
    """

    request_id: str
    prompt: IntArray
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 0
    stop_ids: frozenset[int] = frozenset()
    chunk: int = 0
    decode_tail: int = 0

    def __post_init__(self) -> None:
        if len(self.prompt) < 1:
            raise RequestInvalid("the prompt is empty; it must have at least one token", field="prompt")
        for name in ("max_tokens", "chunk", "decode_tail"):
            value = getattr(self, name)
            if value < 0:
                raise RequestInvalid(f"{name} is {value}; it must not be negative", field=name, value=value)
        self.tokens: list[int] = [int(token) for token in self.prompt]
        self.memory = SequenceMemory(next(_sequence_ids))
        self.cancelled = False
        self.arrived = time.monotonic()
        self.began: float | None = None
        self.last_token: float | None = None
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._sampler = Sampler(self.sampling)
        self._scored: list[torch.Tensor] = []

    @property
    def scores(self) -> bool:
        """Whether the prompt is scored and nothing is made."""
        return self.max_tokens == 0

    @property
    def total_tokens(self) -> int:
        """Tokens that the sequence can reach."""
        return len(self.prompt) + self.max_tokens

    @property
    def made(self) -> int:
        """Tokens made so far."""
        return len(self.tokens) - len(self.prompt)

    @property
    def decoding(self) -> bool:
        """Whether the next span is one token that follows on what was fed."""
        fed = self.memory.length
        tail_begins = len(self.prompt) - self.decode_tail
        return fed > 0 and fed >= min(tail_begins, len(self.prompt))

    def next_span(self, budget: int) -> Span:
        """What to feed in a step that has room for `budget` (at least 1) tokens."""
        fed = self.memory.length
        if self.decoding:
            return Span(self.memory, np.array(self.tokens[fed : fed + 1], dtype=np.int64), Mode.DECODE)
        end = len(self.prompt) - self.decode_tail
        end = max(end, fed + 1)
        count = min(end - fed, budget, self.chunk or budget)
        return Span(self.memory, np.array(self.tokens[fed : fed + count], dtype=np.int64), Mode.EXTEND)

    def rows_wanted(self, span: Span) -> int:
        """How many of a span's last tokens need logits: all, one or none."""
        if self.scores:
            return len(span.tokens)
        return 1 if self.memory.length + len(span.tokens) == len(self.tokens) else 0

    def advance(self, logits: torch.Tensor) -> Finished | None:
        """Take the logits of a step that was committed, tell the caller, and say whether it ends.

        Args:
            logits: float32 [n, V], n as `rows_wanted` said before the step.
        """
        if self.scores:
            self._scored.append(logits)
            if self.memory.length < len(self.tokens):
                return None
            self.events.put(Scored(torch.cat(self._scored)))
            return Finished(Finish.SCORED)
        if len(logits) == 0:
            return None
        token = self._sampler.choose(logits[-1])
        if token in self.stop_ids:
            return Finished(Finish.STOP)
        self.tokens.append(token)
        self.events.put(Token(token))
        return Finished(Finish.LENGTH) if self.made == self.max_tokens else None

    def stream(self) -> Iterator[Event]:
        """Events as they come; the last one is `Finished` or `Failed`."""
        while True:
            event = self.events.get()
            yield event
            if isinstance(event, Finished | Failed):
                return
