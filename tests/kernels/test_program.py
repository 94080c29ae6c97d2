"""Programs: elementwise groups, reductions, look-ups, choices, mixtures and products, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from braid_kernels import FieldError, InputError, set_num_threads
from braid_kernels.native.gemm import pack, pack_gated
from braid_kernels.native.program import (
    ChoiceKind,
    Destination,
    Experts,
    Op,
    OpCode,
    Operand,
    Program,
    ProgramBuilder,
    Rows,
    Space,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

UNARY: dict[OpCode, Callable[[Tensor], Tensor]] = {
    OpCode.NEG: torch.neg,
    OpCode.ABS: torch.abs,
    OpCode.SQRT: lambda x: x.abs().sqrt(),
    OpCode.RSQRT: lambda x: x.abs().rsqrt(),
    OpCode.EXP: torch.exp,
    OpCode.LOG: lambda x: x.abs().log(),
    OpCode.SIGMOID: torch.sigmoid,
    OpCode.SILU: F.silu,
    OpCode.GELU: F.gelu,
    OpCode.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    OpCode.TANH: torch.tanh,
    OpCode.SOFTPLUS: F.softplus,
    OpCode.COS: torch.cos,
    OpCode.SIN: torch.sin,
    OpCode.RELU: torch.relu,
    OpCode.RECIPROCAL: torch.reciprocal,
}
ABSOLUTE = (OpCode.SQRT, OpCode.RSQRT, OpCode.LOG)
BINARY: dict[OpCode, Callable[[Tensor, Tensor], Tensor]] = {
    OpCode.ADD: torch.add,
    OpCode.SUB: torch.sub,
    OpCode.MUL: torch.mul,
    OpCode.DIV: torch.div,
    OpCode.MINIMUM: torch.minimum,
    OpCode.MAXIMUM: torch.maximum,
    OpCode.POW: lambda x, y: x.abs() ** y,
    OpCode.LESS: lambda x, y: (x < y).double(),
    OpCode.LESS_EQUAL: lambda x, y: (x <= y).double(),
    OpCode.EQUAL: lambda x, y: (x == y).double(),
    OpCode.KEEP: lambda x, y: torch.where(y != 0, x, 0.0),
}
REDUCTIONS: dict[OpCode, Callable[[Tensor], Tensor]] = {
    OpCode.SUM: lambda x: x.sum(-1),
    OpCode.LARGEST: lambda x: x.amax(-1),
}
DTYPES = (torch.float32, torch.bfloat16)
register, column, constant = Operand.register, Operand.column, Operand.constant


class Bench:
    """A program over tensors [rows, loop, middle, inner], each in padded memory full of NaN."""

    def __init__(self, rows: int, loop: int, middle: int, inner: int, chunk: int = 16) -> None:
        self.shape = (rows, loop, middle, inner)
        self.builder = ProgramBuilder(chunk)
        self.ops: list[Op] = []
        self._bound: list[tuple[int, Tensor]] = []

    def tensor(self, dtype: torch.dtype = torch.float32, *, fill: bool = True, step: int = 1) -> Tensor:
        """[rows, loop, middle, inner], its strides not those of dense memory."""
        rows, loop, middle, inner = self.shape
        whole = torch.full((rows + 2, loop, middle + 1, inner * step + 3), math.nan, dtype=dtype)
        found = whole[:rows, :, :middle, : inner * step : step]
        return found.copy_(2 * torch.randn(self.shape)) if fill else found

    def view(self, tensor: Tensor) -> Operand:
        """A tensor that broadcasts against the shape, as an operand."""
        strides = tensor.expand(self.shape).stride()
        slot = self.builder.slot(chunked=False)
        self._bound.append((slot, tensor))
        row, loop, middle, inner = strides
        return Operand.view(
            self.builder.view(slot, tensor.dtype, 0, row=row, loops=[loop], middle=middle, inner=inner)
        )

    def add(self, code: OpCode, dst: Operand, a: Operand, b: Operand | None = None) -> None:
        """Append an operation."""
        self.ops.append(Op(code, dst, a) if b is None else Op(code, dst, a, b))

    def run(self, rows: int | None = None) -> Program:
        """Build and run it."""
        _, loop, middle, inner = self.shape
        self.builder.group(Space(inner, middle, (loop,)), self.ops)
        program = self.builder.build()
        for slot, tensor in self._bound:
            program.bind(slot, tensor.data_ptr())
        program.run(self.shape[0] if rows is None else rows)
        return program


def tail_is_untouched(found: Tensor) -> bool:
    """Whether all memory around a tensor that `Bench` made is still NaN."""
    base = found._base
    assert base is not None
    return int((~base.isnan()).sum()) <= found.numel()


def close(found: Tensor, wanted: Tensor, relative: float = 4e-7) -> None:
    """Within so much of the value, or of one."""
    bound = relative * wanted.abs().clamp(min=1.0)
    if found.dtype is torch.bfloat16:
        bound = 2.0**-8 * wanted.abs() + 1e-6
    assert bool(((found.double() - wanted).abs() <= bound).all()), (found.double() - wanted).abs().max()


shapes = st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 5), st.integers(1, 70))


@settings(deadline=None, max_examples=120)
@given(code=st.sampled_from(list(UNARY)), shape=shapes, seed=st.integers(0, 99))
def test_functions_of_one_operand(code: OpCode, shape: tuple[int, int, int, int], seed: int) -> None:
    torch.manual_seed(seed)
    bench = Bench(*shape)
    x, out = bench.tensor(), bench.tensor(fill=False)
    if code in ABSOLUTE:
        x.abs_().add_(1e-3)
    bench.add(code, bench.view(out), bench.view(x))
    bench.run()
    close(out, UNARY[code](x.double()), 1e-6 if code is OpCode.EXP else 4e-7)
    assert tail_is_untouched(out)


@pytest.mark.parametrize("code", list(UNARY), ids=lambda code: code.name)
def test_functions_over_their_whole_range(code: OpCode) -> None:
    """Small, large and infinite values, and NaN."""
    grid = torch.tensor([0.0, 1e-30, 1e-8, 1e-3, 0.3, 0.62, 0.63, 0.99, 1.01, 3.9, 4.3, 9.0, 30.0, 87.0, 1e4])
    x = torch.cat([grid, -grid]) if code not in ABSOLUTE else grid + 1e-30
    values = torch.cat([x, torch.tensor([math.inf, math.nan])])
    bench = Bench(1, 1, 1, len(values))
    out = bench.tensor(fill=False)
    bench.add(code, bench.view(out), bench.view(values.view(1, 1, 1, -1)))
    bench.run()
    wanted = UNARY[code](values.double())
    found = out.flatten()
    assert bool(found[-1].isnan())
    finite = wanted.isfinite() & (wanted.abs() < 1e37)
    close(found[finite], wanted[finite], 1e-6)


@settings(deadline=None, max_examples=120)
@given(
    code=st.sampled_from(list(BINARY)),
    shape=shapes,
    kinds=st.sampled_from(["tt", "tr", "t1", "1t", "tc", "ct", "tk", "kt", "kk"]),
    seed=st.integers(0, 99),
)
def test_functions_of_two_operands(
    code: OpCode, shape: tuple[int, int, int, int], kinds: str, seed: int
) -> None:
    """Operands are tensors (t), rows of all (r), a value for each row in memory (1) or in a column (k), or
    constants (c)."""
    torch.manual_seed(seed)
    bench = Bench(*shape)
    rows, _, middle, inner = shape
    tensors, operands = list[Tensor](), list[Operand]()
    for place, kind in enumerate(kinds):
        sizes = {"t": shape, "r": (1, 1, 1, inner), "c": (1, 1, 1, 1)}.get(kind, (rows, 1, middle, 1))
        x = bench.tensor() if kind == "t" else torch.randn(sizes).round(decimals=1 if kind == "c" else 4)
        if code is OpCode.POW:
            x.abs_().add_(1e-2)
        if code is OpCode.DIV and place == 1:
            x.copy_(torch.where(x.abs() < 0.1, torch.full_like(x, 0.1), x))
        if code is OpCode.KEEP and place == 1:
            x.copy_((x > 0).float())
        tensors.append(x)
        operands.append(constant(float(x)) if kind == "c" else bench.view(x))
        if kind == "k":
            bench.add(OpCode.COPY, column(place), operands[-1])
            operands[-1] = column(place)
    out = bench.tensor(fill=False)
    if kinds == "kk":
        bench.add(code, column(2), *operands)
        bench.add(OpCode.COPY, bench.view(out), column(2))
    else:
        bench.add(code, bench.view(out), *operands)
    bench.run()
    wanted = BINARY[code](*(x.double() for x in tensors)).expand(shape)
    close(out, wanted, 1e-5 if code is OpCode.POW else 4e-7)
    assert tail_is_untouched(out)


@settings(deadline=None, max_examples=60)
@given(code=st.sampled_from([*REDUCTIONS, OpCode.DOT]), shape=shapes, seed=st.integers(0, 99))
def test_reductions_over_the_inner_dimension(
    code: OpCode, shape: tuple[int, int, int, int], seed: int
) -> None:
    torch.manual_seed(seed)
    bench = Bench(*shape)
    x, y = bench.tensor(), bench.tensor()
    out = torch.full((shape[0] + 1, *shape[1:3], 1), math.nan)
    if code is OpCode.DOT:
        bench.add(code, column(0), bench.view(x), bench.view(y))
        wanted = (x.double() * y.double()).sum(-1)
    else:
        bench.add(code, column(0), bench.view(x))
        wanted = REDUCTIONS[code](x.double())
    bench.add(OpCode.STORE_COLUMN, bench.view(out[:-1]), column(0))
    bench.run()
    close(out[:-1, ..., 0], wanted, 1e-5)
    assert bool(out[-1].isnan().all())


@pytest.mark.parametrize("inner", [1, 15, 16, 64, 65, 130])
def test_a_maximum_sees_nan_and_minus_infinity(inner: int) -> None:
    x = torch.full((3, 1, 1, inner), -math.inf)
    x[1, 0, 0, -1], x[2, 0, 0, inner // 2] = math.nan, -7.0
    bench = Bench(3, 1, 1, inner)
    out = torch.zeros(3, 1, 1, 1)
    bench.add(OpCode.LARGEST, column(0), bench.view(x))
    bench.add(OpCode.STORE_COLUMN, bench.view(out), column(0))
    bench.run()
    torch.testing.assert_close(out.flatten(), torch.tensor([-math.inf, math.nan, -7.0]), equal_nan=True)


@settings(deadline=None, max_examples=60)
@given(
    shape=shapes,
    source=st.sampled_from([*DTYPES, torch.int64]),
    target=st.sampled_from(DTYPES),
    steps=st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2])),
    seed=st.integers(0, 99),
)
def test_copies_convert_and_step(
    shape: tuple[int, int, int, int],
    source: torch.dtype,
    target: torch.dtype,
    steps: tuple[int, int],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    bench = Bench(*shape)
    integers = torch.randint(-1000, 1000, shape)
    x = integers if source is torch.int64 else bench.tensor(source, step=steps[0])
    out = bench.tensor(target, fill=False, step=steps[1])
    bench.add(OpCode.COPY, register(0), bench.view(x))
    bench.add(OpCode.COPY, bench.view(out), register(0))
    direct = bench.tensor(target, fill=False)
    bench.add(OpCode.COPY, bench.view(direct), bench.view(x))
    bench.run()
    assert torch.equal(out, x.to(target)) and torch.equal(direct, x.to(target))
    assert tail_is_untouched(out) and tail_is_untouched(direct)


def norm(bench: Bench, x: Tensor, weight: Tensor, out: Tensor) -> None:
    """The root-mean-square norm of the inner dimension."""
    bench.add(OpCode.DOT, column(0), bench.view(x), bench.view(x))
    bench.add(OpCode.MUL, column(0), column(0), constant(1.0 / x.shape[-1]))
    bench.add(OpCode.ADD, column(0), column(0), constant(1e-6))
    bench.add(OpCode.RSQRT, column(0), column(0))
    bench.add(OpCode.MUL, register(0), bench.view(x), column(0))
    bench.add(OpCode.MUL, bench.view(out), register(0), bench.view(weight))


@pytest.mark.parametrize("shape", [(37, 1, 1, 256), (37, 2, 3, 65), (9, 1, 1, 5000), (300, 1, 8, 24)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_the_same_bits_in_any_company(shape: tuple[int, int, int, int], threads: int) -> None:
    torch.manual_seed(0)
    rows, *rest = shape
    x, weight = torch.randn(shape), torch.randn(1, 1, 1, shape[-1])

    def run(rows: Tensor) -> Tensor:
        bench = Bench(len(rows), *rest)
        out = torch.full_like(rows, math.nan)
        norm(bench, rows, weight, out)
        bench.run()
        return out

    set_num_threads(threads)
    try:
        together = run(x)
    finally:
        set_num_threads(1)
    for row in (0, 1, rows // 2, rows - 1):
        assert torch.equal(together[row : row + 1], run(x[row : row + 1].clone()))
    close(together, F.rms_norm(x.double(), (shape[-1],), weight.double().flatten(), 1e-6), 2e-6)


def linear(
    chunk: int, x: Tensor, tables: Tensor, ids: Tensor, weights: list[Tensor], rows: int
) -> list[Tensor]:
    """tables[ids] + silu(x), then a product with two destinations, one of them with bias and addend."""
    columns = x.shape[1]
    builder = ProgramBuilder(chunk)
    places = [builder.slot(chunked=False) for _ in range(4)]
    looked, summed = builder.slot(chunked=True), builder.slot(chunked=True)
    index, source, first, second = places
    builder.lookup(Rows(index, 0, 1, 0), tables, columns, Rows(looked, 0, columns, columns), torch.float32)
    views = {
        slot: Operand.view(builder.view(slot, torch.float32, 0, row=columns, inner=1))
        for slot in (source, looked, summed)
    }
    builder.group(
        Space(columns),
        [
            Op(OpCode.SILU, register(0), views[source]),
            Op(OpCode.ADD, views[summed], views[looked], register(0)),
        ],
    )
    widths = [len(weight) for weight in weights]
    builder.product(
        Rows(summed, 0, columns, columns),
        pack(*weights),
        [
            Destination(Rows(first, 0, widths[0], widths[0]), 0, widths[0]),
            Destination(
                Rows(second, 0, widths[1], widths[1]),
                widths[0],
                widths[1],
                torch.arange(widths[1]).float(),
                Rows(source, 0, columns, columns) if widths[1] == columns else None,
            ),
        ],
    )
    program = builder.build()
    outs = [torch.full((rows + 1, width), math.nan) for width in widths]
    scratch = [torch.full((chunk, columns), math.nan) for _ in range(2)]
    for slot, tensor in zip((*places, looked, summed), (ids, x, *outs, *scratch), strict=True):
        program.bind(slot, tensor.data_ptr())
    program.run(rows)
    return outs


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 99))
def test_steps_in_chunks_of_any_size(rows: int, columns: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, tables, ids = torch.randn(rows, columns), torch.randn(11, columns), torch.randint(0, 11, (rows,))
    weights = [torch.randn(width, columns), torch.randn(columns, columns)]
    found = [linear(chunk, x, tables, ids, weights, rows) for chunk in (1, 7, 64)]
    for outs in found[1:]:
        assert all(torch.equal(a[:rows], b[:rows]) for a, b in zip(outs, found[0], strict=True))
    summed = tables.double()[ids] + F.silu(x.double())
    wanted = [summed @ weight.double().T for weight in weights]
    wanted[1] += torch.arange(columns) + x.double()
    for out, one in zip(found[0], wanted, strict=True):
        close(out[:rows], one, 2e-5)
        assert bool(out[rows].isnan().all())


def test_an_id_outside_of_the_table_is_refused() -> None:
    for bad in (11, -1):
        with pytest.raises(InputError, match="row 2"):
            linear(
                2,
                torch.randn(3, 4),
                torch.randn(11, 4),
                torch.tensor([0, 1, bad]),
                [torch.randn(4, 4)] * 2,
                3,
            )


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 9),
    per_row=st.integers(1, 3),
    count=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_elements_by_index(
    rows: int, per_row: int, count: int, dtype: torch.dtype, seed: int, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    chosen = data.draw(st.integers(1, count))
    x = torch.randn(rows, per_row, count).round(decimals=1).to(dtype)
    ids = torch.full((rows, per_row, chosen), -5)
    values, gathered = (torch.full((rows, per_row, chosen), math.nan, dtype=dtype) for _ in range(2))
    marked = x.clone()
    builder = ProgramBuilder(4)
    slots = [builder.slot(chunked=False) for _ in range(5)]
    of_x, of_ids, of_values, of_gathered, of_marked = (
        Rows(slot, 0, per_row * width, width)
        for slot, width in zip(slots, (count, chosen, chosen, chosen, count), strict=True)
    )
    sizes = {"count": count, "chosen": chosen, "per_row": per_row}
    builder.choice(ChoiceKind.TOP, of_ids, of_values, dtype, x=of_x, **sizes)
    builder.choice(ChoiceKind.GATHER, of_ids, of_gathered, dtype, x=of_x, **sizes)
    builder.choice(ChoiceKind.SCATTER, of_ids, of_marked, dtype, value=7.0, **sizes)
    program = builder.build()
    for slot, tensor in zip(slots, (x, ids, values, gathered, marked), strict=True):
        program.bind(slot, tensor.data_ptr())
    program.run(rows)
    # Of equal elements the earlier one comes first.
    order = x.float().sort(dim=-1, descending=True, stable=True).indices[..., :chosen]
    assert torch.equal(ids, order)
    assert torch.equal(values, x.gather(-1, order)) and torch.equal(gathered, values)
    assert torch.equal(marked, x.scatter(-1, order, 7.0))


def test_nan_is_the_largest_element() -> None:
    x, ids, values = (
        torch.tensor([[1.0, math.nan, 3.0]]),
        torch.zeros(1, 3, dtype=torch.int64),
        torch.zeros(1, 3),
    )
    builder = ProgramBuilder(1)
    slots = [builder.slot(chunked=False) for _ in range(3)]
    builder.choice(
        ChoiceKind.TOP, Rows(slots[1], 0, 3, 3), Rows(slots[2], 0, 3, 3), torch.float32, count=3, chosen=3,
        x=Rows(slots[0], 0, 3, 3),
    )  # fmt: skip
    program = builder.build()
    for slot, tensor in zip(slots, (x, ids, values), strict=True):
        program.bind(slot, tensor.data_ptr())
    program.run(1)
    assert ids.tolist() == [[1, 2, 0]]


class Mixture:
    """A mixture of experts, and what it gives for some rows."""

    def __init__(
        self, experts: int, width: int, inner: int, activation: str, gated: bool, dtype: torch.dtype
    ) -> None:
        self.up = (torch.randn(experts, inner * (2 if gated else 1), width) / width**0.5).to(dtype)
        self.down = (torch.randn(experts, width, inner) / inner**0.5).to(dtype)
        self.activation, self.gated, self.dtype = activation, gated, dtype
        if gated and activation == "silu":
            up = tuple(pack_gated(one[:inner], one[inner:]) for one in self.up)
        else:
            up = tuple(pack(one) for one in self.up)
        self.packed = Experts(up, tuple(pack(one) for one in self.down), activation, gated)

    def run(self, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        """[rows, width]."""
        (rows, width), chosen = x.shape, ids.shape[1]
        out = torch.full((rows + 1, width), math.nan, dtype=self.dtype)
        builder = ProgramBuilder(rows)
        slots = [builder.slot(chunked=False) for _ in range(4)]
        given_ = (Rows(slot, 0, n, n) for slot, n in zip(slots, (width, chosen, chosen, width), strict=True))
        builder.mixture(*given_, self.packed, chosen, scores.dtype)
        program = builder.build()
        for slot, tensor in zip(slots, (x, ids, scores, out), strict=True):
            program.bind(slot, tensor.data_ptr())
        program.run(rows)
        assert bool(out[rows].isnan().all())
        return out[:rows]

    def naive(self, x: Tensor, ids: Tensor, scores: Tensor, *, sizes: bool = False) -> Tensor:
        """The same in float64, token by token; or the sizes of what is added up, which errors follow from."""
        functions = {"silu": F.silu, "gelu": F.gelu, "relu2": lambda rows: F.relu(rows) ** 2}
        found = torch.zeros(x.shape, dtype=torch.float64)
        for row in range(len(x)):
            for expert, score in zip(ids[row].tolist(), scores[row].double(), strict=True):
                inner = self.up[expert].double() @ x[row].double()
                if self.gated:
                    gate, value = inner.chunk(2)
                    inner = functions[self.activation](gate) * value
                else:
                    inner = functions[self.activation](inner)
                down = self.down[expert].double()
                found[row] += score * (down.abs() @ inner.abs() if sizes else down @ inner)
        return found


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 12),
    experts=st.integers(1, 7),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    activation=st.sampled_from(["silu", "gelu", "relu2"]),
    gated=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_mixtures_of_experts(
    rows: int,
    experts: int,
    sizes: tuple[int, int],
    activation: str,
    gated: bool,
    dtype: torch.dtype,
    seed: int,
    data: st.DataObject,
) -> None:
    torch.manual_seed(seed)
    chosen = data.draw(st.integers(1, experts))
    mixture = Mixture(experts, *sizes, activation, gated, dtype)
    x, scores = torch.randn(rows, sizes[0]).to(dtype), torch.rand(rows, chosen)
    ids = torch.rand(rows, experts).argsort(dim=1)[:, :chosen].contiguous()
    found, wanted = mixture.run(x, ids, scores), mixture.naive(x, ids, scores)
    # In bfloat16: an inner product's two factors, one of them perhaps squared, the product and the result are
    # rounded, each by 2^-8 of it. Terms may be larger than what is left of their sum.
    bound = 5 * 2.0**-8 if dtype is torch.bfloat16 else 5e-6
    bound *= max(1.0, float(mixture.naive(x, ids, scores, sizes=True).max()))
    assert float((found.double() - wanted).abs().max()) <= bound
    row = rows // 2
    alone = mixture.run(*(tensor[row : row + 1].clone() for tensor in (x, ids, scores)))
    assert torch.equal(alone[0], found[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_expert_takes_many_rows_in_blocks(dtype: torch.dtype) -> None:
    """And a row that chooses an expert twice is added twice."""
    torch.manual_seed(0)
    mixture = Mixture(3, 20, 9, "silu", True, dtype)
    x, scores = torch.randn(700, 20).to(dtype), torch.rand(700, 2)
    ids = torch.ones(700, 2, dtype=torch.int64)
    ids[::7, 0] = 2
    found, wanted = mixture.run(x, ids, scores), mixture.naive(x, ids, scores)
    bound = (2e-2 if dtype is torch.bfloat16 else 5e-6) * float(wanted.abs().max())
    assert float((found.double() - wanted).abs().max()) <= bound
    for row in (0, 255, 256, 699):
        alone = mixture.run(*(tensor[row : row + 1].clone() for tensor in (x, ids, scores)))
        assert torch.equal(alone[0], found[row])


@pytest.mark.parametrize("bad", [-1, 3])
def test_an_expert_that_does_not_exist_is_refused(bad: int) -> None:
    mixture = Mixture(3, 4, 5, "silu", True, torch.float32)
    ids = torch.tensor([[0, 2], [1, bad]])
    with pytest.raises(InputError, match="row 1"):
        mixture.run(torch.randn(2, 4), ids, torch.rand(2, 2))


def test_products_are_counted_while_they_are_measured() -> None:
    builder = ProgramBuilder(4)
    x, out = builder.slot(chunked=False), builder.slot(chunked=False)
    builder.product(Rows(x, 0, 8, 8), pack(torch.randn(5, 8)), [Destination(Rows(out, 0, 5, 5), 0, 5)])
    program = builder.build()
    rows, result = torch.randn(10, 8), torch.empty(10, 5)
    program.bind(x, rows.data_ptr())
    program.bind(out, result.data_ptr())
    program.run(10)
    assert program.matmul() == (0, 0)
    program.measure(True)
    program.run(10)
    nanoseconds, count = program.matmul()
    assert count == 3 and nanoseconds > 0


def test_what_the_library_cannot_run_is_refused() -> None:
    builder = ProgramBuilder(4)
    slot = builder.slot(chunked=False)
    builder.group(
        Space(4), [Op(OpCode.NEG, Operand.view(builder.view(slot, torch.float32, 0, inner=1)), register(0))]
    )
    with pytest.raises(FieldError, match="slot = 0: does not exist or was not bound"):
        builder.build().run(1)
    for op in (
        Op(OpCode.SUM, register(0), register(1)),  # a reduction gives a column
        Op(OpCode.NEG, register(0), column(0)),  # one value for each row is no operand of one
        Op(OpCode.ADD, column(0), register(0), column(0)),
        Op(OpCode.ADD, register(0), Operand.view(7), register(0)),
        Op(OpCode.STORE_COLUMN, register(0), column(0)),
        Op(OpCode.ADD, constant(1.0), register(0), register(0)),
    ):
        builder = ProgramBuilder(4)
        builder.group(Space(4), [op])
        with pytest.raises(FieldError, match="op = 0"):
            builder.build()
    with pytest.raises(FieldError, match="chunk"):
        ProgramBuilder(0).build()
    with pytest.raises(FieldError, match="must lie within 5"):
        ProgramBuilder(1).product(
            Rows(0, 0, 8, 8), pack(torch.randn(5, 8)), [Destination(Rows(0, 0, 5, 5), 1, 5)]
        )
    with pytest.raises(FieldError, match="dtype"):
        ProgramBuilder(1).view(0, torch.float64, 0)
    with pytest.raises(FieldError, match="loops"):
        ProgramBuilder(1).view(0, torch.float32, 0, loops=[1, 2, 3, 4])
