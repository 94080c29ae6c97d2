"""Checks of tensors against a geometry's signature; shared by all backends."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from braid_kernels.errors import InputError, LayerError
from braid_kernels.geometry import FullGeometry, LinearGeometry, Shape, signature

STATE_DTYPES = (torch.float32, torch.bfloat16)


def dense_inside(tensor: Tensor) -> bool:
    """True where everything below dim 0 is contiguous (dimensions of size 1 have no stride)."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def check_rows(name: str, tensor: Tensor, rows: int, inner: Shape, dtype: torch.dtype | None = None) -> None:
    """Raise InputError unless `tensor` is [rows, *inner] with dense inner dimensions (of `dtype`)."""
    if tensor.shape != (rows, *inner):
        raise InputError(name, tuple(tensor.shape), f"must have shape {(rows, *inner)}")
    if dtype is not None and tensor.dtype != dtype:
        raise InputError(name, tensor.dtype, f"must be {dtype}")
    if not tensor.is_contiguous() and not dense_inside(tensor):
        raise InputError(name, tuple(tensor.stride()), "must be dense below dim 0")


def check_inputs(inputs: Mapping[str, Tensor], rows: int, expected: Mapping[str, Shape]) -> None:
    """Raise InputError unless `inputs` holds exactly the tensors of `expected`, well formed."""
    for name, inner in expected.items():
        tensor = inputs.get(name)
        if tensor is None:
            raise InputError(name, None, f"is missing; expected {', '.join(expected)}")
        check_rows(name, tensor, rows, inner)
    if len(inputs) != len(expected):
        extra = sorted(set(inputs) - set(expected))
        raise InputError(extra[0], "given", f"is no input of this layer; expected {', '.join(expected)}")


def check_params(params: Mapping[str, Tensor], shapes: Mapping[str, Shape], optional: frozenset[str]) -> None:
    """Raise LayerError unless `params` holds exactly the tensors of `shapes` (`optional` may be absent)."""
    for name, shape in shapes.items():
        tensor = params.get(name)
        if tensor is None:
            if name in optional:
                continue
            raise LayerError(f"params[{name}]", None, "is missing")
        if tuple(tensor.shape) != shape:
            raise LayerError(f"params[{name}]", tuple(tensor.shape), f"must have shape {shape}")
        if not tensor.is_floating_point():
            raise LayerError(f"params[{name}]", tensor.dtype, "must be floating point")
    extra = sorted(set(params) - set(shapes))
    if extra:
        raise LayerError(f"params[{extra[0]}]", "given", f"is no parameter here; known: {sorted(shapes)}")


def _check_pool(name: str, pool: Tensor, inner: Shape) -> None:
    if pool.dim() != len(inner) + 1 or tuple(pool.shape[1:]) != inner:
        raise LayerError(name, tuple(pool.shape), f"must have shape [n, {', '.join(map(str, inner))}]")
    if pool.shape[0] < 1:
        raise LayerError(name, tuple(pool.shape), "must hold at least one slot or page")
    if pool.dtype not in STATE_DTYPES:
        raise LayerError(name, pool.dtype, "must be float32 or bfloat16")
    if not dense_inside(pool):
        raise LayerError(name, tuple(pool.stride()), "must be dense below dim 0")


def check_linear_layer(
    geometry: LinearGeometry,
    params: Mapping[str, Tensor],
    state_pool: Tensor | None,
    conv_pool: Tensor | None,
) -> None:
    """Raise LayerError unless the static tensors of a linear layer fit its geometry."""
    sig = signature(geometry)
    if sig.state is None and sig.conv is None:
        raise LayerError("geometry", geometry, "is not a linear mechanism")
    check_params(params, sig.params, sig.optional_params)
    pools = (("state_pool", state_pool, sig.state), ("conv_pool", conv_pool, sig.conv))
    for name, pool, inner in pools:
        if (pool is None) != (inner is None):
            rule = "has none" if inner is None else "needs one"
            raise LayerError(
                name, None if pool is None else tuple(pool.shape), f"{geometry.mechanism} {rule}"
            )
        if pool is not None and inner is not None:
            _check_pool(name, pool, inner)
    if state_pool is not None and conv_pool is not None and conv_pool.shape[0] != state_pool.shape[0]:
        raise LayerError("conv_pool", tuple(conv_pool.shape), f"must have {state_pool.shape[0]} slots")


def check_full_layer(
    geometry: FullGeometry, params: Mapping[str, Tensor], caches: Mapping[str, Tensor]
) -> None:
    """Raise LayerError unless the static tensors of a full layer fit its geometry."""
    sig = signature(geometry)
    if not sig.caches:
        raise LayerError("geometry", geometry, "is not a full mechanism")
    check_params(params, sig.params, sig.optional_params)
    if set(caches) != set(sig.caches):
        raise LayerError("caches", sorted(caches), f"must be exactly {sorted(sig.caches)}")
    first = next(iter(caches.values()))
    for name, inner in sig.caches.items():
        cache = caches[name]
        if cache.dim() != len(inner) + 2:
            raise LayerError(f"caches[{name}]", tuple(cache.shape), "must be [num_pages, page_size, ...]")
        _check_pool(f"caches[{name}]", cache, (cache.shape[1], *inner))
        if cache.shape[1] < 1 or cache.shape[:2] != first.shape[:2] or cache.dtype != first.dtype:
            raise LayerError(
                f"caches[{name}]", tuple(cache.shape), "must agree in page count and size, and dtype"
            )
