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
from braid_wire.layers import Mode, Role

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
    mtp_logits: torch.Tensor | None = None
    """float32 [L−1, V]: the draft's logits of the token after next, where they were asked for."""


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
        mtp: run the draft over the prompt too, and score with it; only where nothing is made.
        mrope_positions: int64 [3, L], a time, a height and a width position for each prompt token;
            what is made counts on from the largest in all three. For models that take them.

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
    mtp: bool = False
    mrope_positions: IntArray | None = None

    def __post_init__(self) -> None:
        if len(self.prompt) < 1:
            raise RequestInvalid("the prompt is empty; it must have at least one token", field="prompt")
        for name in ("max_tokens", "chunk", "decode_tail"):
            value = getattr(self, name)
            if value < 0:
                raise RequestInvalid(f"{name} is {value}; it must not be negative", field=name, value=value)
        if self.mtp and self.max_tokens:
            raise RequestInvalid("mtp scores a prompt; max_tokens must be 0", field="mtp")
        self._check_mrope()
        self.tokens: list[int] = [int(token) for token in self.prompt]
        sequence_id = next(_sequence_ids)
        roles = (Role.TARGET, Role.DRAFT) if self.mtp else (Role.TARGET,)
        self.memories = {role: SequenceMemory(sequence_id) for role in roles}
        self.cancelled = False
        self.arrived = time.monotonic()
        self.began: float | None = None
        self.last_token: float | None = None
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._sampler = Sampler(self.sampling)
        self._scored: list[torch.Tensor] = []
        self._drafted: list[torch.Tensor] = []

    @property
    def memory(self) -> SequenceMemory:
        """What the sequence holds in the target role."""
        return self.memories[Role.TARGET]

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
            return self._span(self.memory, fed, fed, 1, Mode.DECODE)
        end = len(self.prompt) - self.decode_tail
        end = max(end, fed + 1)
        count = min(end - fed, budget, self.chunk or budget)
        return self._span(self.memory, fed, fed, count, Mode.EXTEND)

    def draft_span(self, fed: Span) -> Span | None:
        """What the draft is fed after the step that committed `fed`: the tokens that follow its rows.

        The draft's position t takes the hidden state of token t and token t+1; a row whose next token
        is not known yet stays out. None where there is nothing to feed.
        """
        memory = self.memories.get(Role.DRAFT)
        if memory is None:
            return None
        begin, end = memory.length, min(self.memory.length, len(self.tokens) - 1)
        if begin >= end:
            return None
        return self._span(memory, begin, begin + 1, end - begin, fed.mode)

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
            drafted = torch.cat(self._drafted) if self._drafted else None
            self.events.put(Scored(torch.cat(self._scored), drafted))
            return Finished(Finish.SCORED)
        if len(logits) == 0:
            return None
        token = self._sampler.choose(logits[-1])
        if token in self.stop_ids:
            return Finished(Finish.STOP)
        self.tokens.append(token)
        self.events.put(Token(token))
        return Finished(Finish.LENGTH) if self.made == self.max_tokens else None

    def take_draft(self, logits: torch.Tensor) -> None:
        """Keep the draft's logits [n, V] of the rows that `draft_span` named."""
        self._drafted.append(logits)

    def stream(self) -> Iterator[Event]:
        """Events as they come; the last one is `Finished` or `Failed`."""
        while True:
            event = self.events.get()
            yield event
            if isinstance(event, Finished | Failed):
                return

    def _span(self, memory: SequenceMemory, position: int, first: int, count: int, mode: Mode) -> Span:
        """`count` tokens from token `first` on, at positions from `position` on."""
        tokens = np.array(self.tokens[first : first + count], dtype=np.int64)
        return Span(memory, tokens, mode, self._mrope(position, count))

    def _mrope(self, start: int, count: int) -> IntArray | None:
        """int64 [3, count]: the positions of tokens from `start` on; None for plain ones."""
        grid = self.mrope_positions
        if grid is None:
            return None
        length = grid.shape[1]
        made = grid.max() + 1 + np.arange(max(start + count - length, 0))
        return np.concatenate([grid, np.broadcast_to(made, (3, len(made)))], axis=1)[:, start : start + count]

    def _check_mrope(self) -> None:
        grid = self.mrope_positions
        if grid is None:
            return
        expected = (3, len(self.prompt))
        if grid.shape != expected or grid.dtype != np.int64 or (grid < 0).any():
            raise RequestInvalid(
                f"mrope_positions is {grid.dtype} {list(grid.shape)}; "
                f"it must be int64 {list(expected)} and not negative",
                field="mrope_positions",
            )
