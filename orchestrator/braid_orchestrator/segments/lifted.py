"""Graphs whose weights are arguments, so that equal layers run one compiled function."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from braid_orchestrator.segments.graph import outputs_of, value_of, weights_of


@dataclass(frozen=True)
class Lifted:
    """A graph of its inputs and then its weights, in the order in which it uses them."""

    module: GraphModule
    weights: Sequence[torch.Tensor]
    key: str
    """Equal for graphs that compute the same from inputs and weights of the same kinds."""


def lift(module: GraphModule) -> Lifted:
    """The same graph with its weights as last arguments."""
    graph, copies = Graph(), dict[Node, Node]()
    inputs, weights = module.graph.find_nodes(op="placeholder"), weights_of(module)
    for index, node in enumerate([*inputs, *weights]):
        copies[node] = graph.placeholder(f"a{index}")
        copies[node].meta = dict(node.meta)
    for index, node in enumerate(module.graph.nodes):
        if node.op == "output":
            graph.output(tuple(copies[value] for value in outputs_of(module)))
        elif node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            # Names are made from operators and counted over a whole body; equal layers get equal ones.
            copies[node].name = f"v{index}"
    graph.lint()
    lifted = GraphModule(torch.nn.Module(), graph)
    return Lifted(lifted, list(weights.values()), _key(lifted))


def _key(module: GraphModule) -> str:
    kinds = [_kind(value_of(node)) for node in module.graph.find_nodes(op="placeholder")]
    return hashlib.sha256("\n".join([module.code, *kinds]).encode()).hexdigest()


def _kind(value: torch.Tensor) -> str:
    """What a compiler may specialise in; T counts as one size whatever its symbol is called."""
    shape, strides = (
        ["T" if isinstance(size, torch.SymInt) else size for size in sizes]
        for sizes in (value.shape, value.stride())
    )
    return f"{value.dtype} {value.device} {shape} {strides}"
