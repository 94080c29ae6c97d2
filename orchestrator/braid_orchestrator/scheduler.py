"""Which requests take part in the next step, and with how many tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from braid_wire.errors import PoolExhausted, QueueFull
from braid_wire.layers import Mode, Role

from braid_orchestrator.memory import RoleMemory, Span
from braid_orchestrator.prefix_cache import Lease, PrefixCache
from braid_orchestrator.request import Request
from braid_orchestrator.store import Limits

MAX_WAITING = 1024

# A prompt's share of a step is at least an eighth of the budget, so that many prompts take turns
# instead of being fed in crumbs; as much is left for prompts where there is more to decode than fits.
_SHARES = 8


@dataclass(frozen=True)
class Part:
    """One request's share of a step."""

    request: Request
    span: Span
    rows: int
    """Last tokens of the span whose logits are wanted."""


@dataclass(eq=False)
class _Seat:
    """What the scheduler knows of a request."""

    request: Request
    order: int
    """Requests that came before it."""
    lease: Lease | None = None
    running: bool = False
    service: int = 0
    """Prompt tokens that it was given, counted on from what the others had when it was admitted."""
    turn: int = 0
    """When it last took part in a step, among all turns."""
    preempted: bool = False
    """Whether it ran before."""
    followed: bool = False
    """Whether others wait for what it computes in the next step."""


