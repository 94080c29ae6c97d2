"""Walks: steps in order, failures that close a step and not the stream, peers that leave."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import grpc
import pytest
from braid.v1 import attention_pb2 as pb
from braid_wire import errors
from braid_wire.layers import Kind, Role
from service_harness import PATIENCE_S, Cell, Sent, Work, assert_status, changed

KINDS = (Kind.FULL, Kind.LINEAR)


@dataclass
class Stream:
    """A walk that is driven message by message."""

    cell: Cell
    kind: Kind
    requests: queue.SimpleQueue[pb.WalkRequest | None] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        self.call = self.cell.services[self.kind].stub.Walk(iter(self.requests.get, None), timeout=PATIENCE_S)

    def ask(self, request: pb.WalkRequest) -> pb.WalkResponse:
        self.requests.put(request)
        response: pb.WalkResponse = next(self.call)
        return response

    def open(self, sent: Sent, works: list[Work]) -> pb.WalkResponse:
        return self.ask(self.cell.open_request(sent, works))

    def run(self, sent: Sent, at: int, **changes: int) -> pb.WalkResponse:
        run = pb.RunTicket(step=sent.message.step, lane=sent.message.lane, index=at)
        for name, value in changes.items():
            setattr(run, name, value)
        return self.ask(pb.WalkRequest(run=run))

    def close(self, sent: Sent) -> None:
        self.requests.put(pb.WalkRequest(close=pb.CloseStep(step=sent.message.step, lane=sent.message.lane)))

    def walk(self, sent: Sent) -> None:
        """A whole correct step."""
        works = self.cell.all_work(self.kind, sent)
        assert self.open(sent, works).HasField("opened")
        for index, work in enumerate(works):
            assert self.run(sent, index).HasField("done")
            self.cell.check(self.kind, sent, work)
        self.close(sent)


def assert_failed(response: pb.WalkResponse, sent: Sent, error: type[errors.BraidError]) -> None:
    assert response.WhichOneof("message") == "failed", response
    assert (response.step, response.lane) == (sent.message.step, sent.message.lane)
    assert_status(response.failed, error)
    assert type(errors.from_status(response.failed)) is error


@pytest.fixture(params=KINDS, ids=lambda kind: kind.value)
def stream(cell: Cell, request: pytest.FixtureRequest) -> Iterator[Stream]:
    """A walk; when the test is over, it must still take a correct step."""
    stream = Stream(cell, request.param)
    yield stream
    cell.next_epoch()
    cell.shadow = {
        key: {name: t.clone() for name, t in memory.items()} for key, memory in cell.memory.items()
    }
    stream.walk(cell.batch((cell.sequence(3), 4)))
    stream.requests.put(None)
    assert list(stream.call) == []


def reverse(works: list[Work]) -> list[Work]:
    return works[::-1]


def drop_last(works: list[Work]) -> list[Work]:
    return works[:-1]


def none(works: list[Work]) -> list[Work]:
    return []


def repeat_first(works: list[Work]) -> list[Work]:
    return [works[0], *works]


@pytest.mark.parametrize("spoil", [reverse, drop_last, none, repeat_first])
def test_tickets_must_be_the_plan(stream: Stream, spoil: Callable[[list[Work]], list[Work]]) -> None:
    sent = stream.cell.batch((stream.cell.sequence(0), 3))
    works = stream.cell.all_work(stream.kind, sent)
    response = stream.open(sent, spoil(works))
    assert_failed(response, sent, errors.LayerPlanDisputed)
    assert "3" in response.failed.message
    assert_failed(stream.run(sent, 0), sent, errors.StepOrder)


@pytest.mark.parametrize(("layer_id", "error"), [(99, errors.LayerUnknown), (2, errors.LayerMisrouted)])
def test_tickets_of_other_layers(stream: Stream, layer_id: int, error: type[errors.BraidError]) -> None:
    sent = stream.cell.batch((stream.cell.sequence(0), 3))
    works = stream.cell.all_work(stream.kind, sent)
    works[0].ticket.layer_id = layer_id
    assert_failed(stream.open(sent, works), sent, error)


def test_a_bad_view_fails_the_step_before_any_layer_runs(stream: Stream) -> None:
    sent = stream.cell.batch((stream.cell.sequence(0), 3))
    works = stream.cell.all_work(stream.kind, sent)
    works[-1].ticket.output.offset = 1 << 50
    assert_failed(stream.open(sent, works), sent, errors.ViewInvalid)
    assert works[0].output.isnan().all()
    with pytest.raises(grpc.RpcError) as caught:  # nor is its plan kept
        stream.cell.attend(stream.kind, sent, works[0])
    assert type(errors.from_rpc_error(caught.value, "service")) is errors.PlanMissing


def test_a_bad_batch_fails_the_step(stream: Stream) -> None:
    sent = stream.cell.batch((stream.cell.sequence(0), 3))
    changed(sent, "modes", [1])
    assert_failed(stream.open(sent, stream.cell.all_work(stream.kind, sent)), sent, errors.BatchInvalid)


@pytest.mark.parametrize(
    "changes", [{"step": 77}, {"lane": 1}, {"index": 1}, {"index": 9}, {"index": (1 << 32) - 1}], ids=str
)
def test_tickets_run_in_order(stream: Stream, changes: dict[str, int]) -> None:
    sent = stream.cell.batch((stream.cell.sequence(0), 3))
    works = stream.cell.all_work(stream.kind, sent)
    assert stream.open(sent, works).HasField("opened")
    response = stream.run(sent, 0, **changes)
    assert response.WhichOneof("message") == "failed"
    assert_status(response.failed, errors.StepOrder)
    assert works[0].output.isnan().all()


def test_a_ticket_runs_once(stream: Stream) -> None:
    sent = stream.cell.batch((stream.cell.sequence(0), 3))
    works = stream.cell.all_work(stream.kind, sent)
    assert stream.open(sent, works).HasField("opened")
    assert stream.run(sent, 0).HasField("done")
    assert_failed(stream.run(sent, 0), sent, errors.StepOrder)
    assert_failed(stream.run(sent, 1), sent, errors.StepOrder)  # a failed step is closed


def test_no_ticket_runs_behind_the_last(stream: Stream) -> None:
    sent = stream.cell.batch((stream.cell.sequence(0), 3))
    works = stream.cell.all_work(stream.kind, sent)
    stream.open(sent, works)
    for index in range(len(works)):
        assert stream.run(sent, index).HasField("done")
    assert_failed(stream.run(sent, len(works)), sent, errors.StepOrder)


def test_a_closed_step_is_over(stream: Stream) -> None:
    sent = stream.cell.batch((stream.cell.sequence(0), 3))
    works = stream.cell.all_work(stream.kind, sent)
    stream.open(sent, works)
    stream.close(sent)
    stream.close(sent)  # ignored
    assert_failed(stream.run(sent, 0), sent, errors.StepOrder)
    with pytest.raises(grpc.RpcError) as caught:
        stream.cell.attend(stream.kind, sent, works[0])
    assert type(errors.from_rpc_error(caught.value, "service")) is errors.PlanMissing


def test_a_step_opens_once(stream: Stream) -> None:
    sent = stream.cell.batch((stream.cell.sequence(0), 3))
    works = stream.cell.all_work(stream.kind, sent)
    assert stream.open(sent, works).HasField("opened")
    assert_failed(stream.open(sent, works), sent, errors.StepOrder)


def test_no_message(stream: Stream) -> None:
    response = stream.ask(pb.WalkRequest())
    assert_status(response.failed, errors.BatchInvalid)


def test_an_old_epoch(stream: Stream) -> None:
    stream.walk(stream.cell.batch((stream.cell.sequence(0), 3)))
    sent = stream.cell.batch((stream.cell.sequence(1), 3))
    sent.message.epoch -= 1
    works = stream.cell.all_work(stream.kind, sent)
    assert_failed(stream.open(sent, works), sent, errors.EpochStale)


def test_a_new_epoch_fences_open_steps(stream: Stream) -> None:
    """Begun by anyone who may: here by a Plan beside the stream."""
    cell, kind = stream.cell, stream.kind
    sent = cell.batch((cell.sequence(0), 3))
    works = cell.all_work(kind, sent)
    stream.open(sent, works)
    cell.next_epoch()
    cell.plan(kind, cell.batch((cell.sequence(1), 2), lane=1))
    assert_failed(stream.run(sent, 0), sent, errors.EpochStale)
    assert works[0].output.isnan().all()


def test_a_new_plan_ends_the_open_step_of_its_lane(stream: Stream) -> None:
    cell, kind = stream.cell, stream.kind
    sent = cell.batch((cell.sequence(0), 3))
    works = cell.all_work(kind, sent)
    stream.open(sent, works)
    cell.plan(kind, cell.batch((cell.sequence(1), 2)))
    assert_failed(stream.run(sent, 0), sent, errors.StepOrder)
    again = cell.batch((cell.sequence(0), 3))
    stream.open(again, cell.all_work(kind, again))
    stream.walk(cell.batch((cell.sequence(2), 3)))
    assert_failed(stream.run(again, 0), again, errors.StepOrder)


def test_a_new_configuration_fences_open_steps(stream: Stream) -> None:
    cell, kind = stream.cell, stream.kind
    sent = cell.batch((cell.sequence(0), 3))
    works = cell.all_work(kind, sent)
    stream.open(sent, works)
    cell.configure()
    assert_failed(stream.run(sent, 0), sent, errors.EpochStale)
    assert works[0].output.isnan().all()


def test_metadata_changed_after_the_check_reaches_no_kernel(stream: Stream) -> None:
    """Kernels see the copy that was checked: hostile slots and pages written later do nothing."""
    cell, kind = stream.cell, stream.kind
    sent = cell.batch((cell.sequence(0), 3))
    works = cell.all_work(kind, sent)
    stream.open(sent, works)
    kept = {name: tensor.clone() for name, tensor in sent.arrays.items()}
    for tensor in sent.arrays.values():
        tensor.fill_(100 if tensor.dtype.itemsize == 1 else 1 << 30)
    for index in range(len(works)):
        assert stream.run(sent, index).HasField("done")
    sent.arrays = kept
    for work in works:
        cell.check(kind, sent, work)


def test_refusals_of_walks_are_counted(stream: Stream) -> None:
    from test_services_results import _samples

    def count() -> float:
        return dict(_samples(stream.cell, stream.kind)).get('braid_refused_total{reason="STEP_ORDER"}', 0)

    before = count()
    stream.run(stream.cell.batch((stream.cell.sequence(0), 3)), 0)
    assert count() == before + 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_peer_that_leaves_mid_walk(cell: Cell, kind: Kind) -> None:
    stream = Stream(cell, kind)
    sent = cell.batch((cell.sequence(0), 3))
    works = cell.all_work(kind, sent)
    stream.open(sent, works)
    stream.run(sent, 0)
    cell.check(kind, sent, works[0])
    stream.call.cancel()
    with pytest.raises(grpc.RpcError):
        next(stream.call)
    stream.requests.put(None)
    again = Stream(cell, kind)
    again.walk(cell.batch((cell.sequence(1), 3)))
    again.requests.put(None)
    assert list(again.call) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_channel_that_closes_mid_walk(cell: Cell, kind: Kind) -> None:
    connection = grpc.insecure_channel(str(cell.services[kind].ready["address"]))
    walk = connection.stream_stream(
        "/braid.v1.AttentionService/Walk",
        request_serializer=pb.WalkRequest.SerializeToString,
        response_deserializer=pb.WalkResponse.FromString,
    )
    requests: queue.SimpleQueue[pb.WalkRequest | None] = queue.SimpleQueue()
    call = walk(iter(requests.get, None))
    sent = cell.batch((cell.sequence(0), 3))
    requests.put(cell.open_request(sent, cell.all_work(kind, sent)))
    assert next(call).HasField("opened")
    connection.close()
    requests.put(None)


def test_two_streams_keep_their_steps_apart(cell: Cell) -> None:
    target, draft = Stream(cell, Kind.LINEAR), Stream(cell, Kind.LINEAR)
    ours = cell.batch((cell.sequence(0), 3), role=Role.TARGET)
    theirs = cell.batch((cell.sequence(1), 3), role=Role.DRAFT)
    works = cell.all_work(Kind.LINEAR, ours)
    target.open(ours, works)
    assert_failed(draft.run(ours, 0), ours, errors.StepOrder)
    draft.walk(theirs)
    for index in range(len(works)):
        assert target.run(ours, index).HasField("done")
    for stream in (target, draft):
        stream.requests.put(None)
        assert list(stream.call) == []
