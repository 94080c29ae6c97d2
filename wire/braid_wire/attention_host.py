"""The heart of an attention service, without a transport.

`AttentionHost` enforces every rule of `AttentionService` and runs layers. The gRPC servicer only
translates to it, and a cell that has everything in one process calls it directly. It knows
layers, epochs and planned batches; it knows nothing about sequences.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from braid.v1 import attention_pb2, common_pb2
from google.protobuf.message import DecodeError

from braid_wire import attention_config, convert, doorbell
from braid_wire.attention_config import Configuration, ReadyTicket, RoleLayers
from braid_wire.attention_core import AttentionCore, LayerRunner, PlannedBatch
from braid_wire.batch import PAGE_FIELDS, SHARED_DTYPES, STATE_FIELDS, mode_label
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

__all__ = ["AttentionCore", "AttentionHost", "LayerRunner", "PlannedBatch", "Walk"]

log = logging.getLogger(__name__)

# One kernel at a time in a process, whatever it hosts: kernels share one pool of threads. An epoch
# ends under this lock too, so that when its end is answered nothing of it writes any more.
_KERNEL_LOCK = threading.Lock()

_LANES = 2
# Behind the slowest body between two layers; a peer that is gone is noticed long before.
_LONGEST_WAIT_S = 3600.0
_MAX_TICKETS = 8192
_MAX_LAYOUTS = 1024

_Work = Callable[[], attention_pb2.WalkResponse]


@dataclass(frozen=True, eq=False)
class _Step:
    """A planned batch of one role and lane; compared by identity."""

    role: Role
    epoch: int
    step: int
    lane: int
    configuration: Configuration
    layers: RoleLayers
    num_tokens: int
    mode: str
    batch: PlannedBatch


class AttentionHost:
    """Runs the layers of one kind as `AttentionService` promises.

    Every method takes and gives the messages of the contract and raises the typed errors named
    there; methods may be called from any thread.

    Args:
        core: the kernels.
        metrics: of the process.
        arenas: for a host inside the orchestrator's process: the arenas that views name, kept by
            their owner. None: Configure maps them from their handles, and the host owns the mappings.
    """

    def __init__(self, core: AttentionCore, metrics: ProcessMetrics, arenas: ArenaMap | None = None) -> None:
        self._core = core
        self._metrics = metrics
        self._shared_arenas = arenas
        self._max_tokens = core.describe().max_tokens
        self._epoch = 0
        self._configuration: Configuration | None = None
        self._steps: dict[tuple[Role, int], _Step] = {}
        # Guards the three above; taken after _KERNEL_LOCK where both are.
        self._lock = threading.Lock()
        self._configuring = threading.Lock()

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
        return response

    def configure(self, request: attention_pb2.ConfigureRequest) -> attention_pb2.ConfigureResponse:
        """Take on layers, memory and parameters; a request that fails leaves everything as it was."""
        with self._configuring:
            self._expect_new(request.epoch)
            arenas = self._map(request)
            try:
                configuration = attention_config.resolve(self._core, request, arenas, self._metrics)
                previous = self._take_over(request.epoch, configuration)
            except BaseException:
                self._unmap(arenas)
                raise
        if previous is not None:
            self._unmap(previous.arenas)
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
        step = self._planned(role, request.epoch, request.step, request.lane)
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

    # Plans.

    def _plan(self, request: attention_pb2.PlanRequest) -> tuple[_Step, attention_pb2.PlanResponse]:
        began = time.monotonic_ns()
        batch = request.batch
        role = convert.role_from_pb(batch.role)
        configuration = self._enter(batch.epoch)
        layers = configuration.roles.get(role)
        if layers is None:
            raise BatchInvalid(f"role {role.value} has no plan here", field="role", role=role.value)
        self._check_sizes(batch)
        arrays = _snapshot(batch, layers, configuration.arenas)
        planned = self._plan_batch(batch, layers, arrays, dict(request.options))
        step = _Step(
            role,
            batch.epoch,
            batch.step,
            batch.lane,
            configuration,
            layers,
            batch.num_tokens,
            mode_label(arrays["modes"].numpy()),
            planned,
        )
        with self._lock:
            if batch.epoch != self._epoch or configuration is not self._configuration:
                raise EpochStale(f"epoch {batch.epoch} ended while its batch was planned", epoch=batch.epoch)
            self._steps[role, batch.lane] = step
        nanoseconds = time.monotonic_ns() - began
        self._metrics.plan_seconds.observe(nanoseconds * 1e-9)
        return step, attention_pb2.PlanResponse(summary=planned.summary, plan_ns=nanoseconds)

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

    def _plan_batch(
        self,
        batch: attention_pb2.Batch,
        layers: RoleLayers,
        arrays: Mapping[str, torch.Tensor],
        options: Mapping[str, str],
    ) -> PlannedBatch:
        """Check a batch against the contract, then let the kernels plan it."""
        if (
            layers.pools is None or layers.check is None
        ):  # the role has no layer here: nothing to plan, but walks stay uniform
            summary = attention_pb2.PlanSummary(
                qo_indptr_last=batch.num_tokens, ignored_options=sorted(options)
            )
            return PlannedBatch(summary, None)
        layers.check(arrays, batch.num_tokens)
        try:
            return self._core.plan(layers.plan, arrays, layers.pools.page_size, options)
        except Exception as error:
            raise self._typed(error, "planning") from error

    def _planned(self, role: Role, epoch: int, step: int, lane: int) -> _Step:
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
        self._note(step, ticket, received, started, finished)
        return common_pb2.Timing(received_ns=received, started_ns=started, finished_ns=finished)

    def _execute(self, step: _Step, ticket: ReadyTicket) -> tuple[int, int]:
        """Run one layer; when it started and finished, nanoseconds of CLOCK_MONOTONIC."""
        layer = ticket.layer
        with _KERNEL_LOCK:
            self._expect_live(step)
            started = time.monotonic_ns()
            try:
                layer.run(ticket.inputs, step.batch, ticket.output)
            except Exception as error:
                name = f"{step.role.value} layer {layer.spec.layer_id} ({layer.geometry.mechanism})"
                raise self._typed(error, name) from error
            return started, time.monotonic_ns()

    def _note(self, step: _Step, ticket: ReadyTicket, received: int, started: int, finished: int) -> None:
        """Count one layer."""
        metrics = ticket.layer.metrics
        metrics.dispatch[step.mode].inc()
        metrics.seconds["queue"].observe((started - received) * 1e-9)
        metrics.seconds["compute"].observe((finished - started) * 1e-9)

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
class _Bells:
    """How the layers of a step are handed over."""

    request: doorbell.Doorbell
    done: doorbell.Doorbell
    base: int
    lanes: int
    place: tuple[int, int]  # of the counter's arena: arena id, offset
    timings: memoryview  # int64 [tickets · 3]


@dataclass(frozen=True)
class _Mail:
    """Where steps come from while a walk does not read its stream."""

    requests: Mailbox
    responses: Mailbox


class _OpenStep:
    """A step of a walk: its tickets, and which one is next."""

    def __init__(self, step: _Step, tickets: tuple[ReadyTicket, ...], bells: _Bells | None) -> None:
        self.step = step
        self.tickets = tickets
        self.bells = bells
        self.next = 0


class Walk:
    """One stream of steps; used by one thread at a time."""

    def __init__(self, host: AttentionHost) -> None:
        self._host = host
        self._open: dict[tuple[int, int], _OpenStep] = {}
        # The steps whose bells are rung next: one, or both lanes of one.
        self._followed: tuple[tuple[int, int], ...] = ()
        self._mail: _Mail | None = None

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
        try:
            for ticket in range(len(opened[0].tickets)):
                for lane, one in enumerate(opened):
                    running = one.step
                    self._run_by_bell(one, ticket, bells.base + bells.lanes * ticket + lane + 1, check)
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
        self._mail = None
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
        self._drop(key)
        self._host.metrics.refused(failure.reason)
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
        started, finished = host._execute(step, opened.tickets[index])
        times, at = bells.timings, 3 * index
        times[at], times[at + 1], times[at + 2] = received, started, finished
        bells.done.ring(value)

    def _finish(self, opened: _OpenStep) -> None:
        """Count the layers of a step that has run, and close it."""
        if opened.bells is not None:
            times = iter(opened.bells.timings.tolist())
            for ticket, *stamps in zip(opened.tickets, times, times, times, strict=True):
                self._host._note(opened.step, ticket, *stamps)
        self._drop((opened.step.step, opened.step.lane))

    def _open_step(self, request: attention_pb2.OpenStep) -> attention_pb2.WalkResponse:
        batch = request.plan.batch
        key = batch.step, batch.lane
        if key in self._open:
            raise StepOrder(f"step {key[0]}, lane {key[1]} is open already", step=key[0], lane=key[1])
        step, response = self._host._plan(request.plan)
        try:
            tickets = _resolve_tickets(step, request.tickets)
            bells = _resolve_bells(step, request.doorbells) if request.HasField("doorbells") else None
            mail = self._resolve_mail(step, request.doorbells)
        except BaseException:
            self._host._forget(step)
            raise
        # The plan that this one replaced can run no more, so its step need not be kept.
        replaced = [
            at for at, old in self._open.items() if (old.step.role, old.step.lane) == (step.role, step.lane)
        ]
        for at in replaced:
            del self._open[at]
        self._open[key] = _OpenStep(step, tickets, bells)
        self._followed = (key,) if bells is None else self._behind(key, bells)
        self._mail = mail
        return attention_pb2.WalkResponse(step=key[0], lane=key[1], opened=response)

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

    def _behind(self, key: tuple[int, int], bells: _Bells) -> tuple[tuple[int, int], ...]:
        """The lanes that wait for their bells, now that one more is open."""
        step, lane = key
        if bells.lanes == 1 or lane == 0:
            return (key,)
        first = self._open.get((step, 0))
        if self._followed != ((step, 0),) or first is None or first.bells is None:
            raise StepOrder(f"lane 0 of step {step} was not opened right before lane {lane}", step=step)
        if (first.bells.place, first.bells.base, first.bells.lanes) != (bells.place, bells.base, bells.lanes):
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


def _snapshot(batch: attention_pb2.Batch, layers: RoleLayers, arenas: ArenaMap) -> dict[str, torch.Tensor]:
    """Private copies of the metadata arrays that this kind needs.

    Checks and kernels read the same copy, so a peer that changes the memory after the check reaches
    no kernel.
    """
    layout = attention_pb2.Batch()
    layout.CopyFrom(batch)
    layout.ClearField("epoch")
    layout.ClearField("step")
    key = layout.SerializeToString(deterministic=True)
    found = layers.layouts.get(key)
    if found is None:
        found = tuple(_places(batch, layers, arenas))
        if len(layers.layouts) >= _MAX_LAYOUTS:
            layers.layouts.clear()
        layers.layouts[key] = found
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in found}


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
        yield name, arenas.expect(getattr(batch, name), name, SHARED_DTYPES[name], shapes[name])


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
    if not timings.is_contiguous():
        raise ViewInvalid("timings must be contiguous", field="timings")
    lanes = max(given.lanes, 1)
    if lanes > _LANES or step.lane >= lanes:
        raise StepOrder(f"lane {step.lane} of {lanes}; a step has 1 or {_LANES} lanes", lane=step.lane)
    place = given.request.arena_id, given.request.offset
    return _Bells(bells[0], bells[1], given.base, lanes, place, timings.numpy().reshape(-1).data)


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
