"""The full service with each of its backends, as real processes: gqa and mla, with plans and without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from braid.v1 import attention_pb2 as pb
from braid_orchestrator.plan_check import check_summary
from braid_wire import convert, errors
from braid_wire.batch import Batch
from braid_wire.layers import Gqa, Kind, LayerPlan, LayerSpec, Mla, Mode, Role
from service_harness import (
    PAGE_SIZE,
    PATIENCE_S,
    Cell,
    MakeCell,
    Sent,
    Sequence_,
    Service,
    refused,
    start_service,
)

MLA = Mla(num_heads=2, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=10, kv_lora_rank=16, scale=12**-0.5)
GQA = Gqa(num_q_heads=6, num_kv_heads=2, head_dim=8, v_head_dim=12, scale=0.3, sliding_window=5)
PLAN = LayerPlan(
    Role.TARGET,
    (LayerSpec(0, Kind.FULL, full=MLA), LayerSpec(1, Kind.FULL, full=GQA), LayerSpec(2, Kind.NONE)),
)
CHUNK = 2 * PAGE_SIZE
PREFIXES = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1)
CHUNKED = {"prefix_chunk_tokens": str(CHUNK * sum(prefix > 0 for prefix in PREFIXES))}
EXPANDED = {**CHUNKED, "mla_prefill": "expand"}
TOLERANCE = 2e-5


@dataclass(frozen=True)
class Declared:
    """What a backend says of itself, and which of the options it has."""

    planning: int
    chunked_prefix: bool
    ragged: int
    options: frozenset[str]


BACKENDS: Mapping[str, Declared] = {
    "reference": Declared(
        pb.PLANNING_OPTIONAL, True, pb.RAGGED_FORCED_OFF, frozenset({"prefix_chunk_tokens"})
    ),
    "cpp": Declared(pb.PLANNING_OPTIONAL, True, pb.RAGGED_SUPPORTED, frozenset(EXPANDED)),
    "gather": Declared(pb.PLANNING_REQUIRED, True, pb.RAGGED_FORCED_OFF, frozenset({"prefix_chunk_tokens"})),
    "direct": Declared(pb.PLANNING_NONE, False, pb.RAGGED_FORCED_OFF, frozenset()),
}


@pytest.fixture(scope="module", params=sorted(BACKENDS))
def backend(runtime: Path, request: pytest.FixtureRequest) -> Iterator[tuple[str, Service]]:
    service = start_service(Kind.FULL, f"unix:{runtime}/full-{request.param}", "--backend", request.param)
    yield request.param, service
    assert service.stop() == 0


@pytest.fixture
def cell(backend: tuple[str, Service], make_cell: MakeCell) -> Cell:
    cell = make_cell(services={Kind.FULL: backend[1]}, plans={Role.TARGET: PLAN})
    cell.configure()
    return cell


def plan(cell: Cell, sent: Sent, options: Mapping[str, str]) -> pb.PlanSummary:
    """Plan over gRPC, and check the answer as the orchestrator does."""
    request = pb.PlanRequest(batch=sent.message, options=options)
    summary = cell.services[Kind.FULL].stub.Plan(request, timeout=PATIENCE_S).summary
    check_summary(summary, as_batch(sent), Kind.FULL, "full")
    return summary


def as_batch(sent: Sent) -> Batch:
    nothing = np.zeros(sent.tokens, dtype=np.int64)
    arrays = {name: tensor.numpy() for name, tensor in sent.arrays.items()}
    message = sent.message
    role = convert.role_from_pb(message.role)
    return Batch(role, message.epoch, message.step, message.lane, nothing, nothing, **arrays)


def six_sequences() -> list[Sequence_]:
    return [Sequence_(i, list(range(4 * i, 4 * i + 4))) for i in range(len(PREFIXES) + 1)]


def fill(cell: Cell, sequences: list[Sequence_]) -> None:
    """A first step that gives every sequence its prefix, and the last one something to decode from."""
    first = cell.batch(*((s, n) for s, n in zip(sequences, (*PREFIXES, CHUNK + 3), strict=True) if n))
    plan(cell, first, {})
    run(cell, first)


def run(cell: Cell, sent: Sent) -> list[torch.Tensor]:
    """Attend to each layer, within 2e-5 of the reference's one-shot attention; the outputs."""
    outputs = []
    for work in cell.all_work(Kind.FULL, sent):
        cell.attend(Kind.FULL, sent, work)
        expected = cell.expected(Kind.FULL, sent, work)
        torch.testing.assert_close(work.output, expected, rtol=0, atol=TOLERANCE)
        cell.check_memory((Role.TARGET, work.ticket.layer_id, Kind.FULL))
        outputs.append(work.output.clone())
    sent.commit()
    return outputs


