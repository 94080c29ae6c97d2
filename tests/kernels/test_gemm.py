"""The packed matrix product: right, within its bounds, and the same bits in any company."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from braid_kernels.errors import FieldError, InputError
from braid_kernels.native import num_threads, set_num_threads
from braid_kernels.native.gemm import PackedWeight, Part, gemm, gemm_library, pack, pack_gated
from braid_kernels.native.library import DTYPE_CODES
from braid_kernels.testing import difference, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

K_BLOCK = 256  # GEMM_K_BLOCK
PANEL = 32  # of the widest vectors; narrower ones divide it
NAN = float("nan")
DTYPES = (torch.float32, torch.bfloat16)
MANY_ROWS = 460  # several tasks of rows for any width of vectors


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = num_threads()
    set_num_threads(count)
    yield
    set_num_threads(before)


def margined(
    rows: int, columns: int, dtype: torch.dtype, margin: int, values: Tensor | None = None
) -> Tensor:
    """[rows, columns] inside a NaN-filled tensor, `margin` wider at both sides and two rows longer."""
    whole = torch.full((rows + 2, columns + 2 * margin), NAN, dtype=dtype)
    inside = whole[1 : rows + 1, margin : margin + columns]
    if values is not None:
        inside.copy_(values)
    return inside


def margins_untouched(inside: Tensor, margin: int) -> bool:
    """Whether what `margined` put around is still NaN."""
    rows, columns = inside.shape
    width = columns + 2 * margin
    first = inside.storage_offset() - width - margin
    whole = inside.as_strided((rows + 2, width), (width, 1), first).clone()
    whole[1 : rows + 1, margin : margin + columns] = NAN
    return bool(whole.isnan().all())


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Small enough for every sum of the tests to be exact in fp32."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def product(x: Tensor, weight: PackedWeight) -> Tensor:
    out = torch.full((x.shape[0], weight.n), NAN, dtype=weight.dtype)
    gemm(x, weight, [Part(out, 0)])
    return out


@dataclass(frozen=True)
class Shape:
    m: int
    n: int
    k: int
    dtype: torch.dtype
    margin: int
    threads: int
    seed: int

    def x(self) -> Tensor:
        values = random(self.m, self.k, dtype=self.dtype, seed=self.seed)
        return margined(self.m, self.k, self.dtype, self.margin, values)

    def w(self, salt: int = 1) -> Tensor:
        values = random(self.n, self.k, dtype=self.dtype, seed=self.seed + salt)
        return margined(self.n, self.k, self.dtype, self.margin, values)


def sizes(*edges: int, most: int) -> st.SearchStrategy[int]:
    """Any size from 1 on, and those around edges often."""
    near = [edge + d for edge in edges for d in (-1, 0, 1) if edge + d >= 1]
    return st.one_of(st.integers(1, most), st.sampled_from(near))


SHAPES = st.builds(
    Shape,
    m=st.one_of(st.just(0), sizes(1, 14, 28, 42, most=70)),
    n=sizes(8, 16, PANEL, 4 * PANEL, 8 * PANEL, most=5 * PANEL),
    k=sizes(1, K_BLOCK, 2 * K_BLOCK, most=3 * K_BLOCK),
    dtype=st.sampled_from(DTYPES),
    margin=st.integers(0, 5),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)


def bound(x: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding may cost an element of x w^T: fp32 sums of k products, and one rounding to bf16."""
    size = x.double().abs() @ w.double().abs().T
    exact = (x.double() @ w.double().T).abs()
    return x.shape[1] * 2.0**-24 * size + (2.0**-8 * exact if dtype == torch.bfloat16 else 0.0)


@settings(max_examples=120, deadline=None)
@given(SHAPES)
def test_it_is_the_product_and_writes_nothing_else(shape: Shape) -> None:
    x, w = shape.x(), shape.w()
    out = margined(shape.m, shape.n, shape.dtype, shape.margin)
    with threads(shape.threads):
        gemm(x, pack(w), [Part(out, 0)])
    expected = x.double() @ w.double().T
    assert ((out.double() - expected).abs() <= bound(x, w, shape.dtype)).all()
    assert margins_untouched(out, shape.margin)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.data())
