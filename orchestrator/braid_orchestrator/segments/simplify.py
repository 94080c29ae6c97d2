"""Takes out of a traced graph what need not be computed in every step, without changing a bit of it."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves

from braid_orchestrator.segments.graph import arguments, is_pure, is_size, value_of, weights_of

# Results of parameters alone that take more elements stay operators: memory is worth more than their time.
_MOST_FOLDED = 1 << 20

aten = torch.ops.aten


def simplify(module: GraphModule) -> None:
    """Fold what depends on weights alone, drop operators that do nothing, share equal ones."""
    _drop_identities(module.graph)
    _fold_constants(module)
    _share_equal(module.graph)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()


def _drop_identities(graph: Graph) -> None:
    """Products with one, and copies into a tensor of the same kind that take nothing from it."""
    for node in list(graph.nodes):
        source = _identity(node)
        if source is not None and _alike(value_of(node), value_of(source)):
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _identity(node: Node) -> Node | None:
    """The argument that an operator gives back, perhaps as another type or shape."""
    given = arguments(node)
    if node.target is aten.mul.Tensor and given[1] in (1, 1.0):
        found: Node = given[0]
    elif node.target is aten.copy.default:
        found = given[1]
    elif node.target in (aten.alias.default, aten.detach.default):
        found = given[0]
    else:
        return None
    return found


def _alike(one: torch.Tensor, other: object) -> bool:
    """Whether two tensors have the same type and shape."""
    return (
        isinstance(other, torch.Tensor)
        and one.dtype is other.dtype
        and one.device == other.device
        and len(one.shape) == len(other.shape)
        and all(str(a) == str(b) for a, b in zip(one.shape, other.shape, strict=True))
    )


def _fold_constants(module: GraphModule) -> None:
    """Compute once what depends on weights alone; views of weights stay views."""
    graph, constants = module.graph, weights_of(module)
    for node in list(graph.nodes):
        if not is_pure(node) or is_size(node) or not constants.keys() >= set(node.all_input_nodes):
            continue
        found = _computed(node, constants)
        if found is None:
            continue
        name = f"folded_{node.name}"
        module.register_buffer(name, found, persistent=False)
        with graph.inserting_before(node):
            constant = graph.get_attr(name)
        constant.meta["val"] = constants[constant] = found
        node.replace_all_uses_with(constant)
        graph.erase_node(node)


@torch.no_grad()
def _computed(node: Node, constants: Mapping[Node, torch.Tensor]) -> torch.Tensor | None:
    """A node's tensor; None where it is no tensor, or one that takes much memory of its own."""
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda source: constants[source])
    function: Any = node.target
    found = function(*args, **kwargs)
    if not isinstance(found, torch.Tensor):
        return None
    return found if found.numel() <= _MOST_FOLDED or _is_view(found, args) else None


def _is_view(found: torch.Tensor, args: Any) -> bool:
    storage = found.untyped_storage().data_ptr()
    return any(
        isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() == storage
        for leaf in tree_leaves(args)
    )


def _share_equal(graph: Graph) -> None:
    """Let equal operators on equal values be one."""
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not (is_pure(node) or node.target is operator.getitem):
            continue
        key = (node.target, _key(node.args), _key(tuple(sorted(node.kwargs.items()))))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _key(value: Any) -> Any:
    """Something hashable that is equal for equal arguments only (1, 1.0 and True are not)."""
    if isinstance(value, tuple | list):
        return tuple(_key(item) for item in value)
    if isinstance(value, slice):
        return ("slice", _key((value.start, value.stop, value.step)))
    return (type(value), str(value)) if isinstance(value, float) else (type(value), value)
