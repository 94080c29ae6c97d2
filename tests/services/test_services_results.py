"""What the services compute is what the reference computes, whichever way it is asked for."""

from __future__ import annotations

import contextlib
import math
import queue
import urllib.request
from collections.abc import Iterator

import pytest
import torch
from braid.v1 import attention_pb2 as pb
from braid_full_attn.core import load as load_full
from braid_linear_attn.core import load as load_linear
from braid_wire import convert
from braid_wire.attention_host import AttentionHost
from braid_wire.attention_walk import Walk
from braid_wire.layers import Kind, LayerPlan, Mode, Role
from braid_wire.metrics import ProcessMetrics
from braid_wire.views import ArenaMap
from service_harness import PATIENCE_S, PLANS, Cell, MakeCell, Sent, Work

KINDS = (Kind.FULL, Kind.LINEAR)


def walk(cell: Cell, kind: Kind, steps: list[tuple[Sent, list[Work]]]) -> list[pb.WalkResponse]:
    """Walk steps to their ends on one stream."""
    requests: list[pb.WalkRequest] = []
    for sent, works in steps:
        step, lane = sent.message.step, sent.message.lane
        requests.append(cell.open_request(sent, works))
        requests += [
            pb.WalkRequest(run=pb.RunTicket(step=step, lane=lane, index=index)) for index in range(len(works))
        ]
        requests.append(pb.WalkRequest(close=pb.CloseStep(step=step, lane=lane)))
    return list(cell.services[kind].stub.Walk(iter(requests), timeout=PATIENCE_S))


@pytest.mark.parametrize("kind", KINDS)
def test_attend_and_walk_are_bitwise_equal(cell: Cell, kind: Kind) -> None:
    first, second = cell.sequence(0), cell.sequence(1)
    for parts in (
        [(first, 7)],
        [(first, 1), (second, 5)],
        [(second, 3), (first, 4)],
        [(first, 1), (second, 1)],
    ):
        sent = cell.batch(*parts)
        cell.plan(kind, sent)
        works = cell.all_work(kind, sent)
        for work in works:
            cell.attend(kind, sent, work)
        by_rpc = [work.output.clone() for work in works]
        for work in works:
            work.output.fill_(math.nan)
        responses = walk(cell, kind, [(sent, works)])
        assert [response.WhichOneof("message") for response in responses] == ["opened"] + ["done"] * len(
            works
        )
        assert [response.done.index for response in responses[1:]] == list(range(len(works)))
        for work, output in zip(works, by_rpc, strict=True):
            assert torch.equal(work.output, output)
            cell.check(kind, sent, work)
        sent.commit()


@pytest.mark.parametrize("chunks", [[12], [5, 7], [1] * 12, [4, 1, 7]])
def test_chunks_carry_everything_over(cell: Cell, chunks: list[int]) -> None:
    sequence, other = cell.sequence(0), cell.sequence(1)
    key = (Role.TARGET, 0, Kind.LINEAR)
    inputs = {name: cell.noise(12, *shape) for name, shape in _inputs(cell, key).items()}
    outputs = []
    for length in chunks:
        sent = cell.batch((other, 2), (sequence, length))
        cell.plan(Kind.LINEAR, sent)
        work = cell.work(key, sent.tokens)
        for name, rows in inputs.items():
            work.inputs[name][2:].copy_(rows[sequence.length : sequence.length + length])
        cell.attend(Kind.LINEAR, sent, work)
        cell.check(Kind.LINEAR, sent, work)
        outputs.append(work.output[2:].clone())
        sent.commit()
        other = cell.sequence(1)
    whole = cell.sequence(2)
    sent = cell.batch((whole, 12))
    cell.plan(Kind.LINEAR, sent)
    work = cell.work(key, 12)
    for name, rows in inputs.items():
        work.inputs[name].copy_(rows)
    cell.attend(Kind.LINEAR, sent, work)
    torch.testing.assert_close(torch.cat(outputs), work.output, rtol=1e-4, atol=1e-5)


def _inputs(cell: Cell, key: tuple[Role, int, Kind]) -> dict[str, tuple[int, ...]]:
    role, layer_id, side = key
    return dict(cell.plans[role].layer(layer_id).geometry(side).inputs())


def test_roles_side_by_side(cell: Cell) -> None:
    target, draft = cell.sequence(0), cell.sequence(1)
    for length in (6, 1, 2, 1):
        cell.step((target, length), role=Role.TARGET)
        cell.step((draft, length), role=Role.DRAFT)


