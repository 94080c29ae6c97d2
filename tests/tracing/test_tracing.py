"""A trace of each request: whose it is, what it says, and that nobody has one who did not ask."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import ast
import asyncio
import sys
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from braid_orchestrator.cell import Cell, CellOptions
from braid_orchestrator.client import AsyncClient, Client
from braid_orchestrator.launcher import Endpoints, embedded_hosts, launch
from braid_orchestrator.link import EmbeddedLink
from braid_orchestrator.node import Node
from braid_orchestrator.request import Finish, Finished, Request
from braid_orchestrator.sampling import Sampling
from braid_orchestrator.settings import Settings
from braid_orchestrator.store import Limits
from braid_orchestrator.watching import Watching
from braid_wire import rpc
from braid_wire.errors import ConfigInvalid, PoolExhausted, RequestInvalid
from smg_grpc_proto.generated import vllm_engine_pb2, vllm_engine_pb2_grpc

pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")
pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="the extra otel is not installed")

from braid_orchestrator import tracing
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
LIMITS = Limits(max_tokens=128, max_sequences=4, max_context=512, page_size=16, pool_bytes=1 << 26)
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE}-{PARENT}-01"
UNSAMPLED = f"00-{TRACE}-{PARENT}-00"
PHASES = ["queue", "prefill", "decode"]


class Traced:
    """A cell whose spans are kept here."""

    def __init__(self, directory: Path) -> None:
        self.kept = InMemorySpanExporter()
        links = {kind: EmbeddedLink(kind, host) for kind, host in embedded_hosts(1).items()}
        traces = tracing.Traces("tiny", SimpleSpanProcessor(self.kept))
        self.node = Node(["127.0.0.1:0"])
        self.cell = Cell(TINY, links, directory / "arenas.sock", CellOptions(limits=LIMITS), traces)
        self.node.serve(self.cell, 0)
        self.address = self.node.addresses[0]
        self.client = Client(self.address)

    def close(self) -> None:
        self.client.close()
        self.node.stop()

    def spans(self) -> list[ReadableSpan]:
        """Those made since the last time."""
        found = list(self.kept.get_finished_spans())
        self.kept.clear()
        return found

    def requests(self, count: int) -> list[tuple[ReadableSpan, list[ReadableSpan]]]:
        """Each request's span with its phases, when so many requests have ended."""
        assert eventually(lambda: len(roots(self.kept.get_finished_spans())) == count)
        spans = self.spans()
        found = [(root, [span for span in spans if is_child(span, root)]) for root in roots(spans)]
        assert len(spans) == sum(1 + len(phases) for _, phases in found)
        return found


def roots(spans: Any) -> list[ReadableSpan]:
    return [span for span in spans if span.kind is SpanKind.SERVER]


def is_child(span: ReadableSpan, of: ReadableSpan) -> bool:
    return span.parent is not None and span.parent.span_id == of.context.span_id


def eventually(holds: Any, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.01)
    return bool(holds())


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    traced = Traced(tmp_path_factory.mktemp("cell"))
    yield traced
    traced.close()


@pytest.fixture
def traced(shared: Traced) -> Traced:
    shared.spans()
    return shared


def hexadecimal(number: int, digits: int) -> str:
    return f"{number:0{digits}x}"


