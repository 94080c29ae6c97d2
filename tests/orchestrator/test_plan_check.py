"""What a service says it planned is held against the batch before a layer runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import braid_full_attn.core
import numpy as np
import pytest
import torch
from braid.v1 import attention_pb2 as pb
from braid_orchestrator.dispatch import Dispatch
from braid_orchestrator.dispatcher import Dispatcher
from braid_orchestrator.layer_plan.sizes import kv_bytes_per_token
from braid_orchestrator.link import EmbeddedLink, Link
from braid_orchestrator.memory import SequenceMemory, Span
from braid_orchestrator.plan_check import check_summary
from braid_orchestrator.store import Dtypes, Limits, Store
from braid_wire.arena import ArenaOwner
from braid_wire.attention_host import AttentionHost
from braid_wire.batch import MODE_CODES, Batch
from braid_wire.errors import PlanMismatch
from braid_wire.layers import Kind, LayerPlan, LayerSpec, Mla, Mode, Role
from braid_wire.metrics import ProcessMetrics
from cells import embedded_links

NAMES = (70, 71, 72, 73)
CONTEXTS, LENGTHS = (20, 0, 9, 8), (4, 3, 1, 5)
MODES = (Mode.EXTEND, Mode.EXTEND, Mode.DECODE, Mode.EXTEND)

Chunk = tuple[Sequence[int], Sequence[int]]
GOOD: list[Chunk] = [([0, 0, 0, 0], [16, 0, 0, 8]), ([16, 0, 0, 0], [4, 0, 0, 0])]


def batch(lengths: Sequence[int] = LENGTHS) -> Batch:
    tokens = np.zeros(sum(lengths), dtype=np.int64)
    return Batch(
        Role.TARGET,
        1,
        1,
        0,
        tokens,
        tokens,
        np.cumsum([0, *lengths]).astype(np.int32),
        np.array(CONTEXTS, dtype=np.int32),
        np.array([MODE_CODES[mode] for mode in MODES], dtype=np.uint8),
        np.array(NAMES, dtype=np.int64),
    )


def summary(chunks: Sequence[Chunk] = (), rows: int = 0, keys: int = 0) -> pb.PlanSummary:
    total = sum(LENGTHS)
    return pb.PlanSummary(
        qo_indptr_last=total + rows,
        kv_tokens=total + sum(CONTEXTS) + keys,
        prefix_chunks=[pb.PrefixChunk(starts=starts, lengths=lengths) for starts, lengths in chunks],
    )


def test_what_fits_is_accepted() -> None:
    check_summary(summary(), batch(), Kind.FULL, "full")
    check_summary(summary(GOOD), batch(), Kind.FULL, "full")
    # One that does not extend may be cut up too, as long as it is covered.
    check_summary(summary([*GOOD, ([0, 0, 0, 0], [0, 0, 9, 0])]), batch(), Kind.FULL, "full")
    # Nor is anything asked for a span without tokens.
    empty = batch((0, 3, 1, 9))
    check_summary(summary([([0, 0, 0, 0], [0, 0, 0, 8])]), empty, Kind.FULL, "full")


def test_rows_and_keys_must_be_the_batchs() -> None:
    for side in (Kind.FULL, Kind.LINEAR):
        with pytest.raises(PlanMismatch, match="20 query rows for 13 tokens"):
            check_summary(summary(rows=7), batch(), side, "some")
    with pytest.raises(PlanMismatch, match="49 keys"):
        check_summary(summary(keys=-1), batch(), Kind.FULL, "full")
    check_summary(summary(keys=-1), batch(), Kind.LINEAR, "linear")  # a recurrence has no keys


@pytest.mark.parametrize(
    ("chunks", "sequence"),
    [
        pytest.param([([0, 0, 0, 0], [16, 0, 0, 8])], 70, id="the end is missing"),
        pytest.param([([4, 0, 0, 0], [16, 0, 0, 8])], 70, id="the start is missing"),
        pytest.param([GOOD[0], ([12, 0, 0, 0], [8, 0, 0, 0])], 70, id="overlap"),
        pytest.param([GOOD[0], ([17, 0, 0, 0], [3, 0, 0, 0])], 70, id="gap"),
        pytest.param([GOOD[1], GOOD[0]], 70, id="out of order"),
        pytest.param([*GOOD, GOOD[1]], 70, id="twice"),
        pytest.param([*GOOD, ([20, 0, 0, 0], [1, 0, 0, 0])], 70, id="beyond the context"),
        pytest.param([*GOOD, ([0, 0, 0, 0], [0, 1, 0, 0])], 71, id="of a sequence without one"),
        pytest.param([*GOOD, ([0, 0, 0, 0], [0, 0, 3, 0])], 72, id="part of a decode"),
        pytest.param([([0, 0, 0, 0], [16, 0, 0, 0]), GOOD[1]], 73, id="one is forgotten"),
        pytest.param([([0, 0, 0, 0], [2**32 - 1, 0, 0, 8]), GOOD[1]], 70, id="as long as can be said"),
    ],
)
def test_chunks_must_cover_each_prompts_context_once_and_in_order(chunks: list[Chunk], sequence: int) -> None:
    with pytest.raises(PlanMismatch, match=f"sequence {sequence}: ") as caught:
        check_summary(summary(chunks), batch(), Kind.FULL, "full")
    assert caught.value.metadata["sequence"] == str(sequence)


@pytest.mark.parametrize("entries", [0, 3, 5])
def test_chunks_must_have_an_entry_for_each_sequence(entries: int) -> None:
    with pytest.raises(PlanMismatch, match="for 4 sequences"):
        check_summary(summary([([0] * entries, [0] * 4)]), batch(), Kind.FULL, "full")


# The same against services that run mla.

MLA = Mla(
    num_heads=2, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24, kv_lora_rank=64, scale=24**-0.5
)
PLAN = LayerPlan(Role.TARGET, (LayerSpec(0, Kind.FULL, full=MLA), LayerSpec(1, Kind.NONE)))
LIMITS = Limits(max_tokens=64, max_sequences=6, max_context=128, page_size=8, pool_bytes=1 << 22)
CHUNK = 16
PREFIXES = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1)

Links = Mapping[Kind, Link]
MakeDispatcher = Callable[..., Dispatcher]


@contextmanager
def dispatchers(directory: Path) -> Iterator[MakeDispatcher]:
    """Makes configured dispatchers of one mla layer: `make(links, dispatch, option=value, …)`."""
    generator = torch.Generator().manual_seed(5)
    params = {name: torch.randn(shape, generator=generator) / 8 for name, shape in MLA.params().items()}
    made: list[tuple[Dispatcher, ArenaOwner]] = []

    def make(links: Links, dispatch: Dispatch = Dispatch.WALK, **options: str) -> Dispatcher:
        owner = ArenaOwner(directory / f"arenas-{len(made)}")
        store = Store(owner, {Role.TARGET: PLAN}, {(Role.TARGET, 0): params}, LIMITS, Dtypes())
        dispatcher = Dispatcher(
            store, links, dispatch, ProcessMetrics("orchestrator", "test"), "test", options
        )
        dispatcher.connect()
        made.append((dispatcher, owner))
        return dispatcher

    yield make
    for dispatcher, owner in made:
        dispatcher.close()
        dispatcher.store.close()
        owner.close()


@pytest.fixture
def make_dispatcher(tmp_path: Path) -> Iterator[MakeDispatcher]:
    with dispatchers(tmp_path) as make:
        yield make


def step(dispatcher: Dispatcher, number: int, *spans: Span) -> tuple[torch.Tensor, pb.PlanSummary]:
    """One step of the mla layer, its inputs drawn by `number`; output and plan summary."""
    memory = dispatcher.store.memory[Role.TARGET]
    staged = memory.stage(spans, dispatcher.epoch, number)
    try:
        opened = dispatcher.begin(staged.batch)
        generator = torch.Generator().manual_seed(number)
        rows = staged.batch.num_tokens
        inputs = {n: torch.randn(rows, *shape, generator=generator) for n, shape in MLA.inputs().items()}
        out = opened.attend(0, inputs).clone()
        opened.finish()
    except BaseException:
        memory.abort(staged)
        dispatcher.abort()
        raise
    memory.commit(staged)
    return out, opened.summaries[Kind.FULL]


def span(memory: SequenceMemory, length: int, mode: Mode = Mode.EXTEND) -> Span:
    return Span(memory, np.zeros(length, dtype=np.int64), mode)


def two_steps(dispatcher: Dispatcher) -> tuple[torch.Tensor, pb.PlanSummary]:
    """Prefixes of all lengths, then a step that goes on from each of them beside a decode."""
    held = [SequenceMemory(10 + i) for i in range(len(PREFIXES) + 1)]
    step(dispatcher, 1, *(span(m, n) for m, n in zip(held, (*PREFIXES, 6), strict=True) if n))
    return step(dispatcher, 2, *(span(m, 7) for m in held[:-1]), span(held[-1], 1, Mode.DECODE))


@pytest.fixture(scope="module")
def one_shot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[torch.Tensor]:
    """What comes out without chunks, in float64."""
    with dispatchers(tmp_path_factory.mktemp("one-shot")) as make:
        yield two_steps(make(links_with("reference")))[0]


def links_with(backend: str) -> dict[Kind, Link]:
    return {**embedded_links(), Kind.FULL: _full_link(backend)}


def _full_link(backend: str) -> EmbeddedLink:
    core = braid_full_attn.core.load(backend, 1)
    return EmbeddedLink(Kind.FULL, AttentionHost(core, ProcessMetrics("full", "test")))


@pytest.mark.parametrize("dispatch", list(Dispatch))
@pytest.mark.parametrize("backend", ["reference", "cpp", "gather", "direct"])
def test_a_planned_prefix_gives_what_one_shot_gives(
    make_dispatcher: MakeDispatcher,
    one_shot: torch.Tensor,
    backend: str,
    dispatch: Dispatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    budget = str(CHUNK * sum(prefix > 0 for prefix in PREFIXES))
    options = {"prefix_chunk_tokens": budget, "mla_prefill": "expand"}
    dispatcher = make_dispatcher(links_with(backend), dispatch, **options)
    with caplog.at_level(logging.INFO, "braid_orchestrator.dispatcher"):
        out, planned = two_steps(dispatcher)
    assert float((out - one_shot).abs().max()) <= 2e-5
    assert bool(planned.prefix_chunks) == (backend != "direct")
    told = [record.args[1] for record in caplog.records if "no plan option" in record.message]  # type: ignore[index]
    assert sorted(told) == sorted(planned.ignored_options)  # once each, in two steps


class _Liar(EmbeddedLink):
    """A full service that plans something else than it says."""

    def __init__(self, backend: str, lie: Callable[[pb.PlanSummary], object]) -> None:
        host = _full_link(backend)._host  # type: ignore[attr-defined]
        super().__init__(Kind.FULL, host)
        self._lie = lie

    def plan(self, request: pb.PlanRequest) -> pb.PlanResponse:
        answer = super().plan(request)
        if answer.summary.prefix_chunks:
            self._lie(answer.summary)
        return answer


def _shift(planned: pb.PlanSummary) -> None:
    planned.prefix_chunks[1].starts[4] -= 1


def _drop(planned: pb.PlanSummary) -> None:
    del planned.prefix_chunks[-1]


def _repeat(planned: pb.PlanSummary) -> None:
    planned.prefix_chunks.append(planned.prefix_chunks[-1])


@pytest.mark.parametrize("lie", [_shift, _drop, _repeat])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_service_that_lies_about_chunks_is_refused(
    make_dispatcher: MakeDispatcher, backend: str, lie: Callable[[pb.PlanSummary], object]
) -> None:
    links = {**embedded_links(), Kind.FULL: _Liar(backend, lie)}
    dispatcher = make_dispatcher(links, Dispatch.RPC, prefix_chunk_tokens=str(CHUNK * 4))
    with pytest.raises(PlanMismatch, match="sequence 14: "):
        two_steps(dispatcher)


def test_a_page_holds_the_latents_and_no_more(make_dispatcher: MakeDispatcher) -> None:
    dispatcher = make_dispatcher(embedded_links())
    pages = dispatcher.store.memory[Role.TARGET].pages
    assert pages is not None
    per_token = kv_bytes_per_token(PLAN.layer(0), 4)
    assert per_token == (64 + 8) * 4  # [r + dr]; heads by heads it would be 2 (16 + 8 + 24) = 96 wide
    assert pages.unit_bytes == per_token * LIMITS.page_size
