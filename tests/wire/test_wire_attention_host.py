"""The host with kernels that watch, wait or fail: what no real kernel does on demand."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from braid.v1 import attention_pb2 as pb
from braid.v1 import common_pb2
from braid_wire import convert, errors
from braid_wire.arena import Allocator, ArenaOwner
from braid_wire.attention_core import AttentionCore, CheckedBatch, LayerRunner, PlannedBatch
from braid_wire.attention_host import AttentionHost
from braid_wire.attention_walk import Walk
from braid_wire.layers import Geometry, Kind, LayerPlan, LayerSpec, Lightning, Role
from braid_wire.metrics import ProcessMetrics
from braid_wire.views import ArenaMap, view_of

PLAN = LayerPlan(Role.TARGET, (LayerSpec(4, Kind.LINEAR, linear=Lightning(1, 2, scale=1.0)),))
Kernel = Callable[[Mapping[str, torch.Tensor], PlannedBatch, torch.Tensor], None]


def write_ones(inputs: Mapping[str, torch.Tensor], planned: PlannedBatch, out: torch.Tensor) -> None:
    out.fill_(1)


class ToldNo(Exception):
    """What this core's kernels raise when they refuse a value."""


class Core(AttentionCore):
    """Runs whatever a test puts into `kernel`."""

    kind = Kind.LINEAR
    refusals = {ToldNo: errors.BatchInvalid}  # noqa: RUF012

    def __init__(self) -> None:
        self.kernel: Kernel = write_ones
        self.planned: list[dict[str, torch.Tensor]] = []

    def describe(self) -> pb.DescribeResponse:
        return pb.DescribeResponse(kind=common_pb2.KIND_LINEAR, backend="test", max_tokens=16)

    def supports(
        self, geometry: Geometry, activation_dtype: torch.dtype, state_dtype: torch.dtype
    ) -> str | None:
        return None

    def runner(
        self,
        spec: LayerSpec,
        geometry: Geometry,
        params: Mapping[str, torch.Tensor],
        memory: Mapping[str, torch.Tensor],
        page_size: int,
    ) -> LayerRunner:
        return lambda inputs, planned, out: self.kernel(inputs, planned, out)

    def plan(
        self, plan: LayerPlan, batch: CheckedBatch, page_size: int, options: Mapping[str, str]
    ) -> PlannedBatch:
        self.planned.append(dict(batch.arrays))
        return PlannedBatch(pb.PlanSummary(qo_indptr_last=int(batch.arrays["cu_seqlens"][-1])), None)


class Bench:
    """A configured host in this process, and the memory of one layer."""

    def __init__(self, owner: ArenaOwner, embedded: bool = True) -> None:
        self.core = Core()
        self.metrics = ProcessMetrics("linear", "test")
        self.arena = owner.create(1 << 16, "all")
        self.owner = owner
        self.room = Allocator(self.arena)
        self.arenas = ArenaMap([self.arena])
        self.host = AttentionHost(self.core, self.metrics, self.arenas if embedded else None)
        self.generations = self.put([1] * 8, torch.int64)
        self.state = self.put(torch.zeros(8, 1, 2, 2).tolist(), torch.float32)
        self.log_decay = self.put([-0.1], torch.float32)
        self.configure(1)

    def put(self, values: object, dtype: torch.dtype) -> torch.Tensor:
        value = torch.tensor(values, dtype=dtype)
        place = self.room.empty(value.shape, dtype)
        place.copy_(value)
        return place

    def view(self, tensor: torch.Tensor) -> common_pb2.TensorView:
        return view_of(tensor, self.arena)

    def configure(self, epoch: int) -> pb.ConfigureResponse:
        request = pb.ConfigureRequest(
            epoch=epoch,
            plans=[convert.plan_to_pb(PLAN)],
            arenas=[self.owner.describe(self.arena)],
            activation_dtype=common_pb2.DTYPE_FLOAT32,
            state_dtype=common_pb2.DTYPE_FLOAT32,
        )
        request.pools.add(role=common_pb2.ROLE_TARGET, slot_generation=self.view(self.generations))
        request.storage.add(
            role=common_pb2.ROLE_TARGET,
            layer_id=4,
            params={"log_decay": self.view(self.log_decay)},
            memory={"state": self.view(self.state)},
        )
        return self.host.configure(request)

    def batch(
        self, epoch: int = 1, step: int = 1, lane: int = 0
    ) -> tuple[pb.PlanRequest, dict[str, torch.Tensor]]:
        values = {
            "cu_seqlens": ([0, 2], torch.int32),
            "context_lens": ([0], torch.int32),
            "modes": ([0], torch.uint8),
            "sequence_ids": ([9], torch.int64),
            "state_in": ([-1], torch.int32),
            "state_in_generations": ([0], torch.int64),
            "state_out": ([-1, 3], torch.int32),
            "state_out_generations": ([0, 1], torch.int64),
        }
        arrays = {name: self.put(value, dtype) for name, (value, dtype) in values.items()}
        views = {name: self.view(tensor) for name, tensor in arrays.items()}
        batch = pb.Batch(role=1, epoch=epoch, step=step, lane=lane, num_tokens=2, num_sequences=1, **views)
        return pb.PlanRequest(batch=batch), arrays

    def ticket(self) -> pb.Ticket:
        inputs = {name: self.view(self.put([[[1.0, 2.0]]] * 2, torch.float32)) for name in ("q", "k", "v")}
        return pb.Ticket(
            layer_id=4, inputs=inputs, output=self.view(self.put([[[0.0, 0.0]]] * 2, torch.float32))
        )

    def attend(self, epoch: int = 1, step: int = 1, lane: int = 0) -> pb.AttendResponse:
        return self.host.attend(
            pb.AttendRequest(role=1, epoch=epoch, step=step, lane=lane, ticket=self.ticket())
        )


