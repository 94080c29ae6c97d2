"""Layers go where the plan says, by id; everything else is refused by name."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from braid.v1 import attention_pb2 as pb
from braid_orchestrator.body.base import DispatchPoint
from braid_orchestrator.cell import Cell
from braid_orchestrator.dispatch import Dispatch
from braid_orchestrator.dispatcher import check_coverage
from braid_orchestrator.link import EmbeddedLink, Link
from braid_orchestrator.memory import SequenceMemory, Span
from braid_orchestrator.request import Failed, Finished, Request, Scored
from braid_orchestrator.step import Step
from braid_orchestrator.timings import StepTimes
from braid_wire.attention_host import AttentionHost
from braid_wire.errors import (
    BatchInvalid,
    BraidError,
    LayerMisrouted,
    LayerPlanDisputed,
    LayerUnknown,
    PlanMismatch,
    StepOrder,
    ViewInvalid,
)
from braid_wire.layers import GatedDelta, Gqa, Kind, LayerPlan, LayerSpec, Mode, Role, digest
from braid_wire.metrics import ProcessMetrics
from cells import CellMaker, embedded_links

FULL_ID = 3
LATE_S = 0.3


@pytest.fixture
def cell(make_cell: CellMaker) -> Cell:
    return make_cell()


def inputs(step: Step, cell: Cell, layer_id: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs of one layer."""
    generator = torch.Generator().manual_seed(seed + layer_id)
    spec = cell.plans.target.layer(layer_id)
    geometry = spec.geometry(spec.kind)
    rows = step.batch.num_tokens
    return {name: torch.randn(rows, *shape, generator=generator) for name, shape in geometry.inputs().items()}


def open_step(cell: Cell, tokens: int = 5) -> Iterator[Step]:
    span = Span(SequenceMemory(1), np.arange(tokens, dtype=np.int64), Mode.EXTEND)
    with cell.walker.step(Role.TARGET, [span]) as (_, step):
        yield step
        for spec in cell.plans.target:
            step.attend(spec.layer_id, inputs(step, cell, spec.layer_id))
    cell.walker.memory(Role.TARGET).release(span.memory)


def refused(
    cell: Cell, error: type[BraidError], layer_id: int, tensors: dict[str, torch.Tensor]
) -> BraidError:
    with pytest.raises(error) as caught:
        for step in open_step(cell):
            step.attend(layer_id, tensors or inputs(step, cell, 0))
    for step in open_step(cell):  # the cell lives on
        assert step.batch.num_tokens == 5
    return caught.value


def test_an_unknown_layer_is_refused(cell: Cell) -> None:
    assert refused(cell, LayerUnknown, 17, {}).metadata["layer_id"] == "17"


def test_a_draft_id_without_a_draft_is_refused(cell: Cell) -> None:
    with pytest.raises(LayerUnknown, match="draft"):
        cell.dispatcher.spec(Role.DRAFT, 0)


@pytest.mark.parametrize("layer_id", [0, FULL_ID])
def test_a_full_layer_cannot_be_sent_to_the_linear_service_or_back(cell: Cell, layer_id: int) -> None:
    other = Kind.FULL if cell.plans.target.layer(layer_id).kind is Kind.LINEAR else Kind.LINEAR
    with pytest.raises(LayerMisrouted) as caught:
        for step in open_step(cell):
            step.attend(layer_id, inputs(step, cell, layer_id), side=other)
    assert caught.value.metadata["layer_id"] == str(layer_id)


def test_a_full_layer_with_the_linear_signature_is_refused(cell: Cell) -> None:
    assert refused(cell, ViewInvalid, FULL_ID, {}).metadata["layer_id"] == str(FULL_ID)


