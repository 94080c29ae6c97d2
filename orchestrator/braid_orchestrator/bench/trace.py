"""Steps of a cell of three processes, recorded layer by layer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from braid_orchestrator.bench.cells import Services
from braid_orchestrator.bench.peers import CellPeer
from braid_orchestrator.bench.runs import OF_DISPATCH, OURS, limits
from braid_orchestrator.bench.watch import watched
from braid_orchestrator.cell import Cell, CellOptions
from braid_orchestrator.overlap import OverlapMode
from braid_orchestrator.threads import use_threads
from braid_orchestrator.timeline import Processes, Timeline

# Enough for a cell that decides about lanes to have decided.
_WARM_STEPS = 16


@dataclass(frozen=True)
class TraceOptions:
    """What to record."""

    model: Path
    dtype: torch.dtype = torch.float32
    dispatch: str = "walk"
    overlap: str = "off"
    """Whether steps run in two lanes: off, on or auto."""
    threads: int = 1
    """Of every process."""
    steps: int = 16
    """Decode steps."""
    batch: int = 1
    prompt_tokens: int = 64
    """Of each sequence."""


def record_steps(options: TraceOptions) -> Timeline:
    """Run random prompts and greedy decode steps, and note when each layer ran.

    Raises:
        BraidError: the cell cannot start, or a step failed.
    """
    use_threads(options.threads)
    grows = options.steps + _WARM_STEPS
    setup = CellOptions(
        options.dtype,
        limits=limits([options.batch], [options.prompt_tokens], grows),
        overlap=OverlapMode(options.overlap),
    )
    with (
        Services(options.threads) as services,
        services.remote(options.model, setup, OF_DISPATCH[options.dispatch]) as cell,
    ):
        pids = {kind: found.pid for kind, found in cell.dispatcher.descriptions.items()}
        timeline = Timeline(cell.store.plans, Processes(os.getpid(), pids))
        _generate(cell, options, _WARM_STEPS)
        with watched(cell, timeline.add):
            _generate(cell, options, options.steps)
        return timeline


def _generate(cell: Cell, options: TraceOptions, steps: int) -> None:
    random = np.random.default_rng(0)
    prompts = random.integers(0, cell.plans.vocab_size, (options.batch, options.prompt_tokens))
    peer = CellPeer(OURS, cell)
    logits = peer.prefill(prompts)
    for _ in range(steps):
        logits = peer.decode(logits.argmax(-1).numpy())
    peer.end()
