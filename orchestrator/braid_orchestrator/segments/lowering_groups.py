"""Stores as groups of a program: one pass over tiles of the space, with registers for what is in between.

Every expression is brought into a canonical space (tokens, loops…, middle, inner) in which a reduction runs
over the inner axis and gives one value for each index of the others, a column.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from braid_kernels.native.program import MAX_LOOPS, Op, OpCode, Operand, ProgramBuilder
from braid_kernels.native.program import Space as GroupSpace

from braid_orchestrator.segments.lowering_expressions import (
    TOKENS,
    Affine,
    Constant,
    Expr,
    Expressions,
    Place,
    Pointwise,
    Read,
    Reduce,
    Space,
    Storage,
    dense,
    elements,
    walk,
)
from braid_orchestrator.segments.lowering_sharing import projected
from braid_orchestrator.segments.lowering_steps import Store

_REDUCTIONS = (OpCode.SUM, OpCode.LARGEST)


class NotOneGroup(Exception):
    """A store's reductions do not fit into one pass."""


@dataclass(frozen=True)
class Canonical:
    """A store in canonical space: (tokens, loops…, middle, inner). Reductions are unary operations."""

    space: Space
    expr: Expr
    target: Read


def in_one_pass(store: Store, make: Expressions) -> list[Store]:
    """The store, its reductions stored before it where it cannot compute them on the way.

    Raises:
        NotOneGroup: it has too many axes.
    """
    try:
        canonical(store, make)
        return [store]
    except NotOneGroup:
        inner = next((p for p in walk(store.expr) if isinstance(p, Reduce)), None)
        if inner is None or projected(store.expr, make) is projected(inner, make):
            raise
    one = projected(inner, make)
    storage = Storage(elements(one.space), torch.float32, Place.CHUNK)
    first = Store(one, make.read(storage, 0, dense(one.space), one.space))
    axes = sorted(inner.axes)
    read = make.mapped(first.target, Affine(inner.space, tuple((0, ((axis, 1),)) for axis in axes)))
    rest = replace(store, expr=make.replaced(store.expr, {id(inner): read}))
    return [*in_one_pass(first, make), *in_one_pass(rest, make)]


def canonical(store: Store, make: Expressions) -> Canonical:
    """A store in canonical space. Raises NotOneGroup."""
    return _Canonical(store, make).found()


class _Canonical:
    """Finds the canonical space of one store."""

    def __init__(self, store: Store, make: Expressions) -> None:
        self._store, self._make = store, make
        self._space = store.target.space
        self._outer_reads: list[Read] = [store.target]
        self._all_reads: list[Read] = [store.target]
        self._reductions: list[Reduce] = []
        self._collect(store.expr, True)

    def _collect(self, expr: Expr, outer: bool) -> None:
        for part in _outside_of_reductions(expr):
            if isinstance(part, Read):
                self._all_reads.append(part)
                if outer:
                    self._outer_reads.append(part)
            elif isinstance(part, Reduce):
                if part.bound != 1 or not all(axis < len(self._space) for axis in part.axes):
                    raise NotOneGroup
                self._reductions.append(part)
                self._collect(part.body, False)

    def found(self) -> Canonical:
        inner = self._inner()
        lead = [i for i in range(len(self._space)) if i not in inner and self._space[i] not in (TOKENS, 1)]
        groups = self._coalesced(lead)
        if len(groups) > MAX_LOOPS + 1:
            raise NotOneGroup
        width = math.prod(self._space[axis] for axis in inner)
        if self._reductions:
            width = self._reductions[0].body.space[-1]
        middle = [math.prod(self._space[axis] for axis in group) for group in groups] or [1]
        space = (TOKENS, *middle, width)
        terms: list[tuple[int, tuple[tuple[int, int], ...]]] = [(0, ())] * len(self._space)
        for i, size in enumerate(self._space):
            if size == TOKENS:
                terms[i] = (0, ((0, 1),))
        for place, group in enumerate(groups, 1):
            terms[group[-1]] = (0, ((place, 1),))
        if inner:
            terms[inner[-1]] = (0, ((len(space) - 1, 1),))
        indices = Affine(space, tuple(terms))
        target = self._make.mapped(self._store.target, indices)
        if not isinstance(target, Read):
            raise NotOneGroup
        return Canonical(space, self._mapped(self._store.expr, indices), target)

    def _inner(self) -> list[int]:
        """The axes that are the inner one together."""
        axes = [i for i in range(len(self._space)) if self._space[i] not in (TOKENS, 1)]
        if not self._reductions:
            return self._coalesced(axes)[-1] if axes else []
        used = frozenset[int]().union(*(part.axes for part in self._reductions))
        widths = {part.body.space[-1] for part in self._reductions}
        if len(widths) != 1:
            raise NotOneGroup
        free: list[int] = []
        while axes and axes[-1] not in used:
            free.insert(0, axes.pop())
        if not free:
            return []
        if math.prod(self._space[axis] for axis in free) != widths.pop() or len(self._joined(free)) != 1:
            raise NotOneGroup
        return free

    def _joined(self, axes: Sequence[int]) -> list[list[int]]:
        return _runs(axes, self._space, self._outer_reads)

    def _coalesced(self, axes: Sequence[int]) -> list[list[int]]:
        """Neighbouring axes that all reads step through as if they were one."""
        return _runs(axes, self._space, self._all_reads)

    def _mapped(self, expr: Expr, indices: Affine) -> Expr:
        """An expression in canonical space; what is bound to a reduction becomes the inner axis."""
        match expr:
            case Pointwise():
                return self._make.pointwise(expr.code, *(self._mapped(arg, indices) for arg in expr.operands))
            case Reduce():
                inner = len(indices.space) - 1
                free = tuple(
                    (0, tuple(pair for pair in pairs if pair[0] != inner)) for _, pairs in indices.terms
                )
                inside = Affine(indices.space, (*free[: len(expr.space)], (0, ((inner, 1),))))
                return self._make.pointwise(expr.code, self._mapped(expr.body, inside))
            case _:
                return self._make.mapped(expr, indices)


