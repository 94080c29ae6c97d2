"""Handlers of views, elementwise operators and reductions."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from braid_kernels.native.program import OpCode
from torch.fx import Node

from braid_orchestrator.segments.lowering_expressions import TOKENS, NeedsMemory
from braid_orchestrator.segments.lowering_registry import (
    OPERATORS,
    argument,
    dim_of,
    dtype_of,
    integer,
    lowers,
    no_more,
    number,
)
from braid_orchestrator.segments.lowering_rows import added_to_product, gated
from braid_orchestrator.segments.lowering_values import Complex, Unsupported, Value, size_of, value

if TYPE_CHECKING:
    from braid_orchestrator.segments.lowering import Lowered, Lowering

aten = torch.ops.aten


# ---- views ----


@lowers(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _view(lowering: Lowering, node: Node) -> Lowered:
    return lowering.views.reshape(lowering.value_of(node.args[0]), lowering.sizes(node))


@lowers(aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default)
def _same(lowering: Lowering, node: Node) -> Lowered:
    return lowering.value_of(node.args[0])


@lowers(aten.unsqueeze.default)
def _unsqueeze(lowering: Lowering, node: Node) -> Lowered:
    source = lowering.value_of(node.args[0])
    return lowering.views.insert(source, dim_of(integer(node, 1, "dim"), len(source.dims) + 1))


@lowers(aten.squeeze.dim)
def _squeeze(lowering: Lowering, node: Node) -> Lowered:
    source = lowering.value_of(node.args[0])
    dim = dim_of(integer(node, 1, "dim"), len(source.dims))
    return source if source.dims[dim] else lowering.views.drop(source, dim)


@lowers(aten.expand.default)
def _expand(lowering: Lowering, node: Node) -> Lowered:
    source = lowering.value_of(node.args[0])
    sizes = lowering.sizes(node)
    while len(source.dims) < len(sizes):
        source = lowering.views.insert(source, 0)
    for dim, (count, tokens) in enumerate(sizes):
        if size_of(source.dims[dim]) != (count, tokens):
            axes = ((TOKENS,) if tokens else ()) + ((count,) if count > 1 else ())
            if tokens and count > 1:
                raise Unsupported("an expanded dimension of which tokens are a part")
            source = lowering.views.expand(source, dim, axes)
    return source


@lowers(aten.permute.default)
def _permute(lowering: Lowering, node: Node) -> Lowered:
    source, order = lowering.value_of(node.args[0]), argument(node, 1, "dims")
    return lowering.views.permute(source, [dim_of(dim, len(source.dims)) for dim in order])


@lowers(aten.transpose.int)
def _transpose(lowering: Lowering, node: Node) -> Lowered:
    source = lowering.value_of(node.args[0])
    order = list(range(len(source.dims)))
    one, other = (dim_of(integer(node, i, "dim"), len(order)) for i in (1, 2))
    order[one], order[other] = other, one
    return lowering.views.permute(source, order)


@lowers(aten.t.default)
def _t(lowering: Lowering, node: Node) -> Lowered:
    source = lowering.value_of(node.args[0])
    return lowering.views.permute(source, range(len(source.dims))[::-1])


@lowers(aten.select.int)
def _select(lowering: Lowering, node: Node) -> Lowered:
    source = lowering.value_of(node.args[0])
    dim = dim_of(integer(node, 1, "dim"), len(source.dims))
    count, tokens = size_of(source.dims[dim])
    if tokens:
        raise Unsupported("one token is selected")
    return lowering.views.select(source, dim, dim_of(integer(node, 2, "index"), count))


@lowers(aten.slice.Tensor)
def _slice(lowering: Lowering, node: Node) -> Lowered:
    source = lowering.value_of(node.args[0])
    dim, start, step = _range(node, source, 1)
    length, tokens = lowering.sizes(node)[dim]
    if tokens:
        if start != 0 or step != 1 or size_of(source.dims[dim]) != (length, tokens):
            raise Unsupported("some tokens are taken")
        return source
    return lowering.views.slice(source, dim, start, length, step)


def _range(node: Node, source: Value, first: int) -> tuple[int, int, int]:
    """dim, start and step of a slice whose arguments begin at index `first`."""
    dim = dim_of(integer(node, first, "dim", 0), len(source.dims))
    given, step = argument(node, first + 1, "start"), integer(node, first + 3, "step", 1)
    start = 0 if given is None else given
    if isinstance(start, bool) or not isinstance(start, int):
        raise Unsupported(f"a slice that starts at {start}")
    count, tokens = size_of(source.dims[dim])
    if start < 0 and tokens:
        raise Unsupported("tokens are counted from the end")
    return dim, min(max(dim_of(start, count), 0), count) if not tokens else start, step


@lowers(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
def _split(lowering: Lowering, node: Node) -> Lowered:
    source = lowering.value_of(node.args[0])
    unbinds = node.target is aten.unbind.int
    dim = dim_of(integer(node, 1 if unbinds else 2, "dim", 0), len(source.dims))
    if size_of(source.dims[dim])[1]:
        raise Unsupported("tokens are split")
    found, start = list["Lowered"](), 0
    for part in node.meta["val"]:
        length = 1 if unbinds else part.shape[dim]
        if not isinstance(length, int):
            raise Unsupported("a split into parts of unknown size")
        one = lowering.views.slice(source, dim, start, length, 1)
        found.append(lowering.views.drop(one, dim) if unbinds else one)
        start += length
    return found


@lowers(operator.getitem)
def _getitem(lowering: Lowering, node: Node) -> Lowered:
    source, index = lowering.lowered(node.args[0]), node.args[1]
    if not isinstance(source, list) or not isinstance(index, int):
        raise Unsupported("an item of what is not a list here")
    return source[index]


VIEWS = frozenset(OPERATORS)
"""Operators that give (parts of) their operand's elements and nothing else."""


