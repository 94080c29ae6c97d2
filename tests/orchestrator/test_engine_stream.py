"""`Orchestrator.Attend`: an engine with a body of its own, over real gRPC and shared memory."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from braid.v1 import common_pb2, orchestrator_pb2_grpc
from braid.v1 import orchestrator_pb2 as pb
from braid_orchestrator import engine_stream
from braid_orchestrator.cell import Cell
from braid_orchestrator.servicer import SERVICE_NAME, OrchestratorServicer
from braid_wire import rpc
from braid_wire.batch import Batch
from braid_wire.errors import from_rpc_error, from_status
from braid_wire.layers import Kind, Role
from braid_wire.views import ArenaMap
from cells import CellMaker
from transformers import PreTrainedModel


class EngineClient:
    """The other end of the stream."""

    def __init__(self, address: str) -> None:
        self._channel = rpc.channel(address)
        self._outbox: queue.SimpleQueue[pb.EngineRequest | None] = queue.SimpleQueue()
        stub = orchestrator_pb2_grpc.OrchestratorStub(self._channel)
        self._responses = stub.Attend(iter(self._outbox.get, None))
        self._arenas = ArenaMap()
        self._tickets: dict[tuple[int, int], common_pb2.TensorView] = {}

    def ask(self, **message: object) -> pb.EngineResponse:
        self._outbox.put(pb.EngineRequest(**message))  # type: ignore[arg-type]
        try:
            response: pb.EngineResponse = next(self._responses)
        except grpc.RpcError as error:
            raise from_rpc_error(error, "cell") from error
        if response.HasField("failed"):
            raise from_status(response.failed)
        return response

    def begin(
        self, spans: Mapping[int, int], role: common_pb2.Role = common_pb2.ROLE_TARGET
    ) -> pb.EngineOpened:
        parts = [pb.EngineSpan(sequence_id=name, num_tokens=count) for name, count in spans.items()]
        opened = self.ask(begin=pb.EngineStep(role=common_pb2.ROLE_TARGET, spans=parts)).opened
        for arena in opened.arenas:
            self._arenas.map(arena)
        self.tickets = {(t.ticket.layer_id, t.side): t.ticket for t in opened.tickets}
        return opened

    def attend(
        self, layer_id: int, inputs: Mapping[str, torch.Tensor], side: Kind | None = None
    ) -> torch.Tensor:
        ticket = next(t for (found, _), t in self.tickets.items() if found == layer_id)
        for name, tensor in inputs.items():
            self._arenas.resolve(ticket.inputs[name], name).copy_(tensor)
        self.ask(layer=pb.EngineLayer(layer_id=layer_id))
        return self._arenas.resolve(ticket.output, "output")

    def close(self) -> None:
        self._outbox.put(None)
        for _ in self._responses:
            pass
        self._channel.close()


@pytest.fixture
def cell(make_cell: CellMaker) -> Cell:
    return make_cell()


@pytest.fixture
def address(cell: Cell, tmp_path: Path) -> Iterator[str]:
    server = rpc.Server([SERVICE_NAME], refused=cell.metrics.refused)
    servicer = OrchestratorServicer(cell, server)
    orchestrator_pb2_grpc.add_OrchestratorServicer_to_server(servicer, server.grpc)
    found = server.listen(f"unix:{tmp_path}/o.sock")
    server.start()
    yield found
    server.stop(0)


@pytest.fixture
def engine(address: str) -> Iterator[EngineClient]:
    client = EngineClient(address)
    yield client
    client.close()


def batch_of(ids: np.ndarray, positions: np.ndarray) -> Batch:
    """What a body of one's own needs of a batch: ids and positions."""
    nothing = np.zeros(1, dtype=np.int32)
    return Batch(Role.TARGET, 0, 0, 0, ids, positions, nothing, nothing, nothing, nothing)


