"""Cells with both services in this process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from braid_full_attn.core import load as load_full
from braid_linear_attn.core import load as load_linear
from braid_orchestrator.cell import Cell, CellOptions
from braid_orchestrator.guesses import Guess
from braid_orchestrator.link import EmbeddedLink
from braid_orchestrator.memory import RoleMemory
from braid_orchestrator.request import Failed, Request, Token
from braid_orchestrator.speculative import Progress, Speculator
from braid_orchestrator.store import Limits
from braid_wire.attention_host import AttentionHost
from braid_wire.layers import Kind
from braid_wire.metrics import ProcessMetrics

LIMITS = Limits(max_tokens=96, max_sequences=20, max_context=160, page_size=8, pool_bytes=1 << 28)


@contextmanager
def cell(model: Path, limits: Limits = LIMITS, **options: Any) -> Iterator[Cell]:
    """A cell whose body runs as its modules are, and that guesses whether it pays or not.

    `options` are more of `CellOptions`.
    """
    links = {
        Kind.FULL: EmbeddedLink(Kind.FULL, AttentionHost(load_full("cpp", 1), ProcessMetrics("full", "0"))),
        Kind.LINEAR: EmbeddedLink(
            Kind.LINEAR, AttentionHost(load_linear("cpp", 1), ProcessMetrics("linear", "0"))
        ),
    }
    with tempfile.TemporaryDirectory(prefix="braid") as private:
        settings = CellOptions(limits=limits, **{"segments": "off", "speculative_adaptive": False, **options})
        made = Cell(model, links, Path(private) / "arenas", settings)
        try:
            yield made
        finally:
            made.close()


def poison(running: Cell) -> None:
    """Memory that nobody wrote holds NaN, so that reading it shows."""
    for group in running.store._caches.values():
        for tensor in group.values():
            tensor.fill_(float("nan"))


def held(memory: RoleMemory) -> list[int]:
    """Units of its pools that are in use."""
    return [pool.used for pool in (memory.pages, memory.slots) if pool is not None]


@dataclass
class Script:
    """Stands in for a draft: it knows what requests will make, and is right as often as it is told.

    Args:
        truths: request id → the tokens that it makes.
        pattern: how many guesses of each next step are right; one more is wrong, None: there are none.
    """

    truths: Mapping[str, Sequence[int]]
    pattern: Iterator[int | None]
    verified: list[int] = field(default_factory=list)
    """Guesses that were left with a request, each time."""

    def follow(self, speculator: Speculator, progress: Sequence[Progress]) -> None:
        """In place of `Speculator.follow`."""
        for one in progress:
            request = one.request
            truth = self.truths.get(request.request_id)
            if truth is None or request.memory.released or request.made == 0:
                continue
            right = next(self.pattern)
            if right is None:
                continue
            ahead = list(truth[request.made : request.made + right + 1])
            if len(ahead) > right:
                ahead[right] = (ahead[right] + 1) % 90
            request.guesses = [Guess(token) for token in ahead[: request.rest - 1]]
            self.verified.append(len(request.guesses))


def submit(running: Cell, requests: Iterable[Request]) -> None:
    """Hand requests over together: the engine takes none of them before it has all."""
    with running.engine._change:
        for request in requests:
            running.engine.submit(request)


def tokens_of(request: Request) -> list[int]:
    """All that a request makes; `Failed` is raised."""
    found = []
    for event in request.stream():
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Token):
            found.append(event.token_id)
    return found


def idle(running: Cell) -> bool:
    """Whether every page and slot of every role is free but for what is cached."""
    return not any(used for memory in running.store.memory.values() for used in held(memory))