@lowers(aten.cat.default)
def _cat(lowering: Lowering, node: Node) -> Lowered:
    sources = [lowering.value_of(source) for source in argument(node, 0, "tensors")]
    if any(source.dtype != dtype_of(node) for source in sources):
        raise Unsupported("tensors of several dtypes are concatenated")
    return lowering.views.concatenate(sources, dim_of(integer(node, 1, "dim", 0), len(sources[0].dims)))


@lowers(aten.stack.default)
def _stack(lowering: Lowering, node: Node) -> Lowered:
    sources = [lowering.value_of(source) for source in argument(node, 0, "tensors")]
    if any(source.dtype != dtype_of(node) for source in sources):
        raise Unsupported("tensors of several dtypes are stacked")
    dim = dim_of(integer(node, 1, "dim", 0), len(sources[0].dims) + 1)
    return lowering.views.concatenate([lowering.views.insert(source, dim) for source in sources], dim)


@lowers(aten.select_scatter.default)
def _select_scatter(lowering: Lowering, node: Node) -> Lowered:
    base, source = (lowering.value_of(node.args[i]) for i in (0, 1))
    dim = dim_of(integer(node, 2, "dim"), len(base.dims))
    index = dim_of(integer(node, 3, "index"), size_of(base.dims[dim])[0])
    return _replaced(lowering, base, lowering.views.insert(source, dim), dim, index)


@lowers(aten.slice_scatter.default)
def _slice_scatter(lowering: Lowering, node: Node) -> Lowered:
    base, source = (lowering.value_of(node.args[i]) for i in (0, 1))
    dim, start, step = _range(node, base, 2)
    if step != 1:
        return lowering.scattered(base, source, dim, start, step)
    return _replaced(lowering, base, source, dim, start)


def _replaced(lowering: Lowering, base: Value, source: Value, dim: int, start: int) -> Value:
    """A value with a range of one dimension replaced."""
    (count, tokens), (length, _) = size_of(base.dims[dim]), size_of(source.dims[dim])
    if base.dtype == source.dtype and base.sizes == source.sizes:
        return source
    if tokens or base.dtype != source.dtype:
        raise Unsupported("tokens, or values of another dtype, are replaced")
    end, parts = start + length, [source]
    if start > 0:
        parts.insert(0, lowering.views.slice(base, dim, 0, start, 1))
    if end < count:
        parts.append(lowering.views.slice(base, dim, end, count - end, 1))
    return lowering.views.concatenate(parts, dim)