class Scheduler:
    """Continuous batching: every step decodes what runs and fills its budget with prompts.

    A request is admitted when pages and slots for what it is to be fed are available, not for all that
    it may make. Where they run out later, the youngest request gives back what it holds and waits at
    the head of the queue, so that the oldest always gets on. Nothing is lost by that but time: the
    tokens it made are fed again like a prompt.

    Args:
        memory: of every role that a request needs.
        limits: token budget, sequences of a step, length of a sequence.
        max_waiting: requests that may wait.
        cache: of the target role; None: nothing is shared.
    """

    def __init__(
        self,
        memory: Iterable[RoleMemory],
        limits: Limits,
        max_waiting: int = MAX_WAITING,
        cache: PrefixCache | None = None,
    ) -> None:
        self.running: list[_Seat] = []
        self.waiting: deque[_Seat] = deque()
        self.preemptions = 0
        self.cache = cache
        self._memory = tuple(memory)
        self._limits = limits
        self._max_waiting = max_waiting
        self._seats: dict[str, _Seat] = {}
        self._arrivals = 0
        self._turns = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._seats

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
        seat = _Seat(request, self._arrivals)
        self._arrivals += 1
        self._seats[request.request_id] = seat
        self.waiting.append(seat)

    def next(self) -> list[Part]:
        """The parts of the next step; requests that decode come first.

        Empty where nothing waits or runs, or where others than requests hold the memory.
        """
        self._admit()
        decodes = [seat for seat in self.running if seat.request.decoding]
        decodes.sort(key=lambda seat: seat.turn)
        prompts = [seat for seat in self.running if not seat.request.decoding]
        prompts.sort(key=lambda seat: (seat.service, seat.order))
        prompts = self._leading(prompts)
        wanted = [seat.request.wanted for seat in prompts]
        budget, least = self._limits.max_tokens, self._limits.max_tokens // _SHARES
        for_prompts = min(sum(wanted), least)
        chosen: list[tuple[_Seat, Span]] = []
        for place, seat in enumerate(decodes, 1):
            # Guesses get what is left when every request that decodes has its one token.
            behind = min(len(decodes) - place, max(budget - for_prompts - 1, 0))
            budget -= self._choose(seat, budget - for_prompts - behind, chosen)
        for seat, most in zip(prompts, shares(wanted, budget, least), strict=True):
            seat.service += self._choose(seat, most, chosen)
        return [self._part(seat, span) for seat, span in chosen if seat.running]

    def settle(self, request: Request) -> None:
        """Note that a request's part of a step was committed, and its tokens told."""
        seat = self._seats[request.request_id]
        if self.cache is not None and seat.lease is not None:
            self.cache.insert(seat.lease, request.tokens, request.memory)

    def remove(self, request: Request, faulty: bool = False) -> None:
        """Forget a request and free what it holds.

        Args:
            faulty: what it computed may be wrong, so that none of it stays in the cache.
        """
        seat = self._seats.pop(request.request_id, None)
        if seat is None:
            return
        (self.running if seat.running else self.waiting).remove(seat)
        if self.cache is not None and seat.lease is not None and faulty:
            self.cache.forget(seat.lease)
        self._leave(seat)
        for memory in self._memory:
            if memory.role in request.memories:
                memory.release(request.memories[memory.role])

    def _admit(self) -> None:
        """Move requests from the queue, in order, while there is memory for what each is to be fed."""
        while self.waiting and len(self.running) < self._limits.max_sequences:
            seat = self.waiting[0]
            seat.lease = self._open_lease(seat.request)
            gained = self._look_up(seat)
            try:
                self._acquire(seat.request)
            except PoolExhausted:
                self._leave(seat)
                self._restart(seat.request)
                return
            if self.cache is not None and self._reads_cache(seat):
                self.cache.note_start(gained)
            self._credit(seat, gained)
            self._enter(self.waiting.popleft())

    def _leading(self, prompts: Sequence[_Seat]) -> list[_Seat]:
        """Of prompts that go on with the same tokens only the oldest: the others will find them cached.

        Were it the one that was served least, they would take turns inside a page, and each compute it.
        """
        leaders: dict[tuple[object, ...], _Seat] = {}
        keys = []
        for seat in prompts:
            self._credit(seat, self._look_up(seat))
            seat.followed = False
            keys.append(key := self._next_page(seat))
            if key is not None:
                leaders[key] = min(seat, leaders.get(key, seat), key=lambda one: one.order)
        found = []
        for seat, key in zip(prompts, keys, strict=True):
            if key is None or leaders[key] is seat:
                found.append(seat)
            else:
                leaders[key].followed = True
        return found

    def _next_page(self, seat: _Seat) -> tuple[object, ...] | None:
        """What a prompt computes next, as `PrefixCache.next_page` names it."""
        if self.cache is None or seat.lease is None or not self._reads_cache(seat):
            return None
        return self.cache.next_page(seat.lease, seat.request.tokens)

    def _acquire(self, request: Request) -> None:
        """Hold what a request is to be fed, and leave a page for each that runs: it would be taken back from
        the newcomer at once."""
        for memory in self._memory:
            if memory.role in request.memories:
                mine = request.memories[memory.role]
                tokens = min(len(request.tokens) + 1, request.total_tokens)
                memory.acquire(mine, tokens, margin=len(self.running))

    def _enter(self, seat: _Seat) -> None:
        """A request runs from now on; it is behind no prompt that runs already, and before none."""
        served = [other.service for other in self.running if not other.request.decoding]
        seat.service = min(served, default=0)
        seat.running = True
        self.running.append(seat)

    def _open_lease(self, request: Request) -> Lease | None:
        if self.cache is None or request.cache_namespace is None:
            return None
        return self.cache.open(len(request.tokens), request.cache_namespace)

    def _look_up(self, seat: _Seat) -> int:
        """Let a prompt go on from what is cached, also of others that were faster with the same one."""
        if self.cache is None or seat.lease is None or not self._reads_cache(seat):
            return 0
        return self.cache.attach(seat.lease, seat.request.tokens, seat.request.memory)

    def _reads_cache(self, seat: _Seat) -> bool:
        return seat.lease is not None and not seat.request.reads_whole_prompt

    def _credit(self, seat: _Seat, gained: int) -> None:
        """Note tokens that need not be computed; a request's own, from before it gave way, are no gift."""
        if self.cache is not None and gained:
            self.cache.stats.hit_tokens += gained
            if not seat.preempted:
                seat.request.cached_tokens += gained

    def _choose(self, seat: _Seat, most: int, chosen: list[tuple[_Seat, Span]]) -> int:
        """Give a request a part of at most so many tokens; returns how many it has."""
        if most < 1 or not seat.running:
            return 0
        span = self._fitting(seat.request.next_span(most), seat)
        if not self._make_room(seat, span):
            return 0
        self._turns += 1
        seat.turn = self._turns
        chosen.append((seat, span))
        return len(span.tokens)

    def _fitting(self, span: Span, seat: _Seat) -> Span:
        """A span whose guesses there is room to verify: nobody gives way for guesses."""
        if span.mode is Mode.VERIFY:
            try:
                self._reserve(span, seat.request)
            except PoolExhausted:
                return seat.request.next_span(1)
        return span

    def _make_room(self, seat: _Seat, span: Span) -> bool:
        """Hold what a span needs; where it is not available, the youngest give way, at last this one."""
        while seat.running:
            try:
                self._reserve(span, seat.request)
            except PoolExhausted:
                self._preempt(max(self.running, key=lambda other: other.order))
            else:
                return True
        return False

    def _reserve(self, span: Span, request: Request) -> None:
        for memory in self._memory:
            if memory.role is Role.TARGET:
                memory.reserve(span)
            elif memory.role in request.memories:
                memory.acquire(request.memories[memory.role], span.memory.length + len(span.tokens))

    def _part(self, seat: _Seat, span: Span) -> Part:
        rows = seat.request.rows_wanted(span)
        if self.cache is not None and seat.lease is not None:
            span = self.cache.with_states(seat.lease, span, len(seat.request.tokens), seat.followed)
        return Part(seat.request, span, rows)

    def _preempt(self, seat: _Seat) -> None:
        """Take back what a request holds; it waits before all others, which are younger."""
        self.running.remove(seat)
        seat.running, seat.preempted = False, True
        self._leave(seat)
        self._restart(seat.request)
        self.waiting.appendleft(seat)
        self.preemptions += 1

    def _leave(self, seat: _Seat) -> None:
        if self.cache is not None and seat.lease is not None:
            self.cache.close(seat.lease)
            seat.lease = None

    def _restart(self, request: Request) -> None:
        for memory in self._memory:
            if memory.role in request.memories:
                memory.restart(request.memories[memory.role])
        request.restarted()


def shares(wanted: Sequence[int], budget: int, least: int) -> list[int]:
    """A budget in equal parts, of which none is more than is wanted there.

    Args:
        wanted: tokens, of those that come first first.
        least: of a part, where as much is wanted: the last ones get nothing rather than all too little.
    """
    given = [0] * len(wanted)
    while budget and given != list(wanted):
        open_ = [index for index, most in enumerate(wanted) if given[index] < most]
        part = max(budget // len(open_), least, 1)
        for index in open_:
            more = min(part, wanted[index] - given[index], budget)
            given[index] += more
            budget -= more
    return given
