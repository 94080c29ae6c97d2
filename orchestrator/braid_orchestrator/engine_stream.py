"""Attention layer by layer for an engine that owns its own body (`Orchestrator.Attend`)."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
from braid.v1 import attention_pb2, common_pb2
from braid.v1 import orchestrator_pb2 as pb
from braid_wire import convert
from braid_wire.errors import BraidError, RequestInvalid, StepAborted, StepOrder, StepTimeout, to_status
from braid_wire.layers import Kind, Mode, Role

from braid_orchestrator.cell import Cell
from braid_orchestrator.memory import SequenceMemory, Span
from braid_orchestrator.step import Step
from braid_orchestrator.walker import RECOVERABLE

IDLE_S = 30.0
"""Longest silence of an engine inside a step; it keeps everybody else out while the step is open."""

# Engines name their sequences themselves; on the wire to the services they get names of ours, far
# from those of the cell's own requests.
_names = itertools.count(1 << 40)


class EngineStream:
    """The sequences and the open step of one engine.

    Args:
        cell: whose attention it uses.
    """

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._sequences: dict[tuple[Role, int], SequenceMemory] = {}
        self._open: ExitStack | None = None
        self._step: Step | None = None

    def serve(self, requests: Iterator[pb.EngineRequest]) -> Iterator[pb.EngineResponse]:
        """Answer messages until the engine ends the stream; then free its sequences.

        Raises:
            StepTimeout: the engine says nothing inside a step.
        """
        inbox = _Inbox(requests)
        try:
            while (message := inbox.next(IDLE_S if self._step is not None else None)) is not None:
                yield self._answer(message)
        finally:
            self._forget_step()
            self._release([name for _, name in self._sequences])

    def _answer(self, message: pb.EngineRequest) -> pb.EngineResponse:
        try:
            return self._handle(message)
        except BraidError as error:
            self._cell.metrics.refused(error)
            self._forget_step()
            return pb.EngineResponse(failed=to_status(error))

    def _handle(self, message: pb.EngineRequest) -> pb.EngineResponse:
        match message.WhichOneof("message"):
            case "begin":
                return pb.EngineResponse(opened=self._begin(message.begin))
            case "layer":
                return pb.EngineResponse(done=self._layer(message.layer))
            case "commit":
                self._commit()
                return pb.EngineResponse(committed=pb.EngineCommitted())
            case "abort":
                self._forget_step()
                return pb.EngineResponse(aborted=pb.EngineAborted())
            case "release":
                self._release(list(message.release.sequence_ids))
                return pb.EngineResponse(released=pb.EngineReleased())
        raise RequestInvalid("the message asks nothing", field="message")

    def _begin(self, begin: pb.EngineStep) -> pb.EngineOpened:
        if self._step is not None:
            raise StepOrder("a step is open already")
        role = convert.role_from_pb(begin.role)
        if role not in self._cell.store.plans:
            raise RequestInvalid(f"the cell has no {role.value} role", field="role", value=role.value)
        spans = self._spans(role, begin)
        self._open, self._step = self._enter(role, spans)
        batch = self._step.batch
        layers = self._cell.dispatcher.prepared(role, batch.num_tokens)
        return pb.EngineOpened(
            step=batch.step,
            arenas=[self._cell.store.activations()],
            tickets=[
                pb.EngineTicket(side=convert.KINDS[side], ticket=layer.ticket)
                for (_, side), layer in layers.items()
            ],
            summary=self._step.summaries.get(Kind.FULL),
        )

    def _enter(self, role: Role, spans: list[Span]) -> tuple[ExitStack, Step]:
        """Keep others out and open a step; once more where a service was lost since the last one."""
        stack = ExitStack()
        stack.enter_context(self._cell.walker.exclusive())
        try:
            try:
                _, step = stack.enter_context(self._cell.walker.step(role, spans))
            except RECOVERABLE as error:
                self._cell.walker.recover(error)
                _, step = stack.enter_context(self._cell.walker.step(role, spans))
        except BaseException:
            stack.close()
            raise
        return stack, step

    def _spans(self, role: Role, begin: pb.EngineStep) -> list[Span]:
        names = [span.sequence_id for span in begin.spans]
        if len(set(names)) != len(names) or not names:
            raise RequestInvalid("a step needs spans, each of another sequence", field="spans")
        limits = self._cell.options.limits
        tokens = sum(span.num_tokens for span in begin.spans)
        if min(span.num_tokens for span in begin.spans) < 1 or tokens > limits.max_tokens:
            raise RequestInvalid(
                f"the spans have {tokens} tokens; each needs at least 1, "
                f"all together at most {limits.max_tokens}",
                field="num_tokens",
                value=tokens,
            )
        if len(names) > limits.max_sequences:
            raise RequestInvalid(
                f"the step has {len(names)} sequences; the cell takes {limits.max_sequences}", field="spans"
            )
        return [self._span(role, span) for span in begin.spans]

    def _span(self, role: Role, span: pb.EngineSpan) -> Span:
        key = (role, span.sequence_id)
        memory = self._sequences.setdefault(key, SequenceMemory(next(_names)))
        longest = self._cell.options.limits.max_context
        if memory.length + span.num_tokens > longest:
            raise RequestInvalid(
                f"sequence {span.sequence_id} would have {memory.length + span.num_tokens} tokens; "
                f"a sequence holds {longest}",
                field="num_tokens",
                value=span.num_tokens,
            )
        mode = Mode.DECODE if memory.length and span.num_tokens == 1 else Mode.EXTEND
        return Span(memory, np.zeros(span.num_tokens, dtype=np.int64), mode)

    def _layer(self, layer: pb.EngineLayer) -> attention_pb2.AttendResponse:
        step = self._expect_step()
        side = None if layer.side == common_pb2.KIND_UNSPECIFIED else convert.kind_from_pb(layer.side)
        return attention_pb2.AttendResponse(timing=step.run(layer.layer_id, side))

    def _commit(self) -> None:
        self._expect_step()
        stack, self._open, self._step = self._open, None, None
        if stack is not None:
            stack.close()

    def _expect_step(self) -> Step:
        if self._step is None:
            raise StepOrder("no step is open")
        return self._step

    def _forget_step(self) -> None:
        stack, self._open, self._step = self._open, None, None
        if stack is None:
            return
        error = StepAborted("the engine gave the step up")
        try:
            stack.__exit__(StepAborted, error, None)
        except StepAborted:
            return

    def _release(self, names: list[int]) -> None:
        for role in Role:
            for name in names:
                memory = self._sequences.pop((role, name), None)
                if memory is not None:
                    self._cell.store.memory[role].release(memory)


class _Inbox:
    """The messages of a stream, with a time limit on waiting for one."""

    def __init__(self, requests: Iterator[pb.EngineRequest]) -> None:
        self._queue: queue.SimpleQueue[pb.EngineRequest | BaseException | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(requests,), name="engine-stream", daemon=True).start()

    def next(self, timeout_s: float | None) -> pb.EngineRequest | None:
        """The next message; None where the engine has ended the stream."""
        try:
            item = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            raise StepTimeout(f"the engine said nothing for {timeout_s:.0f} s inside a step") from None
        if isinstance(item, BraidError):
            raise item
        return None if isinstance(item, BaseException) else item

    def _read(self, requests: Iterator[pb.EngineRequest]) -> None:
        try:
            for request in requests:
                self._queue.put(request)
            self._queue.put(None)
        except Exception as error:  # the stream broke, or a message was garbage: the reader ends it
            self._queue.put(error)
