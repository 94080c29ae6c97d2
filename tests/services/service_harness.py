"""Drives real services: starts their processes, and a `Cell` plays the orchestrator for them."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import grpc
import numpy as np
import pytest
import torch
from braid.v1 import attention_pb2 as pb
from braid.v1 import attention_pb2_grpc, common_pb2
from braid_kernels import geometry as kernel_geometry
from braid_kernels.backend import FullLayer, LinearLayer
from braid_kernels.metadata import LinearMeta, PagedMeta
from braid_kernels.reference import ReferenceFullBackend, ReferenceLinearBackend
from braid_wire import convert, errors
from braid_wire.arena import Allocator, ArenaOwner, HostArena
from braid_wire.batch import MODE_CODES
from braid_wire.layers import (
    FullGeometry,
    GatedDelta,
    Geometry,
    Gqa,
    Kind,
    LayerPlan,
    LayerSpec,
    LinearGeometry,
    Mode,
    Role,
    digest,
)
from braid_wire.rpc import channel
from braid_wire.views import view_of
from google.rpc import error_details_pb2
from grpc_status import rpc_status

GQA = Gqa(num_q_heads=4, num_kv_heads=2, head_dim=8, v_head_dim=8, scale=8**-0.5)
GDN = GatedDelta(num_k_heads=2, num_v_heads=4, k_head_dim=8, v_head_dim=8, conv_width=4, scale=8**-0.5)
PLANS = {
    Role.TARGET: LayerPlan(
        Role.TARGET,
        (
            LayerSpec(0, Kind.LINEAR, linear=GDN),
            LayerSpec(1, Kind.FULL, full=GQA),
            LayerSpec(2, Kind.NONE),
            LayerSpec(3, Kind.PARALLEL, full=GQA, linear=GDN),
        ),
    ),
    # Ids restart at 0 in the draft, and its layer 0 is of the other kind than the target's.
    Role.DRAFT: LayerPlan(
        Role.DRAFT, (LayerSpec(0, Kind.FULL, full=GQA), LayerSpec(1, Kind.LINEAR, linear=GDN))
    ),
}
PAGE_SIZE, PAGES, SLOTS = 4, 24, 24
PAGES_PER_SEQUENCE = 6
MODULES = {Kind.FULL: "braid_full_attn", Kind.LINEAR: "braid_linear_attn"}
PATIENCE_S = 60.0
"""Longest wait for what must come at all: what comes in milliseconds here takes seconds where every core
is wanted by others."""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "BRAID_LOG": "warning"}

# Epochs of all tests that share the services only ever rise.
_epochs = itertools.count(1)


@dataclass
class Service:
    """A running service process."""

    kind: Kind
    process: subprocess.Popen[str]
    ready: Mapping[str, object]
    channel: grpc.Channel
    stub: attention_pb2_grpc.AttentionServiceStub

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.channel.close()
        self.process.terminate()
        return self.wait()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.wait()

    def wait(self) -> int:
        """The exit status."""
        try:
            return self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
            for stream in (self.process.stdout, self.process.stderr):
                if stream is not None:
                    stream.close()


def start_service(
    kind: Kind,
    address: str,
    *options: str,
    program: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
) -> Service:
    """Start a service, or another program in its place, and wait until it says that it is ready."""
    ran = program or ("-m", MODULES[kind])
    command = [sys.executable, *ran, "--address", address, "--metrics-port", "0", *options]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, **(environment or {})},
    )
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        raise RuntimeError(f"{command} did not start: {process.stderr.read() if process.stderr else ''}")
    ready = json.loads(line)
    connection = channel(ready["address"])
    # gRPC remembers an address that failed a moment ago, whatever channel it was.
    if "--tls-cert" not in options:
        grpc.channel_ready_future(connection).result(PATIENCE_S)
    return Service(kind, process, ready, connection, attention_pb2_grpc.AttentionServiceStub(connection))


@dataclass
class Sequence_:
    """A sequence as the orchestrator knows it."""

    id: int
    pages: list[int]
    slot: int = -1
    length: int = 0


@dataclass
class Sent:
    """A batch whose metadata lies in the arena."""

    message: pb.Batch
    arrays: dict[str, torch.Tensor]
    """The tensors in the arena themselves: writing to them is what a hostile peer would do."""
    parts: Sequence[tuple[Sequence_, int]]
    slots: list[int]
    """Slot of each sequence's state after the step."""

    @property
    def tokens(self) -> int:
        return self.message.num_tokens

    def commit(self) -> None:
        """The states written become current."""
        for (sequence, length), slot in zip(self.parts, self.slots, strict=True):
            sequence.length += length
            sequence.slot = slot


