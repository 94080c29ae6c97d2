"""The table of request fields: complete, and what it says happens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from braid_orchestrator.frontends.vllm_fields import FIELDS, UNSERVED, Use, refuse_unsupported
from braid_wire.errors import RequestInvalid
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["VllmEngine"]
SERVED = [method for method in SERVICE.methods if method.name not in UNSERVED]


def reached(message: Descriptor) -> Iterator[Descriptor]:
    """A request and the messages in it that are read; what lies in a refused field is not."""
    yield message
    for field in message.fields:
        inside = field.message_type
        read = FIELDS[message.name][field.name].use is Use.HANDLED
        if read and inside is not None and not inside.GetOptions().map_entry:
            yield from reached(inside)


def all_reached() -> dict[str, Descriptor]:
    return {message.name: message for method in SERVED for message in reached(method.input_type)}


@pytest.mark.parametrize("method", SERVED, ids=lambda method: method.name)
def test_every_field_of_every_request_is_in_the_table(method: object) -> None:
    for message in reached(method.input_type):  # type: ignore[attr-defined]
        assert set(FIELDS[message.name]) == {field.name for field in message.fields}


def test_the_table_names_nothing_that_is_not_there() -> None:
    assert set(FIELDS) == set(all_reached())
    assert set(UNSERVED) <= {method.name for method in SERVICE.methods}


def test_whatever_is_not_handled_says_why() -> None:
    for fields in FIELDS.values():
        for rule in fields.values():
            assert bool(rule.why) == (rule.use is not Use.HANDLED)


def set_field(holder: Message, field: FieldDescriptor) -> None:
    """Give a field a value that is not its default."""
    text = field.cpp_type == FieldDescriptor.CPPTYPE_STRING
    value = getattr(holder, field.name)
    if field.message_type is None:
        scalar = "{}" if text else 1
        value.append(scalar) if field.is_repeated else setattr(holder, field.name, scalar)
    elif field.message_type.GetOptions().map_entry:
        value[1] = 1
    elif field.is_repeated:
        value.add()
    else:
        value.SetInParent()


def refused() -> list[tuple[str, str]]:
    return [
        (message, field)
        for message, fields in FIELDS.items()
        for field, rule in fields.items()
        if rule.use is Use.REFUSED
    ]


@pytest.mark.parametrize(("message", "field"), refused())
def test_a_refused_field_is_named_with_its_value_and_rule(message: str, field: str) -> None:
    request = pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=[1]))
    holder = {"GenerateRequest": request, "SamplingParams": request.sampling_params}[message]
    set_field(holder, holder.DESCRIPTOR.fields_by_name[field])
    with pytest.raises(RequestInvalid) as caught:
        refuse_unsupported(request)
    assert caught.value.metadata["field"].split(".")[-1] == field
    assert f"{field} is " in caught.value.message
    assert FIELDS[message][field].why in caught.value.message


def test_a_constraint_of_false_is_one_too() -> None:
    with pytest.raises(RequestInvalid, match=r"sampling_params\.json_object is False"):
        refuse_unsupported(pb.GenerateRequest(sampling_params=pb.SamplingParams(json_object=False)))


def test_what_is_handled_or_harmless_passes() -> None:
    for message, fields in FIELDS.items():
        for field in (name for name, rule in fields.items() if rule.use is not Use.REFUSED):
            request = (getattr(pb, message, None) or getattr(common, message))()
            set_field(request, request.DESCRIPTOR.fields_by_name[field])
            assert request.ListFields()
            refuse_unsupported(request)


@pytest.mark.parametrize("inside", [False, True])
def test_a_field_newer_than_the_stubs_is_refused(inside: bool) -> None:
    newer = b"\xa2\x06\x01x"  # field 100, a string
    if inside:
        sampling = pb.SamplingParams.FromString(newer)
        request = pb.GenerateRequest(sampling_params=sampling)
    else:
        request = pb.GenerateRequest.FromString(newer)
    with pytest.raises(RequestInvalid, match="field number 100"):
        refuse_unsupported(request)
