"""Operators that are not lowered, as one module of torch with the tensors of a step as arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from braid_orchestrator.segments.graph import value_of
from braid_orchestrator.segments.lowering import is_size
from braid_orchestrator.segments.lowering_expressions import Storage
from braid_orchestrator.segments.lowering_steps import Fallback, Tensor


@dataclass(frozen=True)
class Tokens:
    """A size: an expression of the number of tokens."""

    value: torch.SymInt

    def of(self, tokens: int) -> int:
        """It, for so many tokens."""
        expression = self.value.node.expr
        return int(expression.subs(dict.fromkeys(expression.free_symbols, tokens)))


Argument = Tensor | torch.Tensor | Tokens | str
"""A value in memory, a weight, a size, or the name of an earlier call's result."""


@dataclass(frozen=True)
class TorchCall:
    """Some operators, run at once."""

    module: GraphModule
    """Takes the arguments and gives a tuple."""
    arguments: tuple[Argument, ...]
    results: tuple[tuple[str, Storage | None], ...]
    """Names for later calls, and storages that lowered steps read."""


def calls(steps: Sequence[Fallback], names: Mapping[Node, str], kept: Set[Node]) -> list[TorchCall]:
    """One call for each step of a graph, in order.

    Args:
        names: of the results of what torch runs, here or earlier.
        kept: nodes whose results are wanted after the graph.
    """
    found = []
    for index, step in enumerate(steps):
        later = {node for one in steps[index + 1 :] for user in one.nodes for node in user.all_input_nodes}
        wanted = [node for node in step.nodes if node in later or node in kept or node in step.outputs]
        found.append(_call(step, wanted, names))
    return found


def _call(step: Fallback, wanted: Sequence[Node], names: Mapping[Node, str]) -> TorchCall:
    graph, copies = Graph(), dict[Node, Node]()
    arguments: list[Argument] = []

    def copy(node: Node) -> Node:
        if node in copies:
            return copies[node]
        if is_size(node) and "val" not in node.meta:
            copies[node] = graph.node_copy(node, copy)
        elif node not in step.nodes:
            copies[node] = graph.placeholder(node.name)
            arguments.append(_argument(step, node, names))
        else:
            copies[node] = graph.node_copy(node, copy)
        return copies[node]

    for node in step.nodes:
        for source in node.all_input_nodes:
            copy(source)
    for node in step.nodes:
        copy(node)
    graph.output(tuple(copies[node] for node in wanted))
    module = GraphModule(torch.nn.Module(), graph)
    results = tuple((names[node], step.outputs.get(node)) for node in wanted)
    return TorchCall(module, tuple(arguments), results)


def _argument(step: Fallback, source: Node, names: Mapping[Node, str]) -> Argument:
    if is_size(source):
        return Tokens(value_of(source))
    return names[source] if source in names else step.inputs[source]
