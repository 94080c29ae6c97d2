"""Cuts a traced body at its dispatches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from braid_wire.layers import Kind
from torch.fx import Graph, GraphModule, Node
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import OptimizedPythonReferenceAnalysis

from braid_orchestrator.segments.base import (
    HIDDEN,
    IDS,
    POSITIONS,
    RESULT,
    Call,
    Cut,
    Segment,
    SegmentsUnavailable,
    carried_name,
)
from braid_orchestrator.segments.graph import arguments, is_size, outputs_of, storage_of, value_of
from braid_orchestrator.segments.simplify import simplify
from braid_orchestrator.segments.trace import DISPATCH, Traced

_SIDES = (Kind.FULL, Kind.LINEAR)


def cut(traced: Traced) -> Cut:
    """The segments between a role's dispatches; the graphs of `traced` are used up.

    A segment holds what can be computed once the calls before it are back; calls that do not need one
    another follow the same segment.

    Raises:
        SegmentsUnavailable: the body's dispatches are not the plan's, once each and in its order.
    """
    simplify(traced.backbone)
    simplify(traced.head)
    return Cut(_Cutter(traced).segments(), _in_tuple(traced.head), traced.mrope, traced.draft)


def _in_tuple(module: GraphModule) -> GraphModule:
    """The same graph, its one output in a tuple."""
    (output,) = module.graph.find_nodes(op="output")
    output.args = (outputs_of(module),)
    module.recompile()
    return module


class _Cutter:
    """Levels of one graph: a value's level is the number of dispatches in a row that come before it."""

    def __init__(self, traced: Traced) -> None:
        self._traced = traced
        self._levels: dict[Node, int] = {}
        """Of everything but weights and sizes, in the graph's order."""
        self._outside: dict[Node, str] = {}
        """Inputs of the step and outputs of calls → their names."""
        self._calls: dict[int, list[tuple[Call, tuple[Node, ...]]]] = {}
        self._read()
        self._check_calls()
        self._last = max(self._levels.values())
        self._taken = {level: self._taken_by(level) for level in range(self._last + 1)}
        self._lent = {storage_of(node) for node in self._outside if node.op != "placeholder"}
        """Memory of calls' outputs, which later calls write over."""

    def segments(self) -> tuple[Segment, ...]:
        """One for each level."""
        return tuple(self._segment(level) for level in range(self._last + 1))

    def _read(self) -> None:
        """Levels, names and calls of all nodes."""
        specs = {spec.layer_id: spec for spec in self._traced.plan}
        inputs = iter((IDS, POSITIONS, HIDDEN))
        for node in self._traced.backbone.graph.nodes:
            level = max((self._levels[source] for source in _sources(node)), default=0)
            if node.op == "placeholder":
                self._levels[node], self._outside[node] = 0, next(inputs)
            elif node.op == "output":
                (self._result,) = _sources(node)
            elif node.target is DISPATCH:
                layer_id, side, tensors, _ = arguments(node)
                kind = Kind(side)
                call = Call(layer_id, kind, tuple(specs[layer_id].geometry(kind).inputs()))
                self._calls.setdefault(level, []).append((call, tuple(tensors)))
                self._levels[node], self._outside[node] = level + 1, call.output
            elif node.op == "call_function" and not is_size(node):
                self._levels[node] = level

    def _check_calls(self) -> None:
        """The calls of each side come in the plan's order, each once."""
        for side in _SIDES:
            calls = [call for level in sorted(self._calls) for call, _ in self._calls[level]]
            found = [call.layer_id for call in calls if call.side is side]
            planned = [spec.layer_id for spec in self._traced.plan.side(side)]
            if found != planned:
                raise SegmentsUnavailable(
                    f"the body dispatches the {side.value} layers {found}; its plan has {planned}"
                )

    def _taken_by(self, level: int) -> set[Node]:
        """Values that a segment takes and does not compute."""
        made = self._made(level)
        taken = {source for node in made for source in _sources(node)}
        taken.update(node for _, inputs in self._calls.get(level, ()) for node in inputs)
        if level == self._last:
            taken.add(self._result)
        return taken - set(made)

    def _made(self, level: int) -> list[Node]:
        """What a segment computes, in order."""
        return [node for node, at in self._levels.items() if at == level and node not in self._outside]

    def _segment(self, level: int) -> Segment:
        kept = self._kept(level)
        reads = self._ordered(self._taken[level] | (set(kept) - set(self._made(level))))
        builder = _Builder(self._traced.backbone)
        for node in reads:
            builder.read(node)
        for node in self._made(level):
            builder.copy(node)
        calls = self._calls.get(level, [])
        writes: dict[str, Node] = {}
        for call, inputs in calls:
            writes.update(zip(call.reads, (builder.value(node) for node in inputs), strict=True))
        for node in kept:
            writes[self._name(node, level + 1)] = builder.value(node, self._is_lent(node))
        if level == self._last:
            writes[RESULT] = builder.value(self._result, self._is_lent(self._result))
        return Segment(
            level,
            builder.module(writes.values()),
            tuple(self._name(node, level) for node in reads),
            tuple(writes),
            tuple(call for call, _ in calls),
        )

    def _is_lent(self, node: Node) -> bool:
        """Whether a value lies in a call's output, which a later call may write over."""
        return storage_of(node) in self._lent

    def _kept(self, level: int) -> list[Node]:
        """Values that are there at this level first and that later segments take."""
        later = {node for at, taken in self._taken.items() if at > level for node in taken}
        return self._ordered(
            node for node in later if self._levels[node] == level and node.op != "placeholder"
        )

    def _ordered(self, nodes: Iterable[Node]) -> list[Node]:
        wanted = set(nodes)
        return [node for node in self._levels if node in wanted]

    def _name(self, node: Node, level: int) -> str:
        """What a segment of this level calls a value."""
        if node.op == "placeholder" or (node in self._outside and self._levels[node] == level):
            return self._outside[node]
        return carried_name(node.name)


