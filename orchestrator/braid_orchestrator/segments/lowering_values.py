"""Tensors of a traced graph as expressions, and what views do to them.

A value's dimensions are those of its tensor, each a product of axes of the expression's space (none for a
dimension of size 1), outermost first: [T·8, 64] may be ((T, 8), (64,)). A tensor that was concatenated is a
value in pieces along one axis; elementwise operations go through the pieces, so that nothing is copied
until the whole is stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from braid_orchestrator.segments.lowering_expressions import (
    TOKENS,
    Affine,
    Constant,
    Expr,
    Expressions,
    NeedsMemory,
    Pointwise,
    Read,
    Reduce,
    Space,
    walk,
)

Term = tuple[int, tuple[tuple[int, int], ...]]
Dims = tuple[tuple[int, ...], ...]
Size = tuple[int, bool]
"""A factor, and whether the number of tokens is another."""


class Unsupported(Exception):
    """An operator, or arguments of one, that is not lowered."""


@dataclass(frozen=True)
class Piece:
    """An expression over the part of a space that begins at `start` of the value's axis."""

    start: int
    expr: Expr


@dataclass(frozen=True)
class Value:
    """A tensor of the step."""

    dims: Dims
    pieces: tuple[Piece, ...]
    dtype: torch.dtype
    axis: int = -1
    """Along which it is in pieces; -1: it is one."""

    @property
    def space(self) -> Space:
        """All axes."""
        return tuple(size for dim in self.dims for size in dim)

    @property
    def whole(self) -> Expr:
        """Its one expression. Raises NeedsMemory where it is in pieces."""
        if self.axis >= 0:
            raise NeedsMemory
        return self.pieces[0].expr

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Of its dimensions."""
        return tuple(size_of(dim) for dim in self.dims)


def size_of(dim: Sequence[int]) -> Size:
    """The size of a dimension that is a product of axes."""
    return math.prod(size for size in dim if size != TOKENS), TOKENS in dim


@dataclass(frozen=True)
class Complex:
    """A tensor of complex numbers, of two values with its dimensions."""

    real: Value
    imaginary: Value


def value(dims: Dims, expr: Expr, dtype: torch.dtype) -> Value:
    """A value in one piece."""
    return Value(dims, (Piece(0, expr),), dtype)


class Views:
    """View operations on values.

    Every one raises NeedsMemory where its source has to be stored first, and Unsupported for a view that
    mixes tokens.
    """

    def __init__(self, make: Expressions) -> None:
        self.make = make

    def reshape(self, source: Value, sizes: Sequence[Size]) -> Value:
        """The same elements in the same order under other dimensions."""
        if math.prod(size for size, _ in sizes) != size_of(source.space)[0]:
            raise Unsupported("a view changes the number of elements")
        axes, dims, at = list(source.space), list[tuple[int, ...]](), 0
        for size, tokens in sizes:
            first = at
            while size > 1 or tokens:
                if at == len(axes):
                    raise Unsupported("a view takes more axes than there are")
                axis = axes[at]
                if axis == TOKENS:
                    if not tokens:
                        raise Unsupported("a view mixes tokens with other dimensions")
                    tokens = False
                elif size % axis == 0:
                    size //= axis
                elif axis % size == 0:
                    source = self._split(source, at, (size, axis // size))
                    axes[at : at + 1] = [size, axis // size]
                    size = 1
                else:
                    source = self._merge(source, at)
                    axes[at : at + 2] = [axes[at] * axes[at + 1]]
                    continue
                at += 1
            dims.append(tuple(axes[first:at]))
        return replace(source, dims=tuple(dims))

    def permute(self, source: Value, order: Sequence[int]) -> Value:
        """Dimensions in another order."""
        first = [sum(map(len, source.dims[:i])) for i in range(len(source.dims))]
        axes = [first[dim] + i for dim in order for i in range(len(source.dims[dim]))]
        space = tuple(source.space[axis] for axis in axes)
        place = {axis: i for i, axis in enumerate(axes)}
        terms = tuple((0, ((place[axis], 1),)) for axis in range(len(axes)))
        moved = self._each(source, lambda own: Affine(tuple(own[axis] for axis in axes), terms))
        dims = tuple(source.dims[dim] for dim in order)
        assert_space(space, dims)
        return replace(moved, dims=dims, axis=place[source.axis] if source.axis >= 0 else -1)

    def insert(self, source: Value, dim: int) -> Value:
        """A new dimension of size 1 before `dim`."""
        return replace(source, dims=(*source.dims[:dim], (), *source.dims[dim:]))

    def drop(self, source: Value, dim: int) -> Value:
        """Without a dimension of size 1."""
        if source.dims[dim]:
            raise Unsupported("a dimension that is dropped has more than one element")
        return replace(source, dims=source.dims[:dim] + source.dims[dim + 1 :])

    def expand(self, source: Value, dim: int, axes: tuple[int, ...]) -> Value:
        """A dimension of size 1 repeated."""
        if source.dims[dim]:
            raise Unsupported("a dimension that is repeated has more than one element")
        at, count = sum(map(len, source.dims[:dim])), len(axes)

        def indices(own: Space) -> Affine:
            terms = tuple((0, ((i if i < at else i + count, 1),)) for i in range(len(own)))
            return Affine((*own[:at], *axes, *own[at:]), terms)

        found = self._each(source, indices)
        dims = (*source.dims[:dim], axes, *source.dims[dim + 1 :])
        return replace(found, dims=dims, axis=source.axis + count if source.axis >= at else source.axis)

    def select(self, source: Value, dim: int, index: int) -> Value:
        """One index of a dimension, which goes."""
        axes = source.dims[dim]
        if TOKENS in axes:
            raise Unsupported("one token is selected")
        at, found = sum(map(len, source.dims[:dim])), source
        for position in range(len(axes)):
            below = math.prod(axes[position + 1 :])
            found = self._pick(found, at, index // below)
            index %= below
        return replace(found, dims=source.dims[:dim] + source.dims[dim + 1 :])

    def slice(self, source: Value, dim: int, start: int, length: int, step: int) -> Value:
        """Every step-th index of a dimension, from `start`."""
        axes = source.dims[dim]
        at = sum(map(len, source.dims[:dim]))
        if TOKENS in axes:
            raise Unsupported("some tokens are taken")
        if (length, step) == (size_of(axes)[0], 1):
            return source
        if length == 1:
            return self.insert(self.select(source, dim, start), dim)
        below = math.prod(axes[1:])
        if len(axes) > 1 and step == 1 and start % below == 0 and length % below == 0:
            start, length = start // below, length // below
            if length == 1:
                found = self._pick(source, at, start)
                return replace(found, dims=(*source.dims[:dim], axes[1:], *source.dims[dim + 1 :]))
        else:
            while len(axes) > 1:
                source = self._merge(source, at)
                axes = (axes[0] * axes[1], *axes[2:])
        found = self._cut(source, at, start, length, step)
        return replace(found, dims=(*source.dims[:dim], (length, *axes[1:]), *source.dims[dim + 1 :]))

    def concatenate(self, sources: Sequence[Value], dim: int) -> Value:
        """Values one behind the other along a dimension."""
        if any(TOKENS in source.dims[dim] for source in sources):
            raise Unsupported("tokens are concatenated")
        sources = [source for source in sources if size_of(source.dims[dim])[0]] or sources[:1]
        if len(sources) == 1:
            return sources[0]
        sources = [self.one_axis(source, dim) for source in sources]
        sources = self.aligned(sources, skip=dim)
        at, start, pieces = sum(map(len, sources[0].dims[:dim])), 0, list[Piece]()
        for source in sources:
            if source.axis not in (-1, at):
                raise NeedsMemory
            pieces += (Piece(start + piece.start, piece.expr) for piece in source.pieces)
            start += source.dims[dim][0]
        dims = (*sources[0].dims[:dim], (start,), *sources[0].dims[dim + 1 :])
        return Value(dims, tuple(pieces), sources[0].dtype, at)

    def aligned(self, values: Sequence[Value], skip: int = -1) -> list[Value]:
        """Values broadcast against one another: the same axes in every dimension but `skip`."""
        count = max(len(one.dims) for one in values)
        found = [replace(one, dims=((),) * (count - len(one.dims)) + one.dims) for one in values]
        for dim in range(count):
            if dim == skip:
                continue
            axes: tuple[int, ...] = ()
            for one in found:
                axes = _refined(axes, one.dims[dim])
            found = [self._with_axes(one, dim, axes) for one in found]
        return found

    def _with_axes(self, source: Value, dim: int, axes: tuple[int, ...]) -> Value:
        """A dimension divided into these axes, repeated if it has one element."""
        if source.dims[dim] == axes:
            return source
        if not source.dims[dim]:
            return self.expand(source, dim, axes)
        at = sum(map(len, source.dims[:dim]))
        sizes = list(source.dims[dim])
        for i, axis in enumerate(axes):
            if sizes[i] != axis:
                source = self._split(source, at + i, (axis, sizes[i] // axis))
                sizes[i : i + 1] = [axis, sizes[i] // axis]
        return replace(source, dims=(*source.dims[:dim], axes, *source.dims[dim + 1 :]))

    def one_axis(self, source: Value, dim: int) -> Value:
        """A dimension as exactly one axis."""
        if not source.dims[dim]:
            return self.expand(source, dim, (1,))
        at = sum(map(len, source.dims[:dim]))
        while len(source.dims[dim]) > 1:
            merged = self._merge(source, at)
            axes = source.dims[dim]
            dims = (*source.dims[:dim], (axes[0] * axes[1], *axes[2:]), *source.dims[dim + 1 :])
            source = replace(merged, dims=dims)
        return source

    def cut_at(self, source: Value, axis: int, start: int, length: int) -> Expr:
        """The expression of a part of an axis, which lies in one piece."""
        if source.axis not in (-1, axis):
            raise NeedsMemory
        for piece in source.pieces:
            if isinstance(piece.expr, Constant):
                return piece.expr
            size = piece.expr.space[axis]
            if piece.start <= start and start + length <= piece.start + size:
                return self._part(piece.expr, axis, start - piece.start, length, 1)
        raise NeedsMemory

    def _each(self, source: Value, indices: Callable[[Space], Affine]) -> Value:
        """Every piece over another space, of which the axis in pieces is an axis too."""
        pieces = [
            Piece(piece.start, self.make.mapped(piece.expr, indices(piece.expr.space)))
            for piece in source.pieces
            if not isinstance(piece.expr, Constant)
        ]
        return replace(source, pieces=tuple(pieces)) if pieces else source

    def _split(self, source: Value, at: int, sizes: tuple[int, int]) -> Value:
        """An axis as two; dimensions are the caller's to mend."""
        if source.axis == at:
            raise NeedsMemory

        def indices(own: Space) -> Affine:
            terms: list[Term] = [(0, ((i if i < at else i + 1, 1),)) for i in range(len(own))]
            terms[at] = (0, ((at, sizes[1]), (at + 1, 1)))
            return Affine((*own[:at], *sizes, *own[at + 1 :]), tuple(terms))

        found = self._each(source, indices)
        return replace(found, axis=source.axis + 1 if source.axis > at else source.axis)

    def _merge(self, source: Value, at: int) -> Value:
        """An axis and the next as one; dimensions are the caller's to mend."""
        space = source.pieces[0].expr.space
        if at + 1 >= len(space) or TOKENS in space[at : at + 2]:
            raise Unsupported("a view mixes tokens with other dimensions")
        if source.axis in (at, at + 1):
            raise NeedsMemory
        for piece in source.pieces:
            if not mergeable(piece.expr, at):
                raise NeedsMemory

        def indices(own: Space) -> Affine:
            terms: list[Term] = [(0, ((i if i <= at else i - 1, 1),)) for i in range(len(own))]
            # Where they can be merged, the second's stride is that of both; the first has no part in it.
            terms[at] = (0, ())
            return Affine((*own[:at], own[at] * own[at + 1], *own[at + 2 :]), tuple(terms))

        found = self._each(source, indices)
        return replace(found, axis=source.axis - 1 if source.axis > at else source.axis)

    def _pick(self, source: Value, at: int, index: int) -> Value:
        """One index of an axis, which goes; dimensions are the caller's to mend."""

        def indices(own: Space, index: int) -> Affine:
            terms: list[Term] = [(0, ((i if i < at else i - 1, 1),)) for i in range(len(own))]
            terms[at] = (index, ())
            return Affine((*own[:at], *own[at + 1 :]), tuple(terms))

        if source.axis == at:
            piece = next(p for p in source.pieces if p.start <= index < p.start + p.expr.space[at])
            expr = self._computed_once(piece.expr)
            mapped = self.make.mapped(expr, indices(expr.space, index - piece.start))
            return replace(source, pieces=(Piece(0, mapped),), axis=-1)
        for piece in source.pieces:
            self._computed_once(piece.expr)
        found = self._each(source, lambda own: indices(own, index))
        return replace(found, axis=source.axis - 1 if source.axis > at else source.axis)

    def _cut(self, source: Value, at: int, start: int, length: int, step: int) -> Value:
        """Some indices of an axis; dimensions are the caller's to mend."""
        if source.axis != at:
            for piece in source.pieces:
                self._computed_once(piece.expr)
            return self._each(source, lambda own: _taken(own, at, start, length, step))
        if step != 1:
            raise NeedsMemory
        pieces = []
        for piece in source.pieces:
            first = max(start, piece.start)
            last = min(start + length, piece.start + piece.expr.space[at])
            if first < last:
                part = self._part(piece.expr, at, first - piece.start, last - first, 1)
                pieces.append(Piece(first - start, part))
        return replace(source, pieces=tuple(pieces), axis=at if len(pieces) > 1 else -1)

    def _part(self, expr: Expr, at: int, start: int, length: int, step: int) -> Expr:
        if (start, length, step) == (0, expr.space[at], 1):
            return expr
        return self.make.mapped(self._computed_once(expr), _taken(expr.space, at, start, length, step))

    def _computed_once(self, expr: Expr) -> Expr:
        """Parts of a reduction's result are read from memory, rather than each computing it anew."""
        if expr.reduces:
            raise NeedsMemory
        return expr