# ---- elementwise ----

_UNARY: Mapping[object, OpCode] = {
    aten.neg.default: OpCode.NEG,
    aten.abs.default: OpCode.ABS,
    aten.sqrt.default: OpCode.SQRT,
    aten.rsqrt.default: OpCode.RSQRT,
    aten.exp.default: OpCode.EXP,
    aten.log.default: OpCode.LOG,
    aten.sigmoid.default: OpCode.SIGMOID,
    aten.silu.default: OpCode.SILU,
    aten.tanh.default: OpCode.TANH,
    aten.cos.default: OpCode.COS,
    aten.sin.default: OpCode.SIN,
    aten.relu.default: OpCode.RELU,
    aten.reciprocal.default: OpCode.RECIPROCAL,
}


@lowers(*_UNARY)
def _unary(lowering: Lowering, node: Node) -> Lowered:
    return lowering.pointwise(_UNARY[node.target], dtype_of(node), lowering.value_of(node.args[0]))


@lowers(aten.gelu.default)
def _gelu(lowering: Lowering, node: Node) -> Lowered:
    kinds = {"none": OpCode.GELU, "tanh": OpCode.GELU_TANH}
    code = kinds[argument(node, 1, "approximate", "none")]
    return lowering.pointwise(code, dtype_of(node), lowering.value_of(node.args[0]))


@lowers(aten.softplus.default)
def _softplus(lowering: Lowering, node: Node) -> Lowered:
    if number(node, 1, "beta", 1) != 1 or number(node, 2, "threshold", 20) < 20:
        raise Unsupported("softplus with another beta, or a threshold where it is not linear yet")
    return lowering.pointwise(OpCode.SOFTPLUS, dtype_of(node), lowering.value_of(node.args[0]))


_BINARY: Mapping[object, OpCode] = {
    aten.mul.Tensor: OpCode.MUL,
    aten.mul.Scalar: OpCode.MUL,
    aten.div.Tensor: OpCode.DIV,
    aten.div.Scalar: OpCode.DIV,
    aten.minimum.default: OpCode.MINIMUM,
    aten.maximum.default: OpCode.MAXIMUM,
}


@lowers(*_BINARY)
def _binary(lowering: Lowering, node: Node) -> Lowered:
    no_more(node)
    if any(isinstance(lowering.known(node.args[i]), Complex) for i in (0, 1)):
        return _complex_product(lowering, node)
    if node.target is aten.mul.Tensor and (product := gated(lowering, node)) is not None:
        return product
    operands = (lowering.value_of(node.args[i]) for i in (0, 1))
    return lowering.pointwise(_BINARY[node.target], dtype_of(node), *operands)


def _complex_product(lowering: Lowering, node: Node) -> Complex:
    one, other = (lowering.known(node.args[i]) for i in (0, 1))
    if node.target not in (aten.mul.Tensor, aten.mul.Scalar):
        raise Unsupported(f"{node.target} of complex numbers")

    def product(left: Value, right: Value) -> Value:
        return lowering.pointwise(OpCode.MUL, torch.float32, left, right)

    if isinstance(one, Complex) and isinstance(other, Complex):
        real = product(one.real, other.real), product(one.imaginary, other.imaginary)
        imaginary = product(one.real, other.imaginary), product(one.imaginary, other.real)
        return Complex(
            lowering.pointwise(OpCode.SUB, torch.float32, *real),
            lowering.pointwise(OpCode.ADD, torch.float32, *imaginary),
        )
    whole, factor = (one, node.args[1]) if isinstance(one, Complex) else (other, node.args[0])
    if not isinstance(whole, Complex):
        raise Unsupported(f"{node.target} of complex numbers")
    scale = lowering.value_of(factor)
    return Complex(product(whole.real, scale), product(whole.imaginary, scale))


