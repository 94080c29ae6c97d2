"""The heart of an attention service, without a transport.

`AttentionHost` enforces every rule of `AttentionService` and runs layers. The gRPC servicer only
translates to it, and a cell that has everything in one process calls it directly. It knows
layers, epochs and planned batches; it knows nothing about sequences.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from braid.v1 import attention_pb2, common_pb2
from google.protobuf.message import DecodeError

from braid_wire import attention_config, convert, doorbell
from braid_wire.attention_config import Configuration, ReadyTicket, RoleLayers
from braid_wire.attention_core import AttentionCore, CheckedBatch, LayerRunner, PlannedBatch
from braid_wire.audit import Auditor
from braid_wire.batch import PAGE_FIELDS, SHARED_DTYPES, STATE_FIELDS, mode_label
from braid_wire.batch_check import Snapshot
from braid_wire.cuda_doorbell import DeviceBell, Event, Streams
from braid_wire.cuda_driver import HANDLE_BYTES
from braid_wire.errors import (
    ArenaUnknown,
    BatchInvalid,
    BraidError,
    ConfigInvalid,
    EpochStale,
    LayerPlanDisputed,
    MechanismUnsupported,
    NotConfigured,
    PlanMissing,
    ServiceFault,
    StepAborted,
    StepOrder,
    ViewInvalid,
    to_status,
)
from braid_wire.layers import Kind, Role
from braid_wire.mailbox import Mailbox
from braid_wire.metrics import ProcessMetrics
from braid_wire.views import ArenaMap, expect_rows, overlaps, rows_are_dense

__all__ = ["AttentionCore", "AttentionHost", "CheckedBatch", "LayerRunner", "PlannedBatch", "Walk"]

log = logging.getLogger(__name__)

# One kernel at a time in a process, whatever it hosts: kernels share one pool of threads. An epoch
# ends under this lock too, so that when its end is answered nothing of it writes any more.
_KERNEL_LOCK = threading.Lock()

_LANES = 2
# Behind the slowest body between two layers; a peer that is gone is noticed long before.
_LONGEST_WAIT_S = 3600.0
_LONGEST_KERNEL_S = 120.0
_MAX_TICKETS = 8192
_MAX_KEPT = 1024
# Layers enqueued ahead of the device: few enough that the driver's queue never fills, in which case the
# thread would hang in a launch where nobody can release it.
_AHEAD = 32

_Work = Callable[[], attention_pb2.WalkResponse]


@dataclass(frozen=True)
class _Unchecked:
    """The check of a batch whose role has no layer here, so that its arrays are not used."""

    snapshot: Snapshot
    num_tokens: int

    def __call__(self) -> tuple[str, int]:
        return mode_label(self.snapshot.arrays["modes"].numpy()), self.num_tokens


@dataclass(frozen=True, eq=False)
class _Layout:
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
class _Step:
    """A planned batch of one role and lane; compared by identity."""

    layout: _Layout
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
        self._device_bells: list[DeviceBell] = []
        """Of the step whose layers wait on the device now."""
        self._metrics = metrics
        self._shared_arenas = arenas
        self._max_tokens = core.describe().max_tokens
        self._epoch = 0
        self._configuration: Configuration | None = None
        self._steps: dict[tuple[Role, int], _Step] = {}
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
        return self._plan(request)[1]

    def attend(self, request: attention_pb2.AttendRequest) -> attention_pb2.AttendResponse:
        """Run one layer of a planned batch."""
        received = time.monotonic_ns()
        role = convert.role_from_pb(request.role)
        step = self._current(role, request.epoch, request.step, request.lane)
        ticket = _resolve_ticket(step, request.ticket)
        return attention_pb2.AttendResponse(timing=self._run(step, ticket, received))

    def open_walk(self) -> Walk:
        """A stream of steps; close it when its peer is gone."""
        return Walk(self)

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
                self.streams.drain(self._device_bells)
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

    def _plan(self, request: attention_pb2.PlanRequest) -> tuple[_Step, attention_pb2.PlanResponse]:
        began = time.monotonic_ns()
        batch = request.batch
        configuration = self._enter(batch.epoch)
        layout = self._layout(request, configuration)
        layout.snapshot.refresh()
        return self._planned(layout, layout.check(), batch.epoch, batch.step, began)

    def _plan_again(
        self, layout: _Layout, epoch: int, number: int
    ) -> tuple[_Step, attention_pb2.PlanResponse]:
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
        self, layout: _Layout, found: tuple[str, int], epoch: int, number: int, began: int
    ) -> tuple[_Step, attention_pb2.PlanResponse]:
        """Let the kernels plan a batch that was checked, and make it the current one of its role and lane."""
        mode, keys = found
        batch = self._plan_batch(layout, mode, keys)
        step = _Step(layout, epoch, number, mode, batch)
        with self._lock:
            if epoch != self._epoch or layout.configuration is not self._configuration:
                raise EpochStale(f"epoch {epoch} ended while its batch was planned", epoch=epoch)
            self._steps[layout.role, layout.lane] = step
        nanoseconds = time.monotonic_ns() - began
        self._metrics.plan_seconds.observe(nanoseconds * 1e-9)
        return step, attention_pb2.PlanResponse(summary=batch.summary, plan_ns=nanoseconds)

    def _layout(self, request: attention_pb2.PlanRequest, configuration: Configuration) -> _Layout:
        """What of a batch does not change with its numbers, checked."""
        batch = request.batch
        role = convert.role_from_pb(batch.role)
        layers = configuration.roles.get(role)
        if layers is None:
            raise BatchInvalid(f"role {role.value} has no plan here", field="role", role=role.value)
        self._check_sizes(batch)
        snapshot = Snapshot(_places(batch, layers, configuration.arenas))
        check: Callable[[], tuple[str, int]] = _Unchecked(snapshot, batch.num_tokens)
        if layers.check is not None:
            check = layers.check.bind(snapshot.arrays, batch.num_tokens)
        options = dict(request.options)
        return _Layout(
            role, batch.lane, configuration, layers, batch.num_tokens, options, snapshot, check, []
        )

    def _check_sizes(self, batch: attention_pb2.Batch) -> None:
        if batch.num_tokens < 1 or (self._max_tokens and batch.num_tokens > self._max_tokens):
            raise BatchInvalid(
                f"num_tokens is {batch.num_tokens}; it must be from 1 to {self._max_tokens or 'any'}",
                field="num_tokens",
                value=batch.num_tokens,
            )
        if batch.num_sequences < 1:
            raise BatchInvalid("num_sequences is 0; it must be at least 1", field="num_sequences", value=0)
        if batch.lane >= _LANES:
            raise BatchInvalid(f"lane is {batch.lane}; it must be 0 or 1", field="lane", value=batch.lane)

    def _plan_batch(self, layout: _Layout, mode: str, keys: int) -> PlannedBatch:
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

    def _current(self, role: Role, epoch: int, step: int, lane: int) -> _Step:
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

    def _forget(self, step: _Step) -> None:
        with self._lock:
            if self._steps.get((step.role, step.lane)) is step:
                del self._steps[step.role, step.lane]

    # Layers.

    def _run(self, step: _Step, ticket: ReadyTicket, received: int) -> common_pb2.Timing:
        """Run one layer; `received` is CLOCK_MONOTONIC, nanoseconds."""
        started, finished = self._execute(step, ticket)
        if self._metrics.recording:
            # Not the ticket: what waits to be counted must not keep an arena.
            row = ticket.layer.row
            self._metrics.layers.note(step.mode, lambda: ((row,), ((received, started, finished),)))
        return common_pb2.Timing(received_ns=received, started_ns=started, finished_ns=finished)

    def _execute(self, step: _Step, ticket: ReadyTicket) -> tuple[int, int]:
        """Run one layer to its end; when it started and finished, nanoseconds of CLOCK_MONOTONIC."""
        with _KERNEL_LOCK:
            self._expect_live(step)
            try:
                with self.on_device():
                    return self._run_alone(step, ticket)
            except ServiceFault:
                self.check_device()
                raise

    def _run_alone(self, step: _Step, ticket: ReadyTicket) -> tuple[int, int]:
        """As `_execute`, under the kernel lock and on the device."""
        layer, sample = ticket.layer, None
        point = step.role, layer.spec.layer_id
        if self._auditor is not None:
            sample = self._auditor.begin(
                point, step.layers.layers, layer.sampler, ticket.inputs, step.batch.payload
            )
        started = time.monotonic_ns()
        self._launch(step, ticket)
        if self.streams is not None:
            self.streams.finish(lambda: None, _LONGEST_KERNEL_S)
        finished = time.monotonic_ns()
        if self._auditor is not None and sample is not None:
            self._auditor.end(point, layer.geometry, sample, ticket.output)
        return started, finished

    def _launch(self, step: _Step, ticket: ReadyTicket) -> None:
        """Run one layer's kernels; on a device, enqueue them."""
        layer = ticket.layer
        try:
            layer.run(ticket.inputs, step.batch, ticket.output)
        except Exception as error:
            name = f"{step.role.value} layer {layer.spec.layer_id} ({layer.geometry.mechanism})"
            raise self._typed(error, name) from error

    def _expect_live(self, step: _Step) -> None:
        """Under the kernel lock: the step's epoch runs, and no later plan has its role and lane."""
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


