"""A planned step of an attention service: what its batch says, and the tensors of its layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from braid.v1 import attention_pb2

from braid_wire.attention_config import Configuration, ReadyTicket, RoleLayers
from braid_wire.attention_core import PlannedBatch
from braid_wire.batch import PAGE_FIELDS, SHARED_DTYPES, STATE_FIELDS, mode_label
from braid_wire.batch_check import Snapshot
from braid_wire.errors import BatchInvalid, LayerPlanDisputed, ViewInvalid
from braid_wire.layers import Kind, Role
from braid_wire.views import ArenaMap, expect_rows, overlaps, rows_are_dense

LANES = 2
"""The most that a step has."""

_MAX_TICKETS = 8192


@dataclass(frozen=True)
class Unchecked:
    """The check of a batch whose role has no layer here, so that its arrays are not used."""

    snapshot: Snapshot
    num_tokens: int

    def __call__(self) -> tuple[str, int]:
        return mode_label(self.snapshot.arrays["modes"].numpy()), self.num_tokens


@dataclass(frozen=True, eq=False)
class Layout:
    """What batches that differ in their numbers and values alone have in common."""

    role: Role
    lane: int
    configuration: Configuration
    layers: RoleLayers
    num_tokens: int
    options: Mapping[str, str]
    snapshot: Snapshot
    check: Callable[[], tuple[str, int]]
    """Of what the snapshot holds; as `BoundCheck`."""
    planned: list[PlannedBatch]
    """The last one."""


@dataclass(eq=False, slots=True)
class Step:
    """A planned batch of one role and lane; compared by identity."""

    layout: Layout
    epoch: int
    step: int
    mode: str
    batch: PlannedBatch

    @property
    def role(self) -> Role:
        return self.layout.role

    @property
    def lane(self) -> int:
        return self.layout.lane

    @property
    def configuration(self) -> Configuration:
        return self.layout.configuration

    @property
    def layers(self) -> RoleLayers:
        return self.layout.layers

    @property
    def num_tokens(self) -> int:
        return self.layout.num_tokens


def places(
    batch: attention_pb2.Batch, layers: RoleLayers, arenas: ArenaMap
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each metadata array that this kind needs, in shared memory, of the dtype and shape it must have."""
    names = ["cu_seqlens", "context_lens", "modes", "sequence_ids"]
    if layers.pools is not None:
        names += PAGE_FIELDS if layers.side is Kind.FULL else STATE_FIELDS
    tokens, sequences = batch.num_tokens, batch.num_sequences
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (sequences,))
    shapes["cu_seqlens"] = (sequences + 1,)
    for name in PAGE_FIELDS:
        shapes[name] = (sequences, *batch.page_table.shape[1:2])
    shapes["state_out"] = shapes["state_out_generations"] = (tokens,)
    for name in names:
        if not batch.HasField(name):  # type: ignore[arg-type]
            raise BatchInvalid(f"{name} is missing", field=name)
        found = arenas.expect(getattr(batch, name), name, SHARED_DTYPES[name], shapes[name])
        if found.device.type != "cpu":
            raise ViewInvalid(f"{name} lies on {found.device}; it must lie in host memory", field=name)
        yield name, found


def resolve_tickets(step: Step, tickets: Sequence[attention_pb2.Ticket]) -> tuple[ReadyTicket, ...]:
    """The tickets of a walked step: each layer of the role once, in plan order."""
    for ticket in tickets:
        step.layers.layer(ticket.layer_id)
    given, expected = [ticket.layer_id for ticket in tickets], list(step.layers.layers)
    if given != expected:
        raise LayerPlanDisputed(
            f"the tickets are for {step.role.value} layers {given}; the accepted plan is {expected}",
            layers=sorted(set(given) ^ set(expected)) or given,
        )
    return tuple(resolve_ticket(step, ticket) for ticket in tickets)


def resolve_ticket(step: Step, ticket: attention_pb2.Ticket) -> ReadyTicket:
    """A layer's tensors, checked against its geometry, once for each distinct ticket."""
    seen = step.configuration.tickets
    key = step.role, step.num_tokens, ticket.SerializeToString(deterministic=True)
    found = seen.get(key)
    if found is None:
        found = _check_ticket(step, ticket)
        if len(seen) >= _MAX_TICKETS:
            seen.clear()
        seen[key] = found
    return found


def _check_ticket(step: Step, ticket: attention_pb2.Ticket) -> ReadyTicket:
    """A layer's tensors, checked against its geometry and against each other."""
    layer = step.layers.layer(ticket.layer_id)
    configuration, geometry = step.configuration, layer.geometry
    inputs = expect_rows(
        configuration.arenas,
        ticket.inputs,
        geometry.inputs(),
        step.num_tokens,
        configuration.activation_dtype,
    )
    shape = geometry.output()
    output = configuration.arenas.expect(
        ticket.output, "output", configuration.activation_dtype, (step.num_tokens, *shape)
    )
    if not rows_are_dense(output) or (step.num_tokens > 1 and output.stride(0) < math.prod(shape)):
        raise ViewInvalid(
            f"output has strides {output.stride()}; its rows must be contiguous and apart", field="output"
        )
    for name, view in ticket.inputs.items():
        if overlaps(view, ticket.output):
            raise ViewInvalid(f"output overlaps input {name}", field="output")
    return ReadyTicket(layer, inputs, output)
