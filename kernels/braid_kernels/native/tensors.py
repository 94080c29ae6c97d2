"""Addresses of tensors for the C++ kernels, and the copies that they point into."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from braid_kernels.backend import LinearLayer
from braid_kernels.errors import LayerError
from braid_kernels.native.library import DTYPE_CODES, dtype_code

MAX_LANES = 16
# Of one layer; what they keep alive is small beside the layer.
_MOST_CALLS = 64


class ConvDesc(ctypes.Structure):
    """struct Conv in cpp/spans.h, field by field."""

    _fields_ = [
        *[(n, ctypes.c_int32) for n in ("channels", "width", "pool_dtype", "spare")],
        ("pool_stride", ctypes.c_int64),
        *[(n, ctypes.c_void_p) for n in ("pool", "weight", "bias")],
    ]


class Kept:
    """Copies of static tensors, kept alive as long as a descriptor points into them."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def floats(self, tensor: Tensor | None, exp: bool = False) -> int | None:
        """Address of a contiguous fp32 copy, one vector longer than the tensor; None for None."""
        if tensor is None:
            return None
        flat = tensor.detach().to("cpu", torch.float64).reshape(-1)
        copy = torch.zeros(flat.shape[0] + MAX_LANES, dtype=torch.float32)
        copy[: flat.shape[0]] = flat.exp() if exp else flat
        self._tensors.append(copy)
        return copy.data_ptr()

    def matrix(self, weight: Tensor) -> Tensor:
        """[rows, columns] in whole vectors: the tensor itself where it is so already, else a padded copy."""
        weight = weight.detach()
        if weight.dtype not in DTYPE_CODES or not weight.is_cpu:
            weight = weight.to("cpu", torch.float32)
        if weight.shape[1] % MAX_LANES or not weight.is_contiguous():
            weight = torch.nn.functional.pad(weight, (0, -weight.shape[1] % MAX_LANES)).contiguous()
        self._tensors.append(weight)
        return weight

    def conv(self, layer: LinearLayer) -> ConvDesc:
        """The convolution of a layer. Raises LayerError for a pool that is not on the CPU."""
        pool, weight = layer.conv, layer.params["conv_weight"]  # weight [C, K]
        on_cpu("conv_pool", pool)
        d = ConvDesc()
        d.channels, d.width = weight.shape
        d.pool, d.pool_dtype, d.pool_stride = pool.data_ptr(), DTYPE_CODES[pool.dtype], pool.stride(0)
        d.weight = self.floats(weight.T)  # [K, C]: channels in the lanes
        d.bias = self.floats(layer.params.get("conv_bias"))
        return d


Arguments = tuple[int | None, ...]


class Calls:
    """Arguments of calls with the very same tensors, which are checked and taken apart once.

    Steps of one size bring the same ones again and again. The tensors are kept alive, so that another one
    is never taken for one of them.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], tuple[tuple[object, ...], Arguments]] = {}

    def find(self, rows: int, *tensors: Tensor | None) -> Arguments | None:
        """The arguments of a call with these tensors and so many rows, if there was one."""
        known = self._known.get((rows, *map(id, tensors)))
        return None if known is None else known[1]

    def keep(
        self, arguments: Sequence[int | None], rows: int, *tensors: Tensor | None
    ) -> tuple[int | None, ...]:
        """Remember the arguments of a call, and give them back."""
        if len(self._known) >= _MOST_CALLS:
            self._known.clear()
        kept = tuple(arguments)
        self._known[(rows, *map(id, tensors))] = tensors, kept
        return kept


def on_cpu(name: str, tensor: Tensor) -> None:
    """Raise LayerError for a static tensor that is not on the CPU."""
    if not tensor.is_cpu:
        raise LayerError(name, tensor.device, "must be on the CPU")


def rows_of(name: str, tensor: Tensor) -> tuple[int, int, int]:
    """Address, elements between rows, dtype code. Raises InputError for a dtype that no kernel takes."""
    return tensor.data_ptr(), tensor.stride(0), dtype_code(name, tensor)
