"""Element types: the one mapping between torch, the wire and the names in configurations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from braid.v1 import common_pb2

from braid_wire.errors import ConfigInvalid, ViewInvalid

_TO_PB: Mapping[torch.dtype, common_pb2.Dtype.ValueType] = {
    torch.float32: common_pb2.DTYPE_FLOAT32,
    torch.bfloat16: common_pb2.DTYPE_BFLOAT16,
    torch.float16: common_pb2.DTYPE_FLOAT16,
    torch.int32: common_pb2.DTYPE_INT32,
    torch.int64: common_pb2.DTYPE_INT64,
    torch.uint8: common_pb2.DTYPE_UINT8,
}
_FROM_PB: Mapping[int, torch.dtype] = {pb: dtype for dtype, pb in _TO_PB.items()}
_NAMES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def to_pb(dtype: torch.dtype) -> common_pb2.Dtype.ValueType:
    """The wire's name of a torch dtype; `ViewInvalid` for one that has none."""
    if dtype not in _TO_PB:
        raise ViewInvalid(f"dtype {dtype} cannot cross the wire", dtype=dtype)
    return _TO_PB[dtype]


def to_pb_all(found: Iterable[torch.dtype]) -> list[common_pb2.Dtype.ValueType]:
    """The wire's names of those dtypes that have one, in the wire's order."""
    return sorted(_TO_PB[dtype] for dtype in found if dtype in _TO_PB)


def from_pb(dtype: int) -> torch.dtype:
    """The torch dtype of a wire value; `ViewInvalid` for an unknown one."""
    if dtype not in _FROM_PB:
        raise ViewInvalid(f"dtype number {dtype} is unknown", dtype=dtype)
    return _FROM_PB[dtype]


def from_name(name: str) -> torch.dtype:
    """The floating dtype that a configuration or option names; `ConfigInvalid` for another word."""
    if name not in _NAMES:
        raise ConfigInvalid(
            f"dtype is {name!r}; it must be one of {', '.join(_NAMES)}", field="dtype", value=name
        )
    return _NAMES[name]


def name_of(dtype: torch.dtype) -> str:
    """The name that people and configurations use."""
    return str(dtype).removeprefix("torch.")
