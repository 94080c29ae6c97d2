"""Reading torch.fx graphs; their own annotations say of most things that they may be anything."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node


def value_of(node: Node) -> Any:
    """The fake value of a node: a tensor, a size, a list of tensors; a weight's is the weight."""
    return node.meta.get("val")


def arguments(node: Node) -> tuple[Any, ...]:
    """Positional arguments of a node."""
    return tuple(node.args)


def is_size(node: Node) -> bool:
    """Whether a node's value is a size that depends on T."""
    return isinstance(value_of(node), torch.SymInt | torch.SymFloat | torch.SymBool)


def is_pure(node: Node) -> bool:
    """Whether a node is an operator of torch that gives the same for the same and changes nothing."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    return node.target.namespace == "aten" and not node.target._schema.is_mutable and not random


def storage_of(node: Node) -> int | None:
    """Which memory a node's tensor lies in; None for lists, whose items are nodes of their own."""
    value = value_of(node)
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def outputs_of(module: GraphModule) -> tuple[Node, ...]:
    """What a module gives, in order."""
    (output,) = module.graph.find_nodes(op="output")
    (found,) = arguments(output)
    return (found,) if isinstance(found, Node) else tuple(found)


def weights_of(module: GraphModule) -> dict[Node, torch.Tensor]:
    """The nodes that stand for weights, with their tensors."""
    return {node: getattr(module, str(node.target)) for node in module.graph.find_nodes(op="get_attr")}
