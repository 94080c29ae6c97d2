"""Decode and prefill, peer against peer, alternating, with medians and their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from braid_wire.errors import ServiceFault

from braid_orchestrator.bench.model import checkpoint
from braid_orchestrator.bench.peers import CellPeer, Peer, TransformersPeer, cell_peer
from braid_orchestrator.cell import Cell, CellOptions
from braid_orchestrator.dispatcher import Dispatch, Point
from braid_orchestrator.launcher import embedded_hosts
from braid_orchestrator.link import EmbeddedLink
from braid_orchestrator.store import Limits

# Of the range of the reference's logits: what two float32 or bfloat16 forwards of one model may differ by.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class BenchOptions:
    """What to measure."""

    model: Path | None = None
    """None: a 10 M-parameter hybrid with random weights."""
    dtype: torch.dtype = torch.float32
    dispatch: str = "walk"
    threads: int = 1
    batches: tuple[int, ...] = (1, 8)
    contexts: tuple[int, ...] = (512,)
    steps: int = 32
    """Decode steps timed in one repeat."""
    repeats: int = 5
    progress: Callable[[str], None] = field(default=lambda text: None)


Row = dict[str, Any]


def decode(options: BenchOptions) -> list[Row]:
    """Tokens per second when every sequence of a batch makes one token a step.

    Raises:
        ServiceFault: a peer's logits are not the reference's.
    """
    return _measure(options, "decode", _time_decode)


def prefill(options: BenchOptions) -> list[Row]:
    """Tokens per second of prompts that begin anew.

    Raises:
        ServiceFault: a peer's logits are not the reference's.
    """
    return _measure(options, "prefill", _time_prefill)


Timer = Callable[[Peer, BenchOptions, np.ndarray, np.ndarray], tuple[float, torch.Tensor]]
"""(peer, options, prompts [B, L], tokens [steps, B]) → seconds for each token of a sequence, last logits."""


def _measure(options: BenchOptions, bench: str, timer: Timer) -> list[Row]:
    torch.set_num_threads(options.threads)
    rows = []
    with ExitStack() as stack:
        directory = stack.enter_context(checkpoint(options.model))
        options.progress("starting")
        peers, cell = _peers(stack, directory, options)
        for context in options.contexts:
            for batch in options.batches:
                options.progress(f"{bench}, batch {batch}, context {context}")
                rows.append(_row(bench, timer, peers, cell, options, batch, context))
    return rows


def _peers(stack: ExitStack, directory: Path, options: BenchOptions) -> tuple[list[Peer], Cell]:
    longest = max(options.contexts) + options.steps * 2 + 8
    most = max(options.batches)
    limits = Limits(
        max_tokens=max(2048, most), max_sequences=most, max_context=longest, pool_bytes=1 << 34, page_size=16
    )
    setup = CellOptions(options.dtype, torch.float32, Dispatch(options.dispatch), limits)
    remote, cell = stack.enter_context(cell_peer(directory, setup, options.threads))
    handover = cell.owner.socket_path.with_name("embedded.sock")
    links = {kind: EmbeddedLink(kind, host) for kind, host in embedded_hosts(options.threads).items()}
    embedded = Cell(directory, links, handover, setup)
    stack.callback(embedded.close)
    return [TransformersPeer(directory, options.dtype), remote, CellPeer("embedded", embedded)], cell


def _row(
    bench: str,
    timer: Timer,
    peers: Sequence[Peer],
    cell: Cell,
    options: BenchOptions,
    batch: int,
    context: int,
) -> Row:
    random = np.random.default_rng(batch * 100_003 + context)
    prompts = random.integers(0, cell.plans.vocab_size, (batch, context))
    tokens = random.integers(0, cell.plans.vocab_size, (options.steps, batch))
    seconds: dict[str, list[float]] = {peer.name: [] for peer in peers}
    hops: list[float] = []
    for repeat in range(options.repeats + 1):
        logits: dict[str, torch.Tensor] = {}
        for peer in peers:
            with _watch(cell, hops if repeat and peer.name == "braid" else []):
                took, logits[peer.name] = timer(peer, options, prompts, tokens)
            if repeat:  # the first one warms up
                seconds[peer.name].append(took)
        _check(logits, options.dtype)
    return _summary(bench, seconds, hops, options, batch, context)


def _summary(
    bench: str,
    seconds: dict[str, list[float]],
    hops: list[float],
    options: BenchOptions,
    batch: int,
    context: int,
) -> Row:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ours = medians["braid"]
    # Ratios pair runs that were neighbours in time, so that a slow minute does not fake a difference.
    ratio = {name: _ratio(values, seconds["braid"]) for name, values in seconds.items()}
    return {
        "bench": bench,
        "batch": batch,
        "context": context,
        "dtype": str(options.dtype).removeprefix("torch."),
        "dispatch": options.dispatch,
        "threads": options.threads,
        "tokens_per_s": round(batch / ours, 1),
        "tokens_per_s_transformers": round(batch / medians["transformers"], 1),
        "tokens_per_s_embedded": round(batch / medians["embedded"], 1),
        "ratio_transformers": round(ratio["transformers"], 3),
        "ratio_embedded": round(ratio["embedded"], 3),
        "hop_us_p50": round(statistics.median(hops) * 1e6, 1) if hops else None,
        "spread": round((max(seconds["braid"]) - min(seconds["braid"])) / ours, 3),
        "repeats": options.repeats,
    }


def _ratio(peer: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as fast as a peer: the median over pairs of neighbouring runs."""
    return statistics.median(theirs / mine for theirs, mine in zip(peer, ours, strict=True))


def _time_decode(
    peer: Peer, options: BenchOptions, prompts: np.ndarray, tokens: np.ndarray
) -> tuple[float, torch.Tensor]:
    peer.prefill(prompts)
    logits = peer.decode(tokens[0])
    began = time.perf_counter()
    for row in tokens[1:]:
        logits = peer.decode(row)
    return (time.perf_counter() - began) / (len(tokens) - 1), logits


def _time_prefill(
    peer: Peer, options: BenchOptions, prompts: np.ndarray, tokens: np.ndarray
) -> tuple[float, torch.Tensor]:
    began = time.perf_counter()
    logits = peer.prefill(prompts)
    return (time.perf_counter() - began) / prompts.shape[1], logits


def _check(logits: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    reference = logits["transformers"]
    allowed = _TOLERANCE[dtype] * float(reference.max() - reference.min())
    for name, found in logits.items():
        error = float((found - reference).abs().max())
        if not error <= allowed:  # NaN is refused too
            raise ServiceFault(
                f"{name} differs from transformers by {error:.2e} (allowed {allowed:.2e}); "
                "nothing is reported"
            )


@contextmanager
def _watch(cell: Cell, hops: list[float]) -> Iterator[None]:
    """Collect the time of each layer of a cell that was not in the kernel."""

    def note(point: Point, compute_s: float, overhead_s: float) -> None:
        hops.append(overhead_s)

    cell.dispatcher.observer = note
    try:
        yield
    finally:
        cell.dispatcher.observer = None
