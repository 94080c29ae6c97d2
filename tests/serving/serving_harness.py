"""Cells with the small model in this process, and what is asked of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from braid_orchestrator.cell import Cell, CellOptions
from braid_orchestrator.launcher import embedded_hosts
from braid_orchestrator.layer_plan.sizes import plan_memory
from braid_orchestrator.link import EmbeddedLink
from braid_orchestrator.request import Failed, Request, Token
from braid_orchestrator.sampling import Sampling
from braid_orchestrator.settings import Settings
from braid_orchestrator.store import Limits
from braid_wire.layers import Role

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
VOCAB = 2048
FLOAT_BYTES = 4


def prompt(length: int, seed: int = 0) -> list[int]:
    """Token ids that mean nothing; none is an end token."""
    return np.random.default_rng(seed).integers(8, VOCAB, length).tolist()


def limits(pages: int, slots: int, max_sequences: int = 8, max_context: int = 256) -> Limits:
    """Room for so many pages of 16 positions, and for slots beyond those that sequences need."""
    sizes = plan_memory(Settings(TINY).plans().target, 16, FLOAT_BYTES)
    pool_bytes = pages * sizes.kv_bytes + (2 * max_sequences + slots) * sizes.state_bytes
    return Limits(128, max_sequences, max_context, 16, pool_bytes)


def make_cell(directory: Path, room: Limits, **options: object) -> Cell:
    """A cell that the caller closes."""
    links = {kind: EmbeddedLink(kind, host) for kind, host in embedded_hosts(1).items()}
    name = f"arenas-{len(list(directory.iterdir()))}.sock"
    return Cell(TINY, links, directory / name, CellOptions(limits=room, **options))  # type: ignore[arg-type]


def ask(
    cell: Cell, name: str, tokens: Sequence[int], made: int, sampling: Sampling | None = None, **more: object
) -> Request:
    """Submit a request that ends by its length."""
    request = Request(
        name,
        np.array(tokens),
        sampling or Sampling(),
        max_tokens=made,
        **more,  # type: ignore[arg-type]
    )
    cell.engine.submit(request)
    return request


def tokens_of(request: Request) -> list[int]:
    """All that it makes."""
    found = []
    for event in request.stream():
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Token):
            found.append(event.token_id)
    return found


def held(cell: Cell) -> list[int]:
    """Pages and slots that somebody holds."""
    memory = cell.walker.memory(Role.TARGET)
    return [pool.used for pool in (memory.pages, memory.slots) if pool is not None]


def kept(cell: Cell) -> list[int]:
    """Pages and slots that only the cache keeps."""
    memory = cell.walker.memory(Role.TARGET)
    return [pool.cached for pool in (memory.pages, memory.slots) if pool is not None]


def counted(cell: Cell, name: str) -> float:
    """A metric of the orchestrator."""
    return cell.metrics.registry.get_sample_value(name) or 0.0
