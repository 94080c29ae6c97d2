"""How a decode step grows with layers, sequences and context, and what a sequence holds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import numpy as np
from braid_wire.batch import IntArray
from braid_wire.errors import ServiceFault
from braid_wire.layers import Kind

from braid_orchestrator.bench import stats
from braid_orchestrator.bench.cells import Services
from braid_orchestrator.bench.check import expect_close
from braid_orchestrator.bench.matmul import matmul_fraction
from braid_orchestrator.bench.model import checkpoint
from braid_orchestrator.bench.options import BenchOptions, Row
from braid_orchestrator.bench.peers import CellPeer, TransformersPeer
from braid_orchestrator.bench.runs import EMBEDDED, OURS, grows, limits, time_decode
from braid_orchestrator.bench.watch import LayerSeconds, watched
from braid_orchestrator.layer_plan.sizes import plan_memory
from braid_orchestrator.memory import VERSIONS
from braid_orchestrator.threads import use_threads

SWEEPS = ("layers", "batch", "context")
LONGEST_PROMPT = 4096
"""Contexts beyond this are strung together from prompts of `PIECE` tokens: a real one takes time that
grows with its square, and a step that follows reads the same amount."""
PIECE = 2048


@dataclass(frozen=True)
class Ranges:
    """What is swept; the sizes that a sweep holds fixed stand beside it."""

    layers: tuple[int, ...] = (8, 16, 32, 64, 96)
    layers_context: int = 256
    batches: tuple[int, ...] = (1, 4, 16, 64, 256)
    batches_context: int = 64
    contexts: tuple[int, ...] = (1024, 4096, 16384, 65536, 131072)


@dataclass(frozen=True)
class _Point:
    """One row to be."""

    sweep: str
    layers: int | None
    batch: int
    context: int


def scale(options: BenchOptions, ranges: Ranges, sweeps: Sequence[str] = SWEEPS) -> list[Row]:
    """Step times, hops and memory; one of the three sizes varies at a time, the others stay small.

    Args:
        options: batches and contexts are those of `ranges`; with a model of the caller's, there is
            nothing to vary in its layers.
        ranges: what to sweep.
        sweeps: which of `SWEEPS`.

    Raises:
        ServiceFault: logits are not transformers' (after real prompts) or the embedded placement's, or
            the pools hand out other than the plan says.
    """
    use_threads(options.threads)
    rows = []
    with ExitStack() as stack:
        options.progress("starting")
        services = stack.enter_context(Services(options.threads))
        if "layers" in sweeps and options.model is None:
            for layers in ranges.layers:
                rows += _sweep(services, options, [_Point("layers", layers, 1, ranges.layers_context)])
        if "batch" in sweeps:
            points = [_Point("batch", None, batch, ranges.batches_context) for batch in ranges.batches]
            rows += _sweep(services, options, points)
        if "context" in sweeps:
            points = [_Point("context", None, 1, context) for context in ranges.contexts]
            rows += _sweep(services, options, points)
    return rows


def _sweep(services: Services, options: BenchOptions, points: Sequence[_Point]) -> list[Row]:
    """Points that one model and one cell will do for."""
    room = limits([p.batch for p in points], [p.context for p in points], grows(options))
    # In one lane: the figures are those of whole layers.
    setup = options.setup(room)
    with ExitStack() as stack:
        directory = stack.enter_context(checkpoint(options.model, points[0].layers))
        reference = TransformersPeer(directory, options.dtype)
        # The one pair of remote services goes from cell to cell; a new cell configures it anew.
        peers = {
            OURS: CellPeer(OURS, stack.enter_context(services.remote(directory, setup))),
            EMBEDDED: CellPeer(EMBEDDED, stack.enter_context(services.embedded(directory, setup))),
        }
        rows = []
        for point in points:
            options.progress(f"scale, {point.sweep}: batch {point.batch}, context {point.context}")
            rows.append(_measure(reference, peers, options, point))
        return rows


def _measure(
    reference: TransformersPeer, peers: Mapping[str, CellPeer], options: BenchOptions, point: _Point
) -> Row:
    random = np.random.default_rng(point.batch * 100_003 + point.context)
    vocab_size = peers[OURS].cell.plans.vocab_size
    prompts = random.integers(0, vocab_size, (point.batch, point.context))
    turns = random.integers(0, vocab_size, (options.repeats + 1, options.steps + 1, point.batch))
    _prefill(reference, peers, prompts, options)
    memory = _memory(peers[OURS], point)
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    layers = LayerSeconds()
    for repeat, tokens in enumerate(turns):
        logits = {}
        for name in stats.in_turn(list(peers), repeat):
            with watched(peers[name].cell, layers.add) if repeat and name == OURS else nullcontext():
                took, logits[name] = time_decode(peers[name], tokens)
            if repeat:  # the first one warms up
                seconds[name].append(took)
        expect_close(logits, EMBEDDED, options.dtype)
    ours = peers[OURS]
    matmul = matmul_fraction(ours.cell, lambda: time_decode(ours, turns[0]))
    for peer in peers.values():
        peer.end()
    return {**_row(ours, seconds, layers, options, point), "matmul_fraction": matmul, **memory}


def _prefill(
    reference: TransformersPeer, peers: Mapping[str, CellPeer], prompts: IntArray, options: BenchOptions
) -> None:
    """Real prompts are checked against transformers, strung ones against the embedded placement."""
    if prompts.shape[1] <= LONGEST_PROMPT:
        logits = {name: peer.prefill(prompts) for name, peer in peers.items()}
        logits[reference.name] = reference.prefill(prompts)
        expect_close(logits, reference.name, options.dtype)
        reference.forget()
    else:
        logits = {name: peer.prefill_pieces(prompts, PIECE) for name, peer in peers.items()}
        expect_close(logits, EMBEDDED, options.dtype)


def _memory(peer: CellPeer, point: _Point) -> Row:
    """What the pools have handed out for each sequence, beside what the plan says it takes.

    Raises:
        ServiceFault: they are not the same.
    """
    options = peer.cell.options
    pages, slots = peer.memory_bytes()
    page_size = options.limits.page_size
    whole_pages = -(-point.context // page_size) * page_size
    itemsizes = options.dtype.itemsize, options.state_dtype.itemsize
    planned = plan_memory(peer.cell.plans.target, whole_pages, *itemsizes)
    expected = planned.kv_bytes * point.batch, planned.state_bytes * VERSIONS * point.batch
    if (pages, slots) != expected:
        raise ServiceFault(
            f"{point.batch} sequences of {point.context} tokens hold {pages} bytes of pages and {slots} of "
            f"slots; the plan says {expected[0]} and {expected[1]}; nothing is reported"
        )
    exact = plan_memory(peer.cell.plans.target, point.context, *itemsizes)
    return {
        "memory_bytes": (pages + slots) // point.batch,
        "memory_kv_bytes": pages // point.batch,
        "memory_state_bytes": slots // point.batch,
        # Of `braid plan`: one version of the state, where a sequence holds the one that a step reads and
        # the one that it writes.
        "memory_bytes_planned": exact.total_bytes,
        "memory_kv_bytes_planned": exact.kv_bytes,
        "memory_state_bytes_planned": exact.state_bytes,
        "state_versions": VERSIONS,
    }


def _row(
    peer: CellPeer,
    seconds: Mapping[str, Sequence[float]],
    layers: LayerSeconds,
    options: BenchOptions,
    point: _Point,
) -> Row:
    ours = statistics.median(seconds[OURS])
    return {
        "bench": "scale",
        "sweep": point.sweep,
        "layers": len(peer.cell.plans.target),
        "batch": point.batch,
        "context": point.context,
        "context_made_of": "one prompt" if point.context <= LONGEST_PROMPT else f"prompts of {PIECE} tokens",
        "dtype": options.dtype_name,
        "segments": options.segments,
        "threads": options.threads,
        "step_us": round(ours * stats.MICROSECONDS, 1),
        "step_us_embedded": round(statistics.median(seconds[EMBEDDED]) * stats.MICROSECONDS, 1),
        "tokens_per_s": round(point.batch / ours, 1),
        "ratio_embedded": stats.ratio(seconds[EMBEDDED], seconds[OURS]),
        "hop_us_p50": stats.quantile(layers.all_hops(), 0.5),
        "hop_us_p99": stats.quantile(layers.all_hops(), 0.99),
        "kernel_us_p50_full": stats.quantile(layers.kernels[Kind.FULL], 0.5),
        "kernel_us_p50_linear": stats.quantile(layers.kernels[Kind.LINEAR], 0.5),
        "spread": stats.spread(seconds[OURS]),
        "repeats": options.repeats,
    }
