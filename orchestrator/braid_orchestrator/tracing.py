"""A trace of each request, by OpenTelemetry: when it waited, read its prompt, and made its tokens.

Spans are made when a request has ended, by a thread of their own, from the times that it keeps anyway:
nothing of this lies in the way of a step, and nothing is ever recorded of single layers (`braid trace`
does that). This module needs the extra `otel` and is imported only where traces are wanted.

    text_completion MODEL            arrival … end, a child of the caller's span
        queue                        arrival … first step
        prefill                      first step … first token
        decode                       first token … end

Attributes follow the semantic conventions for generative AI. Neither prompts nor completions are told.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from importlib import metadata
from urllib.parse import urlsplit

from braid_wire.errors import RequestInvalid
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from braid_orchestrator.request import Failed, Finished, Request

log = logging.getLogger(__name__)

SERVICE = "braid-orchestrator"
MOST_WAITING = 4096
"""Requests whose spans are still to be made."""
FLUSH_S = 2.0
"""Longest time that the end of a cell waits for its collector."""

_EXPORT_S = 5.0
_NANOSECONDS = 1e9

Attributes = dict[str, str | int | float | bool | list[str]]


class Traces:
    """Makes the spans of requests.

    Args:
        model: that answers them.
        processor: takes the spans.
    """

    def __init__(self, model: str, processor: SpanProcessor) -> None:
        self._model = model
        version = metadata.version("braid-attention")
        resource = Resource.create(
            {"service.name": SERVICE, "service.version": version, "service.instance.id": str(uuid.uuid4())}
        )
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("braid", version)
        self._propagator = TraceContextTextMapPropagator()
        self._over: queue.SimpleQueue[tuple[Request, Finished | Failed] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="traces", daemon=True)
        self._thread.start()

    @classmethod
    def to_collector(cls, model: str, endpoint: str) -> Traces:
        """Traces that go to a collector by OTLP over gRPC.

        Spans wait for it in a queue of 2048; further ones are dropped. A collector that is away is
        tried again and harms nobody.

        Args:
            model: that answers requests.
            endpoint: `http://HOST:PORT`, or `https://` for TLS.

        Raises:
            RequestInvalid: the endpoint is no such URL.
        """
        check_endpoint(endpoint)
        exporter = OTLPSpanExporter(
            endpoint=endpoint, insecure=endpoint.startswith("http:"), timeout=_EXPORT_S
        )
        return cls(model, BatchSpanProcessor(exporter))

    def ended(self, request: Request, event: Finished | Failed) -> None:
        """Have the spans of a request made that is over, well or not; one that was not sampled has none.

        Where very many wait for theirs, it gets none.
        """
        if self._over.qsize() < MOST_WAITING:
            self._over.put((request, event))

    def close(self) -> None:
        """Send what waits, for a while."""
        # A collector that does not answer must not hold up the end of a cell.
        last = threading.Thread(target=self._flush, name="traces-end", daemon=True)
        last.start()
        last.join(FLUSH_S)

    def _work(self) -> None:
        while (over := self._over.get()) is not None:
            try:
                self._tell(*over)
            except Exception:
                log.exception("a trace failed by our own fault")

    def _tell(self, request: Request, event: Finished | Failed) -> None:
        now, wall = time.monotonic(), time.time_ns()

        def clock(moment: float) -> int:
            return wall - round((now - moment) * _NANOSECONDS)

        end = request.ended if request.ended is not None else now
        whole = self._tracer.start_span(
            f"{_operation(request)} {self._model}",
            context=self._propagator.extract(request.trace),
            kind=SpanKind.SERVER,
            start_time=clock(request.arrived),
            attributes=self._attributes(request, event),
        )
        if whole.is_recording():
            within = set_span_in_context(whole)
            for name, begin, until in _phases(request, end):
                self._phase(name, within, clock(begin), clock(until))
            if isinstance(event, Failed):
                _fail(whole, event)
        whole.end(clock(end))

    def _flush(self) -> None:
        self._over.put(None)
        self._thread.join()
        self._provider.shutdown()

    def _phase(self, name: str, within: Context, begin: int, end: int) -> None:
        self._tracer.start_span(name, within, SpanKind.INTERNAL, start_time=begin).end(end)

    def _attributes(self, request: Request, event: Finished | Failed) -> Attributes:
        """What the semantic conventions call the facts of a request."""
        sampling = request.sampling
        found: Attributes = {
            "gen_ai.operation.name": _operation(request),
            "gen_ai.provider.name": "braid",
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.response.id": request.request_id,
            "gen_ai.usage.input_tokens": len(request.prompt),
            "gen_ai.usage.output_tokens": request.made,
            "gen_ai.usage.cache_read.input_tokens": request.cached_tokens,
            "gen_ai.request.temperature": float(sampling.temperature),
            "gen_ai.request.top_p": float(sampling.top_p),
            "gen_ai.request.presence_penalty": float(sampling.presence_penalty),
            "gen_ai.request.frequency_penalty": float(sampling.frequency_penalty),
            "braid.completion.index": request.index,
        }
        if request.max_tokens:
            found["gen_ai.request.max_tokens"] = request.max_tokens
        if sampling.top_k:
            found["gen_ai.request.top_k"] = float(sampling.top_k)
        if sampling.seed is not None:
            # Seeds have 64 bits, of which the sign is one to OTLP.
            found["gen_ai.request.seed"] = sampling.seed - (1 << 64 if sampling.seed >> 63 else 0)
        if request.first_token is not None:
            found["gen_ai.response.time_to_first_chunk"] = request.first_token - request.arrived
        if isinstance(event, Finished):
            found["gen_ai.response.finish_reasons"] = [event.reason.value]
        else:
            found["error.type"] = event.error.reason
        return found


def check_endpoint(endpoint: str) -> None:
    """`RequestInvalid` for what is no URL of a collector."""
    try:
        parts = urlsplit(endpoint)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port is not None
    except ValueError:
        good = False
    if not good:
        raise RequestInvalid(
            f"the collector is {endpoint!r}; it must be http://HOST:PORT or https://HOST:PORT",
            field="otlp_endpoint",
            value=endpoint,
        )


def _operation(request: Request) -> str:
    return "score" if request.scores else "text_completion"


def _phases(request: Request, end: float) -> list[tuple[str, float, float]]:
    """(name, begin, end) of what the request came to, on the monotonic clock."""
    if request.began is None:
        return [("queue", request.arrived, end)]
    found = [("queue", request.arrived, request.began)]
    if request.first_token is None:
        return [*found, ("prefill", request.began, end)]
    return [*found, ("prefill", request.began, request.first_token), ("decode", request.first_token, end)]


def _fail(span: Span, event: Failed) -> None:
    span.set_status(Status(StatusCode.ERROR, event.error.message))