def test_a_row_is_the_same_bits_in_any_company(shape: Shape, data: st.DataObject) -> None:
    x, weight = shape.x(), pack(shape.w())
    with threads(shape.threads):
        together = product(x, weight)
    begin = data.draw(st.integers(0, shape.m), label="begin")
    end = data.draw(st.integers(begin, shape.m), label="end")
    assert same_bits(product(x[begin:end], weight), together[begin:end])
    for row in range(begin, min(end, begin + 3)):
        assert same_bits(product(x[row : row + 1], weight), together[row : row + 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [100, K_BLOCK, 2 * K_BLOCK + 44])
def test_tasks_of_rows_and_threads_change_no_bit(dtype: torch.dtype, k: int) -> None:
    x, w = random(MANY_ROWS, k, dtype=dtype, seed=1), random(70, k, dtype=dtype, seed=2)
    weight = pack(w)
    alone = torch.cat([product(row[None], weight) for row in x])
    for count in (1, 2, 3):
        with threads(count):
            assert same_bits(product(x, weight), alone)
    assert difference(alone, x.double() @ w.double().T) < (2.0**-8 if dtype == torch.bfloat16 else 2e-6)


def test_threads_and_tasks_of_columns_change_no_bit() -> None:
    x, w = random(3, 300, dtype=torch.float32, seed=1), random(1000, 300, dtype=torch.float32, seed=2)
    weight = pack(w)
    alone = product(x, weight)
    for count in (2, 3):
        with threads(count):
            assert same_bits(product(x, weight), alone)
            assert same_bits(product(x[1:2], weight), alone[1:2])


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.lists(st.integers(1, 50), min_size=1, max_size=4), st.data())
def test_merged_projections_are_the_same_bits_as_separate_ones(
    shape: Shape, columns: list[int], data: st.DataObject
) -> None:
    x = shape.x()
    weights = [random(n, shape.k, dtype=shape.dtype, seed=i) for i, n in enumerate(columns)]
    merged = pack(*weights)
    starts = [sum(columns[:i]) for i in range(len(columns))]
    outs = [margined(shape.m, n, shape.dtype, shape.margin) for n in columns]
    order = data.draw(st.permutations(range(len(columns))), label="order of the parts")
    with threads(shape.threads):
        gemm(x, merged, [Part(outs[i], starts[i]) for i in order])
    for weight, out in zip(weights, outs, strict=True):
        assert same_bits(out, product(x, pack(weight)))
        assert margins_untouched(out, shape.margin)


def test_columns_that_no_part_names_are_dropped() -> None:
    x, w = random(5, 40, dtype=torch.float32, seed=1), random(90, 40, dtype=torch.float32, seed=2)
    weight = pack(w)
    whole = product(x, weight)
    out = margined(5, 37, torch.float32, 3)
    gemm(x, weight, [Part(out, 29)])
    assert same_bits(out, whole[:, 29:66])
    assert margins_untouched(out, 3)
    gemm(x, weight, [])


def with_extras(shape: Shape, total: Tensor, in_place: bool) -> tuple[Part, Tensor]:
    """A part with bias and addend of integers, and what must come out for the exact `total`."""
    bias = integers(shape.n, dtype=shape.dtype, seed=shape.seed + 7)
    added = integers(shape.m, shape.n, dtype=shape.dtype, seed=shape.seed + 8)
    out = margined(shape.m, shape.n, shape.dtype, shape.margin, added if in_place else None)
    addend = out if in_place else margined(shape.m, shape.n, shape.dtype, shape.margin + 1, added)
    return Part(out, 0, bias, addend), (total + bias.double() + added.double()).to(shape.dtype)


@settings(max_examples=80, deadline=None)
@given(SHAPES, st.booleans())
def test_exact_sums_with_bias_and_addend_are_rounded_once_to_nearest_even(
    shape: Shape, in_place: bool
) -> None:
    x = integers(shape.m, shape.k, dtype=shape.dtype, seed=shape.seed)
    w = integers(shape.n, shape.k, dtype=shape.dtype, seed=shape.seed + 1)
    part, expected = with_extras(shape, x.double() @ w.double().T, in_place)
    with threads(shape.threads):
        gemm(x, pack(w), [part])
    assert torch.equal(part.out, expected)
    assert margins_untouched(part.out, shape.margin)


