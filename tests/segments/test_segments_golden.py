"""Decode steps with state, through real kernels: captured bodies against the body as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import braid_full_attn.core
import braid_linear_attn.core
import numpy as np
import pytest
import torch
from braid_orchestrator.body import Body
from braid_orchestrator.dispatch import Dispatch
from braid_orchestrator.dispatcher import Dispatcher
from braid_orchestrator.link import EmbeddedLink
from braid_orchestrator.memory import SequenceMemory, Span
from braid_orchestrator.segments.base import SegmentCompiler, SegmentedRole, SegmentsUnavailable
from braid_orchestrator.segments.eager import EagerCompiler
from braid_orchestrator.segments.inductor import InductorCompiler
from braid_orchestrator.segments.native import NativeCompiler
from braid_orchestrator.step import Step
from braid_orchestrator.store import Dtypes, Limits, Store
from braid_wire.arena import ArenaOwner
from braid_wire.attention_host import AttentionHost
from braid_wire.layers import Kind, Mode, Role
from braid_wire.metrics import ProcessMetrics
from checkpoints import QWEN
from toys import LINEAR, Toy, toy
from walks import cut_of, load

STEPS = 200
LIMITS = Limits(max_tokens=16, max_sequences=20, max_context=256, page_size=8, pool_bytes=1 << 27)


@dataclass
class Cell:
    """A body's shared memory, and both services in this process."""

    body: Body
    store: Store
    dispatcher: Dispatcher
    steps: int = 0
    sequences: int = 0

    def sequence(self) -> SequenceMemory:
        """A new one, without tokens."""
        self.sequences += 1
        return SequenceMemory(self.sequences)

    def compile(self, compiler: SegmentCompiler) -> SegmentedRole:
        """The target by a compiler, on the first lane."""
        plan, rows = self.store.plans[Role.TARGET], LIMITS.max_tokens
        return compiler.compile(
            cut_of(self.body.roles[Role.TARGET]),
            lambda layer_id, side: self.store.buffers(plan.layer(layer_id), side, rows),
            rows,
        )

    @contextmanager
    def step(self, memories: list[SequenceMemory], tokens: np.ndarray, mode: Mode) -> Iterator[Step]:
        """A step of the same tokens int64 [n] for each of some sequences."""
        self.steps += 1
        memory = self.store.memory[Role.TARGET]
        spans = [Span(one, tokens, mode) for one in memories]
        staged = memory.stage(spans, self.dispatcher.epoch, self.steps)
        step = self.dispatcher.begin(staged.batch)
        yield step
        step.finish()
        memory.commit(staged)

    def as_it_is(self, memories: list[SequenceMemory], tokens: np.ndarray, mode: Mode) -> torch.Tensor:
        """Logits of all tokens, by the body's modules."""
        with self.step(memories, tokens, mode) as step:
            rows = np.arange(step.batch.num_tokens)
            return self.body.target(step.batch, step.attend, rows).logits

    def captured(
        self, role: SegmentedRole, memories: list[SequenceMemory], tokens: np.ndarray, mode: Mode
    ) -> torch.Tensor:
        """The same by its segments."""
        with self.step(memories, tokens, mode) as step:
            role.start(torch.from_numpy(step.batch.input_ids), torch.from_numpy(step.batch.positions))
            for segment in role.segments:
                role.run(segment.index)
                for call in segment.calls:
                    step.run(call.layer_id, call.side)
            return role.logits(torch.arange(step.batch.num_tokens))


@contextmanager
def running(body: Body, directory: Path) -> Iterator[Cell]:
    """A cell of a body."""
    owner = ArenaOwner(directory / "arenas.sock")
    store = Store(owner, body.plans, body.take_params(), LIMITS, Dtypes())
    cores = {Kind.FULL: braid_full_attn.core, Kind.LINEAR: braid_linear_attn.core}
    links = {
        kind: EmbeddedLink(kind, AttentionHost(core.load("auto", 1), ProcessMetrics(kind.value, "test")))
        for kind, core in cores.items()
    }
    dispatcher = Dispatcher(store, links, Dispatch.WALK, ProcessMetrics("orchestrator", "test"))
    dispatcher.connect()
    try:
        yield Cell(body, store, dispatcher)
    finally:
        dispatcher.close()
        store.close()
        owner.close()


def worst(cell: Cell, role: SegmentedRole, steps: int = STEPS) -> float:
    """Largest difference of a logit: the prompts of two sequences in chunks, then their tokens, one at a
    time; in the second half, of the first sequence alone."""
    random = np.random.default_rng(0)
    ours, theirs = ([cell.sequence() for _ in range(2)] for _ in range(2))
    error = 0.0
    for number in range(steps + 2):
        tokens = random.integers(0, 90, 7 if number < 2 else 1)
        mode = Mode.EXTEND if number < 2 else Mode.DECODE
        count = 2 if number < steps // 2 else 1
        wanted = cell.as_it_is(theirs[:count], tokens, mode)
        found = cell.captured(role, ours[:count], tokens, mode)
        error = max(error, float((found - wanted).abs().nan_to_num(nan=float("inf")).max()))
    return error


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cell]:
    """A small hybrid: three linear layers and a full one."""
    body = load(QWEN[2].save(tmp_path_factory.mktemp("model")))
    with running(body, tmp_path_factory.mktemp("cell")) as found:
        yield found


@pytest.fixture
def toy_cell(tmp_path: Path) -> Iterator[Cell]:
    """A body of a few lines with one layer that has a state, so that little is compiled."""

    def walk(model: Toy, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        rows = model.embedding(ids) + positions.unsqueeze(-1) * 0.01
        return rows + torch.tanh(model.projection(model.call(0, torch.tanh(rows)) / 20)) * model.scale

    decay = torch.full((LINEAR.num_heads,), -0.1)
    body = Body(toy(walk, Kind.LINEAR), None, {(Role.TARGET, 0): {"log_decay": decay}})
    with running(body, tmp_path) as found:
        yield found


def test_segments_run_by_operators_give_the_same_bits(cell: Cell) -> None:
    assert worst(cell, cell.compile(EagerCompiler())) == 0


def test_native_segments(cell: Cell) -> None:
    try:
        role = cell.compile(NativeCompiler())
    except SegmentsUnavailable as error:
        pytest.skip(error.message)
    assert worst(cell, role) <= 2e-5


@pytest.mark.slow
def test_segments_of_torch_compile(toy_cell: Cell) -> None:
    compiler = InductorCompiler()
    assert worst(toy_cell, toy_cell.compile(compiler)) <= 1e-5
    assert compiler.compiled == 2 * 3  # for one token and for more: both segments, and the head


def test_a_lost_state_would_be_seen(cell: Cell) -> None:
    """The comparison is of sequences that remember: without its first tokens one gives other logits."""
    first, second = cell.sequence(), cell.sequence()
    tokens = np.arange(5)
    cell.as_it_is([first], tokens, Mode.EXTEND)
    found = cell.as_it_is([first], tokens[:1], Mode.DECODE)
    assert (found - cell.as_it_is([second], tokens[:1], Mode.DECODE)).abs().max() > 1e-3
