"""The engine: one thread that schedules steps, walks them, and hands out what they made."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from braid_wire.batch import IntArray
from braid_wire.errors import (
    BraidError,
    Draining,
    RequestCancelled,
    RequestInvalid,
    ServiceFault,
)
from braid_wire.layers import Mode

from braid_orchestrator.body.base import Output
from braid_orchestrator.guesses import Run
from braid_orchestrator.memory import Span
from braid_orchestrator.metrics import CellMetrics
from braid_orchestrator.prefix_cache import CacheStats, PrefixCache
from braid_orchestrator.request import Failed, Finished, Request, choose_next
from braid_orchestrator.scheduler import MAX_WAITING, Part, Scheduler
from braid_orchestrator.speculative import Progress, Speculator
from braid_orchestrator.store import Limits
from braid_orchestrator.trace_context import Ended
from braid_orchestrator.walker import Walker

log = logging.getLogger(__name__)

# How often to look again where engines with bodies of their own hold the memory that requests wait for.
_BLOCKED_S = 0.01


@dataclass(frozen=True)
class Progressing:
    """A request in hand, as far as it has come."""

    request_id: str
    phase: str
    """"waiting", "prefill" or "decode"."""
    prompt_tokens: int
    fed_tokens: int
    """Of the prompt and of what was made."""
    made_tokens: int
    max_tokens: int
    cached_tokens: int
    age_s: float


@dataclass(frozen=True)
class Load:
    """Requests in hand."""

    running: int
    waiting: int


class Engine:
    """Runs requests.

    Args:
        walker: runs steps.
        limits: of the cell.
        vocab_size: token ids are below it.
        metrics: of this process.
        max_waiting: requests that may wait.
        cache: of the target role; None: requests share nothing.
        speculator: guesses ahead for requests that decode; None: nothing does.
        ended: told of every request that is over; None: nobody is.
    """

    def __init__(
        self,
        walker: Walker,
        limits: Limits,
        vocab_size: int,
        metrics: CellMetrics,
        max_waiting: int = MAX_WAITING,
        cache: PrefixCache | None = None,
        speculator: Speculator | None = None,
        ended: Ended | None = None,
    ) -> None:
        self._ended = ended
        self.limits = limits
        self.vocab_size = vocab_size
        self._walker = walker
        self._metrics = metrics
        self._speculator = speculator
        memory = [walker.memory(role) for role in walker.body.plans]
        self._scheduler = Scheduler(memory, limits, max_waiting, cache)
        metrics.watch_scheduler(self._scheduler)
        metrics.waiting_limit.set(max_waiting)
        metrics.running_limit.set(limits.max_sequences)
        self.max_waiting = max_waiting
        self._live: dict[str, Request] = {}
        self._change = threading.Condition()
        self._draining = False
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining

    @property
    def load(self) -> Load:
        """Requests in hand."""
        with self._change:
            return Load(len(self._scheduler.running), len(self._scheduler.waiting))

    def in_hand(self, most: int) -> tuple[Load, list[Progressing]]:
        """How many requests are not over, and the oldest of them, `most` at most: both of one moment."""
        with self._change:
            now, load = time.monotonic(), self.load
            oldest = list(islice(self._live.values(), most))
        return load, [_progress(request, now) for request in oldest]

    @property
    def preemptions(self) -> int:
        """Requests that gave way to older ones."""
        return self._scheduler.preemptions

    @property
    def prefix_stats(self) -> CacheStats | None:
        """What the prefix cache did so far; None where there is none."""
        return None if self._scheduler.cache is None else self._scheduler.cache.stats

    def submit(self, request: Request) -> None:
        """Take a request; its events tell of it from now on.

        Raises:
            RequestInvalid: a token id or the request id is wrong.
            Draining: nothing new is taken.
            PoolExhausted: it could never fit.
            QueueFull: too many wait.
        """
        try:
            self._take(request)
        except BraidError as error:
            if self._ended is not None:
                self._ended(request, Failed(error))
            raise

    def _take(self, request: Request) -> None:
        request.settle(self.vocab_size, self.limits.max_context)
        self._refuse_unable(request)
        with self._change:
            if self._draining or self._closed:
                raise Draining("the cell is draining and takes no new requests")
            if request.request_id in self._live:
                raise RequestInvalid(
                    f"request id {request.request_id!r} is live already",
                    field="request_id",
                    value=request.request_id,
                )
            self._scheduler.add(request)
            self._live[request.request_id] = request
            self._change.notify_all()

    def cancel(self, request: Request) -> None:
        """End a request at the next step; one that has ended already stays as it is."""
        with self._change:
            request.cancelled = True
            self._change.notify_all()

    def drain(self, timeout_s: float | None) -> int:
        """Take nothing new, wait for what is in hand, and say how much is left."""
        with self._change:
            self._draining = True
            self._change.notify_all()
            self._change.wait_for(lambda: not self._live, timeout_s)
            return len(self._live)

    def flush_cache(self) -> None:
        """Drop every prefix that is kept; what runs goes on with what it holds, and keeps nothing new."""
        if self._scheduler.cache is not None:
            self._scheduler.cache.flush()

    def close(self) -> None:
        """Stop after the step that is under way; what is in hand fails with `Draining`."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        with self._change:
            for request in list(self._live.values()):
                self._end(request, Failed(Draining("the cell has stopped")))

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closed or not self._scheduler.idle)
                if self._closed:
                    return
                self._drop_cancelled()
                parts = self._scheduler.next()
                self._note_load()
                if not parts and not self._scheduler.idle:
                    self._change.wait(_BLOCKED_S)
            if parts:
                self._step(parts)

    def _step(self, parts: Sequence[Part]) -> None:
        now = time.monotonic()
        for part in parts:
            if part.request.began is None:
                part.request.began = now
                self._metrics.queue_seconds.observe(now - part.request.arrived)
        try:
            output, runs = self._walk(parts)
            self._draft(parts, output.hidden)
        except BraidError as error:
            self._fail(parts, error)
        except Exception as error:
            log.exception("a step failed by our own fault")
            self._fail(parts, ServiceFault(f"{type(error).__name__}: {error}"))
        else:
            took = time.monotonic() - now
            for part in parts:
                part.request.served_s += took
            self._hand_out(parts, output.logits, runs)
            self._guess(parts, runs, output.hidden)

    def _walk(self, parts: Sequence[Part]) -> tuple[Output, Sequence[Run]]:
        """Run the step, and choose what each request makes: the choices say which guesses count."""
        requests, spans = [part.request for part in parts], [part.span for part in parts]
        runs: list[Run] = []

        def keep(output: Output) -> list[int]:
            runs[:] = choose_next(requests, spans, output.logits.split([part.rows for part in parts]))
            return _kept(parts, runs)

        return self._walker.target(spans, _rows(parts), keep), runs

    def _guess(self, parts: Sequence[Part], runs: Sequence[Run], hidden: torch.Tensor) -> None:
        """Let the draft follow a step whose tokens are told, and guess what the next one makes."""
        if self._speculator is None:
            return
        rows = hidden.split([len(part.span.tokens) for part in parts])
        progress = [
            Progress(part.request, part.span, piece[:count])
            for part, piece, count in zip(parts, rows, _kept(parts, runs), strict=True)
        ]
        self._speculator.learn(progress)
        self._speculator.follow(progress)

    def _draft(self, parts: Sequence[Part], hidden: torch.Tensor) -> None:
        """Let the draft follow a committed step, for the requests that want it.

        Args:
            hidden: [T, hidden], of the step's packed tokens.
        """
        spans: list[tuple[Request, Span, torch.Tensor]] = []
        for part, piece in zip(parts, hidden.split([len(part.span.tokens) for part in parts]), strict=True):
            span = part.request.draft_span(part.span)
            if span is not None:
                first = span.memory.length - (part.request.memory.length - len(part.span.tokens))
                spans.append((part.request, span, piece[first : first + len(span.tokens)]))
        if not spans:
            return
        rows = torch.cat([piece for _, _, piece in spans])
        output = self._walker.draft([span for _, span, _ in spans], rows, np.arange(len(rows)))
        lengths = [len(span.tokens) for _, span, _ in spans]
        for (request, _, _), logits in zip(spans, output.logits.split(lengths), strict=True):
            request.take_draft(logits)

    def _refuse_unable(self, request: Request) -> None:
        """`RequestInvalid` for what this model cannot do."""
        body = self._walker.body
        if request.mtp and not body.has_draft:
            raise RequestInvalid("mtp is set, but the model has no draft layers", field="mtp")
        if request.mrope_positions is not None and not body.mrope:
            raise RequestInvalid("the model takes no mrope positions", field="mrope_positions")

    def _hand_out(self, parts: Sequence[Part], logits: torch.Tensor, runs: Sequence[Run]) -> None:
        pieces = logits.split([part.rows for part in parts])
        with self._change:
            self._drop_cancelled()
            for part, piece, run in zip(parts, pieces, runs, strict=True):
                if part.request.memory.released:
                    continue
                self._metrics.prompt_tokens.inc(_prompt_tokens(part))
                finished = self._advanced(part.request, piece, run)
                if not isinstance(finished, Failed):
                    self._scheduler.settle(part.request)
                if finished is not None:
                    self._end(part.request, finished)

    def _advanced(self, request: Request, logits: torch.Tensor, run: Run) -> Finished | Failed | None:
        """As `_advance`; what is wrong with one request, its text for one, ends that request alone."""
        try:
            return self._advance(request, logits, run)
        except Exception as error:
            log.exception("request %s failed by our own fault", request.request_id)
            return Failed(ServiceFault(f"{type(error).__name__}: {error}"))

    def _advance(self, request: Request, logits: torch.Tensor, run: Run) -> Finished | Failed | None:
        """Give a request what a step chose for it, as far as it lasts."""
        finished: Finished | Failed | None = None
        made = 0
        for choice in run or (None,):
            before = request.made
            finished = request.advance(logits, choice)
            if request.made > before:
                self._note_token(request)
                made += 1
            if finished is not None:
                break
        if made:
            self._metrics.generated_tokens.inc(made)
        return finished

    def _fail(self, parts: Sequence[Part], error: BraidError) -> None:
        with self._change:
            for part in parts:
                self._end(part.request, Failed(error))

    def _drop_cancelled(self) -> None:
        now = time.monotonic()
        for request in list(self._live.values()):
            if request.cancelled:
                self._end(request, Failed(RequestCancelled(f"request {request.request_id} was cancelled")))
            elif (late := request.expired(now)) is not None:
                self._end(request, Failed(late))

    def _end(self, request: Request, event: Finished | Failed) -> None:
        """Free what a request holds and count it, then tell its caller, who may count on both."""
        faulty = isinstance(event, Failed) and isinstance(event.error, ServiceFault)
        self._scheduler.remove(request, faulty)
        if self._speculator is not None:
            self._speculator.forget(request)
        if self._live.pop(request.request_id, None) is None:
            return
        request.ended = time.monotonic()
        outcome = event.reason.value if isinstance(event, Finished) else event.error.reason.lower()
        self._metrics.finished.labels(outcome).inc()
        self._metrics.request_seconds.observe(request.ended - request.arrived)
        if (slowdown := request.slowdown) is not None:
            self._metrics.slowdown.observe(slowdown)
        if self._ended is not None:
            self._ended(request, event)
        self._note_load()
        request.tell(event)
        self._change.notify_all()

    def _note_token(self, request: Request) -> None:
        now = time.monotonic()
        if request.last_token is None:
            request.first_token = now
            self._metrics.time_to_first.observe(now - request.arrived)
        else:
            self._metrics.inter_token.observe(now - request.last_token)
        request.last_token = now

    def _note_load(self) -> None:
        self._metrics.running.set(len(self._scheduler.running))
        self._metrics.waiting.set(len(self._scheduler.waiting))