def _outside_of_reductions(expr: Expr) -> list[Expr]:
    """Parts that are not inside of a reduction; reductions themselves are."""
    found: dict[int, Expr] = {}

    def visit(part: Expr) -> None:
        if id(part) not in found:
            found[id(part)] = part
            if not isinstance(part, Reduce):
                for arg in part.args:
                    visit(arg)

    visit(expr)
    return list(found.values())


def _runs(axes: Sequence[int], space: Space, reads: Sequence[Read]) -> list[list[int]]:
    """Neighbouring axes grouped where every read's strides allow it."""
    found: list[list[int]] = []
    for axis in axes:
        last = found[-1][-1] if found else -1
        if found and all(_follows(read, last, axis, space) for read in reads):
            found[-1].append(axis)
        else:
            found.append([axis])
    return found


def _follows(read: Read, one: int, other: int, space: Space) -> bool:
    return read.strides[one] == read.strides[other] * space[other]


class GroupMaker:
    """Turns canonical stores into groups of a program.

    Args:
        builder: of the program.
        slots: of its storages, by id.
    """

    def __init__(self, builder: ProgramBuilder, slots: dict[int, int]) -> None:
        self._builder, self._slots = builder, slots

    def add(self, store: Canonical) -> None:
        """Append the group of one store."""
        ops = _Registers(self, store).ops()
        *loops, middle, inner = store.space[1:]
        self._builder.group(GroupSpace(inner, middle, tuple(loops)), ops)

    def view(self, read: Read) -> Operand:
        """A read in canonical space as a view."""
        tokens, *loops, middle, inner = read.strides
        storage = read.storage
        index = self._builder.view(
            self._slots[id(storage)],
            storage.dtype,
            read.offset,
            row=tokens * storage.width,
            loops=loops,
            middle=middle,
            inner=inner,
        )
        return Operand.view(index)


