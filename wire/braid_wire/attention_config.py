"""Configure, resolved: from the messages to layers that are ready to run.

Nothing here changes the service: a configuration is built whole and taken over whole, so that one
that fails leaves the running one untouched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from braid.v1 import attention_pb2, common_pb2

from braid_wire import convert, dtypes
from braid_wire.attention_core import AttentionCore, LayerRunner
from braid_wire.audit import Sampler
from braid_wire.batch import IntArray, Pools
from braid_wire.batch_check import BatchCheck
from braid_wire.errors import ConfigInvalid, LayerPlanDisputed, ServiceFault, ViewInvalid
from braid_wire.layers import (
    FullGeometry,
    Geometry,
    Kind,
    LayerPlan,
    LayerSpec,
    LinearGeometry,
    Role,
    Shape,
    digest,
)
from braid_wire.metrics import ProcessMetrics
from braid_wire.views import ArenaMap, rows_are_dense

Storage = dict[tuple[Role, int], attention_pb2.LayerStorage]


@dataclass(frozen=True)
class ReadyLayer:
    """One layer of this service, resolved."""

    spec: LayerSpec
    geometry: Geometry
    run: LayerRunner
    sampler: Sampler
    row: int
    """In the process's table of layers."""


@dataclass(frozen=True)
class ReadyTicket:
    """A layer with the tensors of one step, checked."""

    layer: ReadyLayer
    inputs: Mapping[str, torch.Tensor]
    output: torch.Tensor


@dataclass(frozen=True)
class RoleLayers:
    """One role's plan, and the layers of it that this service runs, in plan order."""

    plan: LayerPlan
    side: Kind
    layers: Mapping[int, ReadyLayer]
    pools: Pools | None
    """None where the role has no layer of this service's kind."""
    check: BatchCheck | None
    """Of batches, against the pools."""

    def layer(self, layer_id: int) -> ReadyLayer:
        """The layer with this id.

        Raises:
            LayerUnknown: the role has no such layer.
            LayerMisrouted: it has, but of the other kind.
        """
        found = self.layers.get(layer_id)
        if found is None:
            self.plan.layer(layer_id).geometry(self.side)
            raise ServiceFault(f"layer {layer_id} was accepted but not resolved", layer_id=layer_id)
        return found


@dataclass(frozen=True)
class Configuration:
    """Everything that a service knows between two Configures."""

    arenas: ArenaMap
    activation_dtype: torch.dtype
    roles: Mapping[Role, RoleLayers]
    tickets: dict[tuple[Role, int, bytes], ReadyTicket] = field(default_factory=dict)
    """Tickets seen before, by role, token count and message: decode steps send the same ones over and
    over, and what a view names is fixed while the configuration is."""

    def accepted(self) -> list[attention_pb2.AcceptedLayers]:
        """What Configure answers: of each role the layers that run here, and their digest."""
        return [
            attention_pb2.AcceptedLayers(
                role=convert.ROLES[role],
                layer_ids=list(found.layers),
                digest=digest(layer.spec for layer in found.layers.values()),
            )
            for role, found in self.roles.items()
        ]


def resolve(
    core: AttentionCore, request: attention_pb2.ConfigureRequest, arenas: ArenaMap, metrics: ProcessMetrics
) -> Configuration:
    """Check a Configure against the contract and resolve its layers.

    Args:
        core: the kernels.
        request: its arenas are in `arenas` already.
        arenas: where its views are looked up.
        metrics: whose table of layers counts them.

    Raises:
        ConfigInvalid, LayerPlanDisputed, LayerUnknown, LayerMisrouted, ViewInvalid, ArenaUnknown: as
            the contract says of each field.
    """
    plans = _plans(request.plans)
    activation, state = dtypes.from_pb(request.activation_dtype), dtypes.from_pb(request.state_dtype)
    _check_supported(core, plans, activation, state)
    storage = _storage(request.storage, plans, core.kind)
    pools = _pools(request.pools, plans, core.kind, arenas)
    builder = _Builder(core, arenas, metrics, activation, state)
    roles = {}
    for role, plan in plans.items():
        found = pools.get(role)
        layers = {
            spec.layer_id: builder.layer(role, spec, storage[role, spec.layer_id], found)
            for spec in plan.side(core.kind)
            if found is not None
        }
        check = BatchCheck(found) if found is not None else None
        roles[role] = RoleLayers(plan, core.kind, layers, found, check)
    return Configuration(arenas, activation, roles)


