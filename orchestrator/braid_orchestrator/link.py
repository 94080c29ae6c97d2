"""The way to one service: over gRPC to another process, or straight to a host in this one."""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import grpc
from braid.v1 import attention_pb2 as pb
from braid.v1 import attention_pb2_grpc
from braid_wire import rpc
from braid_wire.attention_host import AttentionHost
from braid_wire.attention_walk import Walk as ServedWalk
from braid_wire.errors import BraidError, ServiceLost, StepOrder, StepTimeout, from_rpc_error, from_status
from braid_wire.layers import Kind

Response = TypeVar("Response")


class Walk(ABC):
    """A stream of steps to one service; every message but a close has one answer."""

    on_lost: Callable[[], None] = staticmethod(lambda: None)
    """Called, by any thread, when the service is lost: the walk's own thread may be held by a device that
    waits for it."""

    @abstractmethod
    def send(self, request: pb.WalkRequest) -> None:
        """Send a message."""

    @abstractmethod
    def receive(self) -> pb.WalkResponse:
        """Wait for the answer to the oldest message that has none yet.

        Raises:
            BraidError: the service refused it (the stream lives on), or was lost.
        """

    @abstractmethod
    def check(self) -> None:
        """Raise what the service has said unasked: why a step failed, or that it was lost."""

    @abstractmethod
    def close(self) -> None:
        """End the stream."""

    def call(self, request: pb.WalkRequest) -> pb.WalkResponse:
        """Send a message and wait for its answer; raises as `receive`."""
        self.send(request)
        return self.receive()


class Link(ABC):
    """One service: `kind` is FULL or LINEAR, `name` is for people."""

    remote: bool
    """Whether it is another process, so that handing over a layer takes a message or a doorbell."""

    def __init__(self, kind: Kind, address: str) -> None:
        self.kind = kind
        self.name = kind.value
        self.address = address

    @abstractmethod
    def describe(self, timeout_s: float | None = None) -> pb.DescribeResponse:
        """What the service is and can do; `ServiceLost` or `StepTimeout` where it does not answer.

        Args:
            timeout_s: longest wait; None: as long as for any call.
        """

    @abstractmethod
    def configure(self, request: pb.ConfigureRequest) -> pb.ConfigureResponse:
        """Give it layers, memory and parameters."""

    @abstractmethod
    def plan(self, request: pb.PlanRequest) -> pb.PlanResponse:
        """Check and plan a batch."""

    @abstractmethod
    def attend(self, request: pb.AttendRequest) -> pb.AttendResponse:
        """Run one layer."""

    @abstractmethod
    def walk(self) -> Walk:
        """Open a stream of steps."""

    @abstractmethod
    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the service can be reached; `ServiceLost` after the time."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the service."""


class RemoteLink(Link):
    """A service in another process.

    Args:
        kind: what it should be.
        address: `unix:PATH` or `HOST:PORT`.
        timeout_s: longest time that one call may take.
    """

    remote = True

    def __init__(self, kind: Kind, address: str, timeout_s: float = 120.0) -> None:
        super().__init__(kind, address)
        self._timeout = timeout_s
        self._channel = rpc.channel(address)
        self._stub = attention_pb2_grpc.AttentionServiceStub(self._channel)

    @property
    def peer(self) -> str:
        """Name and address, for errors."""
        return f"the {self.name} service at {self.address}"

    def describe(self, timeout_s: float | None = None) -> pb.DescribeResponse:
        return self._call(self._stub.Describe, pb.DescribeRequest(), timeout_s)

    def configure(self, request: pb.ConfigureRequest) -> pb.ConfigureResponse:
        return self._call(self._stub.Configure, request)

    def plan(self, request: pb.PlanRequest) -> pb.PlanResponse:
        return self._call(self._stub.Plan, request)

    def attend(self, request: pb.AttendRequest) -> pb.AttendResponse:
        return self._call(self._stub.Attend, request)

    def walk(self) -> Walk:
        return _RemoteWalk(self._stub, self.peer, self._timeout)

    def wait_ready(self, timeout_s: float) -> None:
        try:
            self._stub.Describe(pb.DescribeRequest(), timeout=timeout_s, wait_for_ready=True)
        except grpc.RpcError as error:
            raise ServiceLost(
                f"{self.peer} did not come up within {timeout_s:.0f} s: {error.details()}", peer=self.name
            ) from error

    def close(self) -> None:
        self._channel.close()

    def _call(
        self, method: Callable[..., Response], request: object, timeout_s: float | None = None
    ) -> Response:
        try:
            return method(request, timeout=timeout_s or self._timeout)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.peer) from error


