"""An attention service over gRPC: translates to an `AttentionHost`, and runs as a process."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

import grpc
from braid.v1 import attention_pb2, attention_pb2_grpc

from braid_wire.attention_core import AttentionCore
from braid_wire.attention_host import AttentionHost
from braid_wire.attention_walk import Walk
from braid_wire.audit import Auditor
from braid_wire.cuda_doorbell import streams_for
from braid_wire.errors import BraidError, Draining, ServiceFault, ServiceLost
from braid_wire.metrics import ProcessMetrics, versions
from braid_wire.process import (
    EXIT_FAULT,
    EXIT_OK,
    EXIT_USAGE,
    ServiceOptions,
    Stop,
    begin_loading,
    die_with_parent,
    end_loading,
    leave,
    setup_logging,
    wait_for_stop,
)
from braid_wire.rpc import Server, Tls

log = logging.getLogger(__name__)

SERVICE_NAME = "braid.v1.AttentionService"


class AttentionServicer(attention_pb2_grpc.AttentionServiceServicer):
    """Translates calls; all rules live in the host."""

    def __init__(self, host: AttentionHost) -> None:
        self._host = host
        self._walks: dict[grpc.ServicerContext, Walk] = {}
        self._lock = threading.Lock()
        self._draining = False

    def Describe(
        self, request: attention_pb2.DescribeRequest, context: grpc.ServicerContext
    ) -> attention_pb2.DescribeResponse:
        return self._host.describe()

    def Configure(
        self, request: attention_pb2.ConfigureRequest, context: grpc.ServicerContext
    ) -> attention_pb2.ConfigureResponse:
        return self._host.configure(request)

    def Plan(
        self, request: attention_pb2.PlanRequest, context: grpc.ServicerContext
    ) -> attention_pb2.PlanResponse:
        return self._host.plan(request)

    def Attend(
        self, request: attention_pb2.AttendRequest, context: grpc.ServicerContext
    ) -> attention_pb2.AttendResponse:
        return self._host.attend(request)

    def Walk(
        self, request_iterator: Iterator[attention_pb2.WalkRequest], context: grpc.ServicerContext
    ) -> Iterator[attention_pb2.WalkResponse]:
        walk = Walk(self._host)
        with self._lock:
            self._walks[context] = walk
            late = self._draining
        if late:  # nobody has seen it among the walks to end
            context.cancel()

        def check() -> None:
            _expect_active(context)

        def between() -> None:
            _expect_active(context)
            if self._draining:
                raise Draining("the service stops")

        try:
            for request in request_iterator:
                yield from walk.handle(request)
                yield from walk.follow(check, between)
                if self._draining and walk.idle:
                    return
        finally:
            with self._lock:
                del self._walks[context]
            walk.close()

    def drain(self) -> None:
        """End the walks that are between steps; the others end behind their steps."""
        with self._lock:
            self._draining = True
            idle = [context for context, walk in self._walks.items() if walk.idle]
        for context in idle:
            context.cancel()


def _expect_active(context: grpc.ServicerContext) -> None:
    if not context.is_active():
        raise ServiceLost("the orchestrator is gone")


class RunningService:
    """A host that is being served.

    Args:
        host: what to serve.
        address: `unix:PATH` or `HOST:PORT`; port 0 picks a free one.
        metrics_port: of `/metrics`; 0 picks a free one.
        metrics_host: of `/metrics`.
        tls: PEM files, for TCP beyond loopback.

    Raises:
        RequestInvalid: an address or port is taken or malformed, or lies beyond loopback without TLS.
    """

    def __init__(
        self,
        host: AttentionHost,
        address: str,
        metrics_port: int,
        metrics_host: str = "127.0.0.1",
        tls: Tls | None = None,
    ) -> None:
        self._servicer = AttentionServicer(host)
        self._server = Server([SERVICE_NAME], refused=host.metrics.refused)
        attention_pb2_grpc.add_AttentionServiceServicer_to_server(self._servicer, self._server.grpc)
        self._endpoint = host.metrics.serve(metrics_port, metrics_host)
        try:
            self.address = self._server.listen(address, tls)
        except BraidError:
            self._endpoint.close()
            raise
        self.metrics_port = self._endpoint.port
        self._server.start()
        self._server.set_ready(True)

    def stop(self, grace_seconds: float) -> None:
        """Turn NOT_SERVING, give running calls `grace_seconds` to finish, and stop."""
        self._server.set_ready(False)
        self._servicer.drain()
        self._server.stop(grace_seconds)
        self._endpoint.close()


def serve(
    host: AttentionHost,
    address: str,
    metrics_port: int,
    metrics_host: str = "127.0.0.1",
    tls: Tls | None = None,
    grace_seconds: float = 10.0,
) -> None:
    """Serve until SIGTERM or SIGINT; call it on the main thread.

    Once it serves it prints one line on stdout: JSON with service, address, metrics_port and pid.
    """
    stop = Stop()
    host.on_fault = stop.set
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    running = RunningService(host, address, metrics_port, metrics_host, tls)
    end_loading()
    ready = {
        "service": host.kind.value,
        "address": running.address,
        "metrics_port": running.metrics_port,
        "pid": os.getpid(),
    }
    print(json.dumps(ready), flush=True)
    log.info("serving %s, metrics on port %d", running.address, running.metrics_port)
    wait_for_stop(stop.wait)
    log.info("stopping")
    running.stop(0.0 if host.faulted else grace_seconds)
    if host.faulted:
        raise ServiceFault("the device has failed")


def run_service(name: str, options: ServiceOptions, load: Callable[[], AttentionCore]) -> NoReturn:
    """The main function of a service's process.

    Exits with 0 after a stop, 2 on a typed error of the caller's, 1 on a fault of our own; an error
    is one line on stderr.

    Args:
        name: "full" or "linear".
        options: from the command line.
        load: makes the core, its kernels loaded and their threads set.
    """
    try:
        begin_loading()
        setup_logging(name, options.log_level)
        if options.parent is not None:
            die_with_parent(options.parent)
        tls = options.tls
        metrics = ProcessMetrics(name, versions(("braid-attention",))["braid-attention"])
        auditor = Auditor(metrics, options.audit_seconds) if options.audit_seconds else None
        core = load()
        streams = streams_for(core.device, own=True)
        host = AttentionHost(core, metrics, auditor=auditor, streams=streams)
        serve(host, options.address, options.metrics_port, options.metrics_host, tls, options.grace_seconds)
    except ServiceFault as error:
        log.error("%s", error.message)
        leave(EXIT_FAULT)
    except BraidError as error:
        print(f"braid-{name}: {error.message}", file=sys.stderr)
        leave(EXIT_USAGE)
    except Exception:
        log.exception("the service failed")
        leave(EXIT_FAULT)
    leave(EXIT_OK)
