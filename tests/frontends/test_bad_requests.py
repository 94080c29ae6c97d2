"""Whatever is wrong with a request, to either service of a cell: a typed error, and nothing is held."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from braid.v1 import orchestrator_pb2 as own
from braid.v1 import orchestrator_pb2_grpc
from braid_orchestrator.client import Client
from braid_orchestrator.frontends.vllm_engine import SERVICE_NAME
from braid_orchestrator.servicer import SERVICE_NAME as NATIVE_NAME
from braid_wire.errors import BraidError, PoolExhausted, RequestInvalid, from_rpc_error
from braid_wire.rpc import MAX_MESSAGE_BYTES
from front_harness import ENDLESS, LIMITS, Front
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

GOOD = [5, 6, 7]
TOO_LONG = [9] * (LIMITS.max_context + 1)
NEWER = b"\xa2\x06\x01x"
"""Field 100, a string."""
GARBAGE = (b"\xff" * 40, b"\x0a\xff\xff\xff\xff\x0f", b"GET / HTTP/1.1\r\n\r\n")
METHODS = (f"/{NATIVE_NAME}/Generate", f"/{SERVICE_NAME}/Generate", f"/{NATIVE_NAME}/Score")

Send = Callable[[Front, list[int], dict[str, Any]], object]


def to_own(front: Front, prompt: list[int], sampling: dict[str, Any]) -> object:
    request = own.GenerateRequest(
        tokens=own.TokenIds(ids=prompt), sampling=own.SamplingParams(**sampling), max_tokens=4
    )
    return list(orchestrator_pb2_grpc.OrchestratorStub(front.channel).Generate(request))


def to_vllm(front: Front, prompt: list[int], sampling: dict[str, Any]) -> object:
    return list(front.generate(prompt, max_tokens=4, **sampling))


def to_vllm_stream(front: Front, prompt: list[int], sampling: dict[str, Any]) -> object:
    return list(front.generate(prompt, stream=True, max_tokens=4, **sampling))


SENDS = pytest.mark.parametrize("send", [to_own, to_vllm, to_vllm_stream])


@pytest.fixture(autouse=True)
def lives_on(front: Front) -> Iterator[None]:
    """A good request has its answer afterwards, and nothing is held."""
    yield
    assert front.complete(GOOD, max_tokens=1).completion_tokens == 1


def error_of(call: Callable[[], object]) -> tuple[grpc.StatusCode, BraidError]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), from_rpc_error(caught.value, "the cell")


@SENDS
@pytest.mark.parametrize(
    ("prompt", "sampling", "field"),
    [
        ([], {}, "prompt"),
        ([2048], {}, "prompt"),
        ([5, 2**31], {}, "prompt"),
        (GOOD, {"temperature": math.nan}, "temperature"),
        (GOOD, {"temperature": math.inf}, "temperature"),
        (GOOD, {"temperature": -1.0}, "temperature"),
        (GOOD, {"top_p": math.nan}, "top_p"),
        (GOOD, {"min_p": math.nan}, "min_p"),
        (GOOD, {"repetition_penalty": math.nan}, "repetition_penalty"),
        (GOOD, {"presence_penalty": math.nan}, "presence_penalty"),
        (GOOD, {"logit_bias": {5: math.nan}}, "logit_bias"),
        (GOOD, {"logit_bias": {2048: 1.0}}, "logit_bias"),
        (GOOD, {"min_tokens": 5}, "min_tokens"),
    ],
)
def test_bad_values(
    front: Front, send: Send, prompt: list[int], sampling: dict[str, Any], field: str
) -> None:
    code, error = error_of(lambda: send(front, prompt, sampling))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert isinstance(error, RequestInvalid)
    assert error.metadata["field"] == field


@SENDS
def test_a_prompt_over_the_limit(front: Front, send: Send) -> None:
    code, error = error_of(lambda: send(front, TOO_LONG, {}))
    assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert isinstance(error, RequestInvalid | PoolExhausted)
    assert str(LIMITS.max_context) in error.message


@pytest.mark.parametrize("inside", ["", "sampling", "tokens"])
def test_a_field_that_is_newer_than_the_cell(front: Front, inside: str) -> None:
    """To the cell's own service; who sets a field counts on it."""
    request = own.GenerateRequest(tokens=own.TokenIds(ids=GOOD), max_tokens=4)
    holder = getattr(request, inside) if inside else request
    holder.MergeFromString(NEWER)
    stub = orchestrator_pb2_grpc.OrchestratorStub(front.channel)
    code, error = error_of(lambda: list(stub.Generate(request)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert isinstance(error, RequestInvalid)
    assert error.metadata["field"] == (f"{inside}.100" if inside else "100")
    scored = own.ScoreRequest.FromString(own.ScoreRequest().SerializeToString() + NEWER)
    assert isinstance(error_of(lambda: stub.Score(scored))[1], RequestInvalid)
    drained = own.DrainRequest.FromString(NEWER)
    assert isinstance(error_of(lambda: stub.Drain(drained))[1], RequestInvalid)
    assert not front.cell.engine.draining


def test_a_live_id_is_not_taken_twice_by_either_service(front: Front) -> None:
    first = front.generate(GOOD, stream=True, request_id="twice", max_tokens=ENDLESS, ignore_eos=True)
    next(first)
    stub = orchestrator_pb2_grpc.OrchestratorStub(front.channel)
    again = own.GenerateRequest(tokens=own.TokenIds(ids=GOOD), request_id="twice", max_tokens=4)
    code, error = error_of(lambda: list(stub.Generate(again)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.metadata["field"] == "request_id"
    next(first)  # and the first one goes on
    first.cancel()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", GARBAGE)
def test_bytes_that_are_no_message(front: Front, method: str, data: bytes) -> None:
    call = front.channel.unary_stream(method, request_serializer=bytes, response_deserializer=bytes)
    code, error = error_of(lambda: list(call(data, timeout=10)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert isinstance(error, RequestInvalid)


def test_bytes_that_are_no_call(front: Front) -> None:
    host, _, port = front.address.rpartition(":")
    for data in (*GARBAGE, b""):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(data * 100)


@pytest.mark.parametrize("method", METHODS)
def test_a_message_over_the_limit(front: Front, method: str) -> None:
    with grpc.insecure_channel(front.address, [("grpc.max_send_message_length", -1)]) as channel:
        call = channel.unary_stream(method, request_serializer=bytes, response_deserializer=bytes)
        code, error = error_of(lambda: list(call(bytes(MAX_MESSAGE_BYTES + 1), timeout=60)))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert isinstance(error, RequestInvalid)


def test_an_unknown_method(front: Front) -> None:
    for service in (NATIVE_NAME, SERVICE_NAME):
        call = front.channel.unary_unary(f"/{service}/Nothing", bytes, bytes)
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_many_bad_ones_beside_good_ones(front: Front) -> None:
    """Good requests under way notice nothing of bad ones."""
    with Client(front.address) as client:
        wanted = client.complete(GOOD, 40, ignore_eos=True).token_ids
        good = client.generate(GOOD, 40, ignore_eos=True)
        found: list[int] = []
        for number, chunk in enumerate(good):
            found.extend(chunk.token_ids)
            if number % 4 == 0:
                error_of(lambda: to_vllm(front, [2048], {}))
                error_of(lambda: to_own(front, GOOD, {"temperature": math.nan}))
    assert tuple(found) == tuple(wanted)


def test_a_request_without_anything(front: Front) -> None:
    for call in (
        lambda: list(front.stub.Generate(pb.GenerateRequest())),
        lambda: list(orchestrator_pb2_grpc.OrchestratorStub(front.channel).Generate(own.GenerateRequest())),
        lambda: orchestrator_pb2_grpc.OrchestratorStub(front.channel).Score(own.ScoreRequest()),
    ):
        code, error = error_of(call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert isinstance(error, RequestInvalid)
