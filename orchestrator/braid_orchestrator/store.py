"""The cell's shared memory: parameters, pages, states, generation tables, metadata, activations.

All of it belongs to the orchestrator. Services get views of it when they are configured and with
every step, and keep nothing when they go.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from braid.v1 import attention_pb2 as pb
from braid.v1 import common_pb2
from braid_wire import convert, dtypes
from braid_wire.arena import ALIGNMENT, Allocator, Arena, ArenaOwner
from braid_wire.batch import SHARED_DTYPES, Batch, IntArray
from braid_wire.devices import CPU
from braid_wire.doorbell import BELL_BYTES
from braid_wire.errors import BatchInvalid, ConfigInvalid, ViewInvalid
from braid_wire.layers import Kind, LayerPlan, LayerSpec, Role
from braid_wire.views import view_of

from braid_orchestrator.memory import VERSIONS, RoleMemory
from braid_orchestrator.pool import Pool

_BELLS = 1024
# Pairs of mailboxes of all walks, and bytes of one: plans of a hundred layers on two lanes fit.
_MAILBOXES = 64
_MAIL_BYTES = 1 << 18
# Layouts of batches of different sizes that are kept.
_PUBLISHED = 256

LayerParams = Mapping[tuple[Role, int], Mapping[str, torch.Tensor]]
"""(role, layer id) → parameter name → tensor, for the layers that have any."""


@dataclass(frozen=True)
class Limits:
    """How much a cell holds.

    Raises:
        ConfigInvalid: a value is below 1.
    """

    max_tokens: int = 2048
    """Tokens of one step (the token budget)."""
    max_sequences: int = 64
    """Sequences of one step."""
    max_context: int = 4096
    """Tokens of one sequence, prompt and completion."""
    page_size: int = 16
    """Positions in a page."""
    pool_bytes: int = 1 << 30
    """Pages and slots of all roles together, bytes. The memory is taken as it is used."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_sequences", "max_context", "page_size", "pool_bytes"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigInvalid(f"{name} is {value}; it must be at least 1", field=name, value=value)


@dataclass(frozen=True)
class Dtypes:
    """Element types of a cell."""

    activation: torch.dtype = torch.float32
    state: torch.dtype = torch.float32


@dataclass(frozen=True)
class Buffers:
    """Where one layer side's tensors of a step lie: [rows, …] each."""

    inputs: Mapping[str, torch.Tensor]
    output: torch.Tensor


@dataclass(frozen=True)
class Bells:
    """The memory of one walk's doorbells and mailboxes, and of the times that the service writes."""

    request: torch.Tensor  # uint8 [64]
    done: torch.Tensor  # uint8 [64]
    device_request: torch.Tensor  # uint8 [64], written by streams
    device_done: torch.Tensor  # uint8 [64], likewise
    timings: torch.Tensor  # int64 [lanes, most tickets, 3]
    requests: torch.Tensor  # uint8 [n]
    responses: torch.Tensor  # uint8 [n]
    arena: Arena

    def message(self, tickets: int, lane: int, lanes: int) -> pb.Doorbells:
        """The message that names them, for one lane of a step of so many tickets; without `base`."""
        return pb.Doorbells(
            request=view_of(self.request, self.arena),
            done=view_of(self.done, self.arena),
            timings=view_of(self.timings[lane, :tickets], self.arena),
            lanes=lanes,
        )

    def device_views(self) -> dict[str, common_pb2.TensorView]:
        """Field of the message → the counter that streams write."""
        return {
            "device_request": view_of(self.device_request, self.arena),
            "device_done": view_of(self.device_done, self.arena),
        }

    def mail(self) -> pb.Mailboxes:
        """The message that names the mailboxes."""
        return pb.Mailboxes(
            requests=view_of(self.requests, self.arena), responses=view_of(self.responses, self.arena)
        )


@dataclass(frozen=True, eq=False)
class Published:
    """Where the arrays of batches of one layout lie; compared by identity."""

    layout: pb.Batch
    """Without epoch and step."""
    places: Mapping[str, IntArray]

    def message(self, batch: Batch) -> pb.Batch:
        """The message that names a batch's arrays, which are published."""
        message = pb.Batch()
        message.CopyFrom(self.layout)
        message.epoch, message.step = batch.epoch, batch.step
        return message


