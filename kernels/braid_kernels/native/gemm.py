"""The matrix product of the C++ kernels by itself: packed weights, and products that share an input."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from braid_kernels.errors import FieldError, InputError
from braid_kernels.native.library import DTYPE_CODES, check_descriptor, dtype_code, library
from braid_kernels.native.pages import LargePages

_VOID, _I32, _I64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64

# Whatever begins at a line has every vector of its layout within one.
_WEIGHTS = LargePages()


class GemmPart(ctypes.Structure):
    """struct GemmPart in cpp/gemm.h, field by field."""

    _fields_ = [
        ("out", _VOID),
        ("row_stride", _I64),
        ("first", _I64),
        ("columns", _I64),
        ("bias", _VOID),
        ("addend", _VOID),
        ("addend_stride", _I64),
    ]


@functools.cache
def gemm_library() -> ctypes.CDLL:
    """The library with the product's interface declared. Raises BuildError."""
    lib = library()
    lib.braid_gemm_part_size.restype = _I64
    lib.braid_gemm.restype = lib.braid_gemm_pack_rows.restype = lib.braid_gemm_pack_gated.restype = None
    for name in ("braid_gemm_packed_bytes", "braid_gemm_packed_gated_bytes"):
        size = getattr(lib, name)
        size.restype, size.argtypes = _I64, [_I64, _I64, _I32]
    lib.braid_gemm_pack_rows.argtypes = [_VOID, _I32, *[_I64] * 5, _VOID]
    lib.braid_gemm_pack_gated.argtypes = [_VOID, _I64, _VOID, _I64, _I32, _I64, _I64, _VOID]
    lib.braid_gemm.argtypes = [_VOID, _I64, _I64, _VOID, _I64, _I64, _I32, _VOID, _I64, _I32]
    check_descriptor(ctypes.sizeof(GemmPart), lib.braid_gemm_part_size(), "GemmPart")
    return lib


@dataclass(frozen=True)
class PackedWeight:
    """A weight [n, k] in the kernels' own layout; `gated`: a gate and an up projection in one."""

    data: Tensor  # uint8
    n: int
    k: int
    dtype: torch.dtype
    gated: bool = False


@dataclass(frozen=True)
class Part:
    """Columns [first, first + out.shape[1]) of a product go to out [m, columns], after bias and addend."""

    out: Tensor
    first: int
    bias: Tensor | None = None  # [columns]
    addend: Tensor | None = None  # [m, columns]; may be `out`


def _rows(name: str, tensor: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    if tensor.dim() != 2 or tensor.shape[1] != columns:
        raise InputError(name, list(tensor.shape), f"must be [rows, {columns}]")
    if tensor.dtype != dtype or not tensor.is_cpu:
        raise InputError(name, f"{tensor.dtype} on {tensor.device}", f"must be {dtype} on the CPU")
    if columns > 1 and tensor.stride(1) != 1:
        raise InputError(name, tensor.stride(), "must have contiguous rows")
    return tensor


def pack(*weights: Tensor, memory: LargePages = _WEIGHTS) -> PackedWeight:
    """Weights [n_i, k] of projections of one input, merged in this order, in memory of the given kind.

    Raises InputError for a shape or dtype that does not fit, FieldError for an empty weight.
    """
    if not weights:
        raise FieldError("weights", len(weights), "must be at least one")
    k, dtype = weights[0].shape[-1], weights[0].dtype
    n = sum(weight.shape[0] for weight in weights)
    if n < 1 or k < 1:
        raise FieldError("weights", [n, k], "must have at least one row and one column")
    code, lib = dtype_code("weight", weights[0]), gemm_library()
    data = memory.take(lib.braid_gemm_packed_bytes(n, k, code))
    first = 0
    for weight in weights:
        rows = _rows("weight", weight, k, dtype)
        size, stride = rows.shape[0], rows.stride(0)
        lib.braid_gemm_pack_rows(rows.data_ptr(), code, stride, first, size, n, k, data.data_ptr())
        first += size
    return PackedWeight(data, n, k, dtype)


def pack_gated(gate: Tensor, up: Tensor) -> PackedWeight:
    """gate, up [n, k] for silu(x gate^T) * (x up^T). Raises InputError, FieldError."""
    n, k = gate.shape
    if n < 1 or k < 1:
        raise FieldError("gate", [n, k], "must have at least one row and one column")
    code, lib = dtype_code("gate", gate), gemm_library()
    gate, up = _rows("gate", gate, k, gate.dtype), _rows("up", up, k, gate.dtype)
    if up.shape != gate.shape:
        raise InputError("up", list(up.shape), f"must be {list(gate.shape)} as the gate")
    data = _WEIGHTS.take(lib.braid_gemm_packed_gated_bytes(n, k, code))
    lib.braid_gemm_pack_gated(
        gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), code, n, k, data.data_ptr()
    )
    return PackedWeight(data, n, k, gate.dtype, gated=True)


def _part(part: Part, rows: int, weight: PackedWeight) -> GemmPart:
    out = _rows("out", part.out, part.out.shape[-1], weight.dtype)
    columns = out.shape[1]
    if out.shape[0] != rows:
        raise InputError("out", list(out.shape), f"must have {rows} rows")
    if part.first < 0 or part.first + columns > weight.n:
        raise InputError("first", part.first, f"{columns} columns from there must lie within {weight.n}")
    result = GemmPart(out.data_ptr(), out.stride(0), part.first, columns)
    if part.bias is not None:
        if part.bias.shape != (columns,):
            raise InputError("bias", list(part.bias.shape), f"must be [{columns}]")
        result.bias = _rows("bias", part.bias[None], columns, weight.dtype).data_ptr()
    if part.addend is not None:
        addend = _rows("addend", part.addend, columns, weight.dtype)
        if addend.shape[0] != rows:
            raise InputError("addend", list(addend.shape), f"must have {rows} rows")
        result.addend, result.addend_stride = addend.data_ptr(), addend.stride(0)
    return result


class Gemm:
    """A product bound to its tensors: what it reads and writes is checked once, a call is one C call.

    x [m, k] and the parts' tensors are of the weight's dtype, on the CPU, with contiguous rows; no out
    or addend overlaps x. Raises InputError where they are not.
    """

    def __init__(self, x: Tensor, weight: PackedWeight, parts: Sequence[Part]) -> None:
        _rows("x", x, weight.k, weight.dtype)
        rows = x.shape[0]
        self._kept = (x, weight, tuple(parts))
        self._parts = (GemmPart * len(parts))(*(_part(part, rows, weight) for part in parts))
        code = DTYPE_CODES[weight.dtype]
        where = (x.data_ptr(), x.stride(0), rows, weight.data.data_ptr(), weight.n, weight.k, code)
        self._arguments = (*where, ctypes.addressof(self._parts), len(parts), int(weight.gated))
        self._run = gemm_library().braid_gemm

    def __call__(self) -> None:
        self._run(*self._arguments)


def gemm(x: Tensor, weight: PackedWeight, parts: Sequence[Part]) -> None:
    """x [m, k] times the packed weight, each part where it belongs. Raises InputError (see `Gemm`)."""
    Gemm(x, weight, parts)()
