"""Programs of the C++ kernels: lists of steps over rows, run by one call for any number of rows.

    builder = ProgramBuilder(chunk=128)
    x, y = builder.slot(chunked=False), builder.slot(chunked=False)
    a, b = (Operand.view(builder.view(slot, torch.float32, 0, row=256, inner=1)) for slot in (x, y))
    builder.group(Space(inner=256), [Op(OpCode.SILU, b, a)])
    program = builder.build()
    program.bind(x, tensor.data_ptr())

See cpp/program.h for what the steps do.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from braid_kernels.errors import BuildError, FieldError, InputError
from braid_kernels.native.gemm import PackedWeight, gemm_library
from braid_kernels.native.library import DTYPE_CODES, check_descriptor

_VOID, _I32, _I64, _F32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float

MAX_LOOPS = 3
ELEMENT_CODES = {**DTYPE_CODES, torch.int64: 2}
"""Dtypes of what a program reads; it writes float32 and bfloat16."""


class _Slot(ctypes.Structure):
    _fields_ = [("base", _VOID), ("chunked", _I32), ("spare", _I32)]


class _Rows(ctypes.Structure):
    _fields_ = [("slot", _I32), ("spare", _I32), ("offset", _I64), ("row", _I64), ("stride", _I64)]


class _Part(ctypes.Structure):
    _fields_ = [("out", _Rows), ("addend", _Rows), ("bias", _VOID), ("first", _I64), ("columns", _I64)]


class _Product(ctypes.Structure):
    _fields_ = [
        ("x", _Rows),
        ("packed", _VOID),
        *[(name, _I64) for name in ("n", "k", "per_row")],
        *[(name, _I32) for name in ("dtype", "gated", "first_part", "parts")],
    ]


class _Lookup(ctypes.Structure):
    _fields_ = [
        ("ids", _Rows),
        ("out", _Rows),
        ("table", _VOID),
        *[(name, _I64) for name in ("table_slot", "table_stride", "table_rows", "columns")],
        ("dtype", _I32),
        ("spare", _I32),
    ]


class _Choice(ctypes.Structure):
    _fields_ = [
        *[(name, _Rows) for name in ("x", "ids", "values")],
        *[(name, _I64) for name in ("count", "chosen", "per_row")],
        ("kind", _I32),
        ("dtype", _I32),
        ("value", _F32),
        ("spare", _I32),
    ]


class _Mixture(ctypes.Structure):
    _fields_ = [
        *[(name, _Rows) for name in ("x", "ids", "scores", "out")],
        ("up", _VOID),
        ("down", _VOID),
        *[(name, _I64) for name in ("experts", "chosen", "width", "inner")],
        *[(name, _I32) for name in ("dtype", "scores_dtype", "activation", "gated")],
    ]


class _View(ctypes.Structure):
    _fields_ = [
        ("slot", _I32),
        ("dtype", _I32),
        ("offset", _I64),
        ("row", _I64),
        ("loop", _I64 * MAX_LOOPS),
        ("middle", _I64),
        ("inner", _I64),
    ]


class _Operand(ctypes.Structure):
    _fields_ = [("kind", _I32), ("index", _I32), ("value", _F32), ("spare", _I32)]


class _Op(ctypes.Structure):
    _fields_ = [("code", _I32), ("spare", _I32), ("dst", _Operand), ("a", _Operand), ("b", _Operand)]


class _Group(ctypes.Structure):
    _fields_ = [
        *[(name, _I32) for name in ("first_op", "ops", "registers", "columns", "reduces", "loops")],
        ("loop", _I64 * MAX_LOOPS),
        ("middle", _I64),
        ("inner", _I64),
    ]


class _Step(ctypes.Structure):
    _fields_ = [("kind", _I32), ("index", _I32)]


_ARRAYS = (
    ("slots", _Slot),
    ("products", _Product),
    ("parts", _Part),
    ("lookups", _Lookup),
    ("choices", _Choice),
    ("mixtures", _Mixture),
    ("groups", _Group),
    ("ops", _Op),
    ("views", _View),
    ("steps", _Step),
)


def _singular(name: str) -> str:
    return name.removesuffix("s")


class _Desc(ctypes.Structure):
    _fields_ = [
        ("chunk", _I64),
        *[(name, _I64) for name, _ in _ARRAYS],
        *[(_singular(name), _VOID) for name, _ in _ARRAYS],
    ]


_STRUCTS = (
    _Slot,
    _Rows,
    _Part,
    _Product,
    _Lookup,
    _Choice,
    _Mixture,
    _View,
    _Operand,
    _Op,
    _Group,
    _Step,
    _Desc,
)


@functools.cache
def _library() -> ctypes.CDLL:
    """The library with the programs' interface declared. Raises BuildError."""
    lib = gemm_library()
    lib.braid_program_sizes.restype = lib.braid_program_create.restype = _I64
    lib.braid_program_bind.restype = lib.braid_program_run.restype = _I64
    lib.braid_program_destroy.restype = lib.braid_program_measure.restype = (
        lib.braid_program_matmul.restype
    ) = None
    lib.braid_program_create.argtypes = [_VOID, _VOID]
    lib.braid_program_destroy.argtypes = [_VOID]
    lib.braid_program_bind.argtypes = [_VOID, _I64, _VOID]
    lib.braid_program_run.argtypes = [_VOID, _I64, _I64]
    lib.braid_program_measure.argtypes = [_VOID, _I32]
    lib.braid_program_matmul.argtypes = [_VOID, _VOID, _VOID]
    sizes = (_I64 * len(_STRUCTS))()
    if lib.braid_program_sizes(sizes) != len(_STRUCTS):
        raise BuildError("the library has other program structs than this module")
    for struct, size in zip(_STRUCTS, sizes, strict=True):
        check_descriptor(ctypes.sizeof(struct), size, struct.__name__)
    return lib