def _taken(own: Space, at: int, start: int, length: int, step: int) -> Affine:
    terms = [(0, ((i, 1),)) for i in range(len(own))]
    terms[at] = (start, ((at, step),))
    return Affine((*own[:at], length, *own[at + 1 :]), tuple(terms))


def mergeable(expr: Expr, at: int) -> bool:
    """Whether an axis and the next can be one in everything that the expression reads."""
    for part in walk(expr):
        if isinstance(part, Read):
            if part.strides[at] != part.strides[at + 1] * part.space[at + 1]:
                return False
        elif not isinstance(part, Pointwise | Constant | Reduce):
            return False
    return True


def _refined(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """Axes that both divisions of a dimension can be divided into; an empty one is repeated."""
    if not one or not other:
        return one or other
    if size_of(one) != size_of(other):
        raise Unsupported(f"sizes {one} and {other} are not alike")
    left, right, found = list(one), list(other), list[int]()
    while left:
        a, b = left.pop(0), right.pop(0)
        if TOKENS in (a, b) and a != b:
            raise Unsupported("dimensions divide into tokens differently")
        small, large = min(a, b), max(a, b)
        if a != b and large % small:
            raise Unsupported(f"dimensions divide differently: {one} and {other}")
        found.append(small)
        if a > small:
            left.insert(0, a // small)
        if b > small:
            right.insert(0, b // small)
    return tuple(found)


def assert_space(space: Space, dims: Dims) -> None:
    """Raise Unsupported where dimensions are not made of the axes of a space."""
    if space != tuple(size for dim in dims for size in dim):
        raise Unsupported("dimensions are not the axes of the space")