class _Registers:
    """Orders the operations of one store and gives each result a register or a column."""

    def __init__(self, maker: GroupMaker, store: Canonical) -> None:
        self._maker, self._store = maker, store
        self._inner = len(store.space) - 1
        self._ops: list[Op] = []
        self._places: dict[tuple[int, bool], Operand] = {}
        self._free: dict[bool, list[int]] = {False: [], True: []}
        self._count = {False: 0, True: 0}
        self._parts = list(walk(store.expr))
        self._left = Counter(id(arg) for part in self._parts for arg in part.args)
        self._views: dict[int, Operand] = {}

    def ops(self) -> list[Op]:
        """The operations, in order; the last of them writes the target."""
        root = self._store.expr
        for part in self._parts:
            if isinstance(part, Pointwise) and not self._is_joined(part):
                self._compute(part, last=part is root)
        if not isinstance(root, Pointwise):
            target = self._maker.view(self._store.target)
            self._ops.append(Op(OpCode.COPY, target, self._source(root)))
        return self._ops

    def _source(self, root: Expr) -> Operand:
        if isinstance(root, Constant):
            return Operand.constant(root.value)
        if isinstance(root, Read):
            return self._view(root)
        raise NotOneGroup

    def _is_column(self, expr: Expr) -> bool:
        """Whether it has one value for all indices of the inner axis."""
        if isinstance(expr, Pointwise):
            return expr.code in _REDUCTIONS or all(self._is_column(arg) for arg in expr.operands)
        return self._inner not in expr.axes

    def _is_joined(self, part: Pointwise) -> bool:
        """Whether it is a product whose sum alone is wanted, which is taken at once."""
        return (
            part.code is OpCode.MUL
            and self._left[id(part)] == 1
            and not any(isinstance(arg, Constant) or self._is_column(arg) for arg in part.operands)
            and any(
                isinstance(user, Pointwise) and user.code is OpCode.SUM and user.operands == (part,)
                for user in self._parts
            )
        )

    def _compute(self, part: Pointwise, last: bool) -> None:
        code, operands = part.code, part.operands
        (first, *_) = operands
        column = self._is_column(part)
        if code is OpCode.SUM and isinstance(first, Pointwise) and self._is_joined(first):
            code, operands = OpCode.DOT, first.operands
        if code in (*_REDUCTIONS, OpCode.DOT):
            given = [self._full(arg) for arg in operands]
        else:
            given = [self._operand(arg, column) for arg in operands]
        for arg in operands:
            self._used(arg)
        target = self._store.target
        if last and not column and target.storage.dtype is torch.float32 and target.strides[-1] == 1:
            self._ops.append(Op(code, self._maker.view(target), *given))
            return
        place = self._take(column)
        self._places[id(part), column] = place
        self._ops.append(Op(code, place, *given))
        if last:
            single = target.strides[-1] == 0 or self._store.space[-1] == 1
            store = OpCode.STORE_COLUMN if column and single else OpCode.COPY
            self._ops.append(Op(store, self._maker.view(target), place))

    def _operand(self, expr: Expr, column: bool) -> Operand:
        """What an operation reads: over columns when `column`, else over the whole space."""
        if isinstance(expr, Constant):
            return Operand.constant(expr.value)
        if (id(expr), column) in self._places:
            return self._places[id(expr), column]
        if isinstance(expr, Read):
            plain = expr.storage.dtype is torch.float32 and expr.strides[-1] in (0, 1)
            if plain and not column:
                return self._view(expr)
            one_value = expr.strides[-1] == 0
            place = self._take(one_value)
            self._places[id(expr), column] = self._places[id(expr), one_value] = place
            self._ops.append(Op(OpCode.COPY, place, self._view(expr)))
            return place
        return self._places[id(expr), True]

    def _full(self, expr: Expr) -> Operand:
        """What a reduction reads: a value for every index of the inner axis."""
        found = self._operand(expr, False)
        if not self._is_column(expr):
            return found
        place = self._take(False)
        self._ops.append(Op(OpCode.COPY, place, found))
        self._free[False].append(place.index)
        return place

    def _view(self, read: Read) -> Operand:
        if id(read) not in self._views:
            self._views[id(read)] = self._maker.view(read)
        return self._views[id(read)]

    def _take(self, column: bool) -> Operand:
        free = self._free[column]
        if free:
            index = free.pop()
        else:
            index = self._count[column]
            self._count[column] += 1
        return Operand.column(index) if column else Operand.register(index)

    def _used(self, expr: Expr) -> None:
        """An operation has read it: its place is free after the last one that does."""
        self._left[id(expr)] -= 1
        if self._left[id(expr)] == 0:
            for column in {column for (key, column) in self._places if key == id(expr)}:
                place = self._places.pop((id(expr), column))
                kind = place.kind == Operand.column(0).kind
                if place.index not in self._free[kind]:
                    self._free[kind].append(place.index)