class OpCode(enum.IntEnum):
    """enum OpCode in cpp/program.h."""

    COPY = 0
    STORE_COLUMN = 1
    NEG = 2
    ABS = 3
    SQRT = 4
    RSQRT = 5
    EXP = 6
    LOG = 7
    SIGMOID = 8
    SILU = 9
    GELU = 10
    GELU_TANH = 11
    TANH = 12
    SOFTPLUS = 13
    COS = 14
    SIN = 15
    RELU = 16
    RECIPROCAL = 17
    ADD = 18
    SUB = 19
    MUL = 20
    DIV = 21
    MINIMUM = 22
    MAXIMUM = 23
    POW = 24
    LESS = 25
    LESS_EQUAL = 26
    EQUAL = 27
    KEEP = 28
    SUM = 29
    DOT = 30
    LARGEST = 31


REDUCTIONS = frozenset({OpCode.SUM, OpCode.DOT, OpCode.LARGEST})


@dataclass(frozen=True)
class Operand:
    """A register (a tile of the space), a column (one value for each of its rows), a view or a constant."""

    kind: int = 0
    index: int = 0
    value: float = 0.0

    @staticmethod
    def register(index: int) -> Operand:
        return Operand(1, index)

    @staticmethod
    def column(index: int) -> Operand:
        return Operand(2, index)

    @staticmethod
    def view(index: int) -> Operand:
        """A view that `ProgramBuilder.view` made."""
        return Operand(3, index)

    @staticmethod
    def constant(value: float) -> Operand:
        return Operand(4, 0, value)


NOTHING = Operand()


@dataclass(frozen=True)
class Op:
    """dst = code(a, b)."""

    code: OpCode
    dst: Operand
    a: Operand
    b: Operand = NOTHING


@dataclass(frozen=True)
class Space:
    """What a group runs over for each row: loops, and within them middle x inner."""

    inner: int
    middle: int = 1
    loops: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rows:
    """Matrix rows in a slot: those of row r begin at offset + r * row and lie `stride` apart (elements)."""

    slot: int
    offset: int
    row: int
    stride: int


@dataclass(frozen=True)
class Destination:
    """Where columns [first, first + columns) of a product go, after bias [columns] and addend."""

    out: Rows
    first: int
    columns: int
    bias: Tensor | None = None
    addend: Rows | None = None


class ChoiceKind(enum.IntEnum):
    """enum ChoiceKind in cpp/program.h."""

    TOP = 0
    GATHER = 1
    SCATTER = 2


ACTIVATIONS = {"silu": 0, "gelu": 1, "relu2": 2}
"""What a mixture's experts apply between their two products; enum Activation in cpp/program.h."""


@dataclass(frozen=True)
class Experts:
    """Packed weights of a mixture: up [inner or 2·inner, width] and down [width, inner] of each expert.

    A gated unit with silu has `pack_gated` weights as its `up`, any other gated one the gate's rows first.
    """

    up: tuple[PackedWeight, ...]
    down: tuple[PackedWeight, ...]
    activation: str
    gated: bool