def _progress(request: Request, now: float) -> Progressing:
    working = "decode" if request.made else "prefill"
    return Progressing(
        request_id=request.request_id,
        phase="waiting" if request.began is None else working,
        prompt_tokens=len(request.prompt),
        fed_tokens=request.memory.length,
        made_tokens=request.made,
        max_tokens=request.max_tokens or 0,
        cached_tokens=request.cached_tokens,
        age_s=now - request.arrived,
    )


def _rows(parts: Sequence[Part]) -> IntArray:
    """int64: the tokens of the packed batch whose logits are wanted, part by part."""
    ends = np.cumsum([len(part.span.tokens) for part in parts])
    return np.concatenate([np.arange(end - part.rows, end) for end, part in zip(ends, parts, strict=True)])


def _kept(parts: Sequence[Part], runs: Sequence[Run]) -> list[int]:
    """Of each span, how many of its tokens count: those that a choice of its run stands behind."""
    return [
        len(run) if part.span.mode is Mode.VERIFY else len(part.span.tokens)
        for part, run in zip(parts, runs, strict=True)
    ]


def _prompt_tokens(part: Part) -> int:
    """How many of a committed span's tokens were the caller's."""
    if part.span.mode is Mode.VERIFY:
        return 0
    fed = part.request.memory.length
    began = fed - len(part.span.tokens)
    return max(min(fed, len(part.request.prompt)) - began, 0)
