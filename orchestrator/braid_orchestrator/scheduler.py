"""Which requests take part in the next step, and with how many tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from braid_wire.errors import PoolExhausted, QueueFull

from braid_orchestrator.memory import RoleMemory, Span
from braid_orchestrator.request import Request
from braid_orchestrator.store import Limits


@dataclass(frozen=True)
class Part:
    """One request's share of a step."""

    request: Request
    span: Span
    rows: int
    """Last tokens of the span whose logits are wanted."""


class Scheduler:
    """Continuous batching: every step decodes what runs and fills its budget with prompts.

    A request is admitted when pages and slots for all of it are free, so that it can finish.

    Args:
        memory: of every role that a request needs.
        limits: token budget, sequences of a step, length of a sequence.
        max_waiting: requests that may wait.
    """

    def __init__(self, memory: Iterable[RoleMemory], limits: Limits, max_waiting: int = 1024) -> None:
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self._memory = tuple(memory)
        self._limits = limits
        self._max_waiting = max_waiting

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.running and not self.waiting

    def add(self, request: Request) -> None:
        """Let a request wait its turn.

        Raises:
            PoolExhausted: it could never fit.
            QueueFull: too many wait.
        """
        if request.total_tokens > self._limits.max_context:
            raise PoolExhausted(
                f"prompt and completion are {request.total_tokens} tokens; a sequence holds "
                f"{self._limits.max_context}",
                field="max_tokens",
                value=request.total_tokens,
            )
        for memory in self._memory:
            pages = memory.pages_for(request.total_tokens)
            if memory.pages is not None and pages > memory.pages.total:
                raise PoolExhausted(
                    f"the request needs {pages} pages; there are {memory.pages.total}", pool="pages"
                )
        if len(self.waiting) >= self._max_waiting:
            raise QueueFull(f"{len(self.waiting)} requests wait already", waiting=len(self.waiting))
        self.waiting.append(request)

    def next(self) -> list[Part]:
        """The parts of the next step; requests that decode come first."""
        self._admit()
        budget = self._limits.max_tokens
        parts: list[Part] = []
        for request in sorted(self.running, key=lambda request: not request.decoding):
            if budget == 0:
                break
            span = request.next_span(budget)
            parts.append(Part(request, span, request.rows_wanted(span)))
            budget -= len(span.tokens)
        return parts

    def remove(self, request: Request) -> None:
        """Forget a request and free what it holds."""
        if request in self.running:
            self.running.remove(request)
        if request in self.waiting:
            self.waiting.remove(request)
        for memory in self._memory:
            if memory.role in request.memories:
                memory.release(request.memories[memory.role])

    def _admit(self) -> None:
        """Move requests from the queue, in order, while memory for all of each is free."""
        while self.waiting and len(self.running) < self._limits.max_sequences:
            request = self.waiting[0]
            try:
                for memory in self._memory:
                    if memory.role in request.memories:
                        memory.acquire(request.memories[memory.role], request.total_tokens)
            except PoolExhausted:
                return
            self.running.append(self.waiting.popleft())