class ProgramBuilder:
    """Collects slots and steps.

    Args:
        chunk: rows that are taken through the steps together, which chunked slots hold.
    """

    def __init__(self, chunk: int) -> None:
        self._chunk = chunk
        self._found: dict[str, list[Any]] = {name: [] for name, _ in _ARRAYS}
        self._kept: list[object] = []

    def slot(self, chunked: bool) -> int:
        """New memory to bind: of one chunk of the rows, or of all."""
        return self._add("slots", _Slot(None, chunked, 0))

    def view(
        self,
        slot: int,
        dtype: torch.dtype,
        offset: int,
        *,
        row: int = 0,
        loops: Sequence[int] = (),
        middle: int = 0,
        inner: int = 0,
    ) -> int:
        """A view of a slot by its strides in elements. Raises FieldError for a dtype or too many loops."""
        if dtype not in ELEMENT_CODES:
            raise FieldError("dtype", dtype, f"must be one of {[str(known) for known in ELEMENT_CODES]}")
        strides = (_I64 * MAX_LOOPS)(*_at_most(loops))
        return self._add("views", _View(slot, ELEMENT_CODES[dtype], offset, row, strides, middle, inner))

    def group(self, space: Space, ops: Sequence[Op]) -> None:
        """Elementwise operations and row reductions, in this order. Raises FieldError for too many loops."""
        operands = [operand for op in ops for operand in (op.dst, op.a, op.b)]
        registers, columns = (
            1 + max((o.index for o in operands if o.kind == kind), default=-1) for kind in (1, 2)
        )
        first = len(self._found["ops"])
        for op in ops:
            self._add("ops", _Op(op.code, 0, *(_operand(o) for o in (op.dst, op.a, op.b))))
        loop = (_I64 * MAX_LOOPS)(*_at_most(space.loops))
        reduces = any(op.code in REDUCTIONS for op in ops)
        index = self._add(
            "groups",
            _Group(
                first,
                len(ops),
                registers,
                columns,
                reduces,
                len(space.loops),
                loop,
                space.middle,
                space.inner,
            ),
        )
        self._add("steps", _Step(2, index))

    def product(
        self, x: Rows, weight: PackedWeight, destinations: Sequence[Destination], per_row: int = 1
    ) -> None:
        """x [rows * per_row, k] times a packed weight. Raises FieldError for columns outside of it."""
        first = len(self._found["parts"])
        for to in destinations:
            if to.first < 0 or to.columns < 1 or to.first + to.columns > weight.n:
                raise FieldError("first", to.first, f"{to.columns} columns must lie within {weight.n}")
            addend = _Rows(-1) if to.addend is None else _rows(to.addend)
            bias = None if to.bias is None else self._bias(to.bias, to.columns, weight.dtype)
            self._add("parts", _Part(_rows(to.out), addend, bias, to.first, to.columns))
        self._kept.append(weight)
        code, size = DTYPE_CODES[weight.dtype], len(destinations)
        index = self._add(
            "products",
            _Product(
                _rows(x), weight.data.data_ptr(), weight.n, weight.k, per_row, code, weight.gated, first, size
            ),
        )
        self._add("steps", _Step(0, index))

    def lookup(self, ids: Rows, table: Tensor | int, columns: int, out: Rows, dtype: torch.dtype) -> None:
        """Rows of a table, by ids int64: a matrix, or a slot with as many rows as `run` is told.

        Raises InputError for a table that is not a matrix of such rows.
        """
        item = _Lookup(_rows(ids), _rows(out), None, 0, columns, -1, columns, DTYPE_CODES[dtype], 0)
        if isinstance(table, int):
            item.table_slot = table
        else:
            if table.dim() != 2 or table.shape[1] != columns or table.stride(1) != 1 or table.dtype != dtype:
                raise InputError("table", list(table.shape), f"must be rows of {columns} {dtype}")
            self._kept.append(table)
            item.table, item.table_stride, item.table_rows = table.data_ptr(), table.stride(0), table.shape[0]
        self._add("steps", _Step(1, self._add("lookups", item)))

    def choice(
        self,
        kind: ChoiceKind,
        ids: Rows,
        values: Rows,
        dtype: torch.dtype,
        *,
        count: int,
        chosen: int,
        per_row: int = 1,
        x: Rows | None = None,
        value: float = 0.0,
    ) -> None:
        """Elements of rows of `count` by their index; see `Choice` in cpp/program.h."""
        source = _Rows(-1) if x is None else _rows(x)
        item = _Choice(
            source, _rows(ids), _rows(values), count, chosen, per_row, kind, DTYPE_CODES[dtype], value
        )
        self._add("steps", _Step(3, self._add("choices", item)))

    def mixture(
        self,
        x: Rows,
        ids: Rows,
        scores: Rows,
        out: Rows,
        experts: Experts,
        chosen: int,
        scores_dtype: torch.dtype,
    ) -> None:
        """Rows through the experts chosen for them. Raises FieldError for experts that are not alike."""
        first, last = experts.up[0], experts.down[0]
        alike = all(one.data.shape == first.data.shape for one in experts.up)
        alike = alike and all(one.data.shape == last.data.shape for one in experts.down)
        merged = experts.gated and experts.activation != "silu"
        if not alike or len(experts.up) != len(experts.down) or first.n != last.k * (2 if merged else 1):
            raise FieldError("experts", len(experts.up), "must have weights of the same sizes")
        tables = [
            (_VOID * len(group))(*(one.data.data_ptr() for one in group))
            for group in (experts.up, experts.down)
        ]
        self._kept += [experts, *tables]
        item = _Mixture(*(_rows(rows) for rows in (x, ids, scores, out)))
        item.up, item.down = (ctypes.addressof(table) for table in tables)
        item.experts, item.chosen, item.width, item.inner = len(experts.up), chosen, last.n, last.k
        item.dtype, item.scores_dtype = DTYPE_CODES[first.dtype], DTYPE_CODES[scores_dtype]
        item.activation, item.gated = ACTIVATIONS[experts.activation], experts.gated
        self._add("steps", _Step(4, self._add("mixtures", item)))

    def build(self) -> Program:
        """The program. Raises FieldError for steps that the library refuses, BuildError."""
        desc = _Desc(self._chunk)
        arrays = []
        for name, struct in _ARRAYS:
            found = self._found[name]
            array: ctypes.Array[Any] = (struct * len(found))(*found)
            arrays.append(array)
            setattr(desc, name, len(found))
            setattr(desc, _singular(name), ctypes.addressof(array))
        handle = _VOID()
        status = _library().braid_program_create(ctypes.byref(desc), ctypes.byref(handle))
        if status or handle.value is None:
            raise _failure(status)
        return Program(handle.value, tuple(self._kept))

    def _add(self, name: str, item: ctypes.Structure) -> int:
        self._found[name].append(item)
        return len(self._found[name]) - 1

    def _bias(self, bias: Tensor, columns: int, dtype: torch.dtype) -> int:
        if bias.shape != (columns,) or bias.dtype != dtype or not bias.is_contiguous():
            raise InputError("bias", f"{bias.dtype} {list(bias.shape)}", f"must be {dtype} [{columns}]")
        self._kept.append(bias)
        return bias.data_ptr()


