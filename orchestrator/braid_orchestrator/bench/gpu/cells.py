"""Checks of whole cells on a card: three processes against one, against the CPU, against transformers."""

from __future__ import annotations

import gc
import json
import os
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from braid.v1 import attention_pb2 as pb
from braid_wire.batch import IntArray
from braid_wire.cuda_arena import context_of
from braid_wire.devices import CPU
from braid_wire.layers import Kind
from transformers import AutoConfig, AutoModelForCausalLM

from braid_orchestrator.bench.cells import Services
from braid_orchestrator.bench.gpu.outcome import Outcome
from braid_orchestrator.bench.model import checkpoint
from braid_orchestrator.bench.peers import CellPeer, Peer, TransformersPeer
from braid_orchestrator.cell import Cell, CellOptions
from braid_orchestrator.overlap import OverlapMode
from braid_orchestrator.store import Limits

DEVICE = torch.device("cuda", 0)
SPLIT, EMBEDDED, EAGER, ALONE = "split", "embedded", "embedded, eager", "transformers"
_STEPS, _TURNS = 20, 5
_LEFT_BEHIND = 256 << 20
_LAYERS = 12
_CONFIG = "slice-qwen3-next.json"


def _setup(
    dtype: torch.dtype, segments: str = "auto", tokens: int = 2048, pool: int = 2 << 30
) -> CellOptions:
    room = Limits(max_tokens=tokens, max_sequences=40, max_context=4096, pool_bytes=pool)
    return CellOptions(
        dtype, limits=room, segments=segments, overlap=OverlapMode.OFF, device=DEVICE, prefix_cache=False
    )


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """As a part of the range of what is right."""
    ours, theirs = ours.float().cpu(), theirs.float().cpu()
    return float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))


def _run(peer: Peer, prompts: IntArray, tokens: IntArray) -> list[torch.Tensor]:
    """Logits of prompts [B, L] and of the decode steps that feed tokens [steps, B]."""
    found = [peer.prefill(prompts).float().cpu()]
    return found + [peer.decode(row).float().cpu() for row in tokens]


def _inputs(batch: int, context: int, steps: int, vocabulary: int) -> tuple[IntArray, IntArray]:
    random = np.random.default_rng(batch)
    return random.integers(0, vocabulary, (batch, context)), random.integers(0, vocabulary, (steps, batch))


def small(outcome: Outcome, work: Path) -> None:
    """fp32 and bf16: every hand-over gives what transformers gives on the CPU."""
    with ExitStack() as stack:
        directory = stack.enter_context(checkpoint(None))
        services = stack.enter_context(Services(1, "cuda"))
        reference = TransformersPeer(directory, torch.float32, CPU)
        prompts, tokens = _inputs(3, 70, 6, 1000)
        right = _run(reference, prompts, tokens)
        for dtype, bound in ((torch.float32, 1e-3), (torch.bfloat16, 5e-2)):
            for segments in ("off", "eager", "cudagraph"):
                for name, place in ((SPLIT, services.remote), (EMBEDDED, services.embedded)):
                    with place(directory, _setup(dtype, segments)) as cell:
                        found = _run(CellPeer(name, cell), prompts, tokens)
                        worst = max(_difference(a, b) for a, b in zip(found, right, strict=True))
                        label = f"{name}, {segments}, {str(dtype)[6:]}"
                        outcome.note(label, worst, "of the range of logits", f"<= {bound}")
                        if name == SPLIT and segments == "off" and dtype == torch.float32:
                            _describe(outcome, cell)


def _describe(outcome: Outcome, cell: Cell) -> None:
    for kind, said in cell.dispatcher.descriptions.items():
        ways = [pb.DeviceHandover.Name(way) for way in said.device_handovers]
        outcome.note(f"{kind.value} service", f"{said.backend}, {', '.join(ways) or 'no device hand-over'}")
        outcome.note(f"{kind.value} service shares the device", pb.DeviceSharing.Name(said.device_sharing))


def kill(outcome: Outcome, work: Path) -> None:
    """Each service is killed between two steps; the next step is replayed, with the same result."""
    context = context_of(0)
    context.make_current()
    torch.zeros(1, device=DEVICE)
    before, _ = context.driver.memory_info()
    with ExitStack() as stack:
        directory = stack.enter_context(checkpoint(None))
        services = stack.enter_context(Services(1, "cuda"))
        prompts, tokens = _inputs(2, 40, 6, 1000)
        with services.remote(directory, _setup(torch.float32, "eager")) as cell:
            peer = CellPeer(SPLIT, cell)
            right = _run(peer, prompts, tokens)
            found = [peer.prefill(prompts).float().cpu()]
            for number, row in enumerate(tokens):
                if number in (2, 4):
                    kind = Kind.LINEAR if number == 2 else Kind.FULL
                    os.kill(cell.dispatcher.descriptions[kind].pid, signal.SIGKILL)
                    began = time.monotonic()
                    found.append(peer.decode(row).float().cpu())
                    outcome.note(f"back after the {kind.value} service died", time.monotonic() - began, "s")
                else:
                    found.append(peer.decode(row).float().cpu())
            worst = max(_difference(a, b) for a, b in zip(found, right, strict=True))
            outcome.note("results of the replays", worst, "of the range of logits", "<= 1e-5")
            outcome.note("steps replayed", float(cell.walker.replays), "", ">= 2")
        del cell, peer
    gc.collect()
    torch.cuda.empty_cache()
    after, _ = context.driver.memory_info()
    outcome.note("memory left behind", float(before - after), "bytes", f"<= {_LEFT_BEHIND}")