def _plans(messages: Iterable[common_pb2.LayerPlan]) -> dict[Role, LayerPlan]:
    plans: dict[Role, LayerPlan] = {}
    for message in messages:
        plan = convert.plan_from_pb(message)
        if plan.role in plans:
            raise ConfigInvalid(f"role {plan.role.value} has two plans", field="plans", role=plan.role.value)
        plans[plan.role] = plan
    return plans


def _check_supported(
    core: AttentionCore, plans: Mapping[Role, LayerPlan], activation: torch.dtype, state: torch.dtype
) -> None:
    """Every layer that the kernels cannot run, named at once."""
    refused: dict[str, list[str]] = {}
    for role, plan in plans.items():
        for spec in plan.side(core.kind):
            reason = core.supports(spec.geometry(core.kind), activation, state)
            if reason is not None:
                refused.setdefault(reason, []).append(f"{role.value} {spec.layer_id}")
    if refused:
        told = "; ".join(f"layers {', '.join(ids)}: {reason}" for reason, ids in refused.items())
        raise LayerPlanDisputed(
            f"the {core.kind.value} service cannot run {told}",
            layers=", ".join(name for ids in refused.values() for name in ids),
        )


def _storage(
    messages: Iterable[attention_pb2.LayerStorage], plans: Mapping[Role, LayerPlan], side: Kind
) -> Storage:
    """Storage by role and id: for each layer of this side, and for no other."""
    found: Storage = {}
    for message in messages:
        role = convert.role_from_pb(message.role)
        plan = plans.get(role, LayerPlan(role, ()))
        plan.layer(message.layer_id).geometry(side)
        if (role, message.layer_id) in found:
            raise ConfigInvalid(
                f"{role.value} layer {message.layer_id} has two storages",
                field="storage",
                layer_id=message.layer_id,
            )
        found[role, message.layer_id] = message
    for role, plan in plans.items():
        missing = [spec.layer_id for spec in plan.side(side) if (role, spec.layer_id) not in found]
        if missing:
            raise LayerPlanDisputed(
                f"{role.value} layers {missing} have no storage", layers=missing, role=role.value
            )
    return found


def _pools(
    messages: Iterable[attention_pb2.RolePools], plans: Mapping[Role, LayerPlan], side: Kind, arenas: ArenaMap
) -> dict[Role, Pools]:
    """Pools of each role that has layers of this side."""
    given: dict[Role, attention_pb2.RolePools] = {}
    for message in messages:
        role = convert.role_from_pb(message.role)
        if role in given or role not in plans:
            rule = "has two pools" if role in given else "has pools but no plan"
            raise ConfigInvalid(f"role {role.value} {rule}", field="pools", role=role.value)
        if message.HasField("page_generation") and message.page_size < 1:
            raise ConfigInvalid(
                f"page_size of role {role.value} is 0; it must be at least 1", field="page_size"
            )
        given[role] = message
    table = "page_generation" if side is Kind.FULL else "slot_generation"
    found = {}
    for role, plan in plans.items():
        ids = [spec.layer_id for spec in plan.side(side)]
        if not ids:
            continue
        if role not in given or not given[role].HasField(table):  # type: ignore[arg-type]
            raise LayerPlanDisputed(
                f"{role.value} layers {ids} have no pool with {table}", layers=ids, role=role.value
            )
        generation = _generation(arenas, getattr(given[role], table), f"{role.value} {table}")
        if side is Kind.FULL:
            found[role] = Pools(given[role].page_size, generation, None)
        else:
            found[role] = Pools(0, None, generation)
    return found


