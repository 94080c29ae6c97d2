"""The `Orchestrator` gRPC service: from message to work to message, and nothing else."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator, Sequence

import grpc
import numpy as np
import torch
from braid.v1 import common_pb2, orchestrator_pb2_grpc
from braid.v1 import orchestrator_pb2 as pb
from braid_wire import convert
from braid_wire.arena import Allocator, Arena
from braid_wire.batch import IntArray
from braid_wire.errors import ConfigInvalid, RequestInvalid, ServiceLost
from braid_wire.layers import Kind
from braid_wire.rpc import Server
from braid_wire.views import view_of

from braid_orchestrator.cell import Cell
from braid_orchestrator.dispatch import Point
from braid_orchestrator.dispatcher import LayerTotals
from braid_orchestrator.engine_stream import EngineStream
from braid_orchestrator.newer import refuse_newer
from braid_orchestrator.request import (
    Event,
    Failed,
    Finish,
    Finished,
    PromptLogprobs,
    Request,
    Scored,
    Token,
    fan_out,
    merged,
)
from braid_orchestrator.sampler import Alternatives, logprobs
from braid_orchestrator.sampling import Sampling
from braid_orchestrator.trace_context import headers_of

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Orchestrator"].full_name
LOGITS_KEPT_S = 60.0
"""How long logits wait to be fetched before their memory is given back."""

_FINISH = {Finish.STOP: pb.FINISH_REASON_STOP, Finish.LENGTH: pb.FINISH_REASON_LENGTH}


class OrchestratorServicer(orchestrator_pb2_grpc.OrchestratorServicer):
    """Serves one cell.

    Args:
        cell: what it serves.
        server: whose readiness follows the cell's.
    """

    def __init__(self, cell: Cell, server: Server) -> None:
        self._cell = cell
        self._server = server
        self._started = time.monotonic()

    def GetLayerPlan(
        self, request: pb.GetLayerPlanRequest, context: grpc.ServicerContext
    ) -> pb.GetLayerPlanResponse:
        plans = [convert.plan_to_pb(plan) for plan in self._cell.store.plans.values()]
        return pb.GetLayerPlanResponse(family=self._cell.plans.family, plans=plans)

    def Generate(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        refuse_newer(request)
        asked = self._request(request)
        if self._cell.traces is not None:
            asked.trace = headers_of(context)
        works = fan_out(asked, request.n or 1)
        context.add_callback(lambda: self._cancel(works))
        try:
            for work in works:
                self._cell.engine.submit(work)
            for index, event in merged(works):
                if isinstance(event, Failed):
                    raise event.error
                yield _response(asked.request_id, works[index], event)
        finally:
            self._cancel(works)

    def Score(self, request: pb.ScoreRequest, context: grpc.ServicerContext) -> pb.ScoreResponse:
        refuse_newer(request)
        if not request.sequences:
            raise RequestInvalid("there are no sequences to score", field="sequences")
        if request.mtp and not request.want_logits:
            raise RequestInvalid("mtp is set, but want_logits is not", field="mtp")
        before = self._cell.walker.steps
        trace = {} if self._cell.traces is None else headers_of(context)
        works = [
            Request(
                request_id=uuid.uuid4().hex,
                prompt=np.array(sequence.ids, dtype=np.int64),
                chunk=request.chunk,
                decode_tail=request.decode_tail,
                mtp=request.mtp,
                mrope_positions=grid,
                trace=trace,
            )
            for sequence, grid in zip(request.sequences, _grids(request), strict=True)
        ]
        context.add_callback(lambda: self._cancel(works))
        scored = self._score(works)
        response = pb.ScoreResponse(steps=self._cell.walker.steps - before)
        for work, found in zip(works, scored, strict=True):
            response.scores.append(pb.SequenceScore(token_logprobs=_logprobs(found.logits, work.prompt)))
        if request.want_logits:
            self._share(response, scored)
        return response

    def Attend(
        self, request_iterator: Iterator[pb.EngineRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.EngineResponse]:
        return EngineStream(self._cell).serve(request_iterator)

    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusResponse:
        cell = self._cell
        load = cell.engine.load
        return pb.StatusResponse(
            state=self._state(),
            model=str(cell.model),
            family=cell.plans.family,
            epoch=cell.dispatcher.epoch,
            services=[self._service(kind) for kind in cell.dispatcher.links],
            layers=[self._layer(point, totals) for point, totals in cell.dispatcher.totals.items()],
            pools=self._pools(),
            running=load.running,
            waiting=load.waiting,
            steps=cell.walker.steps,
            replays=cell.walker.replays,
            dispatch=cell.options.dispatch.value,
            uptime_seconds=time.monotonic() - self._started,
        )

    def Drain(self, request: pb.DrainRequest, context: grpc.ServicerContext) -> pb.DrainResponse:
        refuse_newer(request)
        if not 0 <= request.timeout_seconds < float("inf"):
            raise RequestInvalid(
                f"timeout_seconds is {request.timeout_seconds}; it must be a finite number ≥ 0",
                field="timeout_seconds",
                value=request.timeout_seconds,
            )
        self._server.set_ready(False)
        timeout = request.timeout_seconds or context.time_remaining()
        return pb.DrainResponse(remaining=self._cell.engine.drain(timeout))

    def _request(self, request: pb.GenerateRequest) -> Request:
        if request.HasField("max_tokens") and request.max_tokens < 1:
            raise RequestInvalid(
                f"max_tokens is {request.max_tokens}; it must be at least 1",
                field="max_tokens",
                value=request.max_tokens,
            )
        return Request(
            request_id=request.request_id or uuid.uuid4().hex,
            prompt=np.array(self._prompt(request), dtype=np.int64),
            sampling=_sampling(request.sampling),
            max_tokens=request.max_tokens if request.HasField("max_tokens") else None,
            stop_ids=frozenset(request.stop_token_ids),
            stop_strings=tuple(request.stop_strings),
            include_stop_str_in_output=request.include_stop_str_in_output,
            end_ids=self._cell.stop_ids,
            ignore_eos=request.ignore_eos,
            deadline_s=request.deadline_s if request.HasField("deadline_s") else None,
            tokenizer=self._cell.tokenizer,
        )

    def _prompt(self, request: pb.GenerateRequest) -> Sequence[int]:
        which = request.WhichOneof("prompt")
        if which == "tokens":
            return request.tokens.ids
        if which is None:
            raise RequestInvalid("the request has no prompt", field="prompt")
        if self._cell.tokenizer is None:
            raise ConfigInvalid(f"{self._cell.model.name} has no tokenizer; send token ids", field="text")
        return self._cell.tokenizer.encode(request.text)

    def _score(self, works: Sequence[Request]) -> list[Scored]:
        """The scores of each; where one fails, the others are ended too."""
        engine = self._cell.engine
        try:
            for work in works:
                engine.submit(work)
            return [_scored(work) for work in works]
        except BaseException:
            self._cancel(works)
            raise

    def _cancel(self, works: Sequence[Request]) -> None:
        for work in works:
            self._cell.engine.cancel(work)

    def _share(self, response: pb.ScoreResponse, scored: Sequence[Scored]) -> None:
        """Put logits into memory of their own, which the first to fetch it keeps."""
        owner = self._cell.owner
        all_rows = [rows for found in scored for rows in (found.logits, found.mtp_logits) if rows is not None]
        arena = owner.create(sum(-(-rows.nbytes // 64) * 64 for rows in all_rows), "logits", once=True)
        allocator = Allocator(arena)

        def share(rows: torch.Tensor) -> common_pb2.TensorView:
            return view_of(allocator.empty(rows.shape, rows.dtype).copy_(rows), arena)

        for score, found in zip(response.scores, scored, strict=True):
            score.logits.CopyFrom(share(found.logits))
            if found.mtp_logits is not None:
                score.mtp_logits.CopyFrom(share(found.mtp_logits))
        response.logits_arena.CopyFrom(owner.describe(arena))
        self._expire(arena)

    def _expire(self, arena: Arena) -> None:
        timer = threading.Timer(LOGITS_KEPT_S, self._cell.owner.release, (arena,))
        timer.daemon = True
        timer.start()

    def _state(self) -> str:
        if self._cell.engine.draining:
            return "draining"
        return "recovering" if self._cell.walker.recovering else "serving"

    def _service(self, kind: Kind) -> pb.ServiceStatus:
        link = self._cell.dispatcher.links[kind]
        status = pb.ServiceStatus(name=link.name, address=link.address)
        try:
            status.description.CopyFrom(link.describe())
        except ServiceLost:
            return status
        status.ready = status.description.epoch > 0
        return status

    def _layer(self, point: Point, totals: LayerTotals) -> pb.LayerStatus:
        role, layer_id, side = point
        count = max(totals.count, 1)
        geometry = self._cell.dispatcher.spec(role, layer_id).geometry(side)
        return pb.LayerStatus(
            role=convert.ROLES[role],
            layer_id=layer_id,
            side=convert.KINDS[side],
            mechanism=geometry.mechanism,
            dispatches=dict(totals.dispatches),
            compute_seconds=totals.compute_s / count,
            overhead_seconds=totals.overhead_s / count,
        )

    def _pools(self) -> list[pb.PoolStatus]:
        found = []
        for role, memory in self._cell.store.memory.items():
            for pool in (memory.pages, memory.slots):
                if pool is not None:
                    found.append(
                        pb.PoolStatus(
                            role=convert.ROLES[role],
                            name=pool.name,
                            used=pool.used,
                            total=pool.total,
                            unit_bytes=pool.unit_bytes,
                        )
                    )
        return found


def _sampling(given: pb.SamplingParams) -> Sampling:
    return Sampling(
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p if given.HasField("top_p") else 1.0,
        min_p=given.min_p,
        seed=given.seed if given.HasField("seed") else None,
        repetition_penalty=given.repetition_penalty if given.HasField("repetition_penalty") else 1.0,
        presence_penalty=given.presence_penalty,
        frequency_penalty=given.frequency_penalty,
        logit_bias=given.logit_bias,
        min_tokens=given.min_tokens,
        logprobs=given.logprobs if given.HasField("logprobs") else None,
        prompt_logprobs=given.prompt_logprobs if given.HasField("prompt_logprobs") else None,
    )


def _response(request_id: str, work: Request, event: Event) -> pb.GenerateResponse:
    response = pb.GenerateResponse(request_id=request_id, index=work.index)
    if isinstance(event, PromptLogprobs):
        prompt = work.prompt[1:].tolist()
        for token, (logprob, top) in zip(prompt, event.entries, strict=True):
            response.prompt_logprobs.append(_token_logprob(token, logprob, top))
    elif isinstance(event, Token):
        response.token_ids.append(event.token_id)
        response.text = event.text
        if event.logprob is not None:
            response.logprobs.append(_token_logprob(event.token_id, event.logprob, event.top))
    elif isinstance(event, Finished):
        response.text = event.text
        response.finish_reason = _FINISH[event.reason]
        response.prompt_tokens = len(work.prompt)
        response.completion_tokens = work.made
        response.cached_tokens = work.cached_tokens
        if isinstance(event.stop, int):
            response.stop_token_id = event.stop
        elif event.stop is not None:
            response.stop_string = event.stop
    return response


def _token_logprob(token: int, logprob: float, top: Alternatives) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token=pb.Alternative(token_id=token, logprob=logprob),
        top=[pb.Alternative(token_id=other, logprob=value) for other, value in top],
    )


def _grids(request: pb.ScoreRequest) -> list[IntArray | None]:
    """int64 [3, L] of each sequence that has mrope positions."""
    if not request.mrope_positions:
        return [None] * len(request.sequences)
    if len(request.mrope_positions) != len(request.sequences):
        raise RequestInvalid(
            f"there are {len(request.mrope_positions)} grids for {len(request.sequences)} sequences",
            field="mrope_positions",
        )
    grids = [np.array(grid.positions, dtype=np.int64) for grid in request.mrope_positions]
    if any(len(grid) % 3 for grid in grids):
        raise RequestInvalid("a grid's positions must be three times its tokens", field="mrope_positions")
    return [grid.reshape(3, -1) if len(grid) else None for grid in grids]


def _scored(work: Request) -> Scored:
    scored: Scored | None = None
    for event in work.stream():
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Scored):
            scored = event
    if scored is None:
        raise RequestInvalid("the request made no scores")
    return scored


def _logprobs(logits: torch.Tensor, prompt: np.ndarray) -> list[float]:
    """[L−1]: natural-log probability of each token after those before it."""
    following = torch.from_numpy(prompt[1:]).to(logits.device)
    return [value for value, _ in logprobs(logits[:-1], following)]
