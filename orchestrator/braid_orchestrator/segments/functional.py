"""Operators that change a tensor, replaced by ones that give a new one, where that is plain to see."""

from __future__ import annotations

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from braid_orchestrator.segments.graph import arguments, storage_of, value_of


def changes(node: Node) -> bool:
    """Whether an operator changes one of its inputs."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def make_functional(module: GraphModule) -> bool:
    """Replace each such operator whose tensor is seen by nobody under another name afterwards.

    Returns:
        Whether none is left.
    """
    module.graph.eliminate_dead_code()
    places = {node: place for place, node in enumerate(module.graph.nodes)}
    done = True
    for node in [node for node in module.graph.nodes if changes(node)]:
        target = _counterpart(node)
        if target is None or _seen_otherwise(node, places):
            done = False
            continue
        changed, *_ = arguments(node)
        node.target = target
        changed.replace_all_uses_with(node, lambda user, at=places[node]: places[user] > at)
    module.recompile()
    return done


def _counterpart(node: Node) -> OpOverload | None:
    """The operator that gives what this one writes; None where there is none that gives just that."""
    target, (changed, *_) = node.target, arguments(node)
    if not isinstance(target, OpOverload):
        return None
    namespace, name = target._schema.name.split("::")
    if namespace != "aten" or not name.endswith("_") or changed.op != "call_function":
        return None
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    if packet is None or target._overloadname not in packet.overloads():
        return None
    found: OpOverload = getattr(packet, target._overloadname)
    value = value_of(changed)
    with value.fake_mode:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), value_of)
        result = found(*args, **kwargs)
    same = result.dtype is value.dtype and tuple(map(str, result.shape)) == tuple(map(str, value.shape))
    return found if same else None


def _seen_otherwise(node: Node, places: dict[Node, int]) -> bool:
    """Whether an operator after this one takes the changed memory through another value made before."""
    (changed, *_), place = arguments(node), places[node]
    before = [other for other, made in places.items() if made < place and other is not changed]
    return any(
        storage_of(other) == storage_of(changed) and any(places[user] > place for user in other.users)
        for other in before
        if storage_of(other) is not None
    )