@dataclass
class Work:
    """A ticket and its tensors."""

    ticket: pb.Ticket
    inputs: dict[str, torch.Tensor]
    output: torch.Tensor


Key = tuple[Role, int, Kind]


@dataclass
class Cell:
    """Plays the orchestrator: owns memory, makes batches, knows what must come out."""

    services: dict[Kind, Service]
    owner: ArenaOwner
    plans: dict[Role, LayerPlan] = field(default_factory=lambda: dict(PLANS))
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(7)
        self.arenas: dict[str, HostArena] = {
            label: self.owner.create(1 << 21, label) for label in ("memory", "metadata", "activations")
        }
        self.room = {label: Allocator(arena) for label, arena in self.arenas.items()}
        self.generations = {
            name: self._put("memory", torch.ones(count, dtype=torch.int64))
            for name, count in (("page", PAGES), ("slot", SLOTS))
        }
        self.params: dict[Key, dict[str, torch.Tensor]] = {}
        self.memory: dict[Key, dict[str, torch.Tensor]] = {}
        self.shadow: dict[Key, dict[str, torch.Tensor]] = {}
        for role, plan in self.plans.items():
            for side in (Kind.FULL, Kind.LINEAR):
                for spec in plan.side(side):
                    self._allocate((role, spec.layer_id, side), spec.geometry(side))
        self.steps = itertools.count(1)
        self.free_slots = itertools.cycle(range(SLOTS))
        self.epoch = 0

    # Memory.

    def _put(self, label: str, value: torch.Tensor) -> torch.Tensor:
        place = self.room[label].empty(value.shape, value.dtype)
        place.copy_(value)
        return place

    def noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.random)

    def _allocate(self, key: Key, geometry: Geometry) -> None:
        self.params[key] = {
            name: self._put("memory", self.noise(*shape) * 0.5) for name, shape in geometry.params().items()
        }
        shapes: dict[str, tuple[int, ...]] = {}
        if isinstance(geometry, FullGeometry):
            shapes = {name: (PAGES, PAGE_SIZE, *shape) for name, shape in geometry.caches().items()}
        if isinstance(geometry, LinearGeometry):
            state, conv = geometry.state(), geometry.conv()
            shapes = {"state": (SLOTS, *state)} if state else {}
            shapes |= {"conv": (SLOTS, *conv)} if conv else {}
        # What nobody wrote is NaN, so that reading it shows.
        self.memory[key] = {
            name: self._put(
                "memory", torch.full(shape, math.nan, dtype=torch.float32 if name == "state" else self.dtype)
            )
            for name, shape in shapes.items()
        }
        self.shadow[key] = {name: tensor.clone() for name, tensor in self.memory[key].items()}

    def view(self, tensor: torch.Tensor) -> common_pb2.TensorView:
        for arena in self.arenas.values():
            start = arena.memory.data_ptr()
            if start <= tensor.data_ptr() < start + arena.size_bytes:
                return view_of(tensor, arena)
        raise ValueError("the tensor is in no arena")

    # Configure.

    def configure_request(self, kind: Kind) -> pb.ConfigureRequest:
        """A correct request for one service, in the next epoch."""
        request = pb.ConfigureRequest(
            epoch=next(_epochs),
            cell="test",
            plans=[convert.plan_to_pb(plan) for plan in self.plans.values()],
            arenas=[self.owner.describe(arena) for arena in self.arenas.values()],
            activation_dtype=common_pb2.DTYPE_FLOAT32,
            state_dtype=common_pb2.DTYPE_FLOAT32,
        )
        for role, plan in self.plans.items():
            request.pools.add(
                role=convert.ROLES[role],
                page_size=PAGE_SIZE,
                page_generation=self.view(self.generations["page"]),
                slot_generation=self.view(self.generations["slot"]),
            )
            for spec in plan.side(kind):
                key = role, spec.layer_id, kind
                request.storage.add(
                    role=convert.ROLES[role],
                    layer_id=spec.layer_id,
                    params={name: self.view(tensor) for name, tensor in self.params[key].items()},
                    memory={name: self.view(tensor) for name, tensor in self.memory[key].items()},
                )
        return request

    def configure(self) -> None:
        """Configure both services, and check what they accept."""
        for kind, service in self.services.items():
            request = self.configure_request(kind)
            response = service.stub.Configure(request, timeout=PATIENCE_S)
            assert response.epoch == request.epoch
            for (role, plan), accepted in zip(self.plans.items(), response.accepted, strict=True):
                layers = plan.side(kind)
                assert accepted.role == convert.ROLES[role]
                assert list(accepted.layer_ids) == [spec.layer_id for spec in layers]
                assert accepted.digest == digest(layers)
        self.next_epoch()

    def next_epoch(self) -> None:
        """What is sent from here on begins a new epoch in both services."""
        self.epoch = next(_epochs)

    # Steps.

    def sequence(self, id: int) -> Sequence_:
        first = id * PAGES_PER_SEQUENCE
        return Sequence_(id, list(range(first, first + PAGES_PER_SEQUENCE)))

    def batch(
        self,
        *parts: tuple[Sequence_, int],
        role: Role = Role.TARGET,
        lane: int = 0,
        mode: Mode | None = None,
        every_state: bool = False,
    ) -> Sent:
        """A correct batch; one token of a sequence that has some is DECODE unless `mode` says otherwise.

        Args:
            every_state: keep the state after every token, not only after the last of each span.
        """
        lengths = [length for _, length in parts]
        total, sequences = sum(lengths), [sequence for sequence, _ in parts]
        taken = {sequence.slot for sequence in sequences}
        fresh = (slot for slot in self.free_slots if slot not in taken)
        ends = list(itertools.accumulate(lengths))
        out = [next(fresh) if every_state or token + 1 in ends else -1 for token in range(total)]
        modes = [
            mode or (Mode.DECODE if length == 1 and sequence.length else Mode.EXTEND)
            for sequence, length in parts
        ]
        pages = [sequence.pages for sequence in sequences]
        values: dict[str, tuple[object, torch.dtype]] = {
            "cu_seqlens": ([0, *ends], torch.int32),
            "context_lens": ([sequence.length for sequence in sequences], torch.int32),
            "modes": ([MODE_CODES[mode] for mode in modes], torch.uint8),
            "sequence_ids": ([sequence.id for sequence in sequences], torch.int64),
            "page_table": (pages, torch.int32),
            "page_generations": (self.generations["page"][torch.tensor(pages)].tolist(), torch.int64),
            "state_in": ([sequence.slot for sequence in sequences], torch.int32),
            "state_in_generations": ([int(sequence.slot >= 0) for sequence in sequences], torch.int64),
            "state_out": (out, torch.int32),
            "state_out_generations": ([int(slot >= 0) for slot in out], torch.int64),
        }
        arrays = {
            name: self._put("metadata", torch.tensor(value, dtype=dtype))
            for name, (value, dtype) in values.items()
        }
        message = pb.Batch(
            role=convert.ROLES[role],
            epoch=self.epoch,
            step=next(self.steps),
            lane=lane,
            num_tokens=total,
            num_sequences=len(parts),
            **{name: self.view(tensor) for name, tensor in arrays.items()},
        )
        return Sent(message, arrays, parts, [out[end - 1] for end in ends])

    def work(self, key: Key, tokens: int) -> Work:
        """Random inputs and a poisoned output for one layer."""
        role, layer_id, side = key
        geometry = self.plans[role].layer(layer_id).geometry(side)
        inputs = {
            name: self._put("activations", self.noise(tokens, *shape).to(self.dtype))
            for name, shape in geometry.inputs().items()
        }
        output = self._put(
            "activations", torch.full((tokens, *geometry.output()), math.nan, dtype=self.dtype)
        )
        views = {name: self.view(tensor) for name, tensor in inputs.items()}
        return Work(pb.Ticket(layer_id=layer_id, inputs=views, output=self.view(output)), inputs, output)

    def all_work(self, kind: Kind, sent: Sent) -> list[Work]:
        """Work for every layer of one kind, in plan order."""
        role = convert.role_from_pb(sent.message.role)
        return [self.work((role, spec.layer_id, kind), sent.tokens) for spec in self.plans[role].side(kind)]

    def plan(self, kind: Kind, sent: Sent) -> pb.PlanResponse:
        response = self.services[kind].stub.Plan(pb.PlanRequest(batch=sent.message), timeout=PATIENCE_S)
        assert response.summary.qo_indptr_last == sent.tokens
        return response

    def attend_request(self, sent: Sent, work: Work) -> pb.AttendRequest:
        batch = sent.message
        return pb.AttendRequest(
            role=batch.role, epoch=batch.epoch, step=batch.step, lane=batch.lane, ticket=work.ticket
        )

    def attend(self, kind: Kind, sent: Sent, work: Work) -> pb.AttendResponse:
        response = self.services[kind].stub.Attend(self.attend_request(sent, work), timeout=PATIENCE_S)
        timing = response.timing
        assert 0 < timing.received_ns <= timing.started_ns <= timing.finished_ns
        return response

    def open_request(self, sent: Sent, works: list[Work]) -> pb.WalkRequest:
        opened = pb.OpenStep(plan=pb.PlanRequest(batch=sent.message), tickets=[work.ticket for work in works])
        return pb.WalkRequest(open=opened)

    # What must come out.

    def expected(self, kind: Kind, sent: Sent, work: Work) -> torch.Tensor:
        """The reference's output; its own memory advances with it."""
        role = convert.role_from_pb(sent.message.role)
        key = role, work.ticket.layer_id, kind
        geometry = self.plans[role].layer(work.ticket.layer_id).geometry(kind)
        form = getattr(kernel_geometry, type(geometry).__name__)(**asdict(geometry))
        out = torch.full_like(work.output, math.nan)
        arrays, shadow = sent.arrays, self.shadow[key]
        if kind is Kind.FULL:
            meta = PagedMeta(arrays["cu_seqlens"], arrays["context_lens"], arrays["page_table"])
            full = ReferenceFullBackend().layer(FullLayer(form, self.params[key], shadow))
            full(work.inputs, meta, None, out)
        else:
            layer = LinearLayer(form, self.params[key], shadow["state"], shadow.get("conv"))
            states = LinearMeta(arrays["cu_seqlens"], arrays["state_in"], arrays["state_out"])
            ReferenceLinearBackend().layer(layer)(work.inputs, states, out)
        return out

    def check_output(self, kind: Kind, sent: Sent, work: Work) -> None:
        """The output is the reference's."""
        torch.testing.assert_close(work.output, self.expected(kind, sent, work), rtol=2e-4, atol=2e-5)

    def check_memory(self, key: Key) -> None:
        """A layer's pages or slots are the reference's, those that nobody wrote included."""
        for name, tensor in self.memory[key].items():
            torch.testing.assert_close(tensor, self.shadow[key][name], rtol=2e-4, atol=2e-5, equal_nan=True)

    def check(self, kind: Kind, sent: Sent, work: Work) -> None:
        """The output and the memory are the reference's."""
        self.check_output(kind, sent, work)
        self.check_memory((convert.role_from_pb(sent.message.role), work.ticket.layer_id, kind))

    def step(self, *parts: tuple[Sequence_, int], **how: object) -> Sent:
        """A correct step on both services, checked and committed."""
        sent = self.batch(*parts, **how)  # type: ignore[arg-type]
        for kind in self.services:
            self.plan(kind, sent)
            for work in self.all_work(kind, sent):
                self.attend(kind, sent, work)
                self.check(kind, sent, work)
        sent.commit()
        return sent


@contextmanager
def refused(expected: type[errors.BraidError]) -> Iterator[list[errors.BraidError]]:
    """The block is refused with this error of the table: class, gRPC code and ErrorInfo reason."""
    found: list[errors.BraidError] = []
    with pytest.raises(grpc.RpcError) as caught:
        yield found
    error = caught.value
    assert error.code() is expected.code, error
    status = rpc_status.from_call(error)
    assert status is not None, error
    assert_status(status, expected)
    typed = errors.from_rpc_error(error, "service")
    assert type(typed) is expected, typed
    assert len(typed.message) > 10
    found.append(typed)


def assert_status(status: object, expected: type[errors.BraidError]) -> None:
    """A google.rpc.Status has the code of this error, and one ErrorInfo with its reason."""
    info = error_details_pb2.ErrorInfo()
    assert status.code == expected.code.value[0], status  # type: ignore[attr-defined]
    (detail,) = status.details  # type: ignore[attr-defined]
    assert detail.Unpack(info)
    assert (info.reason, info.domain) == (expected.reason, "braid")


def changed(sent: Sent, name: str, value: object) -> None:
    """Write into a metadata array."""
    sent.arrays[name].copy_(torch.from_numpy(np.array(value)))


MakeCell = Callable[..., Cell]