@dataclass(frozen=True)
class _StreamValues:
    """The counters by which streams hand layers over."""

    request: DeviceBell
    done: DeviceBell


@dataclass(frozen=True)
class _Events:
    """The events of one lane."""

    request: Event  # the orchestrator's
    done: Event


@dataclass(frozen=True)
class _Bells:
    """How the layers of a step are handed over."""

    request: doorbell.Doorbell
    done: doorbell.Doorbell
    lanes: int
    place: tuple[int, int]  # of the counter's arena: arena id, offset
    timings: memoryview  # int64 [tickets · 3]
    values: _StreamValues | None = None
    events: _Events | None = None


@dataclass(frozen=True)
class _Mail:
    """Where steps come from while a walk does not read its stream."""

    requests: Mailbox
    responses: Mailbox


@dataclass(frozen=True, eq=False)
class _Kept:
    """What an `open` said, resolved: enough to begin steps like it."""

    layout: _Layout
    tickets: tuple[ReadyTicket, ...]
    bells: _Bells | None

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """Of the tickets' layers, in the process's table."""
        return tuple(ticket.layer.row for ticket in self.tickets)


class _OpenStep:
    """A step of a walk: its tickets, and which one is next."""

    def __init__(self, step: _Step, kept: _Kept, base: int) -> None:
        self.step = step
        self.tickets = kept.tickets
        self.bells = kept.bells
        self.rows = kept.rows
        self.base = base
        self.next = 0


