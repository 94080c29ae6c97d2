"""Taking a decoder layer apart: its attention module, checked to be what the plan says it is."""

from __future__ import annotations

import math
from typing import Any, TypeVar

from braid_wire.errors import ConfigInvalid
from braid_wire.layers import Geometry, Kind, LayerSpec
from torch import nn

G = TypeVar("G", bound=Geometry)

# Two names of one function in transformers' table.
_SILU = ("silu", "swish")


def submodule(layer: nn.Module, name: str, classes: type | tuple[type, ...], spec: LayerSpec) -> Any:
    """The part of a decoder layer with this name.

    Raises:
        ConfigInvalid: there is none, or it is of another class; the layer id is named.
    """
    found = dict(layer.named_children()).get(name)
    if not isinstance(found, classes):
        allowed = classes if isinstance(classes, tuple) else (classes,)
        has = "nothing" if found is None else f"a {type(found).__name__}"
        raise ConfigInvalid(
            f"layer {spec.layer_id} is {spec.kind.value} ({spec.mechanism}) in the plan, but has {has} "
            f"as its {name!r}, not a {' or '.join(c.__name__ for c in allowed)}",
            layer_id=spec.layer_id,
        )
    return found


def geometry(spec: LayerSpec, side: Kind, expected: type[G]) -> G:
    """The geometry of one side of a layer.

    Raises:
        ConfigInvalid: the plan has no such side, or another mechanism there; the layer id is named.
    """
    found = spec.full if side is Kind.FULL else spec.linear
    if not isinstance(found, expected):
        raise ConfigInvalid(
            f"layer {spec.layer_id} is {spec.mechanism} in the plan, its module is {expected.mechanism}",
            layer_id=spec.layer_id,
        )
    return found


def must_agree(spec: LayerSpec, what: str, module: object, plan: object) -> None:
    """Refuse a layer whose module was built with another value than its geometry has.

    Raises:
        ConfigInvalid: naming the layer id.
    """
    agree = module == plan
    if isinstance(module, float) and isinstance(plan, float):
        # Both are computed, perhaps in another order.
        agree = math.isclose(module, plan, rel_tol=1e-9)
    if not agree:
        raise ConfigInvalid(
            f"layer {spec.layer_id}: {what} is {plan} in the plan and {module} in the model",
            layer_id=spec.layer_id,
        )


def must_be_silu(activation: str, spec: LayerSpec) -> None:
    """Refuse a conv activation that the linear service does not apply.

    Raises:
        ConfigInvalid: naming it.
    """
    if activation not in _SILU:
        raise ConfigInvalid(
            f"layer {spec.layer_id}: hidden_act is {activation!r}; the conv of {spec.mechanism} layers runs "
            f"with 'silu'",
            field="hidden_act",
            value=activation,
        )