@lowers(aten.polar.default)
def _polar(lowering: Lowering, node: Node) -> Lowered:
    size, angle = (lowering.value_of(node.args[i]) for i in (0, 1))
    parts = (lowering.pointwise(code, torch.float32, angle) for code in (OpCode.COS, OpCode.SIN))
    return Complex(*(lowering.pointwise(OpCode.MUL, torch.float32, part, size) for part in parts))


@lowers(aten.view_as_complex.default)
def _view_as_complex(lowering: Lowering, node: Node) -> Lowered:
    source = lowering.value_of(node.args[0])
    last = len(source.dims) - 1
    return Complex(*(lowering.views.select(source, last, index) for index in (0, 1)))


@lowers(aten.view_as_real.default)
def _view_as_real(lowering: Lowering, node: Node) -> Lowered:
    source = lowering.known(node.args[0])
    if not isinstance(source, Complex):
        raise Unsupported("a view of what is not complex here")
    return lowering.as_pairs(source)


@lowers(aten.ones_like.default, aten.zeros_like.default, aten.full_like.default)
def _filled(lowering: Lowering, node: Node) -> Lowered:
    content = 1.0 if node.target is aten.ones_like.default else 0.0
    if node.target is aten.full_like.default:
        content = number(node, 1, "fill_value")
    found = lowering.value_of(content)
    dims = lowering.value_of(node.args[0]).dims
    return replace(found, dims=dims, dtype=dtype_of(node))


@lowers(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar)
def _add(lowering: Lowering, node: Node) -> Lowered:
    no_more(node, "alpha")
    one, other = (lowering.value_of(node.args[i]) for i in (0, 1))
    dtype, alpha = dtype_of(node), number(node, 2, "alpha", 1)
    if alpha != 1:
        other = lowering.pointwise(OpCode.MUL, dtype, other, lowering.value_of(alpha))
    if node.target is aten.rsub.Scalar:
        one, other = other, one
    if node.target not in (aten.add.Tensor, aten.add.Scalar):
        return lowering.pointwise(OpCode.SUB, dtype, one, other)
    added = added_to_product(lowering, node, one, other)
    return lowering.pointwise(OpCode.ADD, dtype, one, other) if added is None else added


@lowers(aten.pow.Tensor_Scalar)
def _pow(lowering: Lowering, node: Node) -> Lowered:
    source, exponent, dtype = lowering.value_of(node.args[0]), number(node, 1, "exponent"), dtype_of(node)
    if exponent == 2:
        return lowering.pointwise(OpCode.MUL, dtype, source, source)
    if exponent == 3:
        square = lowering.pointwise(OpCode.MUL, dtype, source, source)
        return lowering.pointwise(OpCode.MUL, dtype, square, source)
    if exponent == 0.5:
        return lowering.pointwise(OpCode.SQRT, dtype, source)
    if exponent == -0.5:
        return lowering.pointwise(OpCode.RSQRT, dtype, source)
    return lowering.pointwise(OpCode.POW, dtype, source, lowering.value_of(exponent))


@lowers(aten.square.default)
def _square(lowering: Lowering, node: Node) -> Lowered:
    source = lowering.value_of(node.args[0])
    return lowering.pointwise(OpCode.MUL, dtype_of(node), source, source)


_BOUNDS: Mapping[object, tuple[str, ...]] = {
    aten.clamp.default: ("min", "max"),
    aten.clamp_min.default: ("min",),
    aten.clamp_max.default: ("max",),
    aten.hardtanh.default: ("min_val", "max_val"),
}


@lowers(*_BOUNDS)
def _clamp(lowering: Lowering, node: Node) -> Lowered:
    found, dtype = lowering.value_of(node.args[0]), dtype_of(node)
    for index, name in enumerate(_BOUNDS[node.target], 1):
        if argument(node, index, name) is None and node.target is aten.clamp.default:
            continue
        limit = lowering.value_of(number(node, index, name))
        code = OpCode.MAXIMUM if name.startswith("min") else OpCode.MINIMUM
        found = lowering.pointwise(code, dtype, found, limit)
    return found


