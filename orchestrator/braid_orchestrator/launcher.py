"""Puts a whole cell together: three supervised processes, or everything in this one.

This is the one place that names all three packages.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from braid_wire.layers import Kind
from braid_wire.metrics import PORTS, ProcessMetrics, versions
from braid_wire.process import thread_count
from braid_wire.rpc import Tls
from braid_wire.runtime_dir import RuntimeDirectory

from braid_orchestrator.client import Client
from braid_orchestrator.discovery import CellInfo, publish
from braid_orchestrator.settings import Settings
from braid_orchestrator.supervisor import Program, Ready, Supervisor, Watch
from braid_orchestrator.watching import Watching

if TYPE_CHECKING:
    from braid_wire.attention_host import AttentionHost

FULL, LINEAR, ORCHESTRATOR = "full", "linear", "orchestrator"
PROCESSES = (FULL, LINEAR, ORCHESTRATOR)
MODULES = {
    FULL: "braid_full_attn",
    LINEAR: "braid_linear_attn",
    ORCHESTRATOR: "braid_orchestrator",
}

START_TIMEOUT_S = 600.0
"""Longest time that loading a model may take."""

_SERVICE_GRACE_S = 5.0


@dataclass(frozen=True)
class Endpoints:
    """Where a cell can be reached beside its Unix socket.

    Args:
        grpc: `HOST:PORT` of the orchestrator, each; port 0 picks a free one.
        metrics_ports: of each process; 0, or none: a free one.
        metrics_host: of all three.
        tls: for every address of `grpc`.
        watching: its live page and its traces.
    """

    grpc: tuple[str, ...] = ()
    metrics_ports: dict[str, int] = field(default_factory=dict)
    metrics_host: str = "127.0.0.1"
    tls: Tls | None = None
    watching: Watching = field(default_factory=Watching)

    @classmethod
    def usual_ports(cls, first: int) -> dict[str, int]:
        """Neighbouring metrics ports from the orchestrator's on; 0: free ones."""
        offset = first - PORTS[ORCHESTRATOR] if first else 0
        return {name: port + offset if first else 0 for name, port in PORTS.items()}


@dataclass(frozen=True)
class Launched:
    """A cell that this process has started.

    Args:
        info: how to reach it.
        supervisor: keeps its processes running; None where it is in this process.
    """

    info: CellInfo
    supervisor: Supervisor | None

    @property
    def address(self) -> str:
        """Of its orchestrator, on a Unix socket."""
        return self.info.address

    def client(self) -> Client:
        """A client of it; the caller closes it."""
        return Client(self.address)

    def pid(self, name: str) -> int | None:
        """Process id of "full", "linear" or "orchestrator"; None while it does not serve."""
        if self.supervisor is None:
            return os.getpid()
        ready = self.supervisor.ready(name)
        return ready.pid if ready is not None else None


@contextmanager
def launch(
    settings: Settings,
    endpoints: Endpoints | None = None,
    placement: str = "process",
    log_level: str = "warning",
    drain_seconds: float = 30.0,
    echo: Callable[[str], None] = lambda line: None,
    watch: Watch = lambda name, what: None,
) -> Iterator[Launched]:
    """A running cell, for as long as the block lasts; then all of it ends at once.

    A caller that wants an orderly end first asks `supervisor.stop()` and waits with `join()`.

    Args:
        settings: the model and how it is held.
        endpoints: where it can be reached.
        placement: "process", or "embedded": everything in this process.
        log_level: of the processes.
        drain_seconds: longest time that accepted requests get when the cell is stopped.
        echo: called with every line that the processes print.
        watch: told how the start goes on.

    Raises:
        BraidError: the cell cannot start.
    """
    settings.plans()  # a model that is unknown is refused before anything starts
    settings = replace(settings, model=settings.model.resolve())
    endpoints = endpoints or Endpoints()
    runtime = RuntimeDirectory.create()
    try:
        if placement == "embedded":
            with _embedded(settings, endpoints, runtime, watch) as launched:
                yield launched
        else:
            supervisor = Supervisor(
                _programs(settings, endpoints, runtime.path, log_level, drain_seconds), echo, watch
            )
            with _supervised(supervisor, settings, runtime) as launched:
                yield launched
    finally:
        runtime.close()


@contextmanager
def _supervised(supervisor: Supervisor, settings: Settings, runtime: RuntimeDirectory) -> Iterator[Launched]:
    supervisor.start()
    try:
        ready = supervisor.wait_ready(START_TIMEOUT_S)
        info = CellInfo(
            address=ready[ORCHESTRATOR].addresses[0],
            grpc=ready[ORCHESTRATOR].addresses[1:],
            metrics={name: ready[name].metrics_port for name in PROCESSES},
            model=str(settings.model),
            pid=os.getpid(),
            directory=str(runtime.path),
            page=ready[ORCHESTRATOR].page,
        )
        publish(info)
        yield Launched(info, supervisor)
    finally:
        supervisor.kill()
        supervisor.settle()


def service_address(directory: Path, name: str) -> str:
    """Where a process of a cell listens in the cell's directory."""
    return f"unix:{directory / name}.sock"