class Program:
    """Steps to run; slots are bound to memory first, which must outlive the runs. One run at a time."""

    def __init__(self, handle: int, kept: tuple[object, ...]) -> None:
        lib = _library()
        self._handle, self._kept = handle, kept
        self._run, self._bind, self._lib = lib.braid_program_run, lib.braid_program_bind, lib
        weakref.finalize(self, lib.braid_program_destroy, handle)

    def bind(self, slot: int, address: int) -> None:
        """Where a slot lies from now on. Raises FieldError for a slot that does not exist."""
        if status := self._bind(self._handle, slot, address):
            raise _failure(status)

    def run(self, rows: int, table_rows: int = 0) -> None:
        """Run all steps.

        Args:
            table_rows: of the tables that are slots.

        Raises:
            InputError: an id is outside of its table.
            FieldError: a slot was not bound.
        """
        if status := self._run(self._handle, rows, table_rows):
            raise _failure(status)

    def measure(self, on: bool) -> None:
        """Whether the time of products is taken."""
        self._lib.braid_program_measure(self._handle, on)

    def matmul(self) -> tuple[int, int]:
        """(nanoseconds in products, their number) while they were measured."""
        ns, count = _I64(), _I64()
        self._lib.braid_program_matmul(self._handle, ctypes.byref(ns), ctypes.byref(count))
        return ns.value, count.value


def _at_most(loops: Sequence[int]) -> Sequence[int]:
    if len(loops) > MAX_LOOPS:
        raise FieldError("loops", list(loops), f"must be at most {MAX_LOOPS}")
    return loops


def _rows(rows: Rows) -> _Rows:
    return _Rows(rows.slot, 0, rows.offset, rows.row, rows.stride)


def _operand(operand: Operand) -> _Operand:
    return _Operand(operand.kind, operand.index, operand.value, 0)


def _failure(status: int) -> FieldError | BuildError:
    """The error behind a non-zero status (see `Invalid` in cpp/program.cpp)."""
    code, index = status >> 32, status & 0xFFFFFFFF
    match code:
        case 16:
            return FieldError("slot", index, "does not exist or was not bound")
        case 17:
            return FieldError("step", index, "has sizes or references that do not fit")
        case 18:
            return FieldError("op", index, "has operands that it does not take")
        case 19:
            return FieldError("view", index, "has a slot or dtype that does not exist")
        case 20:
            return FieldError("chunk", index, "must be >= 1")
        case 21:
            return InputError("ids", f"row {index}", "must be a row of the table")
        case _:
            return BuildError("the program ran out of memory for its workspace")
