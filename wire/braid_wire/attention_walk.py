"""One stream of steps: what its messages ask, and which step's layers run next."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from braid.v1 import attention_pb2
from google.protobuf.message import DecodeError

from braid_wire.attention_handover import LONGEST_WAIT_S, Bells, Handovers, Kept, OpenStep
from braid_wire.attention_host import AttentionHost
from braid_wire.attention_step import Layout, Step, resolve_tickets
from braid_wire.errors import BatchInvalid, BraidError, ServiceFault, StepOrder, ViewInvalid, to_status
from braid_wire.mailbox import Mailbox

log = logging.getLogger(__name__)

_MAX_KEPT = 1024

_Work = Callable[[], attention_pb2.WalkResponse]


@dataclass(frozen=True)
class _Mail:
    """Where steps come from while a walk does not read its stream."""

    requests: Mailbox
    responses: Mailbox


class Walk:
    """One stream of steps; used by one thread at a time, and closed when its peer is gone."""

    def __init__(self, host: AttentionHost) -> None:
        self._host = host
        self._open: dict[tuple[int, int], OpenStep] = {}
        # The steps whose bells are rung next: one, or both lanes of one.
        self._followed: tuple[tuple[int, int], ...] = ()
        self._mail: _Mail | None = None
        self._kept: dict[int, Kept] = {}
        self._handovers = Handovers(host)

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

    def close(self) -> None:
        """Forget every open step: the peer is gone."""
        self._mail = None
        self._handovers.close()
        self._kept.clear()
        for key in list(self._open):
            self._drop(key)

    def _run_followed(
        self, opened: Sequence[OpenStep], bells: Bells, check: Callable[[], None]
    ) -> attention_pb2.WalkResponse | None:
        """Run all layers of a step; the answer where it failed."""
        running = opened[0].step
        streams = self._host.streams
        try:
            if streams is not None and bells.values is not None:
                self._handovers.run_streamed(streams, opened, bells, bells.values, check)
            else:
                for ticket in range(len(opened[0].tickets)):
                    for lane, one in enumerate(opened):
                        running = one.step
                        value = one.base + bells.lanes * ticket + lane + 1
                        self._handovers.run_by_bell(one, ticket, value, check)
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
        self, opened: Sequence[OpenStep], bells: Bells, failed: Step, error: BraidError
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
            letter = mail.requests.take(between, LONGEST_WAIT_S)
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

    def _finish(self, opened: OpenStep) -> None:
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
        self._expect_closed(key)
        if request.keep > _MAX_KEPT:
            raise BatchInvalid(f"keep is {request.keep}; it must be at most {_MAX_KEPT}", field="keep")
        step, response = self._host.plan_step(request.plan)
        try:
            tickets = resolve_tickets(step, request.tickets)
            given = request.doorbells if request.HasField("doorbells") else None
            bells = None if given is None else self._handovers.bells(step, given)
            mail = self._resolve_mail(step, request.doorbells)
            kept = Kept(step.layout, tickets, bells)
            answer = self._begin(key, OpenStep(step, kept, request.doorbells.base), response)
        except BaseException:
            self._host.forget(step)
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
        self, key: tuple[int, int], kept: Kept, request: attention_pb2.OpenAgain
    ) -> attention_pb2.WalkResponse:
        self._expect_closed(key)
        step, response = self._host.plan_again(kept.layout, request.epoch, request.step)
        try:
            return self._begin(key, OpenStep(step, kept, request.base), response)
        except BaseException:
            self._host.forget(step)
            raise

    def _begin(
        self, key: tuple[int, int], opened: OpenStep, response: attention_pb2.PlanResponse
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

    def _resolve_mail(self, step: Step, given: attention_pb2.Doorbells) -> _Mail | None:
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

    def _behind(self, key: tuple[int, int], opened: OpenStep, bells: Bells) -> tuple[tuple[int, int], ...]:
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
        timing = self._host.run(found.step, found.tickets[run.index], received)
        found.next += 1
        done = attention_pb2.TicketDone(index=run.index, timing=timing)
        return attention_pb2.WalkResponse(step=run.step, lane=run.lane, done=done)

    def _expect_closed(self, key: tuple[int, int]) -> None:
        if key in self._open:
            raise StepOrder(f"step {key[0]}, lane {key[1]} is open already", step=key[0], lane=key[1])

    def _drop(self, key: tuple[int, int]) -> None:
        found = self._open.pop(key, None)
        if found is not None:
            self._host.forget(found.step)


def _same_lane(one: Layout, other: Layout) -> bool:
    return (one.role, one.lane) == (other.role, other.lane)


def _refuse_empty() -> attention_pb2.WalkResponse:
    raise BatchInvalid("the walk request has no message", field="message")
