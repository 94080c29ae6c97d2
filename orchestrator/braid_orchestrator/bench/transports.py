"""The ways in which a layer can reach its service, each as the links of a cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import grpc
import torch
from braid.v1 import attention_pb2 as pb
from braid.v1 import common_pb2
from braid_wire import rpc
from braid_wire.errors import from_rpc_error
from braid_wire.layers import Kind
from braid_wire.views import ArenaMap

from braid_orchestrator.bench import tensor_bytes
from braid_orchestrator.dispatch import Dispatch
from braid_orchestrator.link import Link, RemoteLink


class MessageLink(RemoteLink):
    """A service as if it had no doorbells: a walk sends a message for each layer."""

    def describe(self, timeout_s: float | None = None) -> pb.DescribeResponse:
        found = super().describe(timeout_s)
        found.doorbells = False
        return found


@dataclass(frozen=True)
class _Tensors:
    """What a ticket names."""

    inputs: Mapping[str, torch.Tensor]
    output: torch.Tensor


class BytesLink(RemoteLink):
    """A service that gets the tensors themselves with every call, and sends the output back."""

    def __init__(self, kind: Kind, address: str, timeout_s: float = 120.0) -> None:
        super().__init__(kind, address, timeout_s)
        self._bytes_channel = rpc.channel(address)
        self._call_bytes = self._bytes_channel.unary_unary(
            f"/{tensor_bytes.SERVICE}/{tensor_bytes.METHOD}",
            request_serializer=tensor_bytes.Request.SerializeToString,
            response_deserializer=tensor_bytes.Response.FromString,
        )
        self._timeout_s = timeout_s
        self._arenas = ArenaMap()
        self._known: dict[bytes, _Tensors] = {}

    def configure(self, request: pb.ConfigureRequest) -> pb.ConfigureResponse:
        self._known.clear()
        self._arenas.close()
        for described in request.arenas:
            self._arenas.map(described)
        return super().configure(request)

    def attend(self, request: pb.AttendRequest) -> pb.AttendResponse:
        tensors = self._tensors(request.ticket)
        message = tensor_bytes.Request(
            layer_id=request.ticket.layer_id,
            inputs=[tensor_bytes.pack(name, tensor) for name, tensor in tensors.inputs.items()],
        )
        try:
            answer = self._call_bytes(message, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.peer) from error
        tensor_bytes.copy_into(answer.output, tensors.output)
        timing = common_pb2.Timing(
            received_ns=answer.received_ns, started_ns=answer.started_ns, finished_ns=answer.finished_ns
        )
        return pb.AttendResponse(timing=timing)

    def close(self) -> None:
        self._known.clear()
        self._arenas.close()
        self._bytes_channel.close()
        super().close()

    def _tensors(self, ticket: pb.Ticket) -> _Tensors:
        """Views are resolved once: what a ticket names is fixed while the configuration is."""
        key = ticket.SerializeToString(deterministic=True)
        if key not in self._known:
            inputs = {name: self._arenas.resolve(view, name) for name, view in ticket.inputs.items()}
            self._known[key] = _Tensors(inputs, self._arenas.resolve(ticket.output, "output"))
        return self._known[key]


@dataclass(frozen=True)
class Transport:
    """One way."""

    title: str
    link: type[RemoteLink]
    dispatch: Dispatch
    own_service: bool = False
    """Whether it needs services of the benchmark's own."""

    def links(self, addresses: Mapping[Kind, str]) -> dict[Kind, Link]:
        """To both services."""
        return {kind: self.link(kind, address) for kind, address in addresses.items()}


DOORBELLS, STREAM, UNARY, BYTES = "doorbells", "grpc_stream", "grpc_unary", "grpc_bytes"

TRANSPORTS: Mapping[str, Transport] = {
    DOORBELLS: Transport("doorbells in shared memory", RemoteLink, Dispatch.WALK),
    STREAM: Transport("messages on a gRPC stream", MessageLink, Dispatch.WALK),
    UNARY: Transport("a gRPC call with handles", RemoteLink, Dispatch.RPC),
    BYTES: Transport("a gRPC call with the tensors' bytes", BytesLink, Dispatch.RPC, own_service=True),
}
