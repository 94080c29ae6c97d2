"""Servers and channels: options, errors as statuses, health, reflection.

One interceptor gives every server of Braid the same manners: a typed error becomes its status with
`ErrorInfo`, bytes that are no message are the caller's mistake and not ours, and a fault of our own
is logged with its traceback and answered as `SERVICE_FAULT`.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from braid_wire.errors import BraidError, RequestInvalid, ServiceFault, to_status

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 256 * 1024 * 1024
OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # A restarted service must be found again at once, not after a back-off of seconds.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.so_reuseport", 0),
)

RefusalHook = Callable[[BraidError], None]


@dataclass(frozen=True)
class Tls:
    """PEM files of a server that listens beyond this machine."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class _Undecodable:
    """Stands for a request whose bytes were no message."""

    error: str


class _Manners(grpc.ServerInterceptor):
    """Wraps every handler so that errors leave it as the error table says."""

    def __init__(self, refused: RefusalHook) -> None:
        self._refused = refused

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = continuation(details)
        if handler is None:
            return None
        deserialize = _guarded(handler.request_deserializer)
        common = {"request_deserializer": deserialize, "response_serializer": handler.response_serializer}
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(self._unary(handler.unary_unary), **common)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(self._stream(handler.unary_stream), **common)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(self._unary(handler.stream_unary), **common)
        return grpc.stream_stream_rpc_method_handler(self._stream(handler.stream_stream), **common)

    def _unary(self, behaviour: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def call(request: Any, context: grpc.ServicerContext) -> Any:
            try:
                return behaviour(_decoded(request), context)
            except BraidError as error:
                self._abort(context, error)
            except Exception as error:
                self._fault(context, error)

        return call

    def _stream(self, behaviour: Callable[[Any, Any], Iterator[Any]]) -> Callable[[Any, Any], Iterator[Any]]:
        def call(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            try:
                yield from behaviour(_decoded(request), context)
            except BraidError as error:
                self._abort(context, error)
            except Exception as error:
                self._fault(context, error)

        return call

    def _abort(self, context: grpc.ServicerContext, error: BraidError) -> NoReturn:
        self._refused(error)
        context.abort_with_status(rpc_status.to_status(to_status(error)))
        raise AssertionError("abort_with_status returns never")

    def _fault(self, context: grpc.ServicerContext, error: Exception) -> NoReturn:
        # An abort made by a handler itself, and a stream whose peer left, are raised as such.
        if context.code() is not None or not context.is_active():
            raise error
        log.exception("a request failed by our own fault")
        self._abort(context, ServiceFault(f"{type(error).__name__}: {error}"))


def _guarded(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def call(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return _Undecodable(str(error))

    return call


def _decoded(request: Any) -> Any:
    """The request, or the stream of requests, without undecodable ones."""
    if isinstance(request, _Undecodable):
        raise RequestInvalid(f"the request is not a message of this method: {request.error}", field="request")
    if isinstance(request, Iterator):
        return _decoded_stream(request)
    return request


def _decoded_stream(requests: Iterator[Any]) -> Iterator[Any]:
    for request in requests:
        yield _decoded(request)


class Server:
    """A gRPC server with health, reflection and the error table.

    Args:
        service_names: full names of the services, for health and reflection.
        workers: threads that run handlers.
        refused: called with the error of every refused request (for `braid_refused_total`).

    Register servicers on `.grpc`, then `listen`, then `start`.
    """

    def __init__(
        self, service_names: Iterable[str], workers: int = 16, refused: RefusalHook = lambda error: None
    ) -> None:
        self._names = tuple(service_names)
        self.grpc = grpc.server(
            futures.ThreadPoolExecutor(workers, thread_name_prefix="grpc"),
            interceptors=(_Manners(refused),),
            options=list(OPTIONS),
        )
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        reflection.enable_server_reflection(
            (*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME), self.grpc
        )
        self.set_ready(False)
        self._health.set("", health_pb2.HealthCheckResponse.SERVING)

    def listen(self, address: str, tls: Tls | None = None) -> str:
        """Bind to `unix:PATH` or `HOST:PORT` and return the address with its real port.

        Raises:
            RequestInvalid: the address is taken or malformed, or lies beyond loopback without TLS.
        """
        if not address.startswith("unix:") and tls is None and not _is_loopback(address):
            raise RequestInvalid(
                f"address {address} is reachable from other machines; that needs TLS (certificate and key)",
                field="address",
                value=address,
            )
        try:
            if tls is None:
                port = self.grpc.add_insecure_port(address)
            else:
                pair = (tls.key.read_bytes(), tls.certificate.read_bytes())
                port = self.grpc.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        except (RuntimeError, OSError) as error:
            raise RequestInvalid(
                f"cannot listen on {address}: {error}", field="address", value=address
            ) from error
        if address.startswith("unix:"):
            path = Path(address.removeprefix("unix:"))
            path.chmod(0o600)
            return address
        host = address.rpartition(":")[0]
        return f"{host}:{port}"

    def start(self) -> None:
        """Begin to serve."""
        self.grpc.start()

    def set_ready(self, ready: bool) -> None:
        """Readiness per service name; liveness ("") stays."""
        status = health_pb2.HealthCheckResponse
        for name in self._names:
            self._health.set(name, status.SERVING if ready else status.NOT_SERVING)

    def stop(self, grace_seconds: float) -> None:
        """Stop taking calls, give running ones `grace_seconds`, and wait for the end."""
        self._health.enter_graceful_shutdown()
        self.grpc.stop(grace_seconds).wait()

    def wait(self) -> None:
        """Block until the server has stopped."""
        self.grpc.wait_for_termination()


def channel(address: str, ca: Path | None = None) -> grpc.Channel:
    """A channel to `unix:PATH` or `HOST:PORT`; with `ca` (PEM), over TLS."""
    if ca is None:
        return grpc.insecure_channel(address, options=list(OPTIONS))
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca.read_bytes()), options=list(OPTIONS))


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError as error:
        raise RequestInvalid(
            f"address {address} is not HOST:PORT or unix:PATH with a literal host",
            field="address",
            value=address,
        ) from error
