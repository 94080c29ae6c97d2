"""Layer plans between their dataclasses and their messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from braid.v1 import common_pb2

from braid_wire.errors import BatchInvalid, ConfigInvalid, LayerPlanDisputed
from braid_wire.layers import (
    GEOMETRIES,
    FullGeometry,
    Geometry,
    Kind,
    LayerPlan,
    LayerSpec,
    LinearGeometry,
    Role,
    digest,
)

ROLES: Mapping[Role, common_pb2.Role.ValueType] = {
    Role.TARGET: common_pb2.ROLE_TARGET,
    Role.DRAFT: common_pb2.ROLE_DRAFT,
}
KINDS: Mapping[Kind, common_pb2.Kind.ValueType] = {
    Kind.FULL: common_pb2.KIND_FULL,
    Kind.LINEAR: common_pb2.KIND_LINEAR,
    Kind.PARALLEL: common_pb2.KIND_PARALLEL,
    Kind.NONE: common_pb2.KIND_NONE,
}
_ROLES_BACK: Mapping[int, Role] = {pb: role for role, pb in ROLES.items()}
_KINDS_BACK: Mapping[int, Kind] = {pb: kind for kind, pb in KINDS.items()}


def role_from_pb(role: int) -> Role:
    """The role of a message; `BatchInvalid` where it is unset or unknown."""
    if role not in _ROLES_BACK:
        raise BatchInvalid(f"role is {role}; it must be TARGET (1) or DRAFT (2)", field="role", value=role)
    return _ROLES_BACK[role]


def kind_from_pb(kind: int) -> Kind:
    """The kind of a message; `ConfigInvalid` where it is unset or unknown."""
    if kind not in _KINDS_BACK:
        raise ConfigInvalid(f"kind is {kind}; it must be 1 … {len(KINDS)}", field="kind", value=kind)
    return _KINDS_BACK[kind]


def plan_to_pb(plan: LayerPlan) -> common_pb2.LayerPlan:
    """The message of a plan, with its digest."""
    return common_pb2.LayerPlan(
        role=ROLES[plan.role], layers=[_spec_to_pb(spec) for spec in plan], digest=digest(plan)
    )


def plan_from_pb(message: common_pb2.LayerPlan) -> LayerPlan:
    """The plan of a message.

    Raises:
        ConfigInvalid: sizes, kinds or ids break a rule.
        LayerPlanDisputed: the digest of what arrived is not the sender's.
    """
    plan = LayerPlan(role_from_pb(message.role), tuple(_spec_from_pb(layer) for layer in message.layers))
    ours = digest(plan)
    if ours != message.digest:
        raise LayerPlanDisputed(
            f"the {plan.role.value} plan has digest {ours[:12]} here, {message.digest[:12]} at the sender; "
            f"layers {[spec.layer_id for spec in plan]}",
            role=plan.role.value,
        )
    return plan


def _spec_to_pb(spec: LayerSpec) -> common_pb2.LayerSpec:
    message = common_pb2.LayerSpec(layer_id=spec.layer_id, kind=KINDS[spec.kind])
    for geometry in (spec.full, spec.linear):
        if geometry is not None:
            part = getattr(message, geometry.mechanism)
            part.SetInParent()
            for name, value in asdict(geometry).items():
                setattr(part, name, value)
    return message


def _spec_from_pb(message: common_pb2.LayerSpec) -> LayerSpec:
    full = _geometry_from_pb(message, "full")
    linear = _geometry_from_pb(message, "linear")
    return LayerSpec(
        message.layer_id,
        kind_from_pb(message.kind),
        full if isinstance(full, FullGeometry) else None,
        linear if isinstance(linear, LinearGeometry) else None,
    )


def _geometry_from_pb(message: common_pb2.LayerSpec, side: Any) -> Geometry | None:
    mechanism = message.WhichOneof(side)
    if mechanism is None:
        return None
    part = getattr(message, mechanism)
    values = {item.name: getattr(part, item.name) for item in part.DESCRIPTOR.fields}
    return GEOMETRIES[mechanism](**values)
