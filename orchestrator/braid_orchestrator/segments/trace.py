"""One role's body as a graph of aten operators, in which every dispatch is one node.

The graph holds for every number of tokens T ≥ 1: T is a symbol while the body is traced, positions are
an input, and whatever the body decided by T is checked against other numbers of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from braid_wire.errors import CaptureViolation
from braid_wire.layers import Kind, LayerPlan
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from braid_orchestrator.body.base import RoleBody
from braid_orchestrator.segments.base import HIDDEN, IDS, POSITIONS, SegmentsUnavailable, called_side
from braid_orchestrator.segments.functional import make_functional
from braid_orchestrator.segments.graph import weights_of

# Tokens of the trace; any number but 0 and 1, which would not become a symbol.
_EXAMPLE = 13
# Steps that a decision of the body about T must hold for: small, around sizes that code decides by, large.
_COUNTS = (*range(1, 70), 127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 4096, 65536, 1 << 20)
_library = torch.library.Library("braid", "DEF")
_library.define("dispatch(int layer_id, str side, Tensor[] inputs, SymInt[] shape) -> Tensor")


def _no_dispatch(layer_id: int, side: str, inputs: list[torch.Tensor], shape: list[int]) -> torch.Tensor:
    raise CaptureViolation(
        f"layer {layer_id} ({side}) was dispatched inside a segment", layer_id=layer_id, side=side
    )


_library.impl("dispatch", _no_dispatch, "CompositeExplicitAutograd")
_library._register_fake("dispatch", lambda _layer, _side, inputs, shape: inputs[0].new_empty(shape))

DISPATCH = torch.ops.braid.dispatch.default


@dataclass(frozen=True)
class Traced:
    """A role's backbone and head as graphs.

    Placeholders of `backbone` are ids, positions and, of drafts, hidden; it gives [T, hidden]. Its
    dispatches are calls of `braid.dispatch(layer_id, side, inputs in the geometry's order, shape)`.
    """

    backbone: GraphModule
    head: GraphModule
    plan: LayerPlan
    mrope: bool
    draft: bool


def trace(role: RoleBody) -> Traced:
    """Trace one role; its weights stay references to the model's tensors.

    Raises:
        SegmentsUnavailable: the body cannot be traced, or takes another path at another number of tokens.
    """
    mrope, draft, device, dtype = role.mrope, role.draft, role.device, role.dtype
    rows = (3, _EXAMPLE) if mrope else (_EXAMPLE,)
    examples: dict[str, torch.Tensor] = {
        IDS: torch.zeros(_EXAMPLE, dtype=torch.int64, device=device),
        POSITIONS: torch.zeros(rows, dtype=torch.int64, device=device),
    }
    if draft:
        examples[HIDDEN] = torch.zeros(_EXAMPLE, role.hidden_size, dtype=dtype, device=device)
    row = torch.zeros(_EXAMPLE, role.hidden_size, dtype=dtype, device=device)
    backbone = _graph(_backbone(role), examples)
    head = _graph(lambda rows: role.head(rows).float(), {"rows": row})
    return Traced(backbone, head, role.plan, mrope, draft)


def _backbone(role: RoleBody) -> Callable[..., torch.Tensor]:
    """The role's backbone as a function of the named inputs, its dispatches led to `braid.dispatch`."""
    specs = {spec.layer_id: spec for spec in role.plan}

    def attend(layer_id: int, inputs: Mapping[str, torch.Tensor], side: Kind | None = None) -> torch.Tensor:
        spec = specs[layer_id]
        chosen = called_side(spec, side)
        geometry = spec.geometry(chosen)
        if inputs.keys() != geometry.inputs().keys():
            raise SegmentsUnavailable(
                f"layer {layer_id} gives {sorted(inputs)}; its geometry takes {sorted(geometry.inputs())}"
            )
        tensors = [inputs[name] for name in geometry.inputs()]
        shape = [tensors[0].shape[0], *geometry.output()]
        found: torch.Tensor = DISPATCH(layer_id, chosen.value, tensors, shape)
        return found

    return partial(role.packed, attend)


def _graph(function: Callable[..., torch.Tensor], examples: Mapping[str, torch.Tensor]) -> GraphModule:
    """A function of tensors, in all of which one dimension is T, as operators that change no tensor."""
    shapes = ShapeEnv()
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes)
    fakes = [_fake(mode, tensor) for tensor in examples.values()]
    try:
        module = _made(function, fakes)
        if not make_functional(module):
            # A second pass, since composite operators lose the symbol T where the first does both.
            module = _made(torch.func.functionalize(module, remove="mutations"), fakes)
    except SegmentsUnavailable:
        raise
    except Exception as error:
        # Whatever a model's own code does, it runs as it did before; the message says why.
        raise SegmentsUnavailable(f"the body cannot be traced: {type(error).__name__}: {error}") from error
    _check_symbol(shapes, fakes)
    for node, weight in weights_of(module).items():
        node.meta["val"] = weight
    return module


@torch.no_grad()
def _made(function: Callable[..., torch.Tensor], fakes: Sequence[torch.Tensor]) -> GraphModule:
    return make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*fakes)


def _check_symbol(shapes: ShapeEnv, fakes: Sequence[torch.Tensor]) -> None:
    """What the body decided by its number of tokens must hold for any number.

    Raises:
        SegmentsUnavailable: it does not.
    """
    sizes: list[Any] = [size for fake in fakes for size in fake.shape]
    (symbol,) = {size.node.expr for size in sizes if isinstance(size, torch.SymInt)}
    if not symbol.is_Symbol:
        raise SegmentsUnavailable(f"the body takes {symbol} tokens and no other number")
    for guard in shapes.guards:
        for count in _COUNTS:
            if not bool(guard.expr.subs(symbol, count)):
                raise SegmentsUnavailable(
                    f"the body takes another path at {count} tokens than at {_EXAMPLE}: {guard.expr} fails"
                )


def _fake(mode: FakeTensorMode, example: torch.Tensor) -> torch.Tensor:
    """The example with the symbol T as its first size; positions have it as their last."""
    rows = 0 if example.is_floating_point() else example.ndim - 1
    sizes = [DimDynamic.DUCK if dim == rows else DimDynamic.STATIC for dim in range(example.ndim)]
    return mode.from_tensor(example, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