def test_a_request_is_a_part_of_its_callers_trace(traced: Traced) -> None:
    before = time.time_ns()
    sampling = Sampling(temperature=0.5, top_k=5, seed=(1 << 64) - 3)
    done = traced.client.complete(
        "def add(", 12, sampling, ignore_eos=True, traceparent=SAMPLED, tracestate="a=b", request_id="r1"
    )
    after = time.time_ns()
    ((root, phases),) = traced.requests(1)
    assert root.name == "text_completion tiny"
    assert hexadecimal(root.context.trace_id, 32) == TRACE
    assert root.parent is not None and hexadecimal(root.parent.span_id, 16) == PARENT
    assert root.context.trace_state.get("a") == "b"
    assert root.status.status_code is StatusCode.UNSET
    told = dict(root.attributes or {})
    assert told["gen_ai.operation.name"] == "text_completion"
    assert told["gen_ai.request.model"] == "tiny"
    assert told["gen_ai.response.id"] == "r1"
    assert told["gen_ai.usage.input_tokens"] == done.prompt_tokens
    assert told["gen_ai.usage.output_tokens"] == 12
    assert told["gen_ai.request.max_tokens"] == 12
    assert (told["gen_ai.request.temperature"], told["gen_ai.request.top_k"]) == (0.5, 5.0)
    assert told["gen_ai.request.seed"] == -3
    assert told["gen_ai.response.finish_reasons"] == ("length",)
    assert not any("def add" in str(value) for value in told.values())
    assert [span.name for span in phases] == PHASES
    times = [
        root.start_time,
        *(time for span in phases for time in (span.start_time, span.end_time)),
        root.end_time,
    ]
    assert all(a is not None and b is not None and a <= b for a, b in pairwise(times))
    # Each phase begins where the one before has ended, and together they are the whole.
    assert [span.end_time for span in phases] == [*(span.start_time for span in phases[1:]), root.end_time]
    assert before - 1_000_000 <= times[0] and times[-1] <= after + 1_000_000  # type: ignore[operator]
    first = told["gen_ai.response.time_to_first_chunk"]
    assert first == pytest.approx((phases[2].start_time - root.start_time) / 1e9, abs=1e-4)


def test_the_engine_protocol_of_others_carries_it_too(traced: Traced) -> None:
    with rpc.channel(traced.address) as channel:
        request = vllm_engine_pb2.GenerateRequest(
            tokenized=vllm_engine_pb2.TokenizedInput(input_ids=[5, 6, 7]),
            sampling_params=vllm_engine_pb2.SamplingParams(max_tokens=4, ignore_eos=True),
        )
        stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        metadata = [("traceparent", SAMPLED), ("tracestate", "a=b"), ("tracestate", "c=d"), ("other", "x")]
        list(stub.Generate(request, metadata=metadata))
        ((root, phases),) = traced.requests(1)
    assert hexadecimal(root.context.trace_id, 32) == TRACE
    assert dict(root.context.trace_state) == {"a": "b", "c": "d"}
    assert [span.name for span in phases] == PHASES
    assert (root.attributes or {})["gen_ai.usage.output_tokens"] == 4


def test_the_asyncio_client_carries_it_too(traced: Traced) -> None:
    async def ask() -> None:
        async with AsyncClient(traced.address) as client:
            await client.complete("a", 2, traceparent=SAMPLED)

    asyncio.run(ask())
    ((root, _),) = traced.requests(1)
    assert hexadecimal(root.context.trace_id, 32) == TRACE


def test_who_is_not_sampled_has_no_spans(traced: Traced) -> None:
    traced.client.complete("def ", 3, traceparent=UNSAMPLED)
    traced.client.complete("def ", 3, traceparent=SAMPLED)
    traced.requests(1)


@pytest.mark.parametrize(
    "header", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01", SAMPLED + "x" * 600]
)
def test_without_a_good_header_a_trace_begins_here(traced: Traced, header: str) -> None:
    traced.client.complete("def ", 3, traceparent=header)
    ((root, phases),) = traced.requests(1)
    assert root.parent is None and hexadecimal(root.context.trace_id, 32) != TRACE
    assert {span.context.trace_id for span in phases} == {root.context.trace_id}


def test_every_completion_has_a_span(traced: Traced) -> None:
    traced.client.complete("def ", 5, n=3, ignore_eos=True, traceparent=SAMPLED)
    found = traced.requests(3)
    assert sorted((root.attributes or {})["braid.completion.index"] for root, _ in found) == [0, 1, 2]
    assert {hexadecimal(root.context.trace_id, 32) for root, _ in found} == {TRACE}


def test_the_number_of_spans_does_not_grow_with_steps(traced: Traced) -> None:
    for length in (2, 60):
        traced.client.complete("def ", length, ignore_eos=True)
        ((_, phases),) = traced.requests(1)
        assert len(phases) == 3


def test_scores_are_told_as_such(traced: Traced) -> None:
    traced.client.score([[5, 6, 7, 8]])
    ((root, phases),) = traced.requests(1)
    assert root.name == "score tiny"
    assert [span.name for span in phases] == ["queue", "prefill"]