class Store:
    """Makes and lays out the arenas of a cell.

    Args:
        owner: makes arenas and hands them to the services.
        plans: of each role.
        params: static parameters; copied once into shared memory.
        limits: sizes.
        element: dtypes.
        lanes: 1; or 2, where steps may be split in two that run side by side.
        state_spacing: tokens of a prefix for which one state can be cached; 0: none is.
        versions: slots that a sequence needs in a step: more than the usual where guesses are verified.
        device: where parameters, pages, states and activations lie. Generation tables, metadata and
            doorbells are always in host memory, which every process checks, and rings, without the device.

    Raises:
        ConfigInvalid: `pool_bytes` is too small for a single sequence.
        ViewInvalid: a parameter is missing or has another shape than its geometry says.
    """

    def __init__(
        self,
        owner: ArenaOwner,
        plans: Mapping[Role, LayerPlan],
        params: LayerParams,
        limits: Limits,
        element: Dtypes,
        lanes: int = 1,
        state_spacing: int = 0,
        versions: int = VERSIONS,
        device: torch.device = CPU,
    ) -> None:
        self.owner = owner
        self.device = device
        self.lanes = lanes
        self._state_spacing = state_spacing
        self._versions = versions
        self.plans = plans
        self.limits = limits
        self.element = element
        self._arenas: list[Arena] = []
        self.params = self._share_params(params)
        self._caches: dict[tuple[Role, int], dict[str, torch.Tensor]] = {}
        self._tables: dict[tuple[Role, Kind], torch.Tensor] = {}
        self._pool_arenas: dict[tuple[Role, Kind], Arena] = {}
        self._table_arenas: dict[tuple[Role, Kind], Arena] = {}
        self.memory = self._make_memory()
        self._activations: dict[tuple[int, object], Buffers] = {}
        self._activation_arena = self._make_activations()
        self._metadata = [
            Allocator(self._arena(self._metadata_bytes(), f"metadata-{lane}")) for lane in range(lanes)
        ]
        self._published: dict[tuple[object, ...], Published] = {}
        self._bells, self._timings, self._mailboxes = self._make_bells()
        self._bells_given = 0

    def buffers(self, spec: LayerSpec, side: Kind, rows: int, lane: int = 0) -> Buffers:
        """The first `rows` rows of a lane's buffers of one layer side.

        Layers of the same geometry share them: a layer's output is used up by the body before the
        next layer's inputs are written.

        Raises:
            BatchInvalid: more rows than the cell's token budget.
        """
        if rows > self.limits.max_tokens:
            raise BatchInvalid(
                f"the step has {rows} tokens; the cell takes {self.limits.max_tokens}", field="num_tokens"
            )
        whole = self._activations[lane, spec.geometry(side)]
        return Buffers({name: tensor[:rows] for name, tensor in whole.inputs.items()}, whole.output[:rows])

    def view(self, tensor: torch.Tensor) -> common_pb2.TensorView:
        """The message that names an activation buffer."""
        return view_of(tensor, self._activation_arena)

    def bells(self, kind: Kind) -> Bells:
        """Doorbells for a new walk to the service of one kind, at zero.

        They are used again only after dozens of walks, so that a writer of an older epoch that is late by
        all of those is needed to disturb one.
        """
        index = 4 * (self._bells_given % (len(self._bells) // 4))
        requests, responses = self._mailboxes[self._bells_given % _MAILBOXES]
        self._bells_given += 1
        bells = self._bells[index : index + 4].unbind()
        for bell in (*bells, requests[:BELL_BYTES], responses[:BELL_BYTES]):
            bell.zero_()
        request, done, device_request, device_done = bells
        return Bells(
            request,
            done,
            device_request,
            device_done,
            self._timings[kind],
            requests,
            responses,
            self._bell_arena,
        )

    def publish(self, batch: Batch) -> Published:
        """Put a batch's arrays into shared memory.

        The memory is used again by the next batch of the same lane that is published.
        """
        arrays = batch.shared()
        # Without states no array's shape tells the number of tokens.
        sizes = ((name, array.shape) for name, array in arrays.items())
        key = batch.role, batch.lane, batch.num_tokens, *sizes
        if key not in self._published:
            if len(self._published) >= _PUBLISHED:
                self._published.pop(next(iter(self._published)))
            self._published[key] = self._layout(batch, arrays)
        published = self._published[key]
        for name, array in arrays.items():
            published.places[name][...] = array
        return published

    def _layout(self, batch: Batch, arrays: Mapping[str, IntArray]) -> Published:
        """Where arrays of these shapes lie in their lane's metadata."""
        metadata = self._metadata[batch.lane]
        metadata.reset()
        message = pb.Batch(
            role=convert.ROLES[batch.role],
            lane=batch.lane,
            num_tokens=batch.num_tokens,
            num_sequences=batch.num_sequences,
        )
        places = {}
        for name, array in arrays.items():
            shared = metadata.empty(array.shape, SHARED_DTYPES[name])
            places[name] = shared.numpy()
            getattr(message, name).CopyFrom(view_of(shared, metadata.arena))
        return Published(message, places)

    def configure_request(self, kind: Kind, epoch: int, cell: str) -> pb.ConfigureRequest:
        """All that the service of one kind needs to know."""
        request = pb.ConfigureRequest(
            epoch=epoch,
            cell=cell,
            plans=[convert.plan_to_pb(plan) for plan in self.plans.values()],
            arenas=[self.owner.describe(arena) for arena in self._arenas],
            activation_dtype=dtypes.to_pb(self.element.activation),
            state_dtype=dtypes.to_pb(self.element.state),
        )
        for role, plan in self.plans.items():
            layers = plan.side(kind)
            if layers:
                request.pools.append(self._pools_message(role, kind))
                request.storage.extend(self._storage_message(role, spec, kind) for spec in layers)
        return request

    def empty_request(self, epoch: int, cell: str) -> pb.ConfigureRequest:
        """What has a service forget its layers and give up the memory that it has mapped."""
        return pb.ConfigureRequest(
            epoch=epoch,
            cell=cell,
            activation_dtype=dtypes.to_pb(self.element.activation),
            state_dtype=dtypes.to_pb(self.element.state),
        )

    def activations(self) -> common_pb2.Arena:
        """The message from which a client can map the activation buffers."""
        return self.owner.describe(self._activation_arena)

    def copy_page(self, role: Role, source: int, target: int) -> None:
        """Write the keys and values of one page, in every layer of a role, into another."""
        for spec in self.plans[role].side(Kind.FULL):
            if spec.full is not None:
                for name in spec.full.caches():
                    cache = self._caches[role, spec.layer_id][name]
                    cache[target].copy_(cache[source])

    def close(self) -> None:
        """Give all shared memory back."""
        for arena in self._arenas:
            self.owner.release(arena)

    def _arena(self, size_bytes: int, label: str, device: torch.device | None = None) -> Arena:
        """An arena in host memory, or on a device."""
        arena = self.owner.create_on(device or CPU, max(size_bytes, ALIGNMENT), label)
        self._arenas.append(arena)
        return arena

    def _share_params(self, params: LayerParams) -> dict[tuple[Role, int], dict[str, torch.Tensor]]:
        for role, plan in self.plans.items():
            for spec in plan:
                _check_params(role, spec, params.get((role, spec.layer_id), {}))
        tensors = [tensor for group in params.values() for tensor in group.values()]
        arena = self._arena(_bytes((t.shape, t.dtype) for t in tensors), "params", self.device)
        allocator = Allocator(arena)
        self._params_arena = arena
        return {
            key: {name: allocator.empty(t.shape, t.dtype).copy_(t) for name, t in group.items()}
            for key, group in params.items()
        }

    def _make_memory(self) -> dict[Role, RoleMemory]:
        pages, slots = self._pool_sizes()
        return {
            role: RoleMemory(
                role,
                self._make_pool(role, plan, "pages", Kind.FULL, pages),
                self._make_pool(role, plan, "slots", Kind.LINEAR, slots),
                self.limits.page_size,
            )
            for role, plan in self.plans.items()
        }

    def _make_pool(self, role: Role, plan: LayerPlan, name: str, kind: Kind, count: int) -> Pool | None:
        """Memory of one role's pages or slots, layer by layer, and their generation table."""
        layers = plan.side(kind)
        if not layers:
            return None
        shapes = {spec.layer_id: self._memory_shapes(spec, kind, count) for spec in layers}
        table_shape = ((count,), torch.int64)
        wanted = [item for group in shapes.values() for item in group.values()]
        arena = self._arena(_bytes(wanted), f"{role.value}-{name}", self.device)
        allocator = Allocator(arena)
        for layer_id, group in shapes.items():
            tensors = {key: allocator.empty(*shape) for key, shape in group.items()}
            self._caches.setdefault((role, layer_id), {}).update(tensors)
        tables = self._arena(_bytes([table_shape]), f"{role.value}-{name}-generations")
        table = Allocator(tables).empty(*table_shape)
        self._tables[role, kind], self._pool_arenas[role, kind] = table, arena
        self._table_arenas[role, kind] = tables
        return Pool(name, table.numpy(), self._unit_bytes(plan, kind))

    def _memory_shapes(
        self, spec: LayerSpec, kind: Kind, count: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        activation = self.element.activation
        if kind is Kind.FULL and spec.full is not None:
            lead = (count, self.limits.page_size)
            return {name: ((*lead, *shape), activation) for name, shape in spec.full.caches().items()}
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if spec.linear is not None:
            state, conv = spec.linear.state(), spec.linear.conv()
            if state is not None:
                shapes["state"] = ((count, *state), self.element.state)
            if conv is not None:
                shapes["conv"] = ((count, *conv), activation)
        return shapes

    def _unit_bytes(self, plan: LayerPlan, kind: Kind) -> int:
        """Bytes of one page or one slot over all layers of a role."""
        itemsize, state_itemsize = self.element.activation.itemsize, self.element.state.itemsize
        if kind is Kind.FULL:
            per_token = sum(s.full.kv_bytes_per_token(itemsize) for s in plan if s.full is not None)
            return per_token * self.limits.page_size
        return sum(s.linear.state_bytes(itemsize, state_itemsize) for s in plan if s.linear is not None)

    def _pool_sizes(self) -> tuple[int, int]:
        """(pages, slots), as many for every role.

        Every sequence of a step reads one slot and writes another, and one more for every guess that is
        verified; pages get what is left of the budget, up to what all sequences at full length could
        use. Where states are cached too, theirs are what pages leave, or a quarter of what is not needed
        for a single sequence.
        """
        limits = self.limits
        # A prompt that lies in both lanes hands its state over in one more.
        slots = self._versions * limits.max_sequences + self.lanes - 1
        slot_bytes = sum(self._unit_bytes(plan, Kind.LINEAR) for plan in self.plans.values())
        page_bytes = sum(self._unit_bytes(plan, Kind.FULL) for plan in self.plans.values())
        per_sequence = -(-limits.max_context // limits.page_size)
        budget = limits.pool_bytes - slots * slot_bytes
        pages = limits.max_sequences * per_sequence
        if page_bytes:
            pages = min(pages, budget // page_bytes)
        if budget < 0 or pages < per_sequence:
            needed = slots * slot_bytes + per_sequence * page_bytes
            raise ConfigInvalid(
                f"pool_bytes is {limits.pool_bytes}; {limits.max_sequences} sequences and one context of "
                f"{limits.max_context} tokens need {needed}",
                field="pool_bytes",
                value=limits.pool_bytes,
            )
        if self._state_spacing and slot_bytes:
            beyond = max(budget - pages * page_bytes, (budget - per_sequence * page_bytes) // 4)
            cached = min(beyond // slot_bytes, pages * limits.page_size // self._state_spacing)
            if page_bytes:
                pages = min(pages, (budget - cached * slot_bytes) // page_bytes)
            slots += cached
        return pages, slots

    def _make_activations(self) -> Arena:
        rows, dtype = self.limits.max_tokens, self.element.activation
        geometries = {
            spec.geometry(side)
            for plan in self.plans.values()
            for side in (Kind.FULL, Kind.LINEAR)
            for spec in plan.side(side)
        }
        shapes = [((rows, *shape), dtype) for g in geometries for shape in (*g.inputs().values(), g.output())]
        arena = self._arena(_bytes(shapes * self.lanes), "activations", self.device)
        allocator = Allocator(arena)
        for lane in range(self.lanes):
            for geometry in geometries:
                self._activations[lane, geometry] = Buffers(
                    {n: allocator.empty((rows, *shape), dtype) for n, shape in geometry.inputs().items()},
                    allocator.empty((rows, *geometry.output()), dtype),
                )
        return arena

    def _make_bells(self) -> tuple[torch.Tensor, dict[Kind, torch.Tensor], torch.Tensor]:
        """uint8 [bells, 64], int64 [lanes, most tickets, 3] of each kind, and uint8 [mailboxes, 2, n]."""
        most = max(len(plan) for plan in self.plans.values())
        bells, times = ((_BELLS, BELL_BYTES), torch.uint8), ((self.lanes, most, 3), torch.int64)
        mail = ((_MAILBOXES, 2, _MAIL_BYTES), torch.uint8)
        self._bell_arena = self._arena(_bytes([bells, times, times, mail]), "doorbells")
        allocator = Allocator(self._bell_arena)
        found = allocator.empty(*bells)
        return (
            found,
            {kind: allocator.empty(*times) for kind in (Kind.FULL, Kind.LINEAR)},
            allocator.empty(*mail),
        )

    def _metadata_bytes(self) -> int:
        limits = self.limits
        sequences = limits.max_sequences
        pages = max((m.pages.total for m in self.memory.values() if m.pages is not None), default=0)
        per_table = min(-(-limits.max_context // limits.page_size), pages) * sequences * (4 + 8)
        return per_table + sequences * 64 + limits.max_tokens * (4 + 8) + len(SHARED_DTYPES) * ALIGNMENT * 2

    def _pools_message(self, role: Role, kind: Kind) -> pb.RolePools:
        view = view_of(self._tables[role, kind], self._table_arenas[role, kind])
        if kind is Kind.FULL:
            return pb.RolePools(
                role=convert.ROLES[role], page_size=self.limits.page_size, page_generation=view
            )
        return pb.RolePools(role=convert.ROLES[role], slot_generation=view)

    def _storage_message(self, role: Role, spec: LayerSpec, kind: Kind) -> pb.LayerStorage:
        geometry = spec.geometry(kind)
        params = self.params.get((role, spec.layer_id), {})
        names = self._memory_shapes(spec, kind, 1)
        arena = self._pool_arenas[role, kind]
        memory = self._caches[role, spec.layer_id]
        return pb.LayerStorage(
            role=convert.ROLES[role],
            layer_id=spec.layer_id,
            params={n: view_of(params[n], self._params_arena) for n in geometry.params() if n in params},
            memory={name: view_of(memory[name], arena) for name in names},
        )


def _check_params(role: Role, spec: LayerSpec, given: Mapping[str, torch.Tensor]) -> None:
    """Every parameter that a layer's geometries declare is there and shaped as they say."""
    declared: dict[str, tuple[int, ...]] = {}
    optional: set[str] = set()
    for geometry in (spec.full, spec.linear):
        if geometry is not None:
            declared.update(geometry.params())
            optional |= geometry.optional_params()
    where = f"{role.value} layer {spec.layer_id} ({spec.mechanism})"
    for name in declared.keys() - given.keys() - optional:
        raise ViewInvalid(f"{where} lacks the parameter {name}", layer_id=spec.layer_id, field=name)
    for name, tensor in given.items():
        if name not in declared or tuple(tensor.shape) != declared[name]:
            raise ViewInvalid(
                f"{where} has parameter {name} {list(tensor.shape)}; it takes {dict(declared)}",
                layer_id=spec.layer_id,
                field=name,
            )


def _bytes(shapes: Iterable[tuple[Iterable[int], torch.dtype]]) -> int:
    """Bytes that an allocator needs for these tensors."""
    total = 0
    for shape, dtype in shapes:
        total += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return total