def test_roles_and_lanes_are_planned_apart(cell: Cell) -> None:
    sents = [
        cell.batch((cell.sequence(at), 3 + at), role=role, lane=lane)
        for at, (role, lane) in enumerate([(Role.TARGET, 0), (Role.TARGET, 1), (Role.DRAFT, 0)])
    ]
    for kind in KINDS:
        for sent in sents:
            cell.plan(kind, sent)
        for sent in reversed(sents):
            for work in cell.all_work(kind, sent):
                cell.attend(kind, sent, work)
                cell.check(kind, sent, work)


def test_verify_keeps_a_state_after_every_token(cell: Cell) -> None:
    sequence = cell.sequence(0)
    cell.step((sequence, 5))
    sent = cell.step((sequence, 4), mode=Mode.VERIFY, every_state=True)
    assert len(set(sent.arrays["state_out"].tolist())) == 4
    # The third drafted token is rejected: the state after the second is taken up again.
    sequence.length -= 2
    sequence.slot = int(sent.arrays["state_out"][1])
    cell.step((sequence, 1))


def test_empty_spans_and_mixed_modes(cell: Cell) -> None:
    old = cell.sequence(0)
    cell.step((old, 3))
    cell.step((old, 1), (cell.sequence(1), 4), (cell.sequence(2), 1))


def test_two_lanes_on_one_walk(cell: Cell) -> None:
    lanes = [cell.batch((cell.sequence(lane), 4 + lane), lane=lane) for lane in (0, 1)]
    for kind in KINDS:
        works = [cell.all_work(kind, sent) for sent in lanes]
        for at in range(len(works[0])):
            for work in works:
                work[at].output.fill_(math.nan)
        requests = [cell.open_request(sent, work) for sent, work in zip(lanes, works, strict=True)]
        requests += [
            pb.WalkRequest(run=pb.RunTicket(step=sent.message.step, lane=sent.message.lane, index=index))
            for index in range(len(works[0]))
            for sent in lanes
        ]
        responses = list(cell.services[kind].stub.Walk(iter(requests), timeout=PATIENCE_S))
        assert not any(response.HasField("failed") for response in responses)
        for sent, work in zip(lanes, works, strict=True):
            for item in work:
                cell.check_output(kind, sent, item)
        for spec in cell.plans[Role.TARGET].side(kind):
            cell.check_memory((Role.TARGET, spec.layer_id, kind))


def test_walk_answers_each_message_before_the_next(cell: Cell) -> None:
    """As the orchestrator walks: inputs of a layer exist only after the layer before it."""
    sent = cell.batch((cell.sequence(0), 3))
    works = cell.all_work(Kind.LINEAR, sent)
    requests: queue.SimpleQueue[pb.WalkRequest | None] = queue.SimpleQueue()
    stream = cell.services[Kind.LINEAR].stub.Walk(iter(requests.get, None), timeout=PATIENCE_S)
    requests.put(cell.open_request(sent, works))
    assert next(stream).opened.summary.qo_indptr_last == 3
    for index, work in enumerate(works):
        for tensor in work.inputs.values():
            tensor.copy_(cell.noise(*tensor.shape))
        requests.put(pb.WalkRequest(run=pb.RunTicket(step=sent.message.step, index=index)))
        assert next(stream).done.index == index
        cell.check(Kind.LINEAR, sent, work)
    requests.put(None)
    assert list(stream) == []


def test_strided_inputs_and_output(cell: Cell) -> None:
    """Rows of a fused projection are taken as they lie, without a copy."""
    sent = cell.batch((cell.sequence(0), 5))
    cell.plan(Kind.FULL, sent)
    work = cell.work((Role.TARGET, 1, Kind.FULL), 5)
    fused = cell._put("activations", cell.noise(5, 3, 64))
    for at, (name, tensor) in enumerate(work.inputs.items()):
        rows = fused[:, at, : tensor[0].numel()]
        work.inputs[name] = rows.unflatten(1, tensor.shape[1:])
        work.ticket.inputs[name].CopyFrom(cell.view(work.inputs[name]))
    wide = cell._put("activations", torch.full((5, 50), math.nan))
    work.output = wide[:, 3:35].unflatten(1, (4, 8))
    work.ticket.output.CopyFrom(cell.view(work.output))
    cell.attend(Kind.FULL, sent, work)
    cell.check(Kind.FULL, sent, work)
    assert wide[:, :3].isnan().all() and wide[:, 35:].isnan().all()


def test_unknown_options_are_named_and_ignored(cell: Cell) -> None:
    sent = cell.batch((cell.sequence(0), 3))
    for service in cell.services.values():
        response = service.stub.Plan(pb.PlanRequest(batch=sent.message, options={"split_kv": "7"}))
        assert list(response.summary.ignored_options) == ["split_kv"]
        assert response.plan_ns > 0