def test_what_goes_wrong_is_told_with_its_reason(traced: Traced) -> None:
    with pytest.raises(PoolExhausted):
        traced.client.complete("def ", 100_000, traceparent=SAMPLED)
    ((root, phases),) = traced.requests(1)
    assert (root.attributes or {})["error.type"] == "POOL_EXHAUSTED"
    assert root.status.status_code is StatusCode.ERROR and "512" in (root.status.description or "")
    assert [span.name for span in phases] == ["queue"]
    generation = traced.client.generate("def ", 400, ignore_eos=True)
    for _ in generation:
        break
    ((root, phases),) = traced.requests(1)
    assert (root.attributes or {})["error.type"] == "REQUEST_CANCELLED"
    assert [span.name for span in phases] == PHASES


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes what OTLP sends."""

    def __init__(self) -> None:
        self.taken: list[Any] = []

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.taken += request.resource_spans
        return trace_service_pb2.ExportTraceServiceResponse()


@contextmanager
def collecting() -> Iterator[tuple[str, Collector]]:
    """A collector and its endpoint."""
    collector = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"http://127.0.0.1:{port}", collector
    server.stop(0).wait()


def test_a_collector_gets_them_by_otlp(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRAID_RUNTIME_DIR", str(tmp_path_factory.mktemp("r")))
    monkeypatch.setattr(tracing, "FLUSH_S", 30.0)  # this collector does answer, if late
    with collecting() as (endpoint, collector):
        endpoints = Endpoints(watching=Watching(otlp_endpoint=endpoint))
        with launch(Settings(TINY, threads=1), endpoints, "embedded") as cell, cell.client() as client:
            client.complete("def ", 4, ignore_eos=True, traceparent=SAMPLED)
        # What waited was sent when the cell ended, in one piece or in several.
        taken = list(collector.taken)
    (told,) = {
        frozenset((item.key, item.value.string_value) for item in one.resource.attributes) for one in taken
    }
    facts = dict(told)
    assert facts["service.name"] == "braid-orchestrator"
    assert facts["service.version"] and facts["service.instance.id"]
    spans = [span for resource in taken for scope in resource.scope_spans for span in scope.spans]
    assert sorted(span.name for span in spans) == sorted(["text_completion tiny", *PHASES])
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    (root,) = [span for span in spans if span.parent_span_id.hex() == PARENT]
    assert {span.parent_span_id for span in spans if span is not root} == {root.span_id}


def test_a_collector_that_is_away_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "FLUSH_S", 0.3)
    traces = tracing.Traces.to_collector("tiny", "http://127.0.0.1:9")
    request = Request("r", np.array([5, 6]), max_tokens=4)
    began = time.monotonic()
    for _ in range(5000):  # more than the queue holds
        traces.ended(request, Finished(Finish.LENGTH))
    assert (time.monotonic() - began) / 5000 < 1e-3
    began = time.monotonic()
    traces.close()
    assert time.monotonic() - began < 5  # without that limit three times as long


@pytest.mark.parametrize(
    "endpoint", ["127.0.0.1:4317", "grpc://x:1", "http://x", "http://:1", "http://x:y", "http://x:99999"]
)
def test_endpoints_that_are_none_are_refused(endpoint: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        Watching(otlp_endpoint=endpoint).traces("tiny")
    assert caught.value.metadata["field"] == "otlp_endpoint"


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "braid_orchestrator.tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigInvalid, match=r"opentelemetry.*braid-attention\[otel\]"):
        Watching(otlp_endpoint="http://127.0.0.1:4317").traces("tiny")


def imported_at_once(tree: ast.Module) -> Iterator[str]:
    """Modules that a module imports when it is imported itself, but for type checkers."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif not isinstance(node, ast.FunctionDef | ast.Lambda):
            checked = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            pending += [] if checked else ast.iter_child_nodes(node)


def test_off_means_not_even_imported() -> None:
    package = Path(tracing.__file__).parent
    assert Watching().traces("tiny") is None
    for path in package.rglob("*.py"):
        found = set(imported_at_once(ast.parse(path.read_text())))
        outside = {name for name in found if name.startswith("opentelemetry") or name.endswith(".tracing")}
        assert not outside or path.name == "tracing.py", path
    assert "opentelemetry.trace" in set(imported_at_once(ast.parse(Path(tracing.__file__).read_text())))