_COMPARISONS: Mapping[str, tuple[OpCode, bool, bool]] = {
    "lt": (OpCode.LESS, False, False),
    "le": (OpCode.LESS_EQUAL, False, False),
    "gt": (OpCode.LESS, True, False),
    "ge": (OpCode.LESS_EQUAL, True, False),
    "eq": (OpCode.EQUAL, False, False),
    "ne": (OpCode.EQUAL, False, True),
}
"""Operation, whether its operands change places, and whether the opposite is meant."""


@lowers(*(getattr(getattr(aten, name), kind) for name in _COMPARISONS for kind in ("Tensor", "Scalar")))
def _comparison(lowering: Lowering, node: Node) -> Lowered:
    code, swapped, opposite = _COMPARISONS[str(node.target).split(".")[1]]
    one, other = (lowering.value_of(node.args[i]) for i in (0, 1))
    if not all(value.dtype.is_floating_point for value in (one, other)):
        raise Unsupported("integers are compared")
    pair = (other, one) if swapped else (one, other)
    found = lowering.expression(code, torch.bool, *pair)
    return _not(lowering, found) if opposite else found


def _not(lowering: Lowering, source: Value) -> Value:
    return lowering.expression(OpCode.SUB, torch.bool, lowering.value_of(1.0), source)


@lowers(aten.bitwise_not.default, aten.logical_not.default)
def _negation(lowering: Lowering, node: Node) -> Lowered:
    return _not(lowering, _truth(lowering, node.args[0]))


def _truth(lowering: Lowering, node: object) -> Value:
    found = lowering.value_of(node)
    if found.dtype != torch.bool:
        raise Unsupported("truth values that are numbers")
    return found