@settings(max_examples=60, deadline=None)
@given(SHAPES)
def test_a_gated_unit_is_silu_of_one_product_times_the_other(shape: Shape) -> None:
    x, gate, up, bf16 = shape.x(), shape.w(1), shape.w(2), shape.dtype == torch.bfloat16
    scale = shape.k**-0.5  # sums of about one: silu is neither flat nor the identity there
    gate, up = (gate * scale).to(shape.dtype), (up * scale).to(shape.dtype)
    out = margined(shape.m, shape.n, shape.dtype, shape.margin)
    weight = pack_gated(gate, up)
    with threads(shape.threads):
        gemm(x, weight, [Part(out, 0)])
    first, second = x.double() @ gate.double().T, x.double() @ up.double().T
    expected = torch.nn.functional.silu(first) * second
    # Each sum is known to so much of one, the size of its terms, and not of what is left of it where they
    # cancel; each error is multiplied by the other factor.
    bound = 5e-6 * (1 + first.abs() + second.abs()) + (2.0**-8 * expected.abs() if bf16 else 0.0)
    assert ((out.double() - expected).abs() <= bound).all()
    assert margins_untouched(out, shape.margin)
    for row in range(min(shape.m, 3)):
        assert same_bits(product(x[row : row + 1], weight), out[row : row + 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gated_unit_takes_parts_biases_and_addends(dtype: torch.dtype) -> None:
    x, gate, up = (random(n, 60, dtype=dtype, seed=n) for n in (9, 50, 50))
    weight = pack_gated(gate, up)
    plain = torch.nn.functional.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
    bias, addend = random(31, dtype=dtype, seed=1), random(9, 31, dtype=dtype, seed=2)
    left, right = margined(9, 31, dtype, 2), margined(9, 19, dtype, 1)
    gemm(x, weight, [Part(right, 31), Part(left, 0, bias, addend)])
    tolerance = 2.0**-8 if dtype == torch.bfloat16 else 5e-6
    assert difference(left, plain[:, :31] + bias.double() + addend.double()) < tolerance
    assert difference(right, plain[:, 31:]) < tolerance
    assert margins_untouched(left, 2)
    assert margins_untouched(right, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 17, 50])
def test_nan_and_infinity_stay_in_their_row_or_column(dtype: torch.dtype, rows: int) -> None:
    x, w = random(rows, 300, dtype=dtype, seed=1), random(45, 300, dtype=dtype, seed=2)
    clean = product(x, pack(w))
    x[rows // 2, 7] = NAN
    w[40, 290] = float("inf")
    found = product(x, pack(w))
    assert found[rows // 2].isnan().all()
    others = [r for r in range(rows) if r != rows // 2]
    assert torch.equal(found[others, 40], x[others, 290].sign() * float("inf"))
    keep = [c for c in range(45) if c != 40]
    assert same_bits(found[others][:, keep], clean[others][:, keep])


@settings(max_examples=30, deadline=None)
@given(SHAPES)
def test_packing_fills_its_bytes_and_no_more(shape: Shape) -> None:
    lib, code, margin = gemm_library(), DTYPE_CODES[shape.dtype], 64
    n, k, w = shape.n, shape.k, torch.ones(shape.n, shape.k, dtype=shape.dtype)
    sizes = lib.braid_gemm_packed_bytes(n, k, code), lib.braid_gemm_packed_gated_bytes(n, k, code)
    for size, gated in zip(sizes, (False, True), strict=True):
        data = torch.full((size + 2 * margin,), 0xFF, dtype=torch.uint8)
        to = ctypes.c_void_p(data.data_ptr() + margin)
        if gated:
            lib.braid_gemm_pack_gated(w.data_ptr(), k, w.data_ptr(), k, code, n, k, to)
        else:
            lib.braid_gemm_pack_rows(w.data_ptr(), code, k, 0, n, n, k, to)
        assert (data[:margin] == 0xFF).all()
        assert (data[-margin:] == 0xFF).all()
        values = data[margin:-margin].view(shape.dtype)
        assert int((values == 1).sum()) == n * k * (2 if gated else 1)
        assert int((values == 0).sum()) == values.numel() - int((values == 1).sum())


def test_what_does_not_fit_is_refused() -> None:
    x, w = torch.zeros(3, 8), torch.zeros(5, 8)
    weight = pack(w)
    out = torch.zeros(3, 5)
    with pytest.raises(FieldError, match="weights"):
        pack()
    with pytest.raises(FieldError, match="weights"):
        pack(torch.zeros(0, 8))
    with pytest.raises(InputError, match="weight"):
        pack(w, torch.zeros(5, 7))
    with pytest.raises(InputError, match="weight"):
        pack(w, w.bfloat16())
    with pytest.raises(InputError, match="weight"):
        pack(torch.zeros(8, 5).T)
    with pytest.raises(InputError, match="up"):
        pack_gated(w, torch.zeros(4, 8))
    for name, arguments in (
        ("x", (torch.zeros(3, 7), Part(out, 0))),
        ("x", (x.bfloat16(), Part(out, 0))),
        ("out", (x, Part(torch.zeros(2, 5), 0))),
        ("out", (x, Part(torch.zeros(5, 3).T, 0))),
        ("first", (x, Part(out, 1))),
        ("first", (x, Part(out, -1))),
        ("bias", (x, Part(out, 0, bias=torch.zeros(4)))),
        ("bias", (x, Part(out, 0, bias=torch.zeros(5).bfloat16()))),
        ("addend", (x, Part(out, 0, addend=torch.zeros(2, 5)))),
        ("addend", (x, Part(out, 0, addend=torch.zeros(3, 6)))),
    ):
        with pytest.raises(InputError, match=name):
            gemm(arguments[0], weight, [arguments[1]])
