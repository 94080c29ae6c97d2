"""The scheduler, its memory and its cache around a model that is a checksum.

The content of every page and slot is written down as a step would write it, and made garbage when a
unit becomes void. Each step compares what it reads with what a sequence of these tokens must read, so
that any unit that is shared, recycled or overwritten wrongly shows at once, and in the tokens too.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from braid_orchestrator.guesses import Guess, Run
from braid_orchestrator.memory import RoleMemory, SequenceMemory, Span, Staged
from braid_orchestrator.pool import Pool
from braid_orchestrator.prefix_cache import PrefixCache
from braid_orchestrator.request import Failed, Finished, Request, Token, choose_next
from braid_orchestrator.scheduler import Part, Scheduler
from braid_orchestrator.store import Limits
from braid_wire.batch import NO_SLOT, Pools, check
from braid_wire.errors import RequestCancelled, ServiceFault
from braid_wire.layers import Mode, Role

VOCAB = 5
GARBAGE = -99


def checksum(tokens: Iterable[int], state: int = 0) -> int:
    """The state of the model behind some tokens."""
    for token in tokens:
        state = (state * 31 + token + 1) % 1_000_003
    return state


def answer(prompt: Sequence[int], count: int) -> list[int]:
    """What the model makes behind a prompt, alone."""
    state, made = checksum(prompt), []
    for _ in range(count):
        made.append(state % VOCAB)
        state = checksum(made[-1:], state)
    return made


def told(request: Request) -> list[int]:
    """The tokens that a request's caller heard of so far."""
    found = []
    while not request.events.empty():
        _, event = request.events.get()
        if isinstance(event, Token):
            found.append(event.token_id)
    return found