class _RemoteWalk(Walk):
    """A stream whose answers a thread of its own collects, so that waiting for one has a limit."""

    def __init__(self, stub: attention_pb2_grpc.AttentionServiceStub, peer: str, timeout_s: float) -> None:
        self._peer = peer
        self._timeout = timeout_s
        self._outbox: queue.SimpleQueue[pb.WalkRequest | None] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[pb.WalkResponse | BraidError] = queue.SimpleQueue()
        self._responses = stub.Walk(iter(self._outbox.get, None))
        threading.Thread(target=self._read, name="walk", daemon=True).start()

    def send(self, request: pb.WalkRequest) -> None:
        self._outbox.put(request)

    def receive(self) -> pb.WalkResponse:
        try:
            return self._take(self._inbox.get(timeout=self._timeout))
        except queue.Empty:
            raise StepTimeout(
                f"{self._peer} said nothing for {self._timeout:.0f} s", peer=self._peer
            ) from None

    def check(self) -> None:
        try:
            self._take(self._inbox.get_nowait())
        except queue.Empty:
            return
        raise StepOrder(f"{self._peer} answered without being asked", peer=self._peer)

    def close(self) -> None:
        self._outbox.put(None)
        self._responses.cancel()

    def _take(self, item: pb.WalkResponse | BraidError) -> pb.WalkResponse:
        if isinstance(item, BraidError):
            self._inbox.put(item)  # a stream that broke stays broken
            raise item
        if item.HasField("failed"):
            raise from_status(item.failed)
        return item

    def _read(self) -> None:
        try:
            for response in self._responses:
                self._inbox.put(response)
            self._inbox.put(ServiceLost(f"{self._peer} ended the walk", peer=self._peer))
        except grpc.RpcError as error:
            self._inbox.put(from_rpc_error(error, self._peer))
        self.on_lost()


class EmbeddedLink(Link):
    """A service's host in this process: the same contract without a process boundary."""

    remote = False

    def __init__(self, kind: Kind, host: AttentionHost) -> None:
        super().__init__(kind, "embedded")
        self._host = host

    def describe(self, timeout_s: float | None = None) -> pb.DescribeResponse:
        return self._host.describe()

    def configure(self, request: pb.ConfigureRequest) -> pb.ConfigureResponse:
        return self._host.configure(request)

    def plan(self, request: pb.PlanRequest) -> pb.PlanResponse:
        return self._host.plan(request)

    def attend(self, request: pb.AttendRequest) -> pb.AttendResponse:
        return self._host.attend(request)

    def walk(self) -> Walk:
        return _EmbeddedWalk(self._host)

    def wait_ready(self, timeout_s: float) -> None:
        return

    def close(self) -> None:
        return


class _EmbeddedWalk(Walk):
    def __init__(self, host: AttentionHost) -> None:
        self._walk = ServedWalk(host)
        self._answers: deque[pb.WalkResponse] = deque()

    def send(self, request: pb.WalkRequest) -> None:
        self._answers.extend(self._walk.handle(request))

    def receive(self) -> pb.WalkResponse:
        if not self._answers:
            raise StepOrder("a walk message that needs an answer had none")
        response = self._answers.popleft()
        if response.HasField("failed"):
            raise from_status(response.failed)
        return response

    def check(self) -> None:
        return

    def close(self) -> None:
        self._walk.close()