def test_a_body_of_ones_own_gets_the_same_logits(
    cell: Cell, engine: EngineClient, reference: PreTrainedModel
) -> None:
    rows = {11: np.arange(20, 47), 12: np.arange(100, 109)}
    fed = dict.fromkeys(rows, 0)
    found: dict[int, list[torch.Tensor]] = {name: [] for name in rows}
    for counts in ({11: 10, 12: 1}, {11: 16, 12: 7}, {11: 1, 12: 1}):
        opened = engine.begin(counts)
        assert opened.summary.qo_indptr_last == sum(counts.values())
        ids = np.concatenate([rows[n][fed[n] : fed[n] + c] for n, c in counts.items()])
        at = np.concatenate([np.arange(fed[n], fed[n] + c) for n, c in counts.items()])
        logits = cell.body(batch_of(ids, at), engine.attend, np.arange(len(ids)))
        engine.ask(commit=pb.EngineCommit())
        for (name, count), piece in zip(counts.items(), logits.split(list(counts.values())), strict=True):
            found[name].append(piece)
            fed[name] += count
    for name, ids in rows.items():
        with torch.no_grad():
            expected = reference(torch.tensor(ids)[None], use_cache=False).logits[0]
        torch.testing.assert_close(torch.cat(found[name]), expected, atol=2e-4, rtol=0)


def used(cell: Cell) -> int:
    memory = cell.walker.memory(Role.TARGET)
    return (memory.pages.used if memory.pages else 0) + (memory.slots.used if memory.slots else 0)


def test_sequences_are_freed_by_release_and_by_the_end_of_the_stream(cell: Cell, address: str) -> None:
    client = EngineClient(address)
    client.begin({1: 3, 2: 4})
    client.ask(abort=pb.EngineAbort())
    assert used(cell) > 0
    client.ask(release=pb.EngineRelease(sequence_ids=[1, 77]))
    client.close()
    assert used(cell) == 0


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("STEP_ORDER", {"commit": pb.EngineCommit()}),
        ("STEP_ORDER", {"layer": pb.EngineLayer(layer_id=0)}),
        ("BATCH_INVALID", {"begin": pb.EngineStep(spans=[pb.EngineSpan(sequence_id=1, num_tokens=1)])}),
        ("REQUEST_INVALID", {}),
        ("REQUEST_INVALID", {"begin": pb.EngineStep(role=common_pb2.ROLE_TARGET)}),
        ("REQUEST_INVALID", {"begin": pb.EngineStep(role=common_pb2.ROLE_DRAFT)}),
        (
            "REQUEST_INVALID",
            {
                "begin": pb.EngineStep(
                    role=common_pb2.ROLE_TARGET, spans=[pb.EngineSpan(sequence_id=1, num_tokens=500)]
                )
            },
        ),
    ],
)
def test_what_is_wrong_is_refused_and_the_stream_goes_on(
    engine: EngineClient, reason: str, message: dict[str, object]
) -> None:
    with pytest.raises(Exception) as caught:
        engine.ask(**message)
    assert caught.value.reason == reason  # type: ignore[attr-defined]
    assert engine.begin({1: 3}).step > 0


def test_a_refused_layer_forgets_the_step_and_keeps_the_sequence(engine: EngineClient) -> None:
    engine.begin({1: 3})
    with pytest.raises(Exception, match="layer 99"):
        engine.ask(layer=pb.EngineLayer(layer_id=99))
    with pytest.raises(Exception, match="no step is open"):
        engine.ask(commit=pb.EngineCommit())
    opened = engine.begin({1: 3})
    assert opened.summary.kv_tokens == 3  # nothing of the forgotten step counts


def test_silence_inside_a_step_ends_the_stream_and_lets_others_in(
    cell: Cell, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_stream, "IDLE_S", 0.2)
    client = EngineClient(address)
    client.begin({1: 3})
    with pytest.raises(grpc.RpcError) as caught:
        next(client._responses)
    assert from_rpc_error(caught.value, "cell").reason == "STEP_TIMEOUT"
    monkeypatch.undo()  # the other one is not silent, however long it takes
    other = EngineClient(address)
    assert other.begin({1: 2}).step > 0
    other.close()
