"""The orchestrator as a process: loads a model, serves its cell, drains."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

from braid.v1 import orchestrator_pb2_grpc
from braid_wire.errors import BraidError, ServiceFault, ServiceLost
from braid_wire.layers import Kind
from braid_wire.metrics import MetricsEndpoint
from braid_wire.process import (
    EXIT_FAULT,
    EXIT_OK,
    EXIT_USAGE,
    Stop,
    die_with_parent,
    end_loading,
    leave,
    setup_logging,
    thread_count,
    wait_for_stop,
)
from braid_wire.rpc import Server, Tls
from braid_wire.runtime_dir import RuntimeDirectory
from smg_grpc_proto.generated import vllm_engine_pb2_grpc
from transformers.utils import logging as transformers_logging

from braid_orchestrator.cell import Cell
from braid_orchestrator.frontends import vllm_engine
from braid_orchestrator.frontends.vllm_engine import VllmEngineServicer
from braid_orchestrator.link import RemoteLink
from braid_orchestrator.page import Page, Place
from braid_orchestrator.servicer import SERVICE_NAME, OrchestratorServicer
from braid_orchestrator.settings import Settings
from braid_orchestrator.threads import use_threads
from braid_orchestrator.watching import Watching

log = logging.getLogger(__name__)

HANDOVER_SOCKET = "arenas.sock"

_SERVICES = (SERVICE_NAME, vllm_engine.SERVICE_NAME)
# A stream holds a thread while it waits, and Status must be answered beside all of them.
_WORKERS = 1024 + 256
# Behind a drain: what is left of a step, and of a wait for a service that will not come back.
_CLOSE_S = 5.0


@dataclass(frozen=True)
class NodeOptions:
    """Where an orchestrator serves and whom it talks to."""

    addresses: tuple[str, ...]
    full: str
    linear: str
    runtime_dir: Path | None
    metrics_port: int
    metrics_host: str
    tls: Tls | None
    parent: int | None
    drain_seconds: float
    log_level: str
    watching: Watching = field(default_factory=Watching)


class Node:
    """A cell behind its gRPC server, its `/metrics` and its page.

    The server is made first, so that a taken address is refused before a model is loaded.

    Args:
        addresses: `unix:PATH` or `HOST:PORT`, each.
        tls: PEM files, for every TCP address.

    Raises:
        RequestInvalid: an address is taken or malformed, or lies beyond loopback without TLS.
    """

    def __init__(self, addresses: Sequence[str], tls: Tls | None = None) -> None:
        self._cell: Cell | None = None
        self._endpoint: MetricsEndpoint | None = None
        self._page: Page | None = None
        self._server = Server(_SERVICES, workers=_WORKERS, refused=self._refused)
        self.addresses = tuple(
            self._server.listen(address, None if address.startswith("unix:") else tls)
            for address in addresses
        )
        self.metrics_port = 0

    @property
    def page(self) -> str:
        """URL of the page; empty where there is none."""
        return self._page.url if self._page is not None else ""

    def serve(
        self,
        cell: Cell,
        metrics_port: int,
        metrics_host: str = "127.0.0.1",
        watching: Watching | None = None,
    ) -> None:
        """Serve a cell whose engine runs; from here on it is this node's to close.

        Raises:
            RequestInvalid: the port of the metrics or of the page is taken.
        """
        watching = watching or Watching()
        self._cell = cell
        self._endpoint = cell.metrics.serve(metrics_port, metrics_host)
        self.metrics_port = self._endpoint.port
        if watching.page_port is not None:
            self._page = Page(cell, Place(watching.page_port, watching.page_host, watching.page_names))
        servicer = OrchestratorServicer(cell, self._server)
        orchestrator_pb2_grpc.add_OrchestratorServicer_to_server(servicer, self._server.grpc)
        vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(VllmEngineServicer(cell), self._server.grpc)
        self._server.start()
        self._server.set_ready(True)

    def drain(self, seconds: float) -> int:
        """Take nothing new, let what runs finish for so long, and say how many requests are left."""
        if self._cell is None:
            return 0
        self._server.set_ready(False)
        return self._cell.engine.drain(seconds)

    def stop(self) -> None:
        """End what is left, close the cell, stop serving."""
        # Either server sees its end when it next looks up, half a second later: both at once.
        pages = [served for served in (self._page, self._endpoint) if served is not None]
        with ThreadPoolExecutor(max_workers=2) as closing:
            closed = [closing.submit(served.close) for served in pages]
            if self._cell is not None:
                self._cell.close()
            self._server.stop(1.0)
        for served in closed:
            served.result()

    def _refused(self, error: BraidError) -> None:
        if self._cell is not None:
            self._cell.metrics.refused(error)


def run_node(settings: Settings, options: NodeOptions) -> NoReturn:
    """The main function of the orchestrator's process.

    Exits with 0 after a stop, 2 on a typed error of the caller's, 1 on a fault or where a service
    did not come up. An error is one line on stderr, and one of JSON on stdout for a supervisor.
    """
    try:
        setup_logging("orchestrator", options.log_level)
        transformers_logging.disable_progress_bar()
        if options.parent is not None:
            die_with_parent(options.parent)
        _serve(settings, options)
    except (ServiceFault, ServiceLost) as error:
        _report(error)
        leave(EXIT_FAULT)
    except BraidError as error:
        _report(error)
        leave(EXIT_USAGE)
    except Exception as error:
        log.exception("the orchestrator failed")
        _report(ServiceFault(f"{type(error).__name__}: {error}"))
        leave(EXIT_FAULT)
    leave(EXIT_OK)


def _serve(settings: Settings, options: NodeOptions) -> None:
    """Load, serve until SIGTERM or SIGINT, drain."""
    use_threads(thread_count(settings.threads), peers=True)
    cell_options = settings.cell_options()
    runtime = None if options.runtime_dir is not None else RuntimeDirectory.create()
    directory = options.runtime_dir if runtime is None else runtime.path
    if directory is None:
        raise ServiceFault("the node has no run-time directory")
    stop = Stop()
    _on_stop(lambda: sys.exit(EXIT_OK))  # nothing is served yet: a stop is the end
    try:
        node = Node(options.addresses, options.tls)
        traces = options.watching.traces(settings.model.name)
        links = {
            Kind.FULL: RemoteLink(Kind.FULL, options.full),
            Kind.LINEAR: RemoteLink(Kind.LINEAR, options.linear),
        }
        handover = free_socket(directory / HANDOVER_SOCKET)
        cell = Cell(settings.model, links, handover, cell_options, traces)
        _on_stop(stop.set)
        node.serve(cell, options.metrics_port, options.metrics_host, options.watching)
        end_loading()
        _announce(node, settings)
        wait_for_stop(stop.wait)
        _end(node, options)
    finally:
        if runtime is not None:
            runtime.close()


def free_socket(path: Path) -> Path:
    """The path of a socket, without the file that a killed owner left there."""
    path.unlink(missing_ok=True)
    return path


def _announce(node: Node, settings: Settings) -> None:
    """One line on stdout: JSON with service, address, addresses, metrics_port, page, pid and model."""
    ready = {
        "service": "orchestrator",
        "address": node.addresses[0],
        "addresses": node.addresses,
        "metrics_port": node.metrics_port,
        "page": node.page,
        "pid": os.getpid(),
        "model": str(settings.model),
    }
    print(json.dumps(ready), flush=True)
    log.info("serving %s, metrics on port %d", ", ".join(node.addresses), node.metrics_port)


def _end(node: Node, options: NodeOptions) -> None:
    """Drain, then stop, within bounds."""
    log.info("draining")
    left = node.drain(options.drain_seconds)
    if left:
        log.warning("%d requests are left unfinished", left)
    # The engine may be waiting for a service that is gone, and nobody depends on how this ends.
    last = threading.Timer(_CLOSE_S, os._exit, (EXIT_FAULT,))
    last.daemon = True
    last.start()
    node.stop()
    last.cancel()


def _on_stop(act: Callable[[], object]) -> None:
    def handle(number: int, frame: FrameType | None) -> None:
        act()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def _report(error: BraidError) -> None:
    line = " ".join(error.message.split())
    print(json.dumps({"error": {"reason": error.reason, "message": line}}), flush=True)
    print(f"braid-orchestrator: {line}", file=sys.stderr, flush=True)
