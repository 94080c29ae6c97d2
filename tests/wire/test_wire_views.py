"""Views: any message either names memory inside its arena or is refused."""

from __future__ import annotations

import pytest
import torch
from braid.v1 import common_pb2
from braid_wire import dtypes
from braid_wire.arena import HostArena
from braid_wire.errors import ArenaUnknown, ConfigInvalid, ViewInvalid
from braid_wire.views import ArenaMap, expect_rows, overlaps, rows_are_dense, view_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

SIZE = 1003  # odd, so that no element size divides it
ARENA = HostArena.create(5, SIZE, "views")
ARENAS = ArenaMap([ARENA])
U64 = (1 << 64) - 1

numbers = st.one_of(
    st.integers(0, 70), st.integers(0, SIZE + 9), st.sampled_from([1 << 31, 1 << 32, 1 << 62, 1 << 63, U64])
)
views = st.builds(
    common_pb2.TensorView,
    arena_id=st.sampled_from([5, 5, 5, 5, 0, 6]),
    offset=numbers,
    dtype=st.integers(0, 8),
    shape=st.lists(numbers, max_size=4),
    strides=st.one_of(st.just([]), st.lists(numbers, max_size=4)),
)


@settings(max_examples=1000, deadline=None)
@given(views)
@example(common_pb2.TensorView(arena_id=5, dtype=1, shape=[0], strides=[U64]))
@example(common_pb2.TensorView(arena_id=5, dtype=1, shape=[1], strides=[U64]))
@example(common_pb2.TensorView(arena_id=5, dtype=6, shape=[1 << 62, 1 << 62], strides=[0, 0]))
@example(common_pb2.TensorView(arena_id=5, dtype=6, shape=[0, 1 << 63], strides=[1 << 63, 1]))
def test_a_view_lies_inside_or_is_refused(view: common_pb2.TensorView) -> None:
    try:
        tensor = ARENAS.resolve(view, "field")
    except ArenaUnknown:
        assert view.arena_id != 5
        return
    except ViewInvalid:
        return
    assert list(tensor.shape) == list(view.shape) and tensor.dtype is dtypes.from_pb(view.dtype)
    start = ARENA.memory.data_ptr()
    assert tensor.data_ptr() == start + view.offset or tensor.numel() == 0
    last = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel():
        assert tensor.data_ptr() + (last + 1) * tensor.itemsize <= start + SIZE
        tensor.clone()  # touches every element


tensors = st.tuples(
    st.sampled_from([torch.uint8, torch.int32, torch.float32, torch.bfloat16, torch.int64]),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.integers(0, 10),
    st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(tensors)
def test_a_tensor_survives_the_round_trip(made: tuple[torch.dtype, list[int], int, bool]) -> None:
    dtype, shape, start, transpose = made
    whole = ARENA.memory[: SIZE // 8 * 8].view(dtype)
    tensor = whole[start : start + torch.Size(shape).numel()].view(shape)
    if transpose:
        tensor = tensor.transpose(0, -1)
    message = view_of(tensor, ARENA).SerializeToString()
    back = ARENAS.resolve(common_pb2.TensorView.FromString(message), "field")
    assert (back.data_ptr(), back.dtype, back.shape) == (tensor.data_ptr(), tensor.dtype, tensor.shape)
    assert torch.equal(back, tensor)


def test_a_tensor_elsewhere_has_no_view() -> None:
    with pytest.raises(ViewInvalid):
        view_of(torch.zeros(3), ARENA)
    with pytest.raises(ViewInvalid):
        view_of(ARENA.memory[:8].view(torch.float64), ARENA)


def test_expect() -> None:
    view = view_of(ARENA.memory[:24].view(torch.float32).view(2, 3), ARENA)
    assert ARENAS.expect(view, "field", torch.float32, (2, 3)).shape == (2, 3)
    for dtype, shape in ((torch.int32, (2, 3)), (torch.float32, (3, 2)), (torch.float32, (6,))):
        with pytest.raises(ViewInvalid, match="field is float32"):
            ARENAS.expect(view, "field", dtype, shape)


def test_rows_may_be_strided_and_no_more() -> None:
    wide = ARENA.memory[:192].view(torch.float32).view(4, 12)
    declared = {"x": (2, 3)}
    dense = wide[:, 2:8].unflatten(1, (2, 3))
    found = expect_rows(ARENAS, {"x": view_of(dense, ARENA)}, declared, 4, torch.float32)["x"]
    assert found.data_ptr() == dense.data_ptr() and found.stride() == dense.stride()
    holes = wide[:, ::2].unflatten(1, (2, 3))
    with pytest.raises(ViewInvalid, match="contiguous"):
        expect_rows(ARENAS, {"x": view_of(holes, ARENA)}, declared, 4, torch.float32)
    for views in ({}, {"y": view_of(dense, ARENA)}, {"x": view_of(dense, ARENA), "y": view_of(dense, ARENA)}):
        with pytest.raises(ViewInvalid, match="inputs are"):
            expect_rows(ARENAS, views, declared, 4, torch.float32)


def test_axes_of_one_element_have_no_stride() -> None:
    """One head cut out of many, or a rotary part of width 0, is as dense as any row."""
    wide = ARENA.memory[:192].view(torch.float32).view(4, 4, 3)
    for tensor in (wide[:, 1:2], wide[:, :, :0], wide[:, 1:2, :1]):
        assert rows_are_dense(tensor)
        view = view_of(tensor, ARENA)
        expect_rows(ARENAS, {"x": view}, {"x": tuple(tensor.shape[1:])}, 4, torch.float32)
    assert not rows_are_dense(wide[:, ::2])


def test_overlaps() -> None:
    row = ARENA.memory[:96].view(torch.float32)

    def view(start: int, stop: int) -> common_pb2.TensorView:
        return view_of(row[start:stop], ARENA)

    assert (
        overlaps(view(0, 4), view(3, 5))
        and overlaps(view(3, 5), view(0, 4))
        and overlaps(view(0, 9), view(2, 3))
    )
    assert not overlaps(view(0, 4), view(4, 8))
    other = view(0, 4)
    other.arena_id = 6
    assert not overlaps(view(0, 4), other)


def test_dtypes() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.uint8):
        assert dtypes.from_pb(dtypes.to_pb(dtype)) is dtype
    assert dtypes.from_name("bf16") is dtypes.from_name("bfloat16") is torch.bfloat16
    assert dtypes.to_pb_all([torch.float64, torch.bfloat16, torch.float32]) == [
        common_pb2.DTYPE_FLOAT32,
        common_pb2.DTYPE_BFLOAT16,
    ]
    with pytest.raises(ViewInvalid):
        dtypes.to_pb(torch.float64)
    with pytest.raises(ConfigInvalid):
        dtypes.from_name("float128")
