"""The heart of an attention service, without a transport.

`AttentionHost` enforces every rule of `AttentionService` and runs layers. The gRPC servicer only
translates to it, and a cell that has everything in one process calls it directly. It knows
layers, epochs and planned batches; it knows nothing about sequences.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from braid.v1 import attention_pb2, common_pb2

from braid_wire import attention_config, convert, doorbell
from braid_wire.attention_config import Configuration, ReadyTicket
from braid_wire.attention_core import AttentionCore, CheckedBatch, PlannedBatch
from braid_wire.attention_step import LANES, Layout, Step, Unchecked, places, resolve_ticket
from braid_wire.audit import Auditor
from braid_wire.batch_check import Snapshot
from braid_wire.cuda_doorbell import DeviceBell, Streams
from braid_wire.errors import (
    ArenaUnknown,
    BatchInvalid,
    BraidError,
    ConfigInvalid,
    EpochStale,
    NotConfigured,
    PlanMissing,
    ServiceFault,
    StepOrder,
)
from braid_wire.layers import Kind, Role
from braid_wire.metrics import ProcessMetrics
from braid_wire.views import ArenaMap

log = logging.getLogger(__name__)

# One kernel at a time in a process, whatever it hosts: kernels share one pool of threads. An epoch
# ends under this lock too, so that when its end is answered nothing of it writes any more.
_KERNEL_LOCK = threading.Lock()

_LONGEST_KERNEL_S = 120.0


class AttentionHost:
    """Runs the layers of one kind as `AttentionService` promises.

    Every method takes and gives the messages of the contract and raises the typed errors named
    there; methods may be called from any thread.

    Args:
        core: the kernels.
        metrics: of the process.
        arenas: for a host inside the orchestrator's process: the arenas that views name, kept by
            their owner. None: Configure maps them from their handles, and the host owns the mappings.
        auditor: compares layers with the reference now and then; None: nobody does. Its samples are
            copied between a layer and the next, so with one no layers are handed over between streams.
        streams: of the device that the kernels run on. None: a CPU, or a host inside the orchestrator's
            process, whose kernels go to the caller's stream, behind what the caller has put there.
    """

    def __init__(
        self,
        core: AttentionCore,
        metrics: ProcessMetrics,
        arenas: ArenaMap | None = None,
        auditor: Auditor | None = None,
        streams: Streams | None = None,
    ) -> None:
        self._core = core
        self._auditor = auditor
        self.streams = streams
        self.device_bells: list[DeviceBell] = []
        """Of the step whose layers wait on the device now."""
        self._metrics = metrics
        self._shared_arenas = arenas
        self._max_tokens = core.describe().max_tokens
        self._epoch = 0
        self._configuration: Configuration | None = None
        self._steps: dict[tuple[Role, int], Step] = {}
        # Guards the three above; taken after _KERNEL_LOCK where both are.
        self._lock = threading.Lock()
        self._configuring = threading.Lock()
        self.faulted = False
        """Whether the device has failed: no kernel of this process will run again."""
        self.on_fault: Callable[[], None] = lambda: None
        """Called once when it has."""

    @property
    def kind(self) -> Kind:
        """`Kind.FULL` or `Kind.LINEAR`."""
        return self._core.kind

    @property
    def metrics(self) -> ProcessMetrics:
        """Of the process."""
        return self._metrics

    def describe(self) -> attention_pb2.DescribeResponse:
        """What this service is and can do. Never fails."""
        response = self._core.describe()
        response.pid, response.epoch = os.getpid(), self._epoch
        response.doorbells = doorbell.available()
        if self.streams is not None:
            response.device_handovers.extend(self.handovers)
            response.device_sharing = self.streams.sharing
            response.device_uuid = self.streams.uuid
        return response

    @property
    def handovers(self) -> Sequence[attention_pb2.DeviceHandover.ValueType]:
        """How layers on the device may be handed over, best first; none on a CPU, or with audits."""
        return () if self.streams is None or self._auditor is not None else self.streams.handovers

    def check_device(self) -> None:
        """Find out whether a failure was the device's; its context is then lost, and so is this process."""
        if self.streams is None or self.faulted:
            return
        try:
            with self.streams.entered():
                self.streams.idle()
        except ServiceFault as error:
            log.error("the device has failed, this process ends: %s", error.message)
            self.faulted = True
            self.on_fault()

    def on_device(self) -> AbstractContextManager[None]:
        """Where kernels are launched and planned: on the host's own stream, if it has one."""
        return nullcontext() if self.streams is None else self.streams.entered()

    def configure(self, request: attention_pb2.ConfigureRequest) -> attention_pb2.ConfigureResponse:
        """Take on layers, memory and parameters; a request that fails leaves everything as it was."""
        with self._configuring:
            self._expect_new(request.epoch)
            arenas = self._map(request)
            try:
                with self.on_device():
                    configuration = attention_config.resolve(self._core, request, arenas, self._metrics)
                previous = self._take_over(request.epoch, configuration)
            except BaseException:
                self._unmap(arenas)
                raise
        if previous is not None:
            replaced, previous = previous.arenas, None
            self._unmap(replaced)
        self._metrics.model(request.cell)
        accepted = configuration.accepted()
        log.info(
            "cell %s, epoch %d: %s",
            request.cell,
            request.epoch,
            ", ".join(f"role {item.role} layers {list(item.layer_ids)}" for item in accepted),
        )
        return attention_pb2.ConfigureResponse(epoch=request.epoch, accepted=accepted)

    def plan(self, request: attention_pb2.PlanRequest) -> attention_pb2.PlanResponse:
        """Check a batch and plan it; replaces the plan of the same role and lane."""
        return self.plan_step(request)[1]

    def attend(self, request: attention_pb2.AttendRequest) -> attention_pb2.AttendResponse:
        """Run one layer of a planned batch."""
        received = time.monotonic_ns()
        role = convert.role_from_pb(request.role)
        step = self._current(role, request.epoch, request.step, request.lane)
        ticket = resolve_ticket(step, request.ticket)
        return attention_pb2.AttendResponse(timing=self.run(step, ticket, received))

    # Epochs and configurations.

    def _expect_new(self, epoch: int) -> None:
        if epoch <= self._epoch:
            raise EpochStale(f"epoch {epoch} is not above {self._epoch}", epoch=epoch, current=self._epoch)

    def _take_over(self, epoch: int, configuration: Configuration) -> Configuration | None:
        """Make a configuration the current one; gives the previous one."""
        with _KERNEL_LOCK, self._lock:
            self._expect_new(epoch)  # a Plan may have begun a later one meanwhile
            previous, self._configuration = self._configuration, configuration
            self._begin(epoch)
        return previous

    def _begin(self, epoch: int) -> None:
        """Under both locks: nothing that was planned before may run from here on."""
        if self.streams is not None:
            # What is enqueued already writes to memory that the next epoch may map anew.
            with self.streams.entered():
                self.streams.drain(self.device_bells)
        self._epoch = epoch
        self._steps.clear()
        self._metrics.epoch.set(epoch)

    def _enter(self, epoch: int) -> Configuration:
        """The configuration for a batch of this epoch; an epoch above the current one begins."""
        with self._lock:
            current, configuration = self._epoch, self._configuration
        if configuration is None:
            raise NotConfigured("the service has no configuration yet")
        if epoch < current:
            raise EpochStale(f"epoch {epoch} is over; it is {current}", epoch=epoch, current=current)
        if epoch > current:
            with _KERNEL_LOCK, self._lock:
                if epoch > self._epoch:
                    log.info("epoch %d ends, %d begins", self._epoch, epoch)
                    self._begin(epoch)
        return configuration

    def _map(self, request: attention_pb2.ConfigureRequest) -> ArenaMap:
        """The arenas of a Configure, all mapped anew: an id may stand for other memory than before."""
        ids = [described.arena_id for described in request.arenas]
        if len(set(ids)) != len(ids):
            raise ConfigInvalid(f"arenas {ids} name one twice", field="arenas")
        if self._shared_arenas is not None:
            for described in request.arenas:
                _expect_shared(self._shared_arenas, described)
            return self._shared_arenas
        arenas = ArenaMap()
        try:
            for described in request.arenas:
                arenas.map(described)
        except BaseException:
            arenas.close()
            raise
        return arenas

    def _unmap(self, arenas: ArenaMap) -> None:
        if arenas is not self._shared_arenas:
            arenas.close()
        if self.streams is not None:
            # Mappings of a device go with their last tensor; the owner frees the memory when this returns.
            gc.collect()

    # Plans.

    def plan_step(self, request: attention_pb2.PlanRequest) -> tuple[Step, attention_pb2.PlanResponse]:
        """As `plan`, with the step itself."""
        began = time.monotonic_ns()
        batch = request.batch
        configuration = self._enter(batch.epoch)
        layout = self._layout(request, configuration)
        layout.snapshot.refresh()
        return self._planned(layout, layout.check(), batch.epoch, batch.step, began)

    def plan_again(self, layout: Layout, epoch: int, number: int) -> tuple[Step, attention_pb2.PlanResponse]:
        """Plan what a layout's places hold now."""
        began = time.monotonic_ns()
        if self._enter(epoch) is not layout.configuration:
            raise StepOrder("the step was kept before the last Configure", step=number)
        # Kernels of the step before read these copies; under the lock none runs, and then none may.
        with _KERNEL_LOCK:
            with self._lock:
                self._steps.pop((layout.role, layout.lane), None)
            layout.snapshot.refresh()
            found = layout.check()
        return self._planned(layout, found, epoch, number, began)

    def _planned(
        self, layout: Layout, found: tuple[str, int], epoch: int, number: int, began: int
    ) -> tuple[Step, attention_pb2.PlanResponse]:
        """Let the kernels plan a batch that was checked, and make it the current one of its role and lane."""
        mode, keys = found
        batch = self._plan_batch(layout, mode, keys)
        step = Step(layout, epoch, number, mode, batch)
        with self._lock:
            if epoch != self._epoch or layout.configuration is not self._configuration:
                raise EpochStale(f"epoch {epoch} ended while its batch was planned", epoch=epoch)
            self._steps[layout.role, layout.lane] = step
        nanoseconds = time.monotonic_ns() - began
        self._metrics.plan_seconds.observe(nanoseconds * 1e-9)
        return step, attention_pb2.PlanResponse(summary=batch.summary, plan_ns=nanoseconds)

    def _layout(self, request: attention_pb2.PlanRequest, configuration: Configuration) -> Layout:
        """What of a batch does not change with its numbers, checked."""
        batch = request.batch
        role = convert.role_from_pb(batch.role)
        layers = configuration.roles.get(role)
        if layers is None:
            raise BatchInvalid(f"role {role.value} has no plan here", field="role", role=role.value)
        self._check_sizes(batch)
        snapshot = Snapshot(places(batch, layers, configuration.arenas))
        check: Callable[[], tuple[str, int]] = Unchecked(snapshot, batch.num_tokens)
        if layers.check is not None:
            check = layers.check.bind(snapshot.arrays, batch.num_tokens)
        options = dict(request.options)
        return Layout(role, batch.lane, configuration, layers, batch.num_tokens, options, snapshot, check, [])

    def _check_sizes(self, batch: attention_pb2.Batch) -> None:
        if batch.num_tokens < 1 or (self._max_tokens and batch.num_tokens > self._max_tokens):
            raise BatchInvalid(
                f"num_tokens is {batch.num_tokens}; it must be from 1 to {self._max_tokens or 'any'}",
                field="num_tokens",
                value=batch.num_tokens,
            )
        if batch.num_sequences < 1:
            raise BatchInvalid("num_sequences is 0; it must be at least 1", field="num_sequences", value=0)
        if batch.lane >= LANES:
            raise BatchInvalid(f"lane is {batch.lane}; it must be 0 or 1", field="lane", value=batch.lane)

    def _plan_batch(self, layout: Layout, mode: str, keys: int) -> PlannedBatch:
        layers, options = layout.layers, layout.options
        if layers.pools is None:  # the role has no layer here: nothing to plan, but walks stay uniform
            summary = attention_pb2.PlanSummary(
                qo_indptr_last=layout.num_tokens, ignored_options=sorted(options)
            )
            return PlannedBatch(summary, None)
        like = layout.planned[-1] if layout.planned else None
        batch = CheckedBatch(layout.snapshot.arrays, layout.num_tokens, mode, keys, like)
        try:
            with self.on_device():
                planned = self._core.plan(layers.plan, batch, layers.pools.page_size, options)
        except Exception as error:
            raise self._typed(error, "planning") from error
        layout.planned[:] = [planned]
        return planned

    def _current(self, role: Role, epoch: int, step: int, lane: int) -> Step:
        """The planned step of an Attend."""
        with self._lock:
            current, found = self._epoch, self._steps.get((role, lane))
            if self._configuration is None:
                raise NotConfigured("the service has no configuration yet")
        if epoch != current:
            raise EpochStale(f"epoch {epoch} is not the current one, {current}", epoch=epoch, current=current)
        if found is None or found.step != step:
            raise PlanMissing(
                f"step {step}, lane {lane} of role {role.value} is not planned in epoch {epoch}",
                step=step,
                lane=lane,
            )
        return found

    def forget(self, step: Step) -> None:
        """A step is over; nothing where another took its place."""
        with self._lock:
            if self._steps.get((step.role, step.lane)) is step:
                del self._steps[step.role, step.lane]

    # Layers.

    def run(self, step: Step, ticket: ReadyTicket, received: int) -> common_pb2.Timing:
        """Run one layer; `received` is CLOCK_MONOTONIC, nanoseconds."""
        started, finished = self.execute(step, ticket)
        if self._metrics.recording:
            # Not the ticket: what waits to be counted must not keep an arena.
            row = ticket.layer.row
            self._metrics.layers.note(step.mode, lambda: ((row,), ((received, started, finished),)))
        return common_pb2.Timing(received_ns=received, started_ns=started, finished_ns=finished)

    def execute(self, step: Step, ticket: ReadyTicket) -> tuple[int, int]:
        """Run one layer to its end; when it started and finished, nanoseconds of CLOCK_MONOTONIC."""
        with _KERNEL_LOCK:  # and not `alone`, which takes a microsecond longer
            self.expect_live(step)
            try:
                with self.on_device():
                    return self._run_alone(step, ticket)
            except ServiceFault:
                self.check_device()
                raise

    @contextmanager
    def alone(self, step: Step) -> Iterator[None]:
        """No other kernel of this process begins, and no epoch ends; the step is live."""
        with _KERNEL_LOCK:
            self.expect_live(step)
            yield

    def _run_alone(self, step: Step, ticket: ReadyTicket) -> tuple[int, int]:
        """As `execute`, under the kernel lock and on the device."""
        layer, sample = ticket.layer, None
        point = step.role, layer.spec.layer_id
        if self._auditor is not None:
            sample = self._auditor.begin(
                point, step.layers.layers, layer.sampler, ticket.inputs, step.batch.payload
            )
        started = time.monotonic_ns()
        self.launch(step, ticket)
        if self.streams is not None:
            self.streams.finish(lambda: None, _LONGEST_KERNEL_S)
        finished = time.monotonic_ns()
        if self._auditor is not None and sample is not None:
            self._auditor.end(point, layer.geometry, sample, ticket.output)
        return started, finished

    def launch(self, step: Step, ticket: ReadyTicket) -> None:
        """Run one layer's kernels, alone; on a device, enqueue them."""
        layer = ticket.layer
        try:
            layer.run(ticket.inputs, step.batch, ticket.output)
        except Exception as error:
            name = f"{step.role.value} layer {layer.spec.layer_id} ({layer.geometry.mechanism})"
            raise self._typed(error, name) from error

    def expect_live(self, step: Step) -> None:
        """The step's epoch runs, and no later plan has its role and lane.

        Raises:
            EpochStale: another epoch has begun.
            StepOrder: the plan was replaced or closed.
        """
        with self._lock:
            if step.epoch != self._epoch:
                raise EpochStale(f"epoch {step.epoch} is over; it is {self._epoch}", epoch=step.epoch)
            if self._steps.get((step.role, step.lane)) is not step:
                raise StepOrder(
                    f"step {step.step}, lane {step.lane} of role {step.role.value} is over: its plan was "
                    "replaced or closed",
                    step=step.step,
                    lane=step.lane,
                )

    def _typed(self, error: Exception, doing: str) -> BraidError:
        """The typed error of what the kernels raised."""
        refusal = self._core.refusal(error)
        if refusal is not None:
            return type(refusal)(f"{doing}: {refusal.message}")
        log.exception("%s failed by our own fault", doing)
        return ServiceFault(f"{doing}: {type(error).__name__}: {error}")


def _expect_shared(arenas: ArenaMap, described: common_pb2.Arena) -> None:
    """An arena of this very process is known under its id, with at least the size announced."""
    whole = common_pb2.TensorView(
        arena_id=described.arena_id, dtype=common_pb2.DTYPE_UINT8, shape=[described.size_bytes]
    )
    try:
        arenas.resolve(whole, f"arena {described.label}")
    except ArenaUnknown as error:
        raise ArenaUnknown(
            f"arena {described.arena_id} ({described.label}) is not of this process",
            arena_id=described.arena_id,
        ) from error
