"""One step through all layers, and what happens when a service is lost in the middle of it."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from braid_wire.batch import IntArray
from braid_wire.errors import EpochStale, NotConfigured, ServiceLost
from braid_wire.layers import Role

from braid_orchestrator.body.base import Body, Output
from braid_orchestrator.dispatcher import Dispatcher, Step
from braid_orchestrator.memory import RoleMemory, Span, Staged
from braid_orchestrator.metrics import CellMetrics

log = logging.getLogger(__name__)

# What a restarted service answers before it is configured again; a replay then loses nothing.
RECOVERABLE = (ServiceLost, NotConfigured, EpochStale)


class Walker:
    """Runs steps, one at a time.

    Args:
        body: the model without its attention.
        dispatcher: leads its layers to the services.
        metrics: of this process.
        recovery_s: longest time from a step's first loss until it fails.
        replays: times that one step is run again; a step that itself ends a service is given up then.
    """

    def __init__(
        self,
        body: Body,
        dispatcher: Dispatcher,
        metrics: CellMetrics,
        recovery_s: float = 60.0,
        replays: int = 10,
    ) -> None:
        self.dispatcher = dispatcher
        self.recovering = False
        self.steps = 0
        self.replays = 0
        self.body = body
        self._metrics = metrics
        self._recovery_s = recovery_s
        self._max_replays = replays
        self._lock = threading.Lock()

    def memory(self, role: Role) -> RoleMemory:
        """The pages and slots of one role."""
        return self.dispatcher.store.memory[role]

    def run(self, spans: Sequence[Span], rows: IntArray) -> torch.Tensor:
        """As `target`, for its logits alone."""
        return self.target(spans, rows).logits

    def target(self, spans: Sequence[Span], rows: IntArray) -> Output:
        """Run one step of the target role, again from its start if a service is lost in it.

        Args:
            spans: what each sequence feeds.
            rows: int [n], the tokens of the packed batch whose logits are wanted.

        Raises:
            BraidError: the step failed; every sequence is as it was before.
        """
        return self._replayed(
            Role.TARGET, spans, lambda staged, step: self.body.target(staged.batch, step.attend, rows)
        )

    def draft(self, spans: Sequence[Span], hidden: torch.Tensor, rows: IntArray) -> Output:
        """Run one step of the draft role; a target step that it follows stays committed.

        Args:
            spans: of each sequence, the tokens that follow the hidden states.
            hidden: [T, hidden], packed as the spans.
            rows: int [n], the rows whose logits are wanted.

        Raises:
            BraidError: the step failed; every sequence's draft is as it was before.
        """
        return self._replayed(
            Role.DRAFT,
            spans,
            lambda staged, step: self.body.draft(staged.batch, hidden, step.attend, rows),
        )

    def _replayed(self, role: Role, spans: Sequence[Span], walk: Callable[[Staged, Step], Output]) -> Output:
        """Run a step; after a loss, recover and run it again, for a while and a number of times."""
        with self._lock:
            lost: Exception | None = None
            deadline = math.inf
            for attempt in range(self._max_replays + 1):
                try:
                    if lost is not None:
                        # Another loss while this one is mended is a loss like any other.
                        self.recover(lost, deadline - time.monotonic())
                    return self._walked(role, spans, walk)
                except RECOVERABLE as error:
                    deadline = min(deadline, time.monotonic() + self._recovery_s)
                    if attempt == self._max_replays or time.monotonic() >= deadline:
                        raise
                    lost = error
            raise ServiceLost("the step was not run")

    def _walked(self, role: Role, spans: Sequence[Span], walk: Callable[[Staged, Step], Output]) -> Output:
        began = time.monotonic()
        with self.step(role, spans) as (staged, step):
            output = walk(staged, step)
        self._metrics.step(staged.batch.mode, staged.batch.num_tokens, time.monotonic() - began)
        return output

    @contextmanager
    def step(self, role: Role, spans: Sequence[Span]) -> Iterator[tuple[Staged, Step]]:
        """A step whose layers the block runs: committed at its end, forgotten if it raises."""
        memory = self.memory(role)
        self.steps += 1
        staged = memory.stage(spans, self.dispatcher.epoch, self.steps)
        try:
            step = self.dispatcher.begin(staged.batch)
            yield staged, step
            step.finish()
        except BaseException:
            memory.abort(staged)
            self.dispatcher.abort()
            raise
        memory.commit(staged)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other steps out, for one that is run layer by layer from outside."""
        with self._lock:
            yield

    def recover(self, error: Exception, timeout_s: float | None = None) -> None:
        """Wait for the services and configure them again; callers keep other steps out.

        Args:
            error: what was lost, for the log.
            timeout_s: longest wait; None: as long as for a step.

        Raises:
            ServiceLost: one did not come back in time.
        """
        log.warning("step %d is replayed: %s", self.steps, error)
        self.recovering = True
        try:
            self.dispatcher.connect(self._recovery_s if timeout_s is None else max(timeout_s, 0.1))
        finally:
            self.recovering = False
        self.replays += 1
        self._metrics.replays.inc()
        log.info("services are back, epoch %d", self.dispatcher.epoch)