class Walk:
    """One stream of steps; used by one thread at a time."""

    def __init__(self, host: AttentionHost) -> None:
        self._host = host
        self._open: dict[tuple[int, int], _OpenStep] = {}
        # The steps whose bells are rung next: one, or both lanes of one.
        self._followed: tuple[tuple[int, int], ...] = ()
        self._mail: _Mail | None = None
        self._kept: dict[int, _Kept] = {}
        self._events: dict[tuple[bytes, int], _Events] = {}
        self._values: tuple[tuple[int, ...], _StreamValues] | None = None

    @property
    def idle(self) -> bool:
        """Whether no step is open."""
        return not self._open

    def handle(self, request: attention_pb2.WalkRequest) -> Iterator[attention_pb2.WalkResponse]:
        """Do what a message asks, at once, and give the answers (none to a `close`).

        A step that fails is closed and answered by `failed`; nothing is raised.
        """
        received = time.monotonic_ns()
        which = request.WhichOneof("message")
        if which == "open":
            batch = request.open.plan.batch
            return self._answer((batch.step, batch.lane), lambda: self._open_step(request.open))
        if which == "again":
            return self._open_again(request.again)
        if which == "run":
            run = request.run
            return self._answer((run.step, run.lane), lambda: self._run_ticket(run, received))
        if which == "close":
            self._drop((request.close.step, request.close.lane))
            return iter(())
        return self._answer((0, 0), _refuse_empty)

    def follow(
        self, check: Callable[[], None], between: Callable[[], None]
    ) -> Iterator[attention_pb2.WalkResponse]:
        """Run the layers of steps that have doorbells, as they ring; the last `open` said which.

        Gives no answer, or one that says why a step failed. Returns at once where there is no such
        step; where there are mailboxes, once the peer gives them up.

        Args:
            check: called every now and then inside a step; raises where the peer is gone.
            between: the same between steps; raises where the walk should end.
        """
        while True:
            opened = [self._open[key] for key in self._followed if key in self._open]
            bells = opened[0].bells if opened else None
            if bells is not None and len(opened) == bells.lanes:
                self._followed = ()
                failed = self._run_followed(opened, bells, check)
                if failed is not None:
                    yield failed
                    return
            if self._mail is None:
                return  # to the stream: a lane that is not open yet, `run` messages, or the next step
            answers = self._read_letter(self._mail, between)
            if answers is None:
                return
            yield from answers

    def _run_followed(
        self, opened: Sequence[_OpenStep], bells: _Bells, check: Callable[[], None]
    ) -> attention_pb2.WalkResponse | None:
        """Run all layers of a step; the answer where it failed."""
        running = opened[0].step
        streams = self._host.streams
        try:
            if streams is not None and bells.values is not None:
                self._run_streamed(streams, opened, bells, bells.values, check)
                for one in opened:
                    self._finish(one)
                return None
            for ticket in range(len(opened[0].tickets)):
                for lane, one in enumerate(opened):
                    running = one.step
                    self._run_by_bell(one, ticket, one.base + bells.lanes * ticket + lane + 1, check)
            for one in opened:
                self._finish(one)
            return None
        # The error is not kept in a local name: its traceback holds this frame, and with it the arenas.
        except BraidError as error:
            return self._given_up(opened, bells, running, error)
        except Exception as error:
            log.exception("step %d, lane %d failed by our own fault", running.step, running.lane)
            return self._given_up(opened, bells, running, ServiceFault(f"{type(error).__name__}: {error}"))

    def _given_up(
        self, opened: Sequence[_OpenStep], bells: _Bells, failed: _Step, error: BraidError
    ) -> attention_pb2.WalkResponse:
        """Close all lanes of a step one of which failed; the answer that says why."""
        bells.done.fail()
        for one in opened:
            self._drop((one.step.step, one.step.lane))
        return next(self._failed((failed.step, failed.lane), error))

    def _read_letter(
        self, mail: _Mail, between: Callable[[], None]
    ) -> list[attention_pb2.WalkResponse] | None:
        """Do what the next letter asks and answer it; what the stream must carry, None at the end."""
        try:
            letter = mail.requests.take(between, _LONGEST_WAIT_S)
        except ViewInvalid as error:
            answers = list(self._failed((0, 0), error))
        except BraidError:
            return None  # the peer is gone, or the service stops
        else:
            if letter is None:
                self._mail = None
                return None
            answers = [answer for text in letter for answer in self._handle_text(text)]
        texts = [answer.SerializeToString() for answer in answers]
        if mail.responses.fits(texts):
            mail.responses.put(texts)
            return []
        mail.responses.put([])
        return answers

    def _handle_text(self, text: bytes) -> Iterator[attention_pb2.WalkResponse]:
        try:
            request = attention_pb2.WalkRequest.FromString(text)
        except DecodeError as error:
            return self._failed((0, 0), BatchInvalid(f"a letter's message cannot be read: {error}"))
        return self.handle(request)

    def close(self) -> None:
        """Forget every open step: the peer is gone."""
        self._mail = self._values = None
        self._events.clear()
        self._kept.clear()
        for key in list(self._open):
            self._drop(key)

    def _answer(self, key: tuple[int, int], work: _Work) -> Iterator[attention_pb2.WalkResponse]:
        """Do some work for the step `key`; an error closes it and is the answer."""
        try:
            return iter((work(),))
        except BraidError as error:
            return self._failed(key, error)
        except Exception as error:
            log.exception("step %d, lane %d failed by our own fault", *key)
            return self._failed(key, ServiceFault(f"{type(error).__name__}: {error}"))

    def _failed(self, key: tuple[int, int], failure: BraidError) -> Iterator[attention_pb2.WalkResponse]:
        """Close a step that failed; the answer that says why."""
        if isinstance(failure, ServiceFault):
            self._host.check_device()
        self._drop(key)
        self._host.metrics.refused(failure)
        return iter((attention_pb2.WalkResponse(step=key[0], lane=key[1], failed=to_status(failure)),))

    def _run_by_bell(self, opened: _OpenStep, index: int, value: int, check: Callable[[], None]) -> None:
        """Run one ticket of a step when its bell rings."""
        host, step, bells = self._host, opened.step, opened.bells
        if bells is None:
            raise StepOrder(f"step {step.step}, lane {step.lane} has no doorbells")

        def look() -> None:
            check()
            host._expect_live(step)

        rung = bells.request.wait(value, look, _LONGEST_WAIT_S)
        received = time.monotonic_ns()
        if not rung:
            raise StepAborted(f"step {step.step}, lane {step.lane} was given up")
        if bells.events is not None and host.streams is not None:
            started, finished = self._run_by_event(host.streams, opened, index, bells.events, look)
        else:
            started, finished = host._execute(step, opened.tickets[index])
        times, at = bells.timings, 3 * index
        times[at], times[at + 1], times[at + 2] = received, started, finished
        bells.done.ring(value)

    def _run_by_event(
        self, streams: Streams, opened: _OpenStep, index: int, events: _Events, look: Callable[[], None]
    ) -> tuple[int, int]:
        """Enqueue one layer behind the peer's event; the last one of a step is waited for.

        The times are those of enqueuing, but for the last layer's end.
        """
        host, step = self._host, opened.step
        with _KERNEL_LOCK, streams.entered():
            host._expect_live(step)
            started = time.monotonic_ns()
            events.request.wait()
            host._launch(step, opened.tickets[index])
            events.done.record()
        if index == len(opened.tickets) - 1:
            with streams.entered():
                streams.finish(look, _LONGEST_WAIT_S)
        return started, time.monotonic_ns()

    def _run_streamed(
        self,
        streams: Streams,
        opened: Sequence[_OpenStep],
        bells: _Bells,
        values: _StreamValues,
        check: Callable[[], None],
    ) -> None:
        """Enqueue all layers of a step, each between a wait for its inputs and the ring of its output.

        Returns when the device has run them; `done` is rung then, with the times of all.
        """
        host = self._host

        def look() -> None:
            check()
            for one in opened:
                host._expect_live(one.step)
            if bells.request.failed:
                raise StepAborted(f"step {opened[0].step.step} was given up")

        both = (values.request, values.done)
        host._device_bells = list(both)
        marks: list[list[object]] = [[] for _ in opened]
        value = opened[0].base
        try:
            with streams.entered():
                for ticket in range(len(opened[0].tickets)):
                    for lane, one in enumerate(opened):
                        value += 1
                        near = partial(_has_reached, values.done, value - _AHEAD)
                        streams.until(near, look, _LONGEST_WAIT_S)
                        streams.wait(values.request, value)
                        with _KERNEL_LOCK:
                            host._expect_live(one.step)
                            marks[lane].append(streams.mark())
                            host._launch(one.step, one.tickets[ticket])
                            marks[lane].append(streams.mark())
                            streams.ring(values.done, value)
                last = streams.mark()
                streams.finish(look, _LONGEST_WAIT_S)
                now = time.monotonic_ns()
                if values.request.failed:
                    raise StepAborted(f"step {opened[0].step.step} was given up")
                for one, found in zip(opened, marks, strict=True):
                    _write_times(one, streams.times(found, last, now))
        except BaseException:
            bells.done.fail()
            with streams.entered():
                streams.drain(both)
            raise
        finally:
            host._device_bells = []
        bells.done.ring(value)

    def _finish(self, opened: _OpenStep) -> None:
        """Count the layers of a step that has run, and close it."""
        if opened.bells is not None and self._host.metrics.recording:
            rows, stamps = opened.rows, bytes(opened.bells.timings)
            self._host.metrics.layers.note(
                opened.step.mode,
                lambda: (rows, np.frombuffer(stamps, dtype=np.int64).reshape(-1, 3).tolist()),
            )
        self._drop((opened.step.step, opened.step.lane))

    def _open_step(self, request: attention_pb2.OpenStep) -> attention_pb2.WalkResponse:
        batch = request.plan.batch
        key = batch.step, batch.lane
        if key in self._open:
            raise StepOrder(f"step {key[0]}, lane {key[1]} is open already", step=key[0], lane=key[1])
        if request.keep > _MAX_KEPT:
            raise BatchInvalid(f"keep is {request.keep}; it must be at most {_MAX_KEPT}", field="keep")
        step, response = self._host._plan(request.plan)
        try:
            tickets = _resolve_tickets(step, request.tickets)
            given = request.doorbells if request.HasField("doorbells") else None
            bells = None if given is None else self._resolve_bells(step, given)
            mail = self._resolve_mail(step, request.doorbells)
            kept = _Kept(step.layout, tickets, bells)
            answer = self._begin(key, _OpenStep(step, kept, request.doorbells.base), response)
        except BaseException:
            self._host._forget(step)
            raise
        self._mail = mail
        if request.keep:
            self._kept[request.keep] = kept
        return answer

    def _open_again(self, request: attention_pb2.OpenAgain) -> Iterator[attention_pb2.WalkResponse]:
        kept = self._kept.get(request.kept)
        if kept is None:
            return self._failed(
                (request.step, 0), StepOrder(f"no step is kept as {request.kept}", step=request.step)
            )
        key = request.step, kept.layout.lane
        return self._answer(key, lambda: self._begin_again(key, kept, request))

    def _begin_again(
        self, key: tuple[int, int], kept: _Kept, request: attention_pb2.OpenAgain
    ) -> attention_pb2.WalkResponse:
        if key in self._open:
            raise StepOrder(f"step {key[0]}, lane {key[1]} is open already", step=key[0], lane=key[1])
        step, response = self._host._plan_again(kept.layout, request.epoch, request.step)
        try:
            return self._begin(key, _OpenStep(step, kept, request.base), response)
        except BaseException:
            self._host._forget(step)
            raise

    def _begin(
        self, key: tuple[int, int], opened: _OpenStep, response: attention_pb2.PlanResponse
    ) -> attention_pb2.WalkResponse:
        """Let a step that was planned wait for its first ticket; the answer to what opened it."""
        layout = opened.step.layout
        if opened.bells is not None and opened.bells.events is not None:
            response.device_event = opened.bells.events.done.handle
        followed = (key,) if opened.bells is None else self._behind(key, opened, opened.bells)
        # The plan that this one replaced can run no more, so its step need not be kept.
        replaced = [at for at, old in self._open.items() if _same_lane(old.step.layout, layout)]
        for at in replaced:
            del self._open[at]
        self._open[key] = opened
        self._followed = followed
        return attention_pb2.WalkResponse(step=key[0], lane=key[1], opened=response)

    def _resolve_bells(self, step: _Step, given: attention_pb2.Doorbells) -> _Bells:
        """The counters of a step, and how its layers are ordered on the device."""
        bells = _resolve_bells(step, given)
        way, streams = given.device, self._host.streams
        if way == attention_pb2.DEVICE_HANDOVER_UNSPECIFIED:
            return bells
        if streams is None or way not in self._host.handovers:
            raise MechanismUnsupported(
                f"this service has not declared {attention_pb2.DeviceHandover.Name(way)}", device=way
            )
        if way == attention_pb2.DEVICE_HANDOVER_EVENTS:
            return replace(bells, events=self._events_of(streams, given.device_event, step.lane))
        return replace(bells, values=self._values_of(streams, given, step.configuration.arenas))

    def _events_of(self, streams: Streams, handle: bytes, lane: int) -> _Events:
        """A lane's events; opened once for a walk."""
        found = self._events.get((handle, lane))
        if found is None:
            if len(handle) != HANDLE_BYTES:
                raise ViewInvalid(
                    f"device_event has {len(handle)} bytes; it must have {HANDLE_BYTES}", field="device_event"
                )
            found = self._events[handle, lane] = _Events(streams.peer_event(handle), streams.event())
        return found

    def _values_of(self, streams: Streams, given: attention_pb2.Doorbells, arenas: ArenaMap) -> _StreamValues:
        """A walk's counters on the device; made reachable once."""
        views = {"device_request": given.device_request, "device_done": given.device_done}
        tensors = [
            arenas.expect(view, name, torch.uint8, (doorbell.BELL_BYTES,)) for name, view in views.items()
        ]
        key = tuple(tensor.data_ptr() for tensor in tensors)
        if self._values is None or self._values[0] != key:
            self._values = key, _StreamValues(*(streams.bell(tensor) for tensor in tensors))
        return self._values[1]

    def _resolve_mail(self, step: _Step, given: attention_pb2.Doorbells) -> _Mail | None:
        """The mailboxes of the walk, given with one of its steps."""
        if not given.HasField("mail"):
            return self._mail
        if self._mail is not None:
            raise StepOrder(f"step {step.step} brings mailboxes, but the walk has some already")
        arenas = step.configuration.arenas
        boxes = []
        for name, view in (("requests", given.mail.requests), ("responses", given.mail.responses)):
            boxes.append(Mailbox(arenas.expect(view, name, torch.uint8, view.shape[:1])))
        return _Mail(*boxes)

    def _behind(self, key: tuple[int, int], opened: _OpenStep, bells: _Bells) -> tuple[tuple[int, int], ...]:
        """The lanes that wait for their bells, now that one more is open."""
        step, lane = key
        if bells.lanes == 1 or lane == 0:
            return (key,)
        first = self._open.get((step, 0))
        if self._followed != ((step, 0),) or first is None or first.bells is None:
            raise StepOrder(f"lane 0 of step {step} was not opened right before lane {lane}", step=step)
        if (first.bells.place, first.base, first.bells.lanes) != (bells.place, opened.base, bells.lanes):
            raise StepOrder(f"the lanes of step {step} have different doorbells", step=step)
        return (*self._followed, key)

    def _run_ticket(self, run: attention_pb2.RunTicket, received: int) -> attention_pb2.WalkResponse:
        found = self._open.get((run.step, run.lane))
        if found is None:
            raise StepOrder(f"step {run.step}, lane {run.lane} is not open", step=run.step, lane=run.lane)
        if run.index != found.next or run.index >= len(found.tickets):
            raise StepOrder(
                f"ticket {run.index} of step {run.step} is not next: {found.next} of {len(found.tickets)} is",
                step=run.step,
                index=run.index,
            )
        timing = self._host._run(found.step, found.tickets[run.index], received)
        found.next += 1
        done = attention_pb2.TicketDone(index=run.index, timing=timing)
        return attention_pb2.WalkResponse(step=run.step, lane=run.lane, done=done)

    def _drop(self, key: tuple[int, int]) -> None:
        found = self._open.pop(key, None)
        if found is not None:
            self._host._forget(found.step)


