"""Views: tensors named by arena, offset, dtype, shape and strides, checked before use."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from braid.v1 import common_pb2

from braid_wire import dtypes
from braid_wire.arena import Arena, map_arena
from braid_wire.errors import ArenaUnknown, ViewInvalid

# A view with more axes than any tensor of the contract is garbage; refusing it bounds the work.
_MAX_DIMS = 8
# Steps of one size name the same tensors again and again; this many are remembered.
_REMEMBERED = 4096


def view_of(tensor: torch.Tensor, arena: Arena) -> common_pb2.TensorView:
    """The message that names a tensor of an arena.

    Raises:
        ViewInvalid: the tensor does not lie in the arena.
    """
    # An empty tensor lies nowhere; torch says that its memory is at 0.
    offset = tensor.data_ptr() - arena.memory.data_ptr() if tensor.numel() else 0
    view = common_pb2.TensorView(
        arena_id=arena.arena_id,
        offset=max(offset, 0),
        dtype=dtypes.to_pb(tensor.dtype),
        shape=tensor.shape,
        strides=() if tensor.is_contiguous() else tensor.stride(),
    )
    if (
        offset < 0
        or offset + _extent_bytes(tensor.shape, tensor.stride(), tensor.itemsize) > arena.size_bytes
    ):
        raise ViewInvalid(f"the tensor does not lie in arena {arena.arena_id} ({arena.label})")
    return view


class ArenaMap:
    """The arenas that a process can resolve views in, by id."""

    def __init__(self, arenas: Iterable[Arena] = ()) -> None:
        self._arenas: dict[int, Arena] = {arena.arena_id: arena for arena in arenas}
        self._expected: dict[tuple[bytes, torch.dtype, tuple[int, ...]], torch.Tensor] = {}

    def add(self, arena: Arena) -> None:
        """Make an arena of this process known."""
        self._arenas[arena.arena_id] = arena
        self._expected.clear()

    def map(self, described: common_pb2.Arena) -> Arena:
        """Map an arena of another process, unless it is mapped already."""
        found = self._arenas.get(described.arena_id)
        if found is None:
            found = map_arena(described)
            self._arenas[described.arena_id] = found
        return found

    def close(self) -> None:
        """Give up every mapping."""
        self._expected.clear()
        arenas, self._arenas = self._arenas, {}
        for arena in arenas.values():
            arena.close()

    def resolve(self, view: common_pb2.TensorView, name: str) -> torch.Tensor:
        """The tensor that a view names, without a copy.

        Args:
            view: what the peer sent.
            name: of the field, for the error.

        Raises:
            ArenaUnknown: no such arena here.
            ViewInvalid: dtype unknown, offset unaligned, or not wholly inside the arena.
        """
        arena = self._arenas.get(view.arena_id)
        if arena is None:
            raise ArenaUnknown(
                f"{name} names arena {view.arena_id}, which is not mapped", arena_id=view.arena_id
            )
        dtype = dtypes.from_pb(view.dtype)
        shape, strides = tuple(view.shape), tuple(view.strides) or _contiguous(view.shape)
        if len(shape) != len(strides) or len(shape) > _MAX_DIMS:
            raise ViewInvalid(f"{name} has {len(shape)} extents and {len(strides)} strides", field=name)
        # Bounded before any arithmetic of torch, which is 64-bit: neither an extent that a stride of 0
        # makes harmless nor a stride that is never taken may overflow it.
        if max((*shape, *strides), default=0) > arena.size_bytes or (
            math.prod(shape) * dtype.itemsize > arena.size_bytes
        ):
            raise ViewInvalid(
                f"{name} has shape {list(shape)} and strides {list(strides)}; arena {arena.arena_id} "
                f"({arena.label}) has {arena.size_bytes} bytes",
                field=name,
            )
        if view.offset % dtype.itemsize:
            raise ViewInvalid(f"{name} begins at byte {view.offset}, unaligned for {dtype}", field=name)
        end = view.offset + _extent_bytes(shape, strides, dtype.itemsize)
        if end > arena.size_bytes:
            raise ViewInvalid(
                f"{name} ends at byte {end} of arena {arena.arena_id} ({arena.label}), "
                f"which has {arena.size_bytes}",
                field=name,
                arena_id=view.arena_id,
            )
        # The typed alias must cover whole elements of the arena; the arena's odd tail is never viewed.
        whole = arena.size_bytes // dtype.itemsize * dtype.itemsize
        typed = arena.memory[:whole].view(dtype)
        return typed.as_strided(shape, strides, view.offset // dtype.itemsize)

    def expect(
        self, view: common_pb2.TensorView, name: str, dtype: torch.dtype, shape: Sequence[int]
    ) -> torch.Tensor:
        """As `resolve`, and the tensor has exactly this dtype and shape.

        Raises:
            ViewInvalid: it has not.
        """
        key = view.SerializeToString(deterministic=True), dtype, tuple(shape)
        found = self._expected.get(key)
        if found is not None:
            return found
        tensor = self.resolve(view, name)
        if tensor.dtype is not dtype or tuple(tensor.shape) != key[2]:
            raise ViewInvalid(
                f"{name} is {dtypes.name_of(tensor.dtype)} {list(tensor.shape)}; "
                f"it must be {dtypes.name_of(dtype)} {list(shape)}",
                field=name,
            )
        if len(self._expected) >= _REMEMBERED:
            self._expected.clear()
        self._expected[key] = tensor
        return tensor


def expect_rows(
    arenas: ArenaMap,
    views: Mapping[str, common_pb2.TensorView],
    declared: Mapping[str, tuple[int, ...]],
    rows: int,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Resolve a layer's inputs against what its geometry declares per token.

    Raises:
        ViewInvalid: a name is missing or unknown, or a view is not [rows, …] of this dtype with
            neighbouring elements of a row next to each other.
    """
    if views.keys() != declared.keys():
        raise ViewInvalid(f"inputs are {sorted(views)}; the layer takes {sorted(declared)}", field="inputs")
    tensors = {}
    for name, shape in declared.items():
        tensor = arenas.expect(views[name], name, dtype, (rows, *shape))
        if not rows_are_dense(tensor):
            raise ViewInvalid(
                f"{name} has strides {tensor.stride()}; each row must be contiguous", field=name
            )
        tensors[name] = tensor
    return tensors


def rows_are_dense(tensor: torch.Tensor) -> bool:
    """Whether everything below axis 0 is contiguous; an axis of one element has no stride."""
    if tensor.numel() == 0:
        return True
    below = zip(tensor.shape[1:], tensor.stride()[1:], _contiguous(tensor.shape)[1:], strict=True)
    return all(extent == 1 or stride == dense for extent, stride, dense in below)


def overlaps(first: common_pb2.TensorView, second: common_pb2.TensorView) -> bool:
    """Whether the byte ranges of two views meet."""
    if first.arena_id != second.arena_id:
        return False
    spans = []
    for view in (first, second):
        size = dtypes.from_pb(view.dtype).itemsize
        strides = tuple(view.strides) or _contiguous(view.shape)
        spans.append((view.offset, view.offset + _extent_bytes(tuple(view.shape), strides, size)))
    return spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]


def _contiguous(shape: Iterable[int]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for extent in reversed(tuple(shape)):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


def _extent_bytes(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> int:
    """Bytes from the first to behind the last element; 0 for an empty tensor."""
    if any(extent == 0 for extent in shape):
        return 0
    return (1 + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))) * itemsize