@contextmanager
def _slice(work: Path) -> Iterator[Path]:
    """A checkpoint of Qwen3-Next's shape with 12 layers, 32 experts and random weights; made once a run."""
    directory = work / "slice"
    if not (directory / "done").exists():
        directory.mkdir(exist_ok=True)
        config = json.loads(resources.files(__package__).joinpath(_CONFIG).read_text())
        config["num_hidden_layers"] = _LAYERS
        (directory / "config.json").write_text(json.dumps(config))
        torch.manual_seed(0)
        with DEVICE:
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(directory), dtype=torch.bfloat16
            )
        model.save_pretrained(directory)
        del model
        gc.collect()
        torch.cuda.empty_cache()
        (directory / "done").touch()
    yield directory


def slice_of_a_model(outcome: Outcome, work: Path) -> None:
    """Decode at batch 1 and 32, and prefill: three processes, one, one without graphs, transformers."""
    with ExitStack() as stack:
        directory = stack.enter_context(_slice(work))
        services = stack.enter_context(Services(1, "cuda"))
        bf16 = torch.bfloat16
        cells = {
            SPLIT: stack.enter_context(services.remote(directory, _setup(bf16))),
            EMBEDDED: stack.enter_context(services.embedded(directory, _setup(bf16))),
        }
        peers: list[Peer] = [CellPeer(name, cell) for name, cell in cells.items()]
        peers.append(TransformersPeer(directory, bf16, DEVICE))
        layers = sum(len(cells[SPLIT].plans.target.side(side)) for side in (Kind.FULL, Kind.LINEAR))
        vocabulary = cells[SPLIT].plans.vocab_size
        for batch in (1, 32):
            steps = _decode(outcome, peers, batch, vocabulary)
            hop = (steps[SPLIT] - steps[EMBEDDED]) / layers * 1e6
            tax = steps[SPLIT] / steps[EMBEDDED] - 1
            outcome.note(f"batch {batch}: added to a step by each layer", hop, "us", "<= 10")
            outcome.note(f"batch {batch}: split tax", tax, "of a step", "<= 0.05" if batch == 32 else "")
        _prefill(outcome, peers, vocabulary)
        plain = stack.enter_context(services.embedded(directory, _setup(bf16, "eager")))
        eager = _decode(outcome, [CellPeer(EAGER, plain)], 1, vocabulary)[EAGER]
        graphed = outcome_seconds(outcome, f"batch 1: a step, {EMBEDDED}")
        outcome.note("batch 1: graphs against operator by operator", eager / graphed, "times", ">= 2")


def outcome_seconds(outcome: Outcome, name: str) -> float:
    """A figure that was noted, in seconds."""
    return next(float(m.value) for m in outcome.measures if m.name == name) * 1e-3


def _decode(outcome: Outcome, peers: Sequence[Peer], batch: int, vocabulary: int) -> dict[str, float]:
    """Median seconds of a decode step of each peer, taken in turns; their logits must agree."""
    prompts, tokens = _inputs(batch, 512, _STEPS * (_TURNS + 1), vocabulary)
    took: dict[str, list[float]] = {peer.name: [] for peer in peers}
    first: dict[str, torch.Tensor] = {}
    for peer in peers:
        first[peer.name] = peer.prefill(prompts).float().cpu()
    _agree(outcome, f"batch {batch}: prompt", first)
    for turn in range(_TURNS + 1):
        logits = {}
        for peer in peers:
            rows = tokens[turn * _STEPS : (turn + 1) * _STEPS]
            torch.cuda.synchronize()
            began = time.perf_counter()
            for row in rows:
                # A sampler needs the logits: the host waits for them in every step.
                logits[peer.name] = peer.decode(row).float().cpu()
            if turn:
                took[peer.name].append((time.perf_counter() - began) / _STEPS)
    _agree(outcome, f"batch {batch}: decode", logits)
    found = {name: statistics.median(values) for name, values in took.items()}
    for name, value in found.items():
        outcome.note(f"batch {batch}: a step, {name}", value * 1e3, "ms")
    return found


def _prefill(outcome: Outcome, peers: Sequence[Peer], vocabulary: int) -> None:
    prompts, _ = _inputs(1, 2048, 1, vocabulary)
    for peer in peers:
        took = []
        for _ in range(_TURNS):
            torch.cuda.synchronize()
            began = time.perf_counter()
            peer.prefill(prompts).cpu()
            took.append(time.perf_counter() - began)
        rate = prompts.shape[1] / statistics.median(took)
        outcome.note(f"prompt of 2048 tokens, {peer.name}", rate, "tokens a second")


def _agree(outcome: Outcome, label: str, logits: dict[str, torch.Tensor]) -> None:
    """Differences from the last peer's, which is transformers where it takes part."""
    *others, last = logits
    for name in others:
        worst = _difference(logits[name], logits[last])
        outcome.note(f"{label}, {name} against {last}", worst, "of the range of logits", "<= 5e-2")
