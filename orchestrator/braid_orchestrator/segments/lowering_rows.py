"""Handlers of what takes whole rows: products, look-ups, elements by index, mixtures of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from braid_kernels.native.program import ACTIVATIONS, ChoiceKind
from torch.fx import Node

from braid_orchestrator.segments.lowering_expressions import TOKENS, Place, Read, Storage
from braid_orchestrator.segments.lowering_registry import (
    argument,
    dim_of,
    dtype_of,
    integer,
    lowers,
    number,
)
from braid_orchestrator.segments.lowering_steps import Choice, Lookup, Mixture, Part, Product
from braid_orchestrator.segments.lowering_values import Unsupported, Value, size_of, value

if TYPE_CHECKING:
    from braid_orchestrator.segments.lowering import Lowered, Lowering

aten = torch.ops.aten


@lowers(aten.mm.default)
def _mm(lowering: Lowering, node: Node) -> Lowered:
    weight = lowering.weight_of(node.args[1])
    return lowering.linear(node, lowering.value_of(node.args[0]), weight.t())


@lowers(aten.addmm.default)
def _addmm(lowering: Lowering, node: Node) -> Lowered:
    if number(node, 3, "beta", 1) != 1 or number(node, 4, "alpha", 1) != 1:
        raise Unsupported("a scaled product")
    bias, weight = lowering.weight_of(node.args[0]), lowering.weight_of(node.args[2])
    return lowering.linear(node, lowering.value_of(node.args[1]), weight.t(), bias)


@lowers(aten.embedding.default)
def _embedding(lowering: Lowering, node: Node) -> Lowered:
    return _lookup(lowering, lowering.weight_of(node.args[0]), lowering.value_of(node.args[1]))


@lowers(aten.index.Tensor)
def _index(lowering: Lowering, node: Node) -> Lowered:
    indices = node.args[1]
    if not isinstance(indices, list | tuple) or len(indices) != 1:
        raise Unsupported("an index of several dimensions")
    return _lookup(lowering, lowering.weight_of(node.args[0]), lowering.value_of(indices[0]))


def _lookup(lowering: Lowering, table: torch.Tensor, ids: Value) -> Value:
    """Rows of a weight by ids."""
    if ids.dtype != torch.int64 or ids.space != (TOKENS,) or not isinstance(ids.whole, Read):
        raise Unsupported("a look-up by something else than one id a token")
    if table.dim() != 2 or table.dtype not in (torch.float32, torch.bfloat16) or not table.is_cpu:
        raise Unsupported("a look-up in something else than a matrix of weights")
    columns = table.shape[1]
    storage = Storage(columns, table.dtype, Place.CHUNK)
    lowering.steps.append(Lookup(ids.whole, table if table.stride(1) == 1 else table.contiguous(), storage))
    dims = (*ids.dims, (columns,) if columns > 1 else ())
    space = (TOKENS, *dims[-1])
    return value(dims, lowering.make.read(storage, 0, (1, 1)[: len(space)], space), table.dtype)


# ---- elements by index ----


def _last_dim(node: Node, index: int, source: Value) -> None:
    if dim_of(integer(node, index, "dim", -1), len(source.dims)) != len(source.dims) - 1:
        raise Unsupported(f"{node.target} along another dimension than the last")


@lowers(aten.topk.default)
def _topk(lowering: Lowering, node: Node) -> Lowered:
    source, chosen = lowering.value_of(node.args[0]), integer(node, 1, "k")
    _last_dim(node, 2, source)
    if not argument(node, 3, "largest", True):
        raise Unsupported("the smallest elements")
    x, count = lowering.rows(source, source.dtype)
    values, found = lowering.new_rows(source, chosen, source.dtype)
    ids, indices = lowering.new_rows(source, chosen, torch.int64)
    lowering.steps.append(Choice(ChoiceKind.TOP, ids, values, count, chosen, x))
    return [found, indices]


@lowers(aten.gather.default)
def _gather(lowering: Lowering, node: Node) -> Lowered:
    source, indices = lowering.value_of(node.args[0]), lowering.value_of(node.args[2])
    _last_dim(node, 1, source)
    if source.sizes[:-1] != indices.sizes[:-1]:
        raise Unsupported("elements of some rows only")
    (x, count), (ids, chosen) = lowering.rows(source, source.dtype), lowering.rows(indices, torch.int64)
    values, found = lowering.new_rows(indices, chosen, source.dtype)
    lowering.steps.append(Choice(ChoiceKind.GATHER, ids, values, count, chosen, x))
    return found


@lowers(aten.scatter.value)
def _scatter(lowering: Lowering, node: Node) -> Lowered:
    source, indices = lowering.value_of(node.args[0]), lowering.value_of(node.args[2])
    given = number(node, 3, "value")
    _last_dim(node, 1, source)
    if source.sizes[:-1] != indices.sizes[:-1] or source.dtype not in (torch.float32, torch.bfloat16):
        raise Unsupported("elements of some rows only, or of another dtype")
    (ids, chosen), count = lowering.rows(indices, torch.int64), size_of(source.dims[-1])[0]
    values, found = lowering.new_rows(source, count, source.dtype)
    lowering.store(replace(source, dims=found.dims), values.storage)
    lowering.steps.append(Choice(ChoiceKind.SCATTER, ids, values, count, chosen, value=given))
    return found


@lowers("braid_experts.run.default")
def _experts(lowering: Lowering, node: Node) -> Lowered:
    hidden, indices, scores = (lowering.value_of(node.args[i]) for i in range(3))
    up, down = (lowering.weight_of(node.args[i]) for i in (3, 4))
    activation, gated = argument(node, 5, "activation"), argument(node, 6, "gated")
    (ids, chosen), inner = lowering.rows(indices, torch.int64), down.shape[-1]
    if activation not in ACTIVATIONS or up.dtype != down.dtype or dtype_of(node) != up.dtype:
        raise Unsupported(f"experts with {activation} in {up.dtype} and {down.dtype}")
    if up.shape != (len(down), inner * (2 if gated else 1), down.shape[1]) or not up.is_cpu:
        raise Unsupported(f"experts of {list(up.shape)} and {list(down.shape)}")
    (x, width), (weights, count) = lowering.rows(hidden, up.dtype), lowering.rows(scores, scores.dtype)
    if any(rows.per_token != 1 for rows in (x, ids, weights)) or count != chosen or width != down.shape[1]:
        raise Unsupported("experts of something else than tokens")
    out, found = lowering.new_rows(hidden, width, up.dtype)
    lowering.steps.append(Mixture(x, ids, weights, out.storage, chosen, up, down, activation, bool(gated)))
    return found


def added_to_product(lowering: Lowering, node: Node, one: Value, other: Value) -> Value | None:
    """The sum of a product and another value, where the product can add it before it writes."""
    for source, addend in ((one, other), (other, one)):
        found = lowering.product_of(source)
        if found is None or lowering.consumers(found[1]) != {node}:
            continue
        product, made_by = found
        (part,) = product.parts
        if part.addend is not None or addend.dtype != source.dtype or source.dtype != dtype_of(node):
            continue
        if addend.space != source.space or source.sizes != lowering.sizes(node):
            continue
        if any(read.storage is part.out for piece in addend.pieces for read in piece.expr.reads):
            continue
        rows, columns = product.x.per_token, part.columns
        shaped = lowering.views.reshape(addend, ((rows, True), (columns, False)))
        matrix = lowering.matrix(shaped, source.dtype)
        changed = replace(part, addend=matrix)
        lowering.replace_product(product, made_by, Product(product.x, (changed,)))
        return source
    return None


def gated(lowering: Lowering, node: Node) -> Value | None:
    """silu(x gate) * (x other) as one product, where nothing else uses the two."""
    for gate, other in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
        activated = lowering.origin(gate)
        if activated is None or activated.target is not aten.silu.default:
            continue
        first, second = _columns_of_product(lowering, activated.args[0]), _columns_of_product(lowering, other)
        if first is None or second is None or lowering.consumers(activated) != {node}:
            continue
        (one, weight, made), (two, other_weight, also_made) = first, second
        users = {activated, node} if one is two else {activated}
        if lowering.consumers(made) != users or (one is not two and lowering.consumers(also_made) != {node}):
            continue
        if one.x != two.x or weight.shape != other_weight.shape or dtype_of(node) != weight.dtype:
            continue
        if one is two and weight.shape[0] + other_weight.shape[0] != one.parts[0].columns:
            continue
        storage = Storage(weight.shape[0], weight.dtype, Place.CHUNK)
        dims = ((TOKENS,), tuple(size for size in (storage.width,) if size > 1))
        space = (TOKENS, *dims[1])
        read = lowering.make.read(storage, 0, (1, 1)[: len(space)], space)
        found = lowering.views.reshape(value(dims, read, weight.dtype), lowering.sizes(node))
        for product in dict.fromkeys((one, two)):
            lowering.drop_product(product)
        lowering.add_product(node, Product(one.x, (Part((weight, other_weight), storage),)))
        return found
    return None


def _columns_of_product(lowering: Lowering, node: object) -> tuple[Product, torch.Tensor, Node] | None:
    """The product that a node is some columns of, one row a token; the weight's rows for them."""
    source = lowering.value_of(node)
    read = source.pieces[0].expr
    if source.axis >= 0 or not isinstance(read, Read) or len(read.space) != 2 or read.strides != (1, 1):
        return None
    if read.space[0] != TOKENS or id(read.storage) not in lowering.products:
        return None
    product, made_by = lowering.products[id(read.storage)]
    (part,) = product.parts
    if product.gated or product.x.per_token != 1 or part.bias is not None or part.addend is not None:
        return None
    return product, part.weights[0][read.offset : read.offset + read.space[1]], made_by
