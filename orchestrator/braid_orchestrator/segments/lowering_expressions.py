"""Elementwise expressions over the elements of a step's tensors, and the index maps that views are.

A space is a tuple of axis sizes, of which `TOKENS` stands for the step's tokens. An expression has a value
at every point of its space; a view of a tensor is the same expression over another space, its indices
mapped affinely, down to where it reads memory. Equal expressions are one object.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar, cast

import torch
from braid_kernels.native.program import OpCode

TOKENS = -1
"""The size of the axis of the step's tokens."""

Space = tuple[int, ...]


class NeedsMemory(Exception):
    """A view cannot be expressed by indices alone: its source must lie in memory first."""


class Place(enum.Enum):
    """Where a storage lies."""

    CHUNK = "chunk"
    """With the rows that are taken through a program together."""
    STEP = "step"
    """With all rows of the step."""
    NAMED = "named"
    """A value of the segments' interface: it outlives the segment."""
    TORCH = "torch"
    """Where torch put the result of an operator that is not lowered."""
    CONSTANT = "constant"
    """A weight."""


@dataclass(eq=False)
class Storage:
    """Memory of one value: a row of `width` elements for each token, or a weight."""

    width: int
    dtype: torch.dtype
    place: Place
    name: str = ""
    """Of a NAMED one."""
    tensor: torch.Tensor | None = None
    """Of a CONSTANT one."""


class Expr:
    """A value at each point of a space. Made by `Expressions`."""

    space: Space

    @property
    def args(self) -> tuple[Expr, ...]:
        """What it is computed from."""
        return ()

    @cached_property
    def reduces(self) -> bool:
        """Whether there is a reduction in it."""
        return any(arg.reduces for arg in self.args)

    @cached_property
    def cost(self) -> int:
        """Roughly, vector instructions for each element."""
        return sum(arg.cost for arg in self.args)

    @cached_property
    def reads(self) -> frozenset[Read]:
        """All reads of memory in it."""
        return frozenset().union(*(arg.reads for arg in self.args))

    @cached_property
    def axes(self) -> frozenset[int]:
        """Axes of its space that it depends on."""
        return frozenset().union(*(arg.axes for arg in self.args))


@dataclass(eq=False)
class Constant(Expr):
    """A number, in any space."""

    value: float
    space = ()


@dataclass(eq=False)
class Read(Expr):
    """Memory: element offset + the sum of index times stride. The tokens' stride is in rows: 0 or 1."""

    storage: Storage
    offset: int
    strides: tuple[int, ...]
    space: Space

    @cached_property
    def reads(self) -> frozenset[Read]:
        return frozenset([self])

    @cached_property
    def axes(self) -> frozenset[int]:
        return frozenset(i for i, stride in enumerate(self.strides) if stride)


# What an exponential, a division or a call for each lane costs beside an addition.
_COSTS = {
    **dict.fromkeys((OpCode.EXP, OpCode.SIGMOID, OpCode.SILU, OpCode.GELU, OpCode.GELU_TANH), 12),
    **dict.fromkeys((OpCode.TANH, OpCode.SOFTPLUS), 16),
    **dict.fromkeys((OpCode.COS, OpCode.SIN, OpCode.LOG, OpCode.POW), 100),
    **dict.fromkeys((OpCode.DIV, OpCode.SQRT, OpCode.RSQRT, OpCode.RECIPROCAL), 4),
}


@dataclass(eq=False)
class Pointwise(Expr):
    """An elementwise operation on one or two expressions over the same space."""

    code: OpCode
    operands: tuple[Expr, ...]
    space: Space

    @property
    def args(self) -> tuple[Expr, ...]:
        return self.operands

    @cached_property
    def cost(self) -> int:
        return _COSTS.get(self.code, 1) + sum(arg.cost for arg in self.args)


@dataclass(eq=False)
class Reduce(Expr):
    """The sum or the maximum of an expression over the last `bound` axes of the expression's space."""

    code: OpCode
    body: Expr
    bound: int
    space: Space

    @property
    def args(self) -> tuple[Expr, ...]:
        return (self.body,)

    @cached_property
    def reduces(self) -> bool:
        return True

    @cached_property
    def cost(self) -> int:
        return 4 + self.body.cost

    @cached_property
    def axes(self) -> frozenset[int]:
        return frozenset(axis for axis in self.body.axes if axis < len(self.space))

    @property
    def sizes(self) -> Space:
        """Of the axes that it runs over."""
        return self.body.space[len(self.space) :]