def test_wrong_dtype_and_shape_are_refused(cell: Cell) -> None:
    with pytest.raises(ViewInvalid, match="float64"):
        for step in open_step(cell):
            step.attend(0, {k: v.double() for k, v in inputs(step, cell, 0).items()})
    with pytest.raises(ViewInvalid, match="mixed_qkv"):
        for step in open_step(cell):
            step.attend(0, {k: v[:-1] for k, v in inputs(step, cell, 0).items()})


def test_a_layer_that_ran_and_a_step_that_is_short_are_refused(cell: Cell) -> None:
    with pytest.raises(StepOrder, match="ran already"):
        for step in open_step(cell):
            step.attend(0, inputs(step, cell, 0))
            step.attend(0, inputs(step, cell, 0))
    span = Span(SequenceMemory(5), np.arange(3, dtype=np.int64), Mode.EXTEND)
    with pytest.raises(StepOrder, match="have not run"), cell.walker.step(Role.TARGET, [span]) as (_, step):
        step.attend(0, inputs(step, cell, 0))
    assert span.memory.length == 0


def test_a_step_over_the_token_budget_is_refused(cell: Cell) -> None:
    with pytest.raises(BatchInvalid, match="65 tokens"):
        for _ in open_step(cell, tokens=65):
            pytest.fail("the step was opened")


def test_a_layer_reached_outside_a_step_is_refused() -> None:
    with pytest.raises(StepOrder, match="outside a step"):
        DispatchPoint().attend(0, {})


def test_rpc_and_walk_are_bitwise_equal(make_cell: CellMaker) -> None:
    found = []
    for dispatch in Dispatch:
        cell = make_cell(dispatch=dispatch)
        work = Request("r", np.arange(50, dtype=np.int64), chunk=13, decode_tail=4)
        cell.engine.submit(work)
        events = list(work.stream())
        assert not isinstance(events[-1], Failed), events
        assert isinstance(events[-1], Finished)
        found.append(next(event.logits for event in events if isinstance(event, Scored)))
    assert torch.equal(*found)


GQA = Gqa(2, 1, 8, 8, 0.35)
GDN = GatedDelta(1, 2, 8, 8, 4, 0.35)
PLAN = LayerPlan(
    Role.TARGET,
    (
        LayerSpec(0, Kind.LINEAR, linear=GDN),
        LayerSpec(1, Kind.NONE),
        LayerSpec(2, Kind.FULL, full=GQA),
        LayerSpec(3, Kind.PARALLEL, full=GQA, linear=GDN),
    ),
)


def accepted(side: Kind, ids: list[int]) -> pb.AcceptedLayers:
    return pb.AcceptedLayers(layer_ids=ids, digest=digest(PLAN.side(side)))


@pytest.mark.parametrize(
    ("full", "linear", "named"),
    [([2], [0, 3], "[3]"), ([2, 3], [0], "[3]"), ([2, 3], [0, 2, 3], "[2]"), ([3, 2], [0, 3], "[2, 3]")],
    ids=["missing in full", "missing in linear", "doubled", "order"],
)
def test_a_plan_that_is_not_covered_once_names_the_ids(
    full: list[int], linear: list[int], named: str
) -> None:
    check_coverage(PLAN, {Kind.FULL: accepted(Kind.FULL, [2, 3]), Kind.LINEAR: accepted(Kind.LINEAR, [0, 3])})
    answers = {Kind.FULL: accepted(Kind.FULL, full), Kind.LINEAR: accepted(Kind.LINEAR, linear)}
    with pytest.raises(LayerPlanDisputed) as caught:
        check_coverage(PLAN, answers)
    assert caught.value.metadata["layer_ids"] == named


def test_another_digest_is_a_dispute() -> None:
    answers = {Kind.FULL: accepted(Kind.LINEAR, [2, 3]), Kind.LINEAR: accepted(Kind.LINEAR, [0, 3])}
    with pytest.raises(LayerPlanDisputed, match="digest"):
        check_coverage(PLAN, answers)


