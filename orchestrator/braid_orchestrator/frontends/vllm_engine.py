"""The gRPC service `vllm.grpc.engine.VllmEngine` over one cell: from message to work to message."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from typing import NoReturn

import grpc
from braid_wire.errors import MechanismUnsupported, PoolExhausted, RequestInvalid
from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from braid_orchestrator.cell import Cell
from braid_orchestrator.frontends.loads import LoadMeter
from braid_orchestrator.frontends.model_info import ModelInfo
from braid_orchestrator.frontends.tokenizer_archive import TokenizerArchive
from braid_orchestrator.frontends.vllm_fields import UNSERVED, refuse_unsupported
from braid_orchestrator.frontends.vllm_requests import requests_of
from braid_orchestrator.frontends.vllm_responses import responses_of
from braid_orchestrator.request import Request
from braid_orchestrator.trace_context import headers_of

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["VllmEngine"].full_name
SERVER_TYPE = "braid"

_OWN_RANK = 0


class VllmEngineServicer(vllm_engine_pb2_grpc.VllmEngineServicer):
    """Serves one cell.

    Args:
        cell: what it serves.
    """

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._model = ModelInfo.of(cell)
        self._meter = LoadMeter(cell)
        self._version = metadata.version("braid-attention")
        self._started = time.monotonic()
        self._last_request = 0.0
        self._lock = threading.Lock()
        self._live: dict[object, tuple[str, Sequence[Request]]] = {}

    def Generate(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        self._last_request = time.time()
        trace = None if self._cell.traces is None else headers_of(context)
        works = requests_of(request, self._cell, self._model, trace)
        with self._known_as(request.request_id or works[0].request_id, works):
            # It is called at every end of the call: an error, a caller that left, and the good one too.
            if context.add_callback(lambda: self._cancel(works)):
                self._submit(works)
                yield from responses_of(works, request.stream)

    def Abort(self, request: pb.AbortRequest, context: grpc.ServicerContext) -> pb.AbortResponse:
        refuse_unsupported(request)
        names = set(request.request_ids)
        with self._lock:
            found = [works for name, works in self._live.values() if name in names]
        for works in found:
            self._cancel(works)
        return pb.AbortResponse()

    def HealthCheck(
        self, request: pb.HealthCheckRequest, context: grpc.ServicerContext
    ) -> pb.HealthCheckResponse:
        draining = self._cell.engine.draining
        return pb.HealthCheckResponse(healthy=not draining, message="draining" if draining else "serving")

    def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.ServicerContext
    ) -> pb.GetModelInfoResponse:
        model = self._model
        return pb.GetModelInfoResponse(
            model_path=str(model.path),
            tokenizer_path=str(model.path),
            served_model_name=model.name,
            is_generation=True,
            model_type=model.model_type,
            architectures=[model.architecture] if model.architecture is not None else [],
            vocab_size=model.vocab_size,
            max_context_length=model.max_context,
            max_req_input_len=model.max_context - 1,
            eos_token_ids=model.end_tokens,
            bos_token_id=model.bos_token,
            pad_token_id=model.pad_token,
            default_sampling_params_json=model.sampling_json,
        )

    def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> pb.GetServerInfoResponse:
        load, options = self._cell.engine.load, self._cell.options
        return pb.GetServerInfoResponse(
            server_type=SERVER_TYPE,
            active_requests=load.running + load.waiting,
            is_paused=self._cell.engine.draining,
            last_receive_timestamp=self._last_request,
            uptime_seconds=time.monotonic() - self._started,
            data_parallel_size=1,
            model_dtype=str(options.dtype),
            kv_cache_dtype=str(options.dtype).removeprefix("torch."),
            block_size=options.limits.page_size,
            max_num_seqs=options.limits.max_sequences,
        )

    def GetLoads(self, request: pb.GetLoadsRequest, context: grpc.ServicerContext) -> pb.GetLoadsResponse:
        refuse_unsupported(request)
        response = pb.GetLoadsResponse(
            timestamp=datetime.now(UTC).isoformat(), version=self._version, dp_rank_count=1
        )
        if request.dp_rank == _OWN_RANK:
            response.loads.append(self._load())
        return response

    def GetTokenizer(
        self, request: common.GetTokenizerRequest, context: grpc.ServicerContext
    ) -> Iterator[common.GetTokenizerChunk]:
        archive = TokenizerArchive.of(self._cell.model)
        *before, last = archive.chunks()
        for data in before:
            yield common.GetTokenizerChunk(data=data)
        yield common.GetTokenizerChunk(data=last, sha256=archive.sha256)

    def FlushCache(
        self, request: common.FlushCacheRequest, context: grpc.ServicerContext
    ) -> common.FlushCacheResponse:
        refuse_unsupported(request)
        self._cell.engine.flush_cache()
        return common.FlushCacheResponse(success=True, message="no prefix is kept; what runs goes on")

    def Embed(self, request: pb.EmbedRequest, context: grpc.ServicerContext) -> NoReturn:
        raise _unserved("Embed")

    def StartProfile(self, request: common.StartProfileRequest, context: grpc.ServicerContext) -> NoReturn:
        raise _unserved("StartProfile")

    def StopProfile(self, request: common.StopProfileRequest, context: grpc.ServicerContext) -> NoReturn:
        raise _unserved("StopProfile")

    def SubscribeKvEvents(
        self, request: common.SubscribeKvEventsRequest, context: grpc.ServicerContext
    ) -> NoReturn:
        raise _unserved("SubscribeKvEvents")

    @contextmanager
    def _known_as(self, name: str, works: Sequence[Request]) -> Iterator[None]:
        """Let `Abort` find requests for as long as the block lasts."""
        key = object()
        with self._lock:
            self._live[key] = (name, works)
        try:
            yield
        finally:
            with self._lock:
                del self._live[key]

    def _submit(self, works: Sequence[Request]) -> None:
        for work in works:
            try:
                self._cell.engine.submit(work)
            except PoolExhausted as error:
                # It can never fit. RESOURCE_EXHAUSTED would have the gateway tell its caller to try again.
                raise RequestInvalid(error.message, **{"field": "max_tokens", **error.metadata}) from error

    def _cancel(self, works: Sequence[Request]) -> None:
        for work in works:
            self._cell.engine.cancel(work)

    def _load(self) -> pb.SchedulerLoad:
        load = self._meter.read()
        return pb.SchedulerLoad(
            dp_rank=_OWN_RANK,
            num_running_reqs=load.running,
            num_waiting_reqs=load.waiting,
            num_total_reqs=load.running + load.waiting,
            max_running_requests=load.most_running,
            num_used_tokens=load.used_tokens,
            max_total_num_tokens=load.total_tokens,
            token_usage=load.memory,
            utilization=load.running / load.most_running,
            gen_throughput=load.tokens_per_second,
        )


def _unserved(method: str) -> MechanismUnsupported:
    return MechanismUnsupported(f"{method} is not served: {UNSERVED[method]}", method=method)
