"""What a segment's lowering has at hand: expressions, the memory they are stored to, the steps so far."""

from __future__ import annotations

import itertools

import torch
from braid_kernels.native.program import OpCode
from torch.fx import Node

from braid_orchestrator.segments.lowering_expressions import (
    TOKENS,
    Constant,
    Expr,
    Expressions,
    NeedsMemory,
    Place,
    Read,
    Storage,
    dense,
    elements,
)
from braid_orchestrator.segments.lowering_steps import Matrix, Part, Product, Step, Store
from braid_orchestrator.segments.lowering_values import (
    Complex,
    Dims,
    Piece,
    Unsupported,
    Value,
    Views,
    size_of,
    value,
)

COMPUTED = (torch.float32, torch.bfloat16)
"""Dtypes of what is computed; arithmetic is float32, what is stored is rounded."""
KEPT = (*COMPUTED, torch.int64)
"""Dtypes of what lies in memory."""
# Weights that an expression reads are kept in float32 up to this many elements.
_WIDENED = 1 << 20


class Workspace:
    """Makes values, puts them into memory, and appends the steps that do."""

    def __init__(self) -> None:
        self.make = Expressions()
        self.views = Views(self.make)
        self.steps: list[Step] = []
        self.products: dict[int, tuple[Product, Node]] = {}
        """Products of one part, and their nodes, by their storage's id."""
        self._stored: dict[tuple[object, ...], Storage] = {}
        self._constants: dict[int, Storage] = {}
        self._weights: list[torch.Tensor] = []
        """Those in `_constants`, or others could get their ids."""

    def pointwise(self, code: OpCode, dtype: torch.dtype, *values: Value) -> Value:
        """An elementwise operation on values, broadcast against one another."""
        if dtype not in COMPUTED or any(one.dtype not in (*KEPT, torch.bool) for one in values):
            raise Unsupported(f"arithmetic in {dtype}")
        return self.expression(code, dtype, *values)

    def expression(self, code: OpCode, dtype: torch.dtype, *values: Value) -> Value:
        """As `pointwise`, for any dtype: truth values are 1 and 0."""
        found = self.views.aligned(values)
        axis = max(one.axis for one in found)
        if axis < 0:
            return value(found[0].dims, self._computed(code, *(one.whole for one in found)), dtype)
        borders = {0, found[0].space[axis]}
        for one in found:
            borders.update(piece.start for piece in one.pieces if one.axis == axis)
        ordered, pieces = sorted(borders), list[Piece]()
        for start, end in itertools.pairwise(ordered):
            parts = (self.views.cut_at(one, axis, start, end - start) for one in found)
            pieces.append(Piece(start, self._computed(code, *parts)))
        return Value(found[0].dims, tuple(pieces), dtype, axis)

    def _computed(self, code: OpCode, *operands: Expr) -> Expr:
        others = [one for one in operands if not isinstance(one, Constant)]
        if not others:
            raise Unsupported("an operation on numbers alone")
        if code is OpCode.MUL and any(isinstance(one, Constant) and one.value == 1.0 for one in operands):
            return others[0]
        return self.make.pointwise(code, *operands)

    def weight(self, weight: torch.Tensor) -> Value:
        """A weight as a value: a number where it has one element."""
        if weight.dtype not in KEPT or not weight.is_cpu:
            raise Unsupported(f"a weight of {weight.dtype} on {weight.device}")
        if weight.numel() == 1 and weight.is_floating_point():
            dims: Dims = ((),) * weight.dim()
            return value(dims, self.make.constant(float(weight)), weight.dtype)
        dims = tuple(() if length == 1 else (length,) for length in weight.shape)
        space = tuple(length for dim in dims for length in dim)
        read = self.make.read(self._constant(weight), 0, dense(space), space)
        return value(dims, read, weight.dtype)

    def _constant(self, weight: torch.Tensor) -> Storage:
        key = id(weight)
        if key not in self._constants:
            kept = weight.detach().contiguous()
            if kept.dtype is torch.bfloat16 and kept.numel() <= _WIDENED:
                kept = kept.float()
            found = Storage(kept.numel(), kept.dtype, Place.CONSTANT, tensor=kept)
            self._constants[key] = found
            self._weights.append(weight)
        return self._constants[key]

    def as_pairs(self, source: Complex) -> Value:
        """Complex numbers as pairs of a real and an imaginary part in a last dimension."""
        last = len(source.real.dims)
        parts = (source.real, source.imaginary)
        try:
            return self.views.concatenate([self.views.insert(part, last) for part in parts], last)
        except NeedsMemory:
            stored = [self.views.insert(self.in_dense_memory(part), last) for part in parts]
            return self.views.concatenate(stored, last)

    def from_pairs(self, source: Value) -> Complex:
        """Complex numbers of which the last dimension has both parts."""
        last = len(source.dims) - 1
        return Complex(*(self.views.select(source, last, index) for index in (0, 1)))

    def in_memory(self, source: Value) -> Value:
        """A value that is one read of memory."""
        if source.axis < 0 and isinstance(source.whole, Read) and source.whole.storage.dtype == source.dtype:
            return source
        return self.in_dense_memory(source)

    def in_dense_memory(self, source: Value) -> Value:
        """A value whose elements lie in the order of its dimensions, a token's together."""
        space = source.space
        found = source.whole if source.axis < 0 else None
        if isinstance(found, Read) and is_dense(found) and found.storage.dtype == source.dtype:
            return source
        key = (source.axis, source.dtype, *((piece.start, id(piece.expr)) for piece in source.pieces))
        if key not in self._stored:
            storage = Storage(elements(space), source.dtype, Place.CHUNK)
            self.store(source, storage)
            self._stored[key] = storage
        read = self.make.read(self._stored[key], 0, dense(space), space)
        return value(source.dims, read, source.dtype)

    def store(self, source: Value, storage: Storage) -> None:
        """Write a value to memory, densely."""
        if source.dtype not in COMPUTED:
            raise Unsupported(f"{source.dtype} is stored")
        if TOKENS not in source.space:
            raise Unsupported("a value that is the same for every token is stored")
        strides = dense(source.space)
        for piece in source.pieces:
            offset = piece.start * strides[source.axis] if source.axis >= 0 else 0
            space = tuple(
                piece.expr.space[axis] if axis == source.axis else length
                for axis, length in enumerate(source.space)
            )
            self.steps.append(Store(piece.expr, self.make.read(storage, offset, strides, space)))

    def matrix(self, source: Value, dtype: torch.dtype) -> Matrix:
        """A value [rows, n] as rows in memory: their elements together, the rows evenly apart."""
        if source.dtype != dtype or len(source.dims) != 2 or source.dims[0][:1] != (TOKENS,):
            raise Unsupported(f"a product of {source.sizes} {source.dtype} with a weight of {dtype}")
        for found in (self.in_memory(source), self.in_dense_memory(source)):
            read = found.whole
            matrix = _as_matrix(read, len(found.dims[0])) if isinstance(read, Read) else None
            if matrix is not None:
                return matrix
        raise Unsupported("rows that do not lie evenly")

    def rows(self, source: Value, dtype: torch.dtype) -> tuple[Matrix, int]:
        """A value [.., n] as rows in memory, and n."""
        count, tokens = size_of(source.dims[-1])
        if tokens or not count:
            raise Unsupported("rows of tokens")
        per_token = elements(source.space) // count
        return self.matrix(self.views.reshape(source, ((per_token, True), (count, False))), dtype), count

    def new_rows(self, like: Value, count: int, dtype: torch.dtype) -> tuple[Matrix, Value]:
        """New memory for rows of `count` with the other dimensions of a value."""
        dims = (*like.dims[:-1], (count,) if count > 1 else ())
        space = tuple(length for dim in dims for length in dim)
        if space[:1] != (TOKENS,):
            raise Unsupported("rows that are not of one token after the other")
        storage = Storage(elements(space), dtype, Place.CHUNK)
        read = self.make.read(storage, 0, dense(space), space)
        return Matrix(storage, 0, count, storage.width // count), value(dims, read, dtype)

    def linear(self, node: Node, x: Value, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Value:
        """x [rows, k] times weight [n, k] and a bias [n]: a product of its own, for now."""
        dtype = weight.dtype
        if dtype not in COMPUTED or weight.dim() != 2 or (bias is not None and bias.dtype != dtype):
            raise Unsupported(f"a product with a weight of {dtype}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise Unsupported(f"a bias of {list(bias.shape)}")
        matrix, columns = self.matrix(x, dtype), weight.shape[0]
        storage = Storage(matrix.per_token * columns, dtype, Place.CHUNK)
        self.add_product(node, Product(matrix, (Part((weight,), storage, bias),)))
        dims = (x.dims[0], (columns,) if columns > 1 else ())
        space = tuple(size for dim in dims for size in dim)
        return value(dims, self.make.read(storage, 0, dense(space), space), dtype)

    def add_product(self, node: Node, product: Product) -> None:
        """Append a product of one part."""
        self.steps.append(product)
        self.products[id(product.parts[0].out)] = (product, node)

    def product_of(self, source: Value) -> tuple[Product, Node] | None:
        """The product that a value is all of, with nothing done to it."""
        if source.axis >= 0 or not isinstance(source.whole, Read) or not is_dense(source.whole):
            return None
        return self.products.get(id(source.whole.storage))

    def replace_product(self, old: Product, node: Node, new: Product) -> None:
        """A product at the end of the steps instead of one that nothing has used."""
        self.drop_product(old)
        self.add_product(node, new)

    def drop_product(self, product: Product) -> None:
        """Forget a product that nothing has used and nothing will."""
        self.steps.remove(product)
        del self.products[id(product.parts[0].out)]

    def scattered(self, base: Value, source: Value, dim: int, start: int, step: int) -> Value:
        """A value, in new memory, of which every step-th index of a dimension is another's."""
        if base.dtype != source.dtype:
            raise Unsupported("values of another dtype replace some")
        space, storage = base.space, Storage(elements(base.space), base.dtype, Place.CHUNK)
        found = value(base.dims, self.make.read(storage, 0, dense(space), space), base.dtype)
        target = self.views.slice(found, dim, start, size_of(source.dims[dim])[0], step)
        place, given = self.views.aligned((target, source))
        if not isinstance(place.whole, Read) or place.space != target.space:
            raise NeedsMemory
        expr = given.whole
        self.store(base, storage)
        self.steps.append(Store(expr, place.whole))
        return found


def is_dense(read: Read) -> bool:
    """Whether a read is all of its storage, in order."""
    return (
        read.offset == 0
        and read.strides == dense(read.space)
        and TOKENS in read.space
        and elements(read.space) == read.storage.width
    )


def _as_matrix(read: Read, row_axes: int) -> Matrix | None:
    """A read [rows, n] as evenly spaced rows; `row_axes` axes are rows, the first of them the tokens."""
    strides, space = read.strides, read.space
    columns, at = 1, 1
    for axis in reversed(range(row_axes, len(space))):
        if strides[axis] != columns:
            return None
        columns *= space[axis]
    if row_axes == 1:
        return Matrix(read.storage, read.offset, read.storage.width) if strides[0] == 1 else None
    stride = strides[row_axes - 1]
    for axis in reversed(range(1, row_axes)):
        if strides[axis] != at * stride:
            return None
        at *= space[axis]
    if strides[0] != 1 or read.storage.width != at * stride or read.offset >= stride:
        return None
    return Matrix(read.storage, read.offset, stride, at)