class Simulation:
    """Runs steps.

    Args:
        limits: of the scheduler; its `page_size` too.
        pages: in all; 0: the model has no full layers.
        slots: in all; 0: the model has no linear layers.
        cached: whether there is a prefix cache.
        spacing: of its states.
        seed: of how spans are cut in two lanes; None: none is.
        guesses: most tokens that are guessed ahead; how many of them are right is drawn.
    """

    def __init__(
        self,
        limits: Limits,
        pages: int = 64,
        slots: int = 16,
        cached: bool = True,
        spacing: int = 8,
        seed: int | None = None,
        guesses: int = 0,
    ) -> None:
        self.memory = RoleMemory(
            Role.TARGET,
            Pool("pages", np.zeros(pages, dtype=np.int64), 64) if pages else None,
            Pool("slots", np.zeros(slots, dtype=np.int64), 128) if slots else None,
            limits.page_size,
        )
        self.cache = PrefixCache(self.memory, spacing) if cached else None
        self.scheduler = Scheduler([self.memory], limits, cache=self.cache)
        self.live: dict[str, Request] = {}
        self.fed = 0
        self.verified = 0
        self._random = None if seed is None else random.Random(seed)
        self._guesses = guesses
        self._chance = random.Random(guesses)
        self._limits = limits
        self._content = {
            pool.name: np.full((pool.total, limits.page_size), GARBAGE, dtype=np.int64) for pool in self.pools
        }
        self._seen = {pool.name: pool.generation.copy() for pool in self.pools}
        self._numbers = itertools.count(1)

    @property
    def pools(self) -> list[Pool]:
        return [pool for pool in (self.memory.pages, self.memory.slots) if pool is not None]

    def add(self, request: Request) -> Request:
        self.scheduler.add(request)
        self.live[request.request_id] = request
        return request

    def step(
        self, outcome: str = "commit", during: Callable[[Sequence[Part]], None] | None = None
    ) -> list[Part]:
        """One step: committed, replayed once and then committed, or failed with all that took part.

        Args:
            outcome: "commit", "replay" or "fail".
            during: called when the step has run and nothing of it counts yet.
        """
        parts = self.scheduler.next()
        if not parts:
            return parts
        assert sum(len(part.span.tokens) for part in parts) <= self._limits.max_tokens
        assert len({part.request.request_id for part in parts}) == len(parts) <= self._limits.max_sequences
        spans = [part.span for part in parts]
        if outcome != "commit":
            self.memory.abort(self._staged(spans)[0])
            self._note_void()
        if outcome == "fail":
            for part in parts:
                self.end(part.request, Failed(ServiceFault("the step failed")))
            return parts
        staged, rows = self._staged(spans)
        wanted = [logits[len(logits) - part.rows :] for part, logits in zip(parts, rows, strict=True)]
        runs = choose_next([part.request for part in parts], spans, wanted)
        right = {
            id(span): len(run) for span, run in zip(spans, runs, strict=True) if span.mode is Mode.VERIFY
        }
        kept = [right.get(id(piece), len(piece.tokens)) for piece in staged.spans]
        self.verified += sum(count - 1 for count in right.values())
        if during is not None:
            during(parts)
        self.memory.commit(staged, kept)
        self._note_void()
        self.fed += sum(kept)
        self._hand_out(parts, wanted, runs)
        return parts

    def run(self, most: int = 10_000) -> int:
        """Steps until nothing is left; as many as that took."""
        for count in range(most):
            if self.scheduler.idle:
                return count
            self.step()
        raise AssertionError(f"{len(self.live)} requests are not done after {most} steps")

    def end(self, request: Request, event: Finished | Failed) -> None:
        faulty = isinstance(event, Failed) and isinstance(event.error, ServiceFault)
        self.scheduler.remove(request, faulty)
        del self.live[request.request_id]
        request.tell(event)
        self._note_void()

    def cancel(self, request: Request) -> None:
        self.end(request, Failed(RequestCancelled("cancelled")))

    def in_use(self) -> list[int]:
        """Units that somebody holds, and that the cache keeps."""
        return [count for pool in self.pools for count in (pool.used, pool.cached)]

    def _staged(self, spans: Sequence[Span]) -> tuple[Staged, list[torch.Tensor]]:
        """Stage, check what the services check, run; the logits [n, V] of each span."""
        pieces = [piece for span in spans for piece in self._lanes(span)]
        if not self.memory.has_room(pieces):
            pieces = list(spans)
        staged = self.memory.stage(pieces, 1, next(self._numbers))
        self._note_void()
        if not any(piece.follows for piece in pieces):
            generations = [None if pool is None else pool.generation for pool in self._named()]
            check(staged.batch.shared(), staged.batch.num_tokens, Pools(self.memory.page_size, *generations))
        found = [self._run(piece, row, staged) for row, piece in enumerate(pieces)]
        rows = [
            torch.cat(
                [part for part, piece in zip(found, pieces, strict=True) if piece.memory is span.memory]
            )
            for span in spans
        ]
        return staged, rows

    def _named(self) -> tuple[Pool | None, Pool | None]:
        return self.memory.pages, self.memory.slots

    def _lanes(self, span: Span) -> Sequence[Span]:
        if self._random is None or span.mode is not Mode.EXTEND or len(span.tokens) < 2:
            return [span]
        return (
            span.cut(self._random.randrange(1, len(span.tokens))) if self._random.random() < 0.5 else [span]
        )

    def _run(self, span: Span, row: int, staged: Staged) -> torch.Tensor:
        request = next(one for one in self.live.values() if one.memory is span.memory)
        begin = span.memory.length + span.follows
        before, tokens = request.tokens[:begin], span.tokens.tolist()
        known = 1 if span.mode is Mode.VERIFY else len(tokens)
        assert request.tokens[begin : begin + known] == tokens[:known]
        self._run_pages(row, staged, before, tokens)
        state = self._run_states(row, staged, before, tokens)
        logits = torch.zeros(len(tokens), VOCAB)
        for index, token in enumerate(tokens):
            state = checksum([token], state)
            logits[index, state % VOCAB] = 1.0
        return logits

    def _run_pages(self, row: int, staged: Staged, before: list[int], tokens: list[int]) -> None:
        pages, table = self.memory.pages, staged.batch.page_table
        if pages is None or table is None:
            return
        content, size = self._content["pages"], self.memory.page_size
        read = content[table[row]].reshape(-1)[: len(before)]
        assert read.tolist() == before
        for at, token in enumerate(tokens, len(before)):
            assert pages.writable(int(table[row, at // size]))
            content[table[row, at // size], at % size] = token

    def _run_states(self, row: int, staged: Staged, before: list[int], tokens: list[int]) -> int:
        """The state that the span reads; what it writes is written."""
        slots, state_in, out = self.memory.slots, staged.batch.state_in, staged.batch.state_out
        if slots is None or state_in is None or out is None:
            return checksum(before)
        content = self._content["slots"]
        state = 0 if state_in[row] == NO_SLOT else int(content[state_in[row], 0])
        assert state == checksum(before)
        after, begin = state, int(staged.batch.cu_seqlens[row])
        for index, token in enumerate(tokens):
            after = checksum([token], after)
            if out[begin + index] != NO_SLOT:
                assert slots.writable(int(out[begin + index]))
                content[out[begin + index]] = after
        assert out[begin + len(tokens) - 1] != NO_SLOT
        return state

    def _note_void(self) -> None:
        """What became void is garbage from now on."""
        for pool in self.pools:
            gone = pool.generation != self._seen[pool.name]
            self._content[pool.name][gone] = GARBAGE
            self._seen[pool.name] = pool.generation.copy()

    def _hand_out(self, parts: Sequence[Part], rows: Sequence[torch.Tensor], runs: Sequence[Run]) -> None:
        for part, logits, run in zip(parts, rows, runs, strict=True):
            if part.request.memory.released:
                continue
            finished: Finished | Failed | None = None
            for choice in run or (None,):
                finished = part.request.advance(logits, choice)
                if finished is not None:
                    break
            assert not isinstance(finished, Failed)
            self.scheduler.settle(part.request)
            self._note_void()
            if finished is not None:
                self.end(part.request, finished)
            else:
                self._guess(part.request)

    def _guess(self, request: Request) -> None:
        """Some right guesses and perhaps a wrong one, as a draft leaves them; sometimes none."""
        count = min(self._chance.randint(0, self._guesses), request.rest - 1)
        if count < 1 or request.made == 0:
            return
        ahead = answer(request.tokens, count)
        if self._chance.random() < 0.5:
            place = self._chance.randrange(count)
            ahead[place] = (ahead[place] + 1) % VOCAB
        request.guesses = [Guess(token) for token in ahead]


class Holder:
    """An engine of its own that holds memory beside the requests."""

    def __init__(self, memory: RoleMemory, sequence_id: int) -> None:
        self._memory = memory
        self.held = SequenceMemory(sequence_id)

    def grow(self, tokens: int) -> None:
        """Raises PoolExhausted."""
        self._memory.acquire(self.held, tokens)

    def release(self) -> None:
        self._memory.release(self.held)
