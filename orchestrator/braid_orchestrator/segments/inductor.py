"""Segments compiled by torch.compile, on first use, for one token and for any other number of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch.fx import GraphModule

from braid_orchestrator.segments.base import (
    BuffersOf,
    Cut,
    Segment,
    SegmentCompiler,
    SegmentedRole,
    SegmentsUnavailable,
)
from braid_orchestrator.segments.capture import capturing
from braid_orchestrator.segments.graph import value_of
from braid_orchestrator.segments.lifted import Lifted, lift
from braid_orchestrator.segments.step import BufferedRole

Compiled = Callable[..., Sequence[torch.Tensor]]


class InductorCompiler(SegmentCompiler):
    """torch.compile with a symbolic number of tokens; segments of equal layers share what is compiled."""

    name = "inductor"

    def __init__(self) -> None:
        self._lifted: dict[GraphModule, Lifted] = {}
        self._compiled: dict[tuple[str, bool], Compiled] = {}

    def compile(self, cut: Cut, buffers: BuffersOf, max_tokens: int) -> SegmentedRole:
        reason = _unusable()
        if reason:
            raise SegmentsUnavailable(f"torch.compile does not work here: {reason}")
        return InductorRole(cut, buffers, max_tokens, self)

    @property
    def compiled(self) -> int:
        """Functions that were compiled; those for one token count by themselves."""
        return len(self._compiled)

    def run(self, module: GraphModule, values: Sequence[torch.Tensor], tokens: int) -> Sequence[torch.Tensor]:
        """What a graph gives for values of so many tokens; what is not compiled yet is, for seconds."""
        lifted = self._lifted.get(module)
        if lifted is None:
            lifted = self._lifted[module] = lift(module)
        alone = tokens == 1
        compiled = self._compiled.get((lifted.key, alone))
        with capturing("a segment"):
            if compiled is None:
                compiled = self._compiled[lifted.key, alone] = _compiled(lifted.module, alone)
                _mark(lifted.module, values, alone)
            return compiled(*values, *lifted.weights)


class InductorRole(BufferedRole):
    """One role on one lane."""

    def __init__(self, cut: Cut, buffers: BuffersOf, max_tokens: int, compiler: InductorCompiler) -> None:
        super().__init__(cut, buffers, max_tokens)
        self._compiler = compiler

    def _compute(self, segment: Segment, values: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return self._compiler.run(segment.module, values, self.tokens)

    def _head(self, rows: torch.Tensor) -> torch.Tensor:
        (logits,) = self._compiler.run(self._cut.head, (rows,), len(rows))
        return logits


def _compiled(module: GraphModule, alone: bool) -> Compiled:
    """A compiled copy: torch.compile would count the sizes of one as other versions of the other."""
    copy = GraphModule(module, module.graph)
    compiled: Compiled = torch.compile(copy, fullgraph=True, dynamic=False if alone else None)
    return compiled


def _mark(module: GraphModule, values: Sequence[torch.Tensor], alone: bool) -> None:
    """Tell torch.compile which sizes of its first arguments are numbers of tokens."""
    if alone:
        return
    for node, value in zip(module.graph.find_nodes(op="placeholder"), values, strict=False):
        for dim, size in enumerate(value_of(node).shape):
            if isinstance(size, torch.SymInt):
                torch._dynamo.mark_dynamic(value, dim)


@cache
def _unusable() -> str:
    """Why torch.compile cannot be used on this machine; empty where it can."""
    try:
        torch.compile(lambda rows: rows + 1, fullgraph=True)(torch.zeros(3))
    except Exception as error:
        # Whatever is missing (most often a C++ compiler), the message says so.
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""