def _same_lane(one: _Layout, other: _Layout) -> bool:
    return (one.role, one.lane) == (other.role, other.lane)


def _has_reached(bell: DeviceBell, value: int) -> bool:
    return bell.value >= value


def _write_times(opened: _OpenStep, marks: Sequence[int]) -> None:
    """Note when each ticket of a step began and ended on the device."""
    if opened.bells is None:
        return
    times = opened.bells.timings
    for index in range(len(opened.tickets)):
        started, finished = marks[2 * index : 2 * index + 2]
        times[3 * index], times[3 * index + 1], times[3 * index + 2] = started, started, finished


def _refuse_empty() -> attention_pb2.WalkResponse:
    raise BatchInvalid("the walk request has no message", field="message")


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


def _places(
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


def _resolve_bells(step: _Step, given: attention_pb2.Doorbells) -> _Bells:
    """The counters of a step, checked like every other view."""
    if not doorbell.available():
        raise MechanismUnsupported("this service has no doorbells; send `run` messages")
    arenas, tickets = step.configuration.arenas, len(step.layers.layers)
    bells = [
        doorbell.Doorbell(arenas.expect(view, name, torch.uint8, (doorbell.BELL_BYTES,)))
        for name, view in (("request", given.request), ("done", given.done))
    ]
    timings = arenas.expect(given.timings, "timings", torch.int64, (tickets, 3))
    if not timings.is_contiguous() or timings.device.type != "cpu":
        raise ViewInvalid("timings must be contiguous and lie in host memory", field="timings")
    lanes = max(given.lanes, 1)
    if lanes > _LANES or step.lane >= lanes:
        raise StepOrder(f"lane {step.lane} of {lanes}; a step has 1 or {_LANES} lanes", lane=step.lane)
    place = given.request.arena_id, given.request.offset
    return _Bells(bells[0], bells[1], lanes, place, timings.numpy().reshape(-1).data)


def _resolve_tickets(step: _Step, tickets: Sequence[attention_pb2.Ticket]) -> tuple[ReadyTicket, ...]:
    """The tickets of a walked step: each layer of the role once, in plan order."""
    for ticket in tickets:
        step.layers.layer(ticket.layer_id)
    given, expected = [ticket.layer_id for ticket in tickets], list(step.layers.layers)
    if given != expected:
        raise LayerPlanDisputed(
            f"the tickets are for {step.role.value} layers {given}; the accepted plan is {expected}",
            layers=sorted(set(given) ^ set(expected)) or given,
        )
    return tuple(_resolve_ticket(step, ticket) for ticket in tickets)


def _resolve_ticket(step: _Step, ticket: attention_pb2.Ticket) -> ReadyTicket:
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


def _check_ticket(step: _Step, ticket: attention_pb2.Ticket) -> ReadyTicket:
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