def test_it_says_what_it_can(backend: tuple[str, Service]) -> None:
    name, service = backend
    said, declared = service.stub.Describe(pb.DescribeRequest()), BACKENDS[name]
    assert said.backend == name
    assert (said.planning, said.chunked_prefix, said.ragged) == (
        declared.planning,
        declared.chunked_prefix,
        declared.ragged,
    )
    assert list(said.mechanisms) == ["gqa", "mla"]


@pytest.mark.parametrize("options", [{}, CHUNKED, EXPANDED], ids=["none", "chunked", "expanded"])
def test_prefixes_of_all_lengths_beside_a_decode(
    cell: Cell, backend: tuple[str, Service], options: dict[str, str]
) -> None:
    sequences = six_sequences()
    fill(cell, sequences)
    declared = BACKENDS[backend[0]]
    for length in (5, 1):
        parts = [*((s, length) for s in sequences[:-1]), (sequences[-1], 1)]
        sent = cell.batch(*parts, mode=Mode.EXTEND)
        sent.arrays["modes"][-1] = 1  # DECODE
        summary = plan(cell, sent, {**options, "page_order": "any"})
        assert list(summary.ignored_options) == sorted({*options, "page_order"} - declared.options)
        if options and declared.chunked_prefix:
            assert summary.planned and summary.workspace_bytes > 0
            assert {chunk.lengths[-1] for chunk in summary.prefix_chunks} == {0}
            assert max(max(chunk.lengths) for chunk in summary.prefix_chunks) <= CHUNK
        run(cell, sent)


def test_the_same_over_a_walk(cell: Cell) -> None:
    sequences = six_sequences()
    fill(cell, sequences)
    sent = cell.batch(*((s, 4) for s in sequences), mode=Mode.EXTEND)
    works = cell.all_work(Kind.FULL, sent)
    opened = cell.open_request(sent, works)
    opened.open.plan.options.update(EXPANDED)
    runs = [pb.WalkRequest(run=pb.RunTicket(step=sent.message.step, index=i)) for i in range(len(works))]
    answers = list(cell.services[Kind.FULL].stub.Walk(iter([opened, *runs]), timeout=PATIENCE_S))
    assert [answer.WhichOneof("message") for answer in answers] == ["opened", "done", "done"]
    check_summary(answers[0].opened.summary, as_batch(sent), Kind.FULL, "full")
    for work in works:
        expected = cell.expected(Kind.FULL, sent, work)
        torch.testing.assert_close(work.output, expected, rtol=0, atol=TOLERANCE)


def test_a_budget_that_is_none_is_refused_by_those_that_have_one(
    cell: Cell, backend: tuple[str, Service]
) -> None:
    sent = cell.batch((cell.sequence(0), 3))
    request = pb.PlanRequest(batch=sent.message, options={"prefix_chunk_tokens": "many"})
    stub = cell.services[Kind.FULL].stub
    if "prefix_chunk_tokens" not in BACKENDS[backend[0]].options:
        assert list(stub.Plan(request, timeout=PATIENCE_S).summary.ignored_options) == ["prefix_chunk_tokens"]
        return
    with refused(errors.RequestInvalid) as found:
        stub.Plan(request, timeout=PATIENCE_S)
    assert "prefix_chunk_tokens" in found[0].message and "many" in found[0].message
