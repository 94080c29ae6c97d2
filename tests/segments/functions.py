"""Single functions of rows as roles: traced, lowered and run on rows of any number."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from braid_orchestrator.segments.base import Cut, Segment
from braid_orchestrator.segments.native import NativeCompiler, NativeRole
from braid_orchestrator.segments.simplify import simplify
from braid_orchestrator.store import Buffers
from braid_wire.layers import Kind
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

MAX_TOKENS = 40
COUNTS = (1, 2, 7, 33)


class Weights:
    """Random weights by name, the same ones in any dtype."""

    def __init__(self, dtype: torch.dtype, rounded: torch.dtype) -> None:
        self._dtype, self._rounded = dtype, rounded
        self._made: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        if name not in self._made:
            seed = sum(ord(letter) for letter in name)
            values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / math.sqrt(shape[-1])
            self._made[name] = values.to(self._rounded).to(self._dtype)
        return self._made[name]


Function = Callable[[torch.Tensor, Weights], torch.Tensor]
"""(rows [T, width], weights) → rows [T, n]."""


def _graph(function: Callable[[torch.Tensor], torch.Tensor], width: int, dtype: torch.dtype) -> GraphModule:
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DUCK, DimDynamic.STATIC])
    example = mode.from_tensor(torch.zeros(13, width, dtype=dtype), symbolic_context=context)
    with torch.no_grad():
        traced = make_fx(
            torch.func.functionalize(lambda rows: (function(rows),), remove="mutations"),
            tracing_mode="symbolic",
            _allow_non_fake_inputs=True,
        )(example)
    simplify(traced)
    return traced


def cut_of_function(
    function: Function, width: int, dtype: torch.dtype = torch.float32, head: Function | None = None
) -> Cut:
    """A role whose result is a function of the hidden states that it starts from."""
    weights = Weights(dtype, dtype)
    # Made before the trace, or it would hold how they are made.
    columns = function(torch.zeros(2, width, dtype=dtype), weights).shape[1]
    module = _graph(lambda rows: function(rows, weights), width, dtype)
    logits = head or (lambda rows, w: (rows @ w("head", 3, columns).T).float())
    logits(torch.zeros(2, columns, dtype=dtype), weights)
    segment = Segment(0, module, ("hidden",), ("result",), ())
    return Cut((segment,), _graph(lambda rows: logits(rows, weights), columns, dtype), False, True)


def no_buffers(layer_id: int, side: Kind) -> Buffers:
    """There are no layers."""
    raise AssertionError(f"layer {layer_id} {side} is asked for")


def role_of(
    function: Function, width: int, dtype: torch.dtype = torch.float32, head: Function | None = None
) -> NativeRole:
    """It on one lane."""
    return NativeCompiler().compile(cut_of_function(function, width, dtype, head), no_buffers, MAX_TOKENS)


def run(role: NativeRole, rows: torch.Tensor) -> torch.Tensor:
    """The result for some rows."""
    ids = torch.zeros(len(rows), dtype=torch.int64)
    role.start(ids, ids, rows)
    role.run(0)
    return role.result().clone()


def exact(function: Function, rows: torch.Tensor) -> torch.Tensor:
    """The same in float64, the weights rounded as the rows are."""
    return function(rows.double(), Weights(torch.float64, rows.dtype))


def left_to_torch(role: NativeRole) -> set[str]:
    """Operators of the function that are not lowered."""
    return {str(node.target) for segment in role.lowered.segments for node in segment.left_to_torch}
