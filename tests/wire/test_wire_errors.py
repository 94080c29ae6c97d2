"""The error table: every class survives the way through a real server to a client."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from braid_wire import errors
from braid_wire.rpc import Server, channel
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

TABLE = {reason: cls for reason, cls in errors.table().items() if not cls.__module__.startswith("test")}


def raise_error(request: bytes, context: grpc.ServicerContext) -> bytes:
    """Raises what the request names."""
    name = request.decode()
    if name in TABLE:
        raise TABLE[name](f"told of {name}", field="x", value=-1)
    raise ZeroDivisionError(name)


def raise_in_stream(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    """One answer, then the error."""
    for request in requests:
        yield b"first"
        raise_error(request, context)


@pytest.fixture(scope="module")
def refusals() -> list[errors.BraidError]:
    """Errors that the server counted."""
    return []


@pytest.fixture(scope="module")
def connection(
    tmp_path_factory: pytest.TempPathFactory, refusals: list[errors.BraidError]
) -> Iterator[grpc.Channel]:
    """A channel to a server whose methods raise on demand."""
    server = Server(["test.Raises"], refused=refusals.append)
    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(raise_error, request_deserializer=bytes),
        "Stream": grpc.stream_stream_rpc_method_handler(raise_in_stream, request_deserializer=bytes),
    }
    server.grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Raises", handlers),))
    address = server.listen(f"unix:{tmp_path_factory.mktemp('e')}/s")
    server.start()
    with channel(address) as opened:
        yield opened
    server.stop(0)


def check(error: Any, reason: str, cls: type[errors.BraidError]) -> None:
    assert error.code() is cls.code
    status = rpc_status.from_call(error)
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    (detail,) = status.details
    assert detail.Unpack(info) and (info.reason, info.domain) == (reason, "braid")
    typed = errors.from_rpc_error(error, "test")
    assert type(typed) is cls
    assert typed.message == f"told of {reason}"
    assert typed.metadata == {"field": "x", "value": "-1"}


@pytest.mark.parametrize("reason", TABLE)
def test_every_error_survives_the_wire(
    connection: grpc.Channel, refusals: list[errors.BraidError], reason: str
) -> None:
    refusals.clear()
    with pytest.raises(grpc.RpcError) as caught:
        connection.unary_unary("/test.Raises/Unary")(reason.encode(), timeout=60)
    check(caught.value, reason, TABLE[reason])
    stream = connection.stream_stream("/test.Raises/Stream")(iter([reason.encode()]), timeout=60)
    assert next(stream) == b"first"
    with pytest.raises(grpc.RpcError) as caught:
        next(stream)
    check(stream, reason, TABLE[reason])
    assert [error.reason for error in refusals] == [reason, reason]


def test_a_fault_of_our_own(connection: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        connection.unary_unary("/test.Raises/Unary")(b"something", timeout=60)
    typed = errors.from_rpc_error(caught.value, "test")
    assert type(typed) is errors.ServiceFault and "ZeroDivisionError" in typed.message


def test_every_class_has_a_code_and_a_reason_of_its_own() -> None:
    classes = list(TABLE.values())
    assert len({cls.reason for cls in classes}) == len(classes) >= 25
    for cls in classes:
        assert isinstance(cls.code, grpc.StatusCode) and cls.code is not grpc.StatusCode.OK
        assert cls.reason.isupper() and cls.__doc__
    with pytest.raises(TypeError, match="LAYER_UNKNOWN"):
        type("Copy", (errors.BraidError,), {"reason": "LAYER_UNKNOWN"})


def test_statuses_of_others() -> None:
    assert type(errors.from_reason("NEVER_HEARD", "what", {"a": "b"})) is errors.ServiceFault
    plain = status_pb2.Status(code=grpc.StatusCode.NOT_FOUND.value[0], message="no route")
    assert type(errors.from_status(plain)) is errors.ServiceFault
    foreign = errors.to_status(errors.LayerUnknown("x"))
    info = error_details_pb2.ErrorInfo(reason="LAYER_UNKNOWN", domain="somebody.else")
    foreign.details[0].Pack(info)
    assert type(errors.from_status(foreign)) is errors.ServiceFault


def test_a_peer_that_is_not_there(tmp_path_factory: pytest.TempPathFactory) -> None:
    with channel(f"unix:{tmp_path_factory.mktemp('n')}/nobody") as nowhere:
        call = nowhere.unary_unary("/test.Raises/Unary")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=60)
    assert type(errors.from_rpc_error(caught.value, "test")) is errors.ServiceLost


def test_a_peer_that_is_too_slow(connection: grpc.Channel) -> None:
    stream = connection.stream_stream("/test.Raises/Stream")

    silence: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    call = stream(iter(silence.get, b"end"), timeout=0.1)
    with pytest.raises(grpc.RpcError):
        next(call)
    assert type(errors.from_rpc_error(call, "test")) is errors.StepTimeout
    silence.put(b"end")