def _sources(node: Node) -> list[Node]:
    """The values of the step that a node takes: neither weights nor sizes."""
    return [source for source in node.all_input_nodes if source.op != "get_attr" and not is_size(source)]


class _Builder:
    """One segment's graph, from nodes of the whole one."""

    def __init__(self, root: GraphModule) -> None:
        self._root = root
        self._graph = Graph()
        self._copies: dict[Node, Node] = {}
        self._sizes: dict[Any, Any] = {}
        self._rows: Node | None = None

    def read(self, node: Node) -> None:
        """Take a value from outside."""
        placeholder = self._graph.placeholder(node.name)
        placeholder.meta = {"val": node.meta["val"]}
        self._copies[node] = placeholder

    def copy(self, node: Node) -> None:
        """Compute a value here."""
        self._copies[node] = self._graph.node_copy(node, self._argument)

    def value(self, node: Node, own: bool = False) -> Node:
        """The value inside this graph; `own`: in memory of its own."""
        found = self._argument(node)
        if own:
            copied = self._graph.call_function(torch.ops.aten.clone.default, (found,))
            copied.meta = {"val": node.meta["val"]}
            return copied
        return found

    def module(self, outputs: Iterable[Node]) -> GraphModule:
        """The finished graph."""
        self._graph.output(tuple(outputs))
        self._graph.eliminate_dead_code()
        self._graph.lint()
        return GraphModule(self._root, self._graph)

    def _argument(self, node: Node) -> Node:
        if node in self._copies:
            return self._copies[node]
        if is_size(node):
            return self._size(value_of(node).node.expr)
        self._copies[node] = self._graph.node_copy(node)
        return self._copies[node]

    def _size(self, expression: Any) -> Any:
        """A size that depends on T, computed from a size of what this segment reads."""
        if expression.is_number:
            return int(expression)
        if expression not in self._sizes:
            rows = {symbol: torch.fx.Proxy(self._symbol(symbol)) for symbol in expression.free_symbols}
            found = sympy_interp(OptimizedPythonReferenceAnalysis, rows, expression)
            self._sizes[expression] = found.node
        return self._sizes[expression]

    def _symbol(self, symbol: Any) -> Node:
        if symbol in self._sizes:
            return self._sizes[symbol]
        for node in self._graph.find_nodes(op="placeholder"):
            for dim, size in enumerate(value_of(node).shape):
                if isinstance(size, torch.SymInt) and size.node.expr == symbol:
                    self._sizes[symbol] = self._graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
                    self._sizes[symbol].meta = {"val": size}
                    return self._sizes[symbol]
        raise SegmentsUnavailable(f"the size {symbol} depends on values and not on the number of tokens")