def _programs(
    settings: Settings, endpoints: Endpoints, directory: Path, log_level: str, drain_seconds: float
) -> list[Program]:
    """The three processes of a cell."""
    threads = thread_count(settings.threads)
    settings = replace(settings, threads=threads)

    def orchestrator(before: Ready | None) -> list[str]:
        grpc = before.addresses[1:] if before is not None else endpoints.grpc
        tls, watching = endpoints.tls, endpoints.watching
        if before is not None and before.page:
            watching = replace(watching, page_port=urlsplit(before.page).port)
        return [
            *_command(ORCHESTRATOR, before, endpoints, log_level),
            *settings.arguments(),
            *watching.arguments(),
            *("--address", service_address(directory, ORCHESTRATOR)),
            *(word for address in grpc for word in ("--grpc", address)),
            *("--full", service_address(directory, FULL)),
            *("--linear", service_address(directory, LINEAR)),
            *("--runtime-dir", str(directory)),
            *("--drain-seconds", str(drain_seconds)),
            *(("--tls-cert", str(tls.certificate), "--tls-key", str(tls.key)) if tls is not None else ()),
        ]

    environment = _environment(threads, log_level)
    return [
        *service_programs(endpoints, directory, threads, log_level, settings.device),
        Program(ORCHESTRATOR, orchestrator, environment, 0, drain_seconds),
    ]


def service_programs(
    endpoints: Endpoints, directory: Path, threads: int, log_level: str, device: str = "cpu"
) -> list[Program]:
    """The two attention services of a cell.

    Args:
        directory: holds their sockets (`service_address`).
        threads: of each.
        device: where their kernels run.
    """

    def service(name: str, before: Ready | None) -> list[str]:
        return [
            *_command(name, before, endpoints, log_level),
            *("--address", service_address(directory, name)),
            *("--threads", str(threads)),
            *("--device", device),
            *("--grace-seconds", str(_SERVICE_GRACE_S)),
        ]

    environment = _environment(threads, log_level)
    return [
        Program(FULL, lambda before: service(FULL, before), environment, 1, _SERVICE_GRACE_S),
        Program(LINEAR, lambda before: service(LINEAR, before), environment, 1, _SERVICE_GRACE_S),
    ]


def _environment(threads: int, log_level: str) -> dict[str, str]:
    # Libraries that read the variable must agree with the option.
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "BRAID_LOG": log_level}


def _command(name: str, before: Ready | None, endpoints: Endpoints, log_level: str) -> list[str]:
    """What every process of a cell is started with."""
    port = before.metrics_port if before is not None else endpoints.metrics_ports.get(name, 0)
    return [
        *(sys.executable, "-m", MODULES[name]),
        *("--metrics-port", str(port)),
        *("--metrics-host", endpoints.metrics_host),
        *("--parent", str(os.getpid())),
        *("--log-level", log_level),
    ]


def embedded_hosts(threads: int, device: str = "cpu") -> dict[Kind, AttentionHost]:
    """Both services' hosts, with their kernels loaded, in this process.

    On a GPU their kernels go to the caller's stream, behind what the body has put there.
    """
    from braid_full_attn.core import load as load_full
    from braid_linear_attn.core import load as load_linear
    from braid_wire.attention_host import AttentionHost

    from braid_orchestrator.threads import use_threads

    use_threads(threads)
    version = versions(("braid-attention",))["braid-attention"]
    return {
        Kind.FULL: AttentionHost(load_full("auto", threads, device=device), ProcessMetrics(FULL, version)),
        Kind.LINEAR: AttentionHost(
            load_linear("auto", threads, device=device), ProcessMetrics(LINEAR, version)
        ),
    }


@contextmanager
def _embedded(
    settings: Settings, endpoints: Endpoints, runtime: RuntimeDirectory, watch: Watch
) -> Iterator[Launched]:
    """The orchestrator and both hosts in this process: no boundary, the same contract."""
    from transformers.utils import logging as transformers_logging

    from braid_orchestrator.cell import Cell
    from braid_orchestrator.link import EmbeddedLink
    from braid_orchestrator.node import HANDOVER_SOCKET, Node, free_socket

    transformers_logging.disable_progress_bar()
    hosts = embedded_hosts(thread_count(settings.threads), settings.device)
    links = {kind: EmbeddedLink(kind, host) for kind, host in hosts.items()}
    ports, host_name = endpoints.metrics_ports, endpoints.metrics_host
    with ExitStack() as closing:
        scraped: dict[str, int] = {}
        for kind, host in hosts.items():
            endpoint = host.metrics.serve(ports.get(kind.value, 0), host_name)
            closing.callback(endpoint.close)
            scraped[kind.value] = endpoint.port
            watch(kind.value, "ready")
        node = Node([service_address(runtime.path, ORCHESTRATOR), *endpoints.grpc], endpoints.tls)
        closing.callback(node.stop)
        handover = free_socket(runtime.path / HANDOVER_SOCKET)
        traces = endpoints.watching.traces(settings.model.name)
        cell = Cell(settings.model, links, handover, settings.cell_options(), traces)
        node.serve(cell, ports.get(ORCHESTRATOR, 0), host_name, endpoints.watching)
        watch(ORCHESTRATOR, "ready")
        info = CellInfo(
            address=node.addresses[0],
            grpc=node.addresses[1:],
            metrics={ORCHESTRATOR: node.metrics_port, **scraped},
            model=str(settings.model),
            pid=os.getpid(),
            directory=str(runtime.path),
            page=node.page,
        )
        publish(info)
        yield Launched(info, None)