@dataclass(frozen=True)
class Affine:
    """Indices of an old space from those of a new one.

    `terms` has, for each old axis, a constant and pairs (new axis, coefficient).
    """

    space: Space
    terms: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]

    def followed_by(self, bound: Space) -> Affine:
        """The same with more axes behind, each mapped to itself."""
        count = len(self.space)
        more = tuple((0, ((count + i, 1),)) for i in range(len(bound)))
        return Affine(self.space + bound, self.terms + more)


E = TypeVar("E", bound=Expr)


class Expressions:
    """Makes expressions; equal ones are made once."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], Expr] = {}

    def constant(self, value: float) -> Constant:
        """A number."""
        return self._one((Constant, value, math.copysign(1.0, value)), Constant(value))

    def read(self, storage: Storage, offset: int, strides: Sequence[int], space: Space) -> Read:
        """A read of memory."""
        key = (Read, id(storage), offset, tuple(strides), space)
        return self._one(key, Read(storage, offset, tuple(strides), space))

    def pointwise(self, code: OpCode, *operands: Expr) -> Expr:
        """An operation; at least one operand is not a constant, and all others have its space."""
        space = next(operand.space for operand in operands if not isinstance(operand, Constant))
        key = (Pointwise, code, *map(id, operands))
        return self._one(key, Pointwise(code, operands, space))

    def reduce(self, code: OpCode, body: Expr, bound: int) -> Reduce:
        """A reduction over the last axes of the body's space."""
        key = (Reduce, code, id(body), bound)
        return self._one(key, Reduce(code, body, bound, body.space[: len(body.space) - bound]))

    def mapped(self, expr: Expr, indices: Affine) -> Expr:
        """The expression over another space."""
        return self._mapped(expr, indices, {})

    def replaced(self, expr: Expr, by: dict[int, Expr]) -> Expr:
        """The expression with others in place of some of its parts, which are given by their id."""
        if id(expr) in by:
            return by[id(expr)]
        found = expr
        if isinstance(expr, Pointwise):
            found = self.pointwise(expr.code, *(self.replaced(arg, by) for arg in expr.operands))
        elif isinstance(expr, Reduce):
            found = self.reduce(expr.code, self.replaced(expr.body, by), expr.bound)
        by[id(expr)] = found
        return found

    def _mapped(self, expr: Expr, indices: Affine, done: dict[int, Expr]) -> Expr:
        if id(expr) not in done:
            done[id(expr)] = self._map_one(expr, indices, done)
        return done[id(expr)]

    def _map_one(self, expr: Expr, indices: Affine, done: dict[int, Expr]) -> Expr:
        match expr:
            case Read():
                strides, offset = [0] * len(indices.space), expr.offset
                for stride, (constant, pairs) in zip(expr.strides, indices.terms, strict=True):
                    offset += stride * constant
                    for axis, factor in pairs:
                        strides[axis] += stride * factor
                return self.read(expr.storage, offset, strides, indices.space)
            case Pointwise():
                return self.pointwise(expr.code, *(self._mapped(arg, indices, done) for arg in expr.operands))
            case Reduce():
                inside = indices.followed_by(expr.sizes)
                return self.reduce(expr.code, self._mapped(expr.body, inside, {}), expr.bound)
            case _:
                return expr

    def _one(self, key: tuple[object, ...], fresh: E) -> E:
        return cast(E, self._made.setdefault(key, fresh))


def walk(expr: Expr) -> Iterator[Expr]:
    """All parts of an expression, each once, operands before what is made of them."""
    seen: set[int] = set()

    def visit(part: Expr) -> Iterator[Expr]:
        if id(part) in seen:
            return
        seen.add(id(part))
        for arg in part.args:
            yield from visit(arg)
        yield part

    yield from visit(expr)


def elements(space: Sequence[int]) -> int:
    """Elements of one token."""
    return math.prod(size for size in space if size != TOKENS)


def dense(space: Space) -> tuple[int, ...]:
    """Strides of memory that holds a row of a space for each token, its other axes in order."""
    strides, step = [0] * len(space), 1
    for axis in reversed(range(len(space))):
        strides[axis] = 1 if space[axis] == TOKENS else step
        step *= 1 if space[axis] == TOKENS else space[axis]
    return tuple(strides)