def test_plan_counts_rows(cell: Cell) -> None:
    sequence = cell.sequence(0)
    cell.step((sequence, 6))
    sent = cell.batch((sequence, 2), (cell.sequence(1), 3))
    for kind in KINDS:
        assert cell.plan(kind, sent).summary.kv_tokens == 6 + 2 + 3


def test_only_the_fields_of_its_kind_are_needed(cell: Cell) -> None:
    for kind, unneeded in ((Kind.FULL, "state_"), (Kind.LINEAR, "page_")):
        sent = cell.batch((cell.sequence(0), 3))
        for name in sent.arrays:
            if name.startswith(unneeded):
                sent.message.ClearField(name)  # type: ignore[arg-type]
        cell.plan(kind, sent)
        for work in cell.all_work(kind, sent):
            cell.attend(kind, sent, work)
            cell.check(kind, sent, work)


def test_a_plan_without_layers_of_a_kind_passes_through(make_cell: MakeCell) -> None:
    target = PLANS[Role.TARGET]
    full_only = LayerPlan(Role.TARGET, tuple(spec for spec in target if spec.kind is not Kind.LINEAR)[:2])
    cell = make_cell(plans={Role.TARGET: full_only})
    cell.configure()
    cell.step((cell.sequence(0), 4))
    sent = cell.batch((cell.sequence(1), 4))
    (opened,) = walk(cell, Kind.LINEAR, [(sent, [])])
    assert opened.opened.summary.qo_indptr_last == 4


@pytest.mark.parametrize("kind", KINDS)
def test_embedded_is_bitwise_equal(cell: Cell, kind: Kind) -> None:
    """The same host in the orchestrator's process, on the orchestrator's own mappings."""
    load = {Kind.FULL: load_full, Kind.LINEAR: load_linear}[kind]
    host = AttentionHost(
        load("auto", threads=1), ProcessMetrics(kind.value, "test"), ArenaMap(cell.arenas.values())
    )
    sequence = cell.sequence(0)
    for length in (6, 1):
        sent = cell.batch((sequence, length))
        cell.plan(kind, sent)
        works = cell.all_work(kind, sent)
        for work in works:
            cell.attend(kind, sent, work)
        by_service = [work.output.clone() for work in works]
        for work in works:
            work.output.fill_(math.nan)
        host.configure(cell.configure_request(kind))
        sent.message.epoch = host.describe().epoch
        with contextlib.closing(Walk(host)) as embedded:
            (opened,) = embedded.handle(cell.open_request(sent, works))
            assert opened.HasField("opened")
            for index, output in enumerate(by_service):
                run = pb.RunTicket(step=sent.message.step, index=index)
                (response,) = embedded.handle(pb.WalkRequest(run=run))
                assert response.HasField("done")
                assert torch.equal(works[index].output, output)
        sent.commit()


def test_describe(cell: Cell) -> None:
    mechanisms = {Kind.FULL: "gqa", Kind.LINEAR: "gated_delta"}
    for kind, service in cell.services.items():
        said = service.stub.Describe(pb.DescribeRequest())
        assert said.kind == convert.KINDS[kind]
        assert said.pid == service.process.pid
        assert mechanisms[kind] in said.mechanisms
        assert list(said.devices) == ["cpu"] and said.dtypes and said.epoch > 0
        assert said.planning and said.ragged and set(said.versions) == {"torch", "grpcio", "braid-attention"}


def test_metrics_count_every_layer(cell: Cell) -> None:
    before = {kind: dict(_samples(cell, kind)) for kind in KINDS}
    cell.step((cell.sequence(0), 3))
    for kind, mechanism in ((Kind.FULL, "gqa"), (Kind.LINEAR, "gated_delta")):
        after = dict(_samples(cell, kind))
        for spec in cell.plans[Role.TARGET].side(kind):
            labels = f'kind="{kind.value}",layer_id="{spec.layer_id}",mechanism="{mechanism}"'
            dispatched = f'braid_layer_dispatch_total{{{labels},mode="extend",role="target"}}'
            assert after[dispatched] == before[kind].get(dispatched, 0) + 1
            for phase in ("queue", "compute"):
                count = f'braid_layer_seconds_count{{{labels},phase="{phase}",role="target"}}'
                assert after[count] == before[kind].get(count, 0) + 1
        assert after["braid_plan_seconds_count"] == before[kind]["braid_plan_seconds_count"] + 1
        assert after["braid_epoch"] == cell.epoch


def _samples(cell: Cell, kind: Kind) -> Iterator[tuple[str, float]]:
    port = cell.services[kind].ready["metrics_port"]
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S).read().decode()
    for line in text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            head, brace, labels = name.partition("{")
            ordered = ",".join(sorted(labels.rstrip("}").split(","))) if brace else ""
            yield (f"{head}{{{ordered}}}" if brace else head), float(value)