def _generation(arenas: ArenaMap, view: common_pb2.TensorView, name: str) -> IntArray:
    """A generation table, live: its owner counts in it while we look."""
    tensor = arenas.resolve(view, name)
    if tensor.dtype is not torch.int64 or tensor.dim() != 1 or tensor.shape[0] < 1:
        raise ViewInvalid(
            f"{name} is {dtypes.name_of(tensor.dtype)} {list(tensor.shape)}; it must be int64 [n], n > 0",
            field=name,
        )
    if tensor.device.type != "cpu":
        raise ViewInvalid(f"{name} lies on {tensor.device}; it must lie in host memory", field=name)
    table: IntArray = tensor.numpy()
    return table


@dataclass(frozen=True)
class _Builder:
    """Resolves layers one by one."""

    core: AttentionCore
    arenas: ArenaMap
    metrics: ProcessMetrics
    activation: torch.dtype
    state: torch.dtype

    def layer(
        self, role: Role, spec: LayerSpec, storage: attention_pb2.LayerStorage, pools: Pools
    ) -> ReadyLayer:
        geometry = spec.geometry(self.core.kind)
        name = f"{role.value} layer {spec.layer_id}"
        params = self._params(name, geometry, storage.params)
        memory = self._memory(name, geometry, storage.memory, pools)
        try:
            run = self.core.runner(spec, geometry, params, memory, pools.page_size)
        except Exception as error:
            refusal = self.core.refusal(error)
            if refusal is None:
                raise
            raise type(refusal)(f"{name}: {refusal.message}", layer_id=spec.layer_id) from error
        sampler = partial(self.core.sample, geometry, params, memory)
        row = self.metrics.layers.row(role, spec, self.core.kind)
        return ReadyLayer(spec, geometry, run, sampler, row)

    def _params(self, name: str, geometry: Geometry, views: Any) -> dict[str, torch.Tensor]:
        shapes = geometry.params()
        _check_names(name, "parameters", views, shapes, geometry.optional_params())
        params = {}
        for key, view in views.items():
            tensor = self.arenas.resolve(view, f"{name} {key}")
            if not tensor.is_floating_point() or tuple(tensor.shape) != shapes[key]:
                raise ViewInvalid(
                    f"{name} {key} is {dtypes.name_of(tensor.dtype)} {list(tensor.shape)}; "
                    f"it must be floating {list(shapes[key])}",
                    field=key,
                )
            params[key] = tensor
        return params

    def _memory(self, name: str, geometry: Geometry, views: Any, pools: Pools) -> dict[str, torch.Tensor]:
        expected = self._expected_memory(geometry, pools)
        _check_names(name, "memory", views, expected, frozenset())
        memory = {}
        for key, (shape, dtype) in expected.items():
            tensor = self.arenas.expect(views[key], f"{name} {key}", dtype, shape)
            if not rows_are_dense(tensor) or tensor.stride(0) < math.prod(shape[1:]):
                raise ViewInvalid(
                    f"{name} {key} has strides {tensor.stride()}; pages and slots must be dense and apart",
                    field=key,
                )
            memory[key] = tensor
        return memory

    def _expected_memory(self, geometry: Geometry, pools: Pools) -> dict[str, tuple[Shape, torch.dtype]]:
        expected: dict[str, tuple[Shape, torch.dtype]] = {}
        if isinstance(geometry, FullGeometry) and pools.page_generation is not None:
            pages = (len(pools.page_generation), pools.page_size)
            expected = {key: ((*pages, *shape), self.activation) for key, shape in geometry.caches().items()}
        if isinstance(geometry, LinearGeometry) and pools.slot_generation is not None:
            slots, state, conv = len(pools.slot_generation), geometry.state(), geometry.conv()
            if state is not None:
                expected["state"] = ((slots, *state), self.state)
            if conv is not None:
                expected["conv"] = ((slots, *conv), self.activation)
        return expected


def _check_names(
    layer: str, what: str, given: Iterable[str], known: Iterable[str], optional: frozenset[str]
) -> None:
    given, known = set(given), set(known)
    missing, unknown = sorted(known - given - optional), sorted(given - known)
    if missing or unknown:
        raise LayerPlanDisputed(f"{layer}: {what} {missing} are missing, {unknown} are unknown", layers=layer)