@lowers(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(lowering: Lowering, node: Node) -> Lowered:
    source, mask, number = lowering.value_of(node.args[0]), _truth(lowering, node.args[1]), node.args[2]
    return _chosen(lowering, dtype_of(node), mask, lowering.value_of(number), source)


@lowers(aten.where.self)
def _where(lowering: Lowering, node: Node) -> Lowered:
    one, other = (lowering.value_of(node.args[i]) for i in (1, 2))
    return _chosen(lowering, dtype_of(node), _truth(lowering, node.args[0]), one, other)


def _chosen(lowering: Lowering, dtype: torch.dtype, mask: Value, one: Value, other: Value) -> Value:
    """One value where a mask is true, another elsewhere."""
    kept = lowering.pointwise(OpCode.KEEP, dtype, one, mask)
    return lowering.pointwise(
        OpCode.ADD, dtype, kept, lowering.pointwise(OpCode.KEEP, dtype, other, _not(lowering, mask))
    )


@lowers(aten._to_copy.default)
def _to_copy(lowering: Lowering, node: Node) -> Lowered:
    no_more(node, "dtype", "layout", "device", "memory_format")
    source, fake = lowering.value_of(node.args[0]), node.meta["val"]
    if fake.dtype == torch.bool and source.dtype.is_floating_point and fake.device.type == "cpu":
        return _not(lowering, lowering.expression(OpCode.EQUAL, torch.bool, source, lowering.value_of(0.0)))
    if fake.device.type != "cpu" or fake.dtype not in (torch.float32, torch.bfloat16, source.dtype):
        raise Unsupported(f"a conversion of {source.dtype} to {fake.dtype}")
    return replace(source, dtype=fake.dtype)


# ---- reductions ----


def _over(lowering: Lowering, source: Value, dims: Sequence[int], code: OpCode, keep: bool) -> Value:
    """A reduction of some dimensions."""
    if not dims or any(TOKENS in source.dims[dim] for dim in dims):
        raise Unsupported("tokens are reduced")
    kept = [dim for dim in range(len(source.dims)) if dim not in dims]
    dims_left = range(len(source.dims)) if keep else kept
    left = tuple(() if dim in dims else source.dims[dim] for dim in dims_left)
    if not any(source.dims[dim] for dim in dims):
        return replace(source, dims=left)
    moved = lowering.views.permute(source, [*kept, *dims])
    try:
        body = _joined(lowering, moved, len(kept))
    except NeedsMemory:
        body = _joined(lowering, lowering.in_dense_memory(moved), len(kept))
    return value(left, lowering.make.reduce(code, body.whole, 1), source.dtype)


def _joined(lowering: Lowering, source: Value, first: int) -> Value:
    """A value whose dimensions from `first` on are one axis."""
    axes = tuple(size for dim in source.dims[first:] for size in dim)
    return lowering.views.one_axis(replace(source, dims=(*source.dims[:first], axes)), first)


def _mean(lowering: Lowering, source: Value, dims: Sequence[int], keep: bool = True) -> Value:
    count = math.prod(size_of(source.dims[dim])[0] for dim in dims)
    total = _over(lowering, source, dims, OpCode.SUM, keep)
    return lowering.pointwise(OpCode.MUL, source.dtype, total, lowering.value_of(1.0 / count))


@lowers(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default)
def _reduction(lowering: Lowering, node: Node) -> Lowered:
    no_more(node, "dim", "keepdim", "dtype")
    source, given = lowering.value_of(node.args[0]), argument(node, 1, "dim")
    keep = bool(argument(node, 2, "keepdim", False))
    if not isinstance(given, list | tuple) or not all(isinstance(dim, int) for dim in given):
        raise Unsupported(f"a reduction over {given}")
    if not source.dtype.is_floating_point or dtype_of(node) not in (torch.float32, torch.bfloat16):
        raise Unsupported(f"a reduction of {source.dtype} to {dtype_of(node)}")
    source = replace(source, dtype=dtype_of(node))
    dims = [dim_of(dim, len(source.dims)) for dim in given]
    if node.target is aten.mean.dim:
        return _mean(lowering, source, dims, keep)
    code = OpCode.SUM if node.target is aten.sum.dim_IntList else OpCode.LARGEST
    return _over(lowering, source, dims, code, keep)


@lowers(aten.max.dim)
def _max(lowering: Lowering, node: Node) -> Lowered:
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        raise Unsupported("where a maximum is")
    source = lowering.value_of(node.args[0])
    dim = dim_of(integer(node, 1, "dim"), len(source.dims))
    found = _over(lowering, source, [dim], OpCode.LARGEST, bool(argument(node, 2, "keepdim", False)))
    if found.sizes != lowering.sizes_of(node.meta["val"][0]):
        raise Unsupported("a maximum of another shape")
    return [found, lowering.opaque]


@lowers(aten.native_layer_norm.default)
def _layer_norm(lowering: Lowering, node: Node) -> Lowered:
    source = lowering.value_of(node.args[0])
    count, dtype = len(argument(node, 1, "normalized_shape")), source.dtype
    dims = range(len(source.dims) - count, len(source.dims))
    centred = lowering.pointwise(OpCode.SUB, dtype, source, _mean(lowering, source, dims))
    variance = _mean(lowering, lowering.pointwise(OpCode.MUL, dtype, centred, centred), dims)
    shifted = lowering.pointwise(OpCode.ADD, dtype, variance, lowering.value_of(number(node, 4, "eps")))
    found = lowering.pointwise(OpCode.MUL, dtype, centred, lowering.pointwise(OpCode.RSQRT, dtype, shifted))
    for index, code in ((2, OpCode.MUL), (3, OpCode.ADD)):
        if node.args[index] is not None:
            found = lowering.pointwise(code, dtype, found, lowering.value_of(node.args[index]))
    if found.sizes != tuple(lowering.sizes_of(node.meta["val"][0])) or dtype != node.meta["val"][0].dtype:
        raise Unsupported("a layer norm of another shape or dtype")
    return [found, lowering.opaque, lowering.opaque]


@lowers(aten._softmax.default)
def _softmax(lowering: Lowering, node: Node) -> Lowered:
    source, dtype = lowering.value_of(node.args[0]), dtype_of(node)
    dim = dim_of(integer(node, 1, "dim"), len(source.dims))
    largest = _over(lowering, source, [dim], OpCode.LARGEST, True)
    weights = lowering.pointwise(OpCode.EXP, dtype, lowering.pointwise(OpCode.SUB, dtype, source, largest))
    return lowering.pointwise(OpCode.DIV, dtype, weights, _over(lowering, weights, [dim], OpCode.SUM, True))
