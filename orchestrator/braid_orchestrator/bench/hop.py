"""What it costs to have a layer run by another process, one transport against the other.

The hop of a layer is the time that the orchestrator waits for it, minus the time of its kernel. The
same decode steps run over every transport, in turns; their logits must be the same bit for bit.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

import numpy as np
from braid_wire import doorbell
from braid_wire.batch import IntArray
from braid_wire.errors import MechanismUnsupported
from braid_wire.layers import Kind

from braid_orchestrator.bench import stats
from braid_orchestrator.bench.cells import Services
from braid_orchestrator.bench.check import expect_close, expect_same
from braid_orchestrator.bench.load import busy_cores
from braid_orchestrator.bench.model import checkpoint
from braid_orchestrator.bench.options import BenchOptions, Row
from braid_orchestrator.bench.peers import CellPeer, TransformersPeer
from braid_orchestrator.bench.runs import limits
from braid_orchestrator.bench.transports import DOORBELLS, TRANSPORTS, UNARY
from braid_orchestrator.bench.watch import LayerSeconds, watched
from braid_orchestrator.threads import use_threads

FREE, LOADED = "free", "loaded"
LOADS = (FREE, LOADED)
_WARM_STEPS = 4


def hop(
    options: BenchOptions, transports: Sequence[str] = tuple(TRANSPORTS), loads: Sequence[str] = LOADS
) -> list[Row]:
    """Hops of the layers of decode steps, in microseconds.

    Args:
        options: the hops of `repeats` turns of `steps` steps are taken together.
        transports: names of `TRANSPORTS`.
        loads: "free": nothing else runs; "loaded": a busy process on every core.

    Raises:
        ServiceFault: a transport's logits are not those of the others, or not transformers'.
        MechanismUnsupported: doorbells are asked for where there are none.
    """
    if DOORBELLS in transports and not doorbell.available():
        raise MechanismUnsupported("doorbells cannot be built on this machine; leave them out")
    use_threads(options.threads)
    rows = []
    with ExitStack() as stack:
        options.progress("starting")
        directory = stack.enter_context(checkpoint(options.model))
        peers = _peers(stack, directory, options, transports, len(loads))
        reference = TransformersPeer(directory, options.dtype)
        for context in options.contexts:
            for batch in options.batches:
                random = np.random.default_rng(batch * 100_003 + context)
                vocab_size = next(iter(peers.values())).cell.plans.vocab_size
                _prefill(reference, peers, random.integers(0, vocab_size, (batch, context)), options)
                for load in loads:
                    options.progress(f"hop, batch {batch}, context {context}, {load}")
                    tokens = random.integers(0, vocab_size, (options.repeats + 1, _turn(options), batch))
                    with busy_cores() if load == LOADED else nullcontext():
                        found = _measure(peers, tokens)
                    rows += [
                        _row(name, found, options, {"batch": batch, "context": context, "load": load})
                        for name in peers
                    ]
    return rows


def _turn(options: BenchOptions) -> int:
    """Steps of one turn: those that touch what was mapped anew, and those that count."""
    return _WARM_STEPS + options.steps


def _peers(
    stack: ExitStack, directory: Path, options: BenchOptions, transports: Sequence[str], loads: int
) -> dict[str, CellPeer]:
    """A cell for each transport; most of them share one pair of services."""
    grows = loads * (options.repeats + 1) * _turn(options)
    # In one lane, as every transport can.
    setup = options.setup(limits(options.batches, options.contexts, grows))
    services = stack.enter_context(Services(options.threads))
    services.start(transports)
    return {
        name: CellPeer(name, stack.enter_context(services.remote(directory, setup, name)), True)
        for name in transports
    }


def _prefill(
    reference: TransformersPeer, peers: Mapping[str, CellPeer], prompts: IntArray, options: BenchOptions
) -> None:
    logits = {reference.name: reference.prefill(prompts)}
    for name, peer in peers.items():
        peer.enter()
        logits[name] = peer.prefill(prompts)
    expect_close(logits, reference.name, options.dtype)


def _measure(peers: Mapping[str, CellPeer], tokens: IntArray) -> dict[str, list[LayerSeconds]]:
    """Feed tokens [1 + repeats, steps, B] to every peer: its layers, turn by turn."""
    found: dict[str, list[LayerSeconds]] = {name: [] for name in peers}
    for repeat, turn in enumerate(tokens):
        logits = {}
        for name in stats.in_turn(list(peers), repeat):
            peer, layers = peers[name], LayerSeconds()
            peer.enter()
            for row in turn[:_WARM_STEPS]:
                peer.decode(row)
            with watched(peer.cell, layers.add):
                for row in turn[_WARM_STEPS:]:
                    logits[name] = peer.decode(row)
            if repeat:  # the first one warms up
                found[name].append(layers)
        expect_same(logits, next(iter(peers)))
    return found


def _row(
    name: str, found: Mapping[str, Sequence[LayerSeconds]], options: BenchOptions, where: Mapping[str, object]
) -> Row:
    turns = found[name]
    medians = {peer: [statistics.median(turn.all_hops()) for turn in found[peer]] for peer in found}
    together = [value for turn in turns for value in turn.all_hops()]
    return {
        "bench": "hop",
        "transport": name,
        **where,
        "dtype": options.dtype_name,
        "segments": options.segments,
        "threads": options.threads,
        "hop_us_p50": stats.quantile(together, 0.5),
        "hop_us_p90": stats.quantile(together, 0.9),
        "hop_us_p99": stats.quantile(together, 0.99),
        "kernel_us_p50_full": stats.quantile([v for t in turns for v in t.kernels[Kind.FULL]], 0.5),
        "kernel_us_p50_linear": stats.quantile([v for t in turns for v in t.kernels[Kind.LINEAR]], 0.5),
        "ratio_grpc_unary": stats.ratio(medians[UNARY], medians[name]) if UNARY in medians else None,
        "spread": stats.spread(medians[name]),
        "layers_timed": len(together),
        "repeats": options.repeats,
    }
