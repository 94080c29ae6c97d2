"""Two lanes against one: the same steps in one piece, in halves that hide each other's waiting, and as
the cell itself decides.

The tokens of all three must be the same, bit for bit, and so must the logits that they are chosen from.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from braid_wire.batch import IntArray

from braid_orchestrator.bench import stats
from braid_orchestrator.bench.cells import Services
from braid_orchestrator.bench.check import expect_close, expect_same
from braid_orchestrator.bench.model import checkpoint
from braid_orchestrator.bench.options import BenchOptions, Row
from braid_orchestrator.bench.peers import CellPeer, TransformersPeer
from braid_orchestrator.bench.runs import grows, limits
from braid_orchestrator.bench.watch import watched
from braid_orchestrator.overlap import OverlapMode
from braid_orchestrator.threads import use_threads
from braid_orchestrator.timings import StepTimes

PHASES = ("decode", "prefill")
ONE, TWO, AUTO = "one_lane", "two_lanes", "auto"
# Sequences compared with transformers; the lanes are compared with each other on all.
_CHECKED = 4
_MODES = {ONE: OverlapMode.OFF, TWO: OverlapMode.ON, AUTO: OverlapMode.AUTO}


@dataclass
class _Steps:
    """What was seen of some steps."""

    lanes: int = 0
    """Of the last one."""
    steps_ns: int = 0
    waits_ns: int = 0

    def add(self, times: StepTimes) -> None:
        """One lane; lanes of a step come in their order, and have the same time."""
        self.lanes = times.lane + 1
        if times.lane == 0:
            self.steps_ns += times.finished_ns - times.began_ns
        self.waits_ns += sum(layer.taken_ns - layer.waited_ns for layer in times.layers)


@dataclass
class _Turns:
    """Of one peer."""

    seconds: list[float] = field(default_factory=list)
    steps: _Steps = field(default_factory=_Steps)


def overlap(
    options: BenchOptions, prompts: Sequence[int] = (8,), phases: Sequence[str] = PHASES
) -> list[Row]:
    """Tokens per second in one lane, in two, and as the cell decides.

    Args:
        options: steps, repeats and contexts; its batches decode.
        prompts: how many are prefilled, as the batches of the other phase.
        phases: "decode": greedy steps behind prompts; "prefill": the prompts.

    Raises:
        ServiceFault: tokens or logits differ between lanes, or from transformers.
        ConfigInvalid: this model cannot run in two lanes here; the message says why.
    """
    use_threads(options.threads)
    rows = []
    with ExitStack() as stack:
        options.progress("starting")
        directory = stack.enter_context(checkpoint(options.model))
        room = limits((*options.batches, *prompts), options.contexts, grows(options))
        services = stack.enter_context(Services(options.threads))
        peers = {}
        for name, mode in _MODES.items():
            cell = stack.enter_context(services.remote(directory, options.setup(room, mode)))
            peers[name] = CellPeer(name, cell, shares_services=True)
        reference = TransformersPeer(directory, options.dtype)
        for phase in phases:
            batches, measure = (options.batches, _decode) if phase == "decode" else (prompts, _prefill)
            for context in options.contexts:
                for batch in batches:
                    options.progress(f"overlap, {phase}, batch {batch}, context {context}")
                    given = _prompts(peers[ONE], batch, context)
                    _expect_right(reference, peers[ONE], given[:_CHECKED], options)
                    rows.append(_row(phase, measure(peers, given, options), options, batch, context))
    return rows


def _prompts(peer: CellPeer, batch: int, context: int) -> IntArray:
    random = np.random.default_rng(batch * 100_003 + context)
    return random.integers(0, peer.cell.plans.vocab_size, (batch, context))


def _expect_right(
    reference: TransformersPeer, peer: CellPeer, prompts: IntArray, options: BenchOptions
) -> None:
    peer.enter()
    logits = {reference.name: reference.prefill(prompts), peer.name: peer.prefill(prompts)}
    expect_close(logits, reference.name, options.dtype)
    reference.forget()


def _decode(peers: Mapping[str, CellPeer], prompts: IntArray, options: BenchOptions) -> dict[str, _Turns]:
    """Greedy tokens behind the prompts, turn by turn."""
    found = {name: _Turns() for name in peers}
    logits = {}
    for name, peer in peers.items():
        peer.enter()
        logits[name] = peer.prefill(prompts)
    expect_same(logits, ONE)
    for repeat in range(options.repeats + 1):
        tokens: dict[str, torch.Tensor] = {}
        for name in stats.in_turn(list(peers), repeat):
            steps = _Steps()
            peers[name].enter()
            with watched(peers[name].cell, steps.add):
                took, tokens[name], logits[name] = _greedy(peers[name], logits[name], options.steps)
            if repeat:  # the first one warms up, and finds out which way is faster
                found[name].seconds.append(took)
                found[name].steps = steps
        expect_same(tokens, ONE)
        expect_same(logits, ONE)
    return found


def _greedy(peer: CellPeer, logits: torch.Tensor, steps: int) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Mean seconds of all steps but the first; tokens [1 + steps, B]; the last logits."""
    tokens = []
    began = 0.0
    for step in range(steps + 1):
        tokens.append(logits.argmax(-1))
        logits = peer.decode(tokens[-1].numpy())
        if step == 0:
            began = time.perf_counter()
    return (time.perf_counter() - began) / steps, torch.stack(tokens), logits


def _prefill(peers: Mapping[str, CellPeer], prompts: IntArray, options: BenchOptions) -> dict[str, _Turns]:
    """The prompts, again and again."""
    found = {name: _Turns() for name in peers}
    for peer in peers.values():
        peer.warm_up(prompts)
    for repeat in range(options.repeats):
        logits = {}
        for name in stats.in_turn(list(peers), repeat):
            peer, steps = peers[name], _Steps()
            peer.enter()
            peer.prefill(prompts)  # touches what was mapped anew
            with watched(peer.cell, steps.add):
                began = time.perf_counter()
                logits[name] = peer.prefill(prompts)
                found[name].seconds.append((time.perf_counter() - began) / prompts.shape[1])
            found[name].steps = steps
        expect_same(logits, ONE)
    return found


def _row(phase: str, found: Mapping[str, _Turns], options: BenchOptions, batch: int, context: int) -> Row:
    one = found[ONE].seconds
    row: Row = {
        "bench": "overlap",
        "phase": phase,
        "batch": batch,
        "context": context,
        "dtype": options.dtype_name,
        "segments": options.segments,
        "threads": options.threads,
        "repeats": options.repeats,
    }
    for name, turns in found.items():
        row[f"tokens_per_s_{name}"] = round(batch / statistics.median(turns.seconds), 1)
        row[f"waiting_{name}"] = round(turns.steps.waits_ns / turns.steps.steps_ns, 3)
        row[f"lanes_{name}"] = turns.steps.lanes
        row[f"spread_{name}"] = stats.spread(turns.seconds)
        if name != ONE:
            row[f"ratio_{name}"] = stats.ratio(one, turns.seconds)
    return row