@pytest.fixture
def bench(owner: ArenaOwner) -> Bench:
    return Bench(owner)


def test_kernels_get_the_copy_that_was_checked(bench: Bench) -> None:
    request, arrays = bench.batch()
    bench.host.plan(request)
    kept = {name: tensor.clone() for name, tensor in bench.core.planned[0].items()}
    for tensor in arrays.values():
        tensor.fill_(99)
    for name, tensor in bench.core.planned[0].items():
        assert torch.equal(tensor, kept[name])
        assert not (
            bench.arena.memory.data_ptr()
            <= tensor.data_ptr()
            < bench.arena.memory.data_ptr() + bench.arena.size_bytes
        )


def test_a_kernel_that_fails_is_our_fault_and_the_host_lives(bench: Bench) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("deep inside")

    request, _ = bench.batch()
    bench.host.plan(request)
    bench.core.kernel = fail
    with pytest.raises(errors.ServiceFault, match=r"layer 4 \(lightning\).*ZeroDivisionError: deep inside"):
        bench.attend()
    bench.core.kernel = write_ones
    bench.attend()


def test_what_a_kernel_refuses_is_the_callers_mistake(bench: Bench) -> None:
    def refuse(*_: object) -> None:
        raise ToldNo("state_in[0] = 7")

    request, _ = bench.batch()
    bench.host.plan(request)
    bench.core.kernel = refuse
    with pytest.raises(errors.BatchInvalid, match="state_in"):
        bench.attend()


def test_a_failing_layer_closes_its_walked_step(bench: Bench) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    walk = Walk(bench.host)

    def open_step(step: int) -> pb.WalkResponse:
        request, _ = bench.batch(step=step)
        (response,) = walk.handle(pb.WalkRequest(open=pb.OpenStep(plan=request, tickets=[bench.ticket()])))
        return response

    run = pb.WalkRequest(run=pb.RunTicket(step=1))
    assert open_step(1).HasField("opened") and not walk.idle
    bench.core.kernel = fail
    (response,) = walk.handle(run)
    assert type(errors.from_status(response.failed)) is errors.ServiceFault and walk.idle
    bench.core.kernel = write_ones
    (response,) = walk.handle(run)
    assert type(errors.from_status(response.failed)) is errors.StepOrder
    assert open_step(2).HasField("opened")
    (response,) = walk.handle(pb.WalkRequest(run=pb.RunTicket(step=2)))
    assert response.HasField("done")
    assert list(walk.handle(pb.WalkRequest(close=pb.CloseStep(step=2)))) == [] and walk.idle


def test_a_walk_that_closes_forgets_its_plans(bench: Bench) -> None:
    walk = Walk(bench.host)
    request, _ = bench.batch()
    walk.handle(pb.WalkRequest(open=pb.OpenStep(plan=request, tickets=[bench.ticket()])))
    bench.attend()
    walk.close()
    with pytest.raises(errors.PlanMissing):
        bench.attend()


@pytest.mark.parametrize("by", ["plan", "configure"])
def test_an_epoch_ends_only_when_its_running_kernel_has(bench: Bench, by: str) -> None:
    """When the end is answered, memory may be given to others at once: nothing may write it any more."""
    running, go = threading.Event(), threading.Event()
    trace: list[str] = []

    def wait(inputs: object, planned: object, out: torch.Tensor) -> None:
        running.set()
        go.wait(60)
        trace.append("kernel ended")

    bench.core.kernel = wait
    request, _ = bench.batch()
    bench.host.plan(request)

    def end() -> None:
        if by == "plan":
            bench.host.plan(bench.batch(epoch=2)[0])
        else:
            bench.configure(2)
        trace.append("epoch ended")

    kernel = threading.Thread(target=bench.attend)
    kernel.start()
    assert running.wait(60)
    ender = threading.Thread(target=end)
    ender.start()
    ender.join(0.1)
    assert ender.is_alive() and trace == []
    go.set()
    kernel.join(60)
    ender.join(60)
    assert trace == ["kernel ended", "epoch ended"]


