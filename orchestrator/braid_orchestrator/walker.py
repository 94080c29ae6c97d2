"""One step through all layers, and what happens when a service is lost in the middle of it."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from braid_wire.batch import IntArray
from braid_wire.errors import BraidError, EpochStale, NotConfigured, ServiceLost
from braid_wire.layers import Role

from braid_orchestrator.body.base import Body, Output
from braid_orchestrator.dispatcher import Dispatcher
from braid_orchestrator.forward import Lane, forward
from braid_orchestrator.memory import RoleMemory, Span, Staged
from braid_orchestrator.metrics import CellMetrics
from braid_orchestrator.overlap import Overlap
from braid_orchestrator.segments.base import SegmentedRole
from braid_orchestrator.step import Step

log = logging.getLogger(__name__)

# What a restarted service answers before it is configured again; a replay then loses nothing.
RECOVERABLE = (ServiceLost, NotConfigured, EpochStale)

Keep = Callable[[Output], Sequence[int]]
"""The output of a step → of each span, how many of its tokens count (see `RoleMemory.commit`)."""

Segments = Mapping[tuple[Role, int], SegmentedRole]
"""(role, lane) → its body."""


@dataclass
class _Pending:
    """A step under way, and what of it will count."""

    staged: Staged
    kept: Sequence[int] | None = None
    forget: bool = False


class Walker:
    """Runs steps, one at a time.

    Args:
        body: the model without its attention.
        dispatcher: leads its layers to the services.
        metrics: of this process.
        recovery_s: longest time from a step's first loss until it fails.
        replays: times that one step is run again; a step that itself ends a service is given up then.
        segments: of every role and lane; None: the body's modules run as they are.
        overlap: decides which steps run in two lanes; None: none does.
    """

    def __init__(
        self,
        body: Body,
        dispatcher: Dispatcher,
        metrics: CellMetrics,
        recovery_s: float = 60.0,
        replays: int = 10,
        segments: Segments | None = None,
        overlap: Overlap | None = None,
    ) -> None:
        self.dispatcher = dispatcher
        self.recovering = False
        self.steps = 0
        self.replays = 0
        self.body = body
        self._metrics = metrics
        self._recovery_s = recovery_s
        self._max_replays = replays
        self._segments = segments or {}
        self._overlap = overlap
        self._lock = threading.Lock()

    def memory(self, role: Role) -> RoleMemory:
        """The pages and slots of one role."""
        return self.dispatcher.store.memory[role]

    def run(self, spans: Sequence[Span], rows: IntArray) -> torch.Tensor:
        """As `target`, for its logits alone."""
        return self.target(spans, rows).logits

    def target(self, spans: Sequence[Span], rows: IntArray, keep: Keep | None = None) -> Output:
        """Run one step of the target role, again from its start if a service is lost in it.

        Args:
            spans: what each sequence feeds.
            rows: int [n], the tokens of the packed batch whose logits are wanted.
            keep: for steps with VERIFY spans: how many tokens of each span its output lets count.

        Raises:
            BraidError: the step failed; every sequence is as it was before.
        """
        return self._replayed(Role.TARGET, spans, rows, None, keep)

    def draft(
        self, spans: Sequence[Span], hidden: torch.Tensor, rows: IntArray, *, forget: bool = False
    ) -> Output:
        """Run one step of the draft role; a target step that it follows stays committed.

        Args:
            spans: of each sequence, the tokens that follow the hidden states.
            hidden: [T, hidden], packed as the spans.
            rows: int [n], the rows whose logits are wanted.
            forget: nothing of it counts: every sequence's draft is as it was before.

        Raises:
            BraidError: the step failed; every sequence's draft is as it was before.
        """
        return self._replayed(Role.DRAFT, spans, rows, hidden, None, forget)

    def _replayed(
        self,
        role: Role,
        spans: Sequence[Span],
        rows: IntArray,
        hidden: torch.Tensor | None,
        keep: Keep | None,
        forget: bool = False,
    ) -> Output:
        """Run a step; after a loss, recover and run it again, for a while and a number of times."""
        with self._lock:
            lost: BraidError | None = None
            deadline = math.inf
            for attempt in range(self._max_replays + 1):
                try:
                    if lost is not None:
                        # Another loss while this one is mended is a loss like any other.
                        self.recover(lost, deadline - time.monotonic())
                    return self._walked(role, spans, rows, hidden, keep, forget)
                except RECOVERABLE as error:
                    deadline = min(deadline, time.monotonic() + self._recovery_s)
                    if attempt == self._max_replays or time.monotonic() >= deadline:
                        raise
                    lost = error
            raise ServiceLost("the step was not run")

    def _walked(
        self,
        role: Role,
        spans: Sequence[Span],
        rows: IntArray,
        hidden: torch.Tensor | None,
        keep: Keep | None,
        forget: bool,
    ) -> Output:
        began = time.monotonic()
        self.dispatcher.announce(role)
        choice = self._overlap.choose(role, spans) if self._overlap is not None else None
        division = choice.division if choice is not None else None
        if division is not None and not self.memory(role).has_room(division.spans):
            division = None
        with self._staged(role, spans if division is None else division.spans) as pending:
            batch = pending.staged.batch
            lanes = [batch] if division is None else list(batch.split(division.sequences))
            steps = self.dispatcher.open(lanes)
            output = self._forward(role, steps, rows, hidden)
            for step in steps:
                step.finish()
            if keep is not None:
                kept = keep(output)
                pending.kept = kept if division is None else division.expand(kept)
            pending.forget = forget
        took = time.monotonic() - began
        self._metrics.step(batch.mode, batch.num_tokens, took)
        if choice is not None:
            choice.took(len(lanes), took)
        return output

    def _forward(
        self, role: Role, steps: Sequence[Step], rows: IntArray, hidden: torch.Tensor | None
    ) -> Output:
        """The body, on one or two lanes; without segments, as its modules run."""
        if (role, 0) not in self._segments:
            (step,) = steps
            if hidden is None:
                output = self.body.target(step.batch, step.attend, rows)
            else:
                output = self.body.draft(step.batch, hidden, step.attend, rows)
            step.arrive()
            return output
        lanes = [Lane(self._segments[role, index], step) for index, step in enumerate(steps)]
        return forward(lanes, rows, hidden)

    @contextmanager
    def step(self, role: Role, spans: Sequence[Span]) -> Iterator[tuple[Staged, Step]]:
        """A step whose layers the block runs: committed at its end, forgotten if it raises."""
        with self._staged(role, spans) as pending:
            step = self.dispatcher.begin(pending.staged.batch)
            yield pending.staged, step
            step.finish()

    @contextmanager
    def _staged(self, role: Role, spans: Sequence[Span]) -> Iterator[_Pending]:
        """Memory for a step: committed at the block's end, forgotten if it raises."""
        memory = self.memory(role)
        self.steps += 1
        staged = memory.stage(spans, self.dispatcher.epoch, self.steps)
        try:
            pending = _Pending(staged)
            yield pending
        except BaseException:
            memory.abort(staged)
            self.dispatcher.abort()
            raise
        if pending.forget:
            memory.abort(staged)
        else:
            memory.commit(staged, pending.kept)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other steps out, for one that is run layer by layer from outside."""
        with self._lock:
            yield

    def recover(self, error: BraidError, timeout_s: float | None = None) -> None:
        """Wait for the services and configure them again; callers keep other steps out.

        Args:
            error: what was lost, for the log.
            timeout_s: longest wait; None: as long as for a step.

        Raises:
            ServiceLost: one did not come back in time.
        """
        log.warning("step %d is replayed: %s", self.steps, error)
        self._metrics.errors.note(error)
        self.recovering = True
        try:
            self.dispatcher.connect(self._recovery_s if timeout_s is None else max(timeout_s, 0.1))
        finally:
            self.recovering = False
        self.replays += 1
        self._metrics.replays.inc()
        log.info("services are back, epoch %d", self.dispatcher.epoch)
