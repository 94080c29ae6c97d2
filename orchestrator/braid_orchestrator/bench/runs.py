"""Decode and prefill, peer against peer, in turns, with medians and their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from braid_wire.batch import IntArray
from braid_wire.process import settled

from braid_orchestrator.bench import stats
from braid_orchestrator.bench.cells import Services
from braid_orchestrator.bench.check import expect_close
from braid_orchestrator.bench.matmul import matmul_fraction
from braid_orchestrator.bench.model import checkpoint
from braid_orchestrator.bench.options import BenchOptions, Row
from braid_orchestrator.bench.peers import CellPeer, Peer, TransformersPeer
from braid_orchestrator.bench.transports import DOORBELLS, TRANSPORTS, UNARY
from braid_orchestrator.bench.watch import LayerSeconds, watched
from braid_orchestrator.overlap import OverlapMode
from braid_orchestrator.store import Limits
from braid_orchestrator.threads import use_threads

OURS = "braid"
EMBEDDED = "embedded"
OF_DISPATCH = {"walk": DOORBELLS, "rpc": UNARY}
_POOL_BYTES = 1 << 34


@dataclass
class Measured:
    """What one row is made of: seconds of each turn of each peer, and the layers of ours."""

    seconds: dict[str, list[float]]
    layers: LayerSeconds = field(default_factory=LayerSeconds)
    matmul: float | None = None
    """Part of our time that goes into matrix products of the body."""


Measure = Callable[[Sequence[Peer], BenchOptions, int, int, int], Measured]
"""(peers, options, batch, context, vocabulary) → what was measured, seconds for each token of a sequence."""


def decode(options: BenchOptions) -> list[Row]:
    """Tokens per second when every sequence of a batch makes one token a step.

    Raises:
        ServiceFault: a peer's logits are not the reference's.
    """
    return _measure(options, "decode", measure_decode)


def prefill(options: BenchOptions) -> list[Row]:
    """Tokens per second of prompts that begin anew.

    Raises:
        ServiceFault: a peer's logits are not the reference's.
    """
    return _measure(options, "prefill", measure_prefill)


def measure_decode(
    peers: Sequence[Peer], options: BenchOptions, batch: int, context: int, vocab_size: int
) -> Measured:
    """Peers take turns of `steps` steps each, from prompts of `context` tokens on.

    Args:
        peers: the first is the reference.
        options: steps, repeats, dtype.
        batch: sequences.
        context: tokens of each at the beginning; all peers grow by the same ones.
        vocab_size: of the model.

    Raises:
        ServiceFault: after a prompt or a turn, a peer's logits are not the reference's.
    """
    prompts, tokens = _tokens(options, batch, context, vocab_size)
    by_name = {peer.name: peer for peer in peers}
    _compare({name: _prefill(peer, prompts) for name, peer in by_name.items()}, options)
    measured = Measured({name: [] for name in by_name})
    for repeat, turn in enumerate(tokens):
        logits = {}
        for name in stats.in_turn(list(by_name), repeat):
            peer = by_name[name]
            with _watch(peer, measured.layers) if repeat else nullcontext():
                took, logits[name] = time_decode(peer, turn)
            if repeat:  # the first one warms up
                measured.seconds[name].append(took)
        _compare(logits, options)
    ours = by_name[OURS]
    if isinstance(ours, CellPeer):
        measured.matmul = matmul_fraction(ours.cell, lambda: time_decode(ours, tokens[0]))
    return measured


def measure_prefill(
    peers: Sequence[Peer], options: BenchOptions, batch: int, context: int, vocab_size: int
) -> Measured:
    """Peers take turns of one prompt of `context` tokens a sequence; arguments as `measure_decode`."""
    prompts, _ = _tokens(options, batch, context, vocab_size)
    by_name = {peer.name: peer for peer in peers}
    measured = Measured({name: [] for name in by_name})
    for peer in peers:
        peer.warm_up(prompts)
    for repeat in range(options.repeats):
        logits = {}
        for name in stats.in_turn(list(by_name), repeat):
            peer = by_name[name]
            peer.enter()
            if peer.begins_cold:
                peer.prefill(prompts)
            with _watch(peer, measured.layers):
                began = time.perf_counter()
                logits[name] = peer.prefill(prompts)
                measured.seconds[name].append((time.perf_counter() - began) / context)
        _compare(logits, options)
    ours = by_name[OURS]
    if isinstance(ours, CellPeer):
        measured.matmul = matmul_fraction(ours.cell, lambda: _prefill(ours, prompts))
    return measured


def _prefill(peer: Peer, prompts: IntArray) -> torch.Tensor:
    peer.enter()
    return peer.prefill(prompts)


def time_decode(peer: Peer, tokens: IntArray) -> tuple[float, torch.Tensor]:
    """Feed tokens [1 + steps, B]: mean seconds of all steps but the first, and the last logits."""
    peer.enter()
    logits = peer.decode(tokens[0])
    began = time.perf_counter()
    for row in tokens[1:]:
        logits = peer.decode(row)
    return (time.perf_counter() - began) / (len(tokens) - 1), logits


def limits(batches: Sequence[int], contexts: Sequence[int], grows: int) -> Limits:
    """For sequences of these contexts that grow by so many tokens."""
    most = max(batches)
    return Limits(
        max_tokens=max(2048, most),
        # A prompt that lies in two lanes holds a third version of its state.
        max_sequences=most + 1,
        max_context=max(contexts) + grows,
        pool_bytes=_POOL_BYTES,
    )


def grows(options: BenchOptions) -> int:
    """Tokens that a sequence decodes: one turn warms up, and one tells of matrix products."""
    return (options.steps + 1) * (options.repeats + 2)


def _measure(options: BenchOptions, bench: str, measure: Measure) -> list[Row]:
    use_threads(options.threads)
    rows = []
    with ExitStack() as stack:
        options.progress("starting")
        directory = stack.enter_context(checkpoint(options.model))
        peers, vocab_size = _peers(stack, directory, options)
        stack.enter_context(settled())  # as in the orchestrator; peers in here profit alike
        for context in options.contexts:
            for batch in options.batches:
                options.progress(f"{bench}, batch {batch}, context {context}")
                measured = measure(peers, options, batch, context, vocab_size)
                rows.append(_row(bench, measured, options, batch, context))
    return rows


def _peers(stack: ExitStack, directory: Path, options: BenchOptions) -> tuple[list[Peer], int]:
    """The reference, ours, and whoever else was asked for; and the size of the vocabulary."""
    room = limits(options.batches, options.contexts, grows(options))
    setup = options.setup(room)
    ours = OF_DISPATCH[options.dispatch]
    ways = (ours, *(name for name in options.peers if name != EMBEDDED))
    # Cells on the same services configure them anew when their turn begins.
    shared = sum(not TRANSPORTS[name].own_service for name in ways) > 1
    services = stack.enter_context(Services(options.threads))
    services.start(ways)
    chosen = options.setup(room, OverlapMode(options.overlap))
    cell = stack.enter_context(services.remote(directory, chosen, ours))
    found: list[Peer] = [TransformersPeer(directory, options.dtype), CellPeer(OURS, cell, shared)]
    for name in options.peers:
        if name == EMBEDDED:
            other = stack.enter_context(services.embedded(directory, setup))
        else:
            other = stack.enter_context(services.remote(directory, setup, name))
        found.append(CellPeer(name, other, shared and name != EMBEDDED))
    return found, cell.plans.vocab_size


def _tokens(options: BenchOptions, batch: int, context: int, vocab_size: int) -> tuple[IntArray, IntArray]:
    """Prompts [B, context], and what is fed behind them: [turns, 1 + steps, B]."""
    random = np.random.default_rng(batch * 100_003 + context)
    prompts = random.integers(0, vocab_size, (batch, context))
    return prompts, random.integers(0, vocab_size, (options.repeats + 1, options.steps + 1, batch))


def _watch(peer: Peer, layers: LayerSeconds) -> AbstractContextManager[None]:
    """Note the layers of ours."""
    if peer.name == OURS and isinstance(peer, CellPeer):
        return watched(peer.cell, layers.add)
    return nullcontext()


def _compare(logits: Mapping[str, torch.Tensor], options: BenchOptions) -> None:
    expect_close(logits, TransformersPeer.name, options.dtype)


def _row(bench: str, measured: Measured, options: BenchOptions, batch: int, context: int) -> Row:
    seconds = measured.seconds
    ours = seconds[OURS]
    row: Row = {
        "bench": bench,
        "batch": batch,
        "context": context,
        "dtype": options.dtype_name,
        "segments": options.segments,
        "dispatch": options.dispatch,
        "overlap": options.overlap,
        "threads": options.threads,
        "tokens_per_s": round(batch / statistics.median(ours), 1),
        "hop_us_p50": stats.quantile(measured.layers.all_hops(), 0.5),
        "hop_us_p99": stats.quantile(measured.layers.all_hops(), 0.99),
        "matmul_fraction": measured.matmul,
        "spread": stats.spread(ours),
        "repeats": options.repeats,
    }
    for name, theirs in seconds.items():
        if name != OURS:
            row[f"tokens_per_s_{name}"] = round(batch / statistics.median(theirs), 1)
            row[f"ratio_{name}"] = stats.ratio(theirs, ours)
            row[f"spread_{name}"] = stats.spread(theirs)
    return row