def test_a_ticket_that_waited_behind_the_end_of_its_epoch_does_not_run(bench: Bench) -> None:
    running, go = threading.Event(), threading.Event()
    ran: list[int] = []

    def wait(*_: object) -> None:
        ran.append(1)
        running.set()
        go.wait(60)

    bench.core.kernel = wait
    for lane in (0, 1):
        bench.host.plan(bench.batch(lane=lane)[0])
    refusals: list[Exception] = []

    def second() -> None:
        try:
            bench.attend(lane=1)
        except errors.BraidError as error:
            refusals.append(error)

    threads = [threading.Thread(target=bench.attend), threading.Thread(target=lambda: bench.configure(2))]
    threads[0].start()
    assert running.wait(60)
    threads[1].start()
    threads.append(threading.Thread(target=second))
    threads[2].start()
    threads[2].join(0.1)
    go.set()
    for thread in threads:
        thread.join(60)
    # Whether the waiting ticket came before the end or behind it: it ran in its epoch or not at all.
    assert len(ran) == 2 or [type(error) for error in refusals] == [errors.EpochStale]


def test_an_embedded_host_uses_the_orchestrators_own_memory(bench: Bench) -> None:
    bench.host.plan(bench.batch()[0])
    bench.attend()
    bench.configure(2)
    assert bench.arena.memory.any()  # not closed by a new Configure
    stranger = pb.ConfigureRequest(
        epoch=9, arenas=[common_pb2.Arena(arena_id=88, size_bytes=8, device="cpu")]
    )
    with pytest.raises(errors.ArenaUnknown, match="88"):
        bench.host.configure(stranger)
    larger = pb.ConfigureRequest(epoch=9, arenas=[bench.owner.describe(bench.arena)])
    larger.arenas[0].size_bytes += 1
    with pytest.raises(errors.ViewInvalid):
        bench.host.configure(larger)


def test_a_host_maps_and_unmaps_its_own_memory(owner: ArenaOwner) -> None:
    bench = Bench(owner, embedded=False)
    bench.host.plan(bench.batch()[0])
    bench.attend()
    files = _open_arenas()
    for epoch in range(2, 6):
        bench.configure(epoch)
    bad = pb.ConfigureRequest(epoch=9, arenas=[owner.describe(bench.arena)])
    with pytest.raises(errors.ViewInvalid):
        bench.host.configure(bad)
    assert _open_arenas() == files
    bench.host.plan(bench.batch(epoch=5)[0])
    bench.attend(epoch=5)


def _open_arenas() -> int:
    """File descriptors of arenas in this process, mappings included."""
    gc.collect()  # what earlier tests left in cycles may go at any time
    found = 0
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # another thread closed it
            found += "memfd:braid" in str(fd.readlink())
    return found


def test_describe_tells_pid_and_epoch(bench: Bench) -> None:
    bench.host.plan(bench.batch(epoch=5)[0])
    said = bench.host.describe()
    assert (said.backend, said.epoch) == ("test", 5) and said.pid > 0
    assert bench.metrics.registry.get_sample_value("braid_epoch") == 5


def test_what_a_layer_costs_is_told(bench: Bench) -> None:
    bench.host.plan(bench.batch()[0])
    timing = bench.attend().timing
    assert timing.received_ns <= timing.started_ns <= timing.finished_ns
    labels = {"role": "target", "layer_id": "4", "kind": "linear", "mechanism": "lightning"}
    sample = bench.metrics.registry.get_sample_value
    assert sample("braid_layer_dispatch_total", {**labels, "mode": "extend"}) == 1
    assert sample("braid_layer_seconds_count", {**labels, "phase": "compute"}) == 1
    assert sample("braid_layer_seconds_count", {**labels, "phase": "queue"}) == 1


@pytest.fixture
def unconfigured() -> Iterator[AttentionHost]:
    yield AttentionHost(Core(), ProcessMetrics("linear", "test"))


def test_before_configure(unconfigured: AttentionHost) -> None:
    batch = pb.Batch(role=1, epoch=1, step=1, num_tokens=1, num_sequences=1)
    with pytest.raises(errors.NotConfigured):
        unconfigured.plan(pb.PlanRequest(batch=batch))
    with pytest.raises(errors.NotConfigured):
        unconfigured.attend(pb.AttendRequest(role=1, epoch=1))
