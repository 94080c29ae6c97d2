"""The messages of a service as one would write it at first: tensors travel as bytes.

A peer for the benchmarks alone, so its messages are described here and not in the contract.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "braid.bench.TensorBytes"
METHOD = "Attend"

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS: Mapping[str, _Field.Type.ValueType] = {
    "int64": _Field.TYPE_INT64,
    "string": _Field.TYPE_STRING,
    "bytes": _Field.TYPE_BYTES,
}
# Message → field → (type, repeated); a type that is no scalar is another message.
_MESSAGES: Mapping[str, Mapping[str, tuple[str, bool]]] = {
    "Tensor": {
        "name": ("string", False),
        "dtype": ("string", False),
        "shape": ("int64", True),
        "data": ("bytes", False),
    },
    "Request": {"layer_id": ("int64", False), "inputs": ("Tensor", True)},
    "Response": {
        "output": ("Tensor", False),
        "received_ns": ("int64", False),
        "started_ns": ("int64", False),
        "finished_ns": ("int64", False),
    },
}


def _classes() -> dict[str, Any]:
    package = SERVICE.rpartition(".")[0]
    file = descriptor_pb2.FileDescriptorProto(
        name="braid/bench/tensor_bytes.proto", package=package, syntax="proto3"
    )
    for message, fields in _MESSAGES.items():
        described = file.message_type.add(name=message)
        for number, (name, (kind, repeated)) in enumerate(fields.items(), 1):
            label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
            field = described.field.add(name=name, number=number, label=label)
            if kind in _SCALARS:
                field.type = _SCALARS[kind]
            else:
                field.type, field.type_name = _Field.TYPE_MESSAGE, f".{package}.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}"))
        for name in _MESSAGES
    }


_MADE = _classes()
Tensor, Request, Response = (_MADE[name] for name in _MESSAGES)


def pack(name: str, tensor: torch.Tensor) -> Any:
    """A `Tensor` message with a copy of a contiguous tensor."""
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return Tensor(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tensor.shape, data=data)


def unpack(message: Any) -> torch.Tensor:
    """The tensor of a message, without a copy; it must not be written."""
    raw = torch.from_numpy(np.frombuffer(message.data, np.uint8))
    return raw.view(getattr(torch, message.dtype)).reshape(tuple(message.shape))


def copy_into(message: Any, tensor: torch.Tensor) -> None:
    """Write a message's tensor into a contiguous one of the same dtype and shape."""
    tensor.reshape(-1).view(torch.uint8).numpy()[...] = np.frombuffer(message.data, np.uint8)