class _Altered(EmbeddedLink):
    """A service that answers otherwise than the real one would."""

    def __init__(self, link: Link, drop: int | None = None, rows: int = 0) -> None:
        host = link._host  # type: ignore[attr-defined]
        super().__init__(link.kind, host)
        self._drop, self._rows = drop, rows

    def configure(self, request: pb.ConfigureRequest) -> pb.ConfigureResponse:
        answer = super().configure(request)
        if self._drop is not None:
            answer.accepted[0].layer_ids.remove(self._drop)
        return answer

    def plan(self, request: pb.PlanRequest) -> pb.PlanResponse:
        answer = super().plan(request)
        answer.summary.qo_indptr_last += self._rows
        return answer


class _Late(EmbeddedLink):
    """A way whose answers are long on the road."""

    def __init__(self, link: Link) -> None:
        super().__init__(link.kind, link._host)  # type: ignore[attr-defined]

    def attend(self, request: pb.AttendRequest) -> pb.AttendResponse:
        answer = super().attend(request)
        time.sleep(LATE_S)
        return answer


def test_the_way_back_of_a_call_is_a_part_of_its_hop(make_cell: CellMaker) -> None:
    links = dict(embedded_links())
    links[Kind.FULL] = _Late(links[Kind.FULL])
    cell = make_cell(links=links, dispatch=Dispatch.RPC)
    seen: list[StepTimes] = []
    cell.dispatcher.observer = seen.append
    work = Request("r", np.arange(5, dtype=np.int64), chunk=5)
    cell.engine.submit(work)
    assert isinstance(list(work.stream())[-1], Finished)
    layers = [layer for step in seen for layer in step.layers]
    assert {layer.side for layer in layers} == {Kind.FULL, Kind.LINEAR}
    for layer in layers:
        assert (layer.hop_ns >= LATE_S * 1e9) == (layer.side is Kind.FULL)
        assert layer.compute_ns + layer.hop_ns <= layer.taken_ns - layer.posted_ns


def test_a_service_that_disputes_a_layer_stops_start_up(make_cell: CellMaker) -> None:
    links = dict(embedded_links())
    links[Kind.LINEAR] = _Altered(links[Kind.LINEAR], drop=1)
    with pytest.raises(LayerPlanDisputed) as caught:
        make_cell(links=links)
    assert caught.value.metadata["layer_ids"] == "[1]"


def test_a_plan_for_other_rows_stops_the_step(make_cell: CellMaker) -> None:
    links = dict(embedded_links())
    links[Kind.FULL] = _Altered(links[Kind.FULL], rows=7)
    cell = make_cell(links=links, dispatch=Dispatch.RPC)
    with pytest.raises(PlanMismatch) as caught:
        for _ in open_step(cell):
            pytest.fail("the step was opened")
    assert (caught.value.metadata["planned"], caught.value.metadata["tokens"]) == ("12", "5")


def test_services_in_each_others_place_are_refused(make_cell: CellMaker) -> None:
    links = embedded_links()
    swapped: Mapping[Kind, Link] = {Kind.FULL: links[Kind.LINEAR], Kind.LINEAR: links[Kind.FULL]}
    with pytest.raises(LayerPlanDisputed, match="kind"):
        make_cell(links=swapped)


def test_a_backend_without_the_mechanism_stops_start_up_naming_the_layers(make_cell: CellMaker) -> None:
    links = dict(embedded_links())
    core = links[Kind.LINEAR]._host._core  # type: ignore[attr-defined]

    class Without(type(core)):  # type: ignore[misc]
        def __init__(self) -> None:
            self.__dict__.update(core.__dict__)

        def supports(self, *_: object) -> str:
            return "no kernel for gated_delta"

    links[Kind.LINEAR] = EmbeddedLink(Kind.LINEAR, AttentionHost(Without(), ProcessMetrics("linear", "test")))
    with pytest.raises(LayerPlanDisputed) as caught:
        make_cell(links=links)
    assert "target 0, target 1, target 2" in caught.value.message
