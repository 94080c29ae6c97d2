"""Cells to measure: the orchestrator's side in this process, the services in others or in this one."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from braid_wire.attention_host import AttentionHost
from braid_wire.errors import ServiceFault
from braid_wire.layers import Kind
from braid_wire.runtime_dir import RuntimeDirectory

from braid_orchestrator.bench.transports import DOORBELLS, TRANSPORTS
from braid_orchestrator.cell import Cell, CellOptions
from braid_orchestrator.launcher import MODULES, START_TIMEOUT_S, embedded_hosts
from braid_orchestrator.link import EmbeddedLink
from braid_orchestrator.supervisor import Program, Ready, Supervisor

_KINDS = (Kind.FULL, Kind.LINEAR)


@dataclass
class Services:
    """Pairs of services, started when a cell first needs them; cells that share a pair take turns.

    Args:
        threads: of each.
        device: of all.
    """

    threads: int
    device: str = "cpu"
    _stack: ExitStack = field(default_factory=ExitStack)
    _addresses: dict[bool, dict[Kind, str]] = field(default_factory=dict)
    _hosts: dict[Kind, AttentionHost] = field(default_factory=dict)
    _runtime: RuntimeDirectory | None = None
    _count: Iterator[int] = field(default_factory=itertools.count)

    def __enter__(self) -> Services:
        self._runtime = RuntimeDirectory.create()
        self._stack.callback(self._runtime.close)
        return self

    def __exit__(self, *raised: object) -> None:
        self._runtime = None
        self._stack.close()

    def start(self, transports: Sequence[str]) -> None:
        """Start the processes that some transports need, side by side.

        Raises:
            BraidError: one cannot start.
        """
        needed = {TRANSPORTS[name].own_service for name in transports} - self._addresses.keys()
        programs = []
        for own in needed:
            infix = "bytes-" if own else ""
            self._addresses[own] = {
                kind: f"unix:{self.directory}/{infix}{kind.value}.sock" for kind in _KINDS
            }
            programs += [self._program(kind, own) for kind in _KINDS]
        if not programs:
            return
        supervisor = Supervisor(programs)
        supervisor.start()
        self._stack.callback(_end, supervisor)
        supervisor.wait_ready(START_TIMEOUT_S)

    @contextmanager
    def remote(self, model: Path, setup: CellOptions, transport: str = DOORBELLS) -> Iterator[Cell]:
        """A cell whose services are processes of their own."""
        self.start((transport,))
        way = TRANSPORTS[transport]
        links = way.links(self._addresses[way.own_service])
        cell = Cell(model, links, self._socket(), replace(setup, dispatch=way.dispatch))
        try:
            yield cell
        finally:
            cell.close()

    @contextmanager
    def embedded(self, model: Path, setup: CellOptions) -> Iterator[Cell]:
        """A cell with both services in this process."""
        if not self._hosts:
            self._hosts = embedded_hosts(self.threads, self.device)
        links = {kind: EmbeddedLink(kind, host) for kind, host in self._hosts.items()}
        cell = Cell(model, links, self._socket(), setup)
        try:
            yield cell
        finally:
            cell.close()

    @property
    def hosts(self) -> tuple[AttentionHost, ...]:
        """Those of embedded cells, in this process."""
        return tuple(self._hosts.values())

    @property
    def directory(self) -> Path:
        """Private, for sockets.

        Raises:
            ServiceFault: outside the `with` block.
        """
        if self._runtime is None:
            raise ServiceFault("the services are used outside their block")
        return self._runtime.path

    def _socket(self) -> Path:
        return self.directory / f"arenas-{next(self._count)}.sock"

    def _program(self, kind: Kind, own: bool) -> Program:
        if own:
            command = [sys.executable, "-m", "braid_orchestrator.bench.bytes_service", kind.value]
        else:
            command = [sys.executable, "-m", MODULES[kind.value], "--metrics-port", "0"]
            command += ["--log-level", "warning", "--device", self.device]
        command += ["--address", self._addresses[own][kind]]
        command += ["--threads", str(self.threads), "--parent", str(os.getpid())]

        def line(last: Ready | None) -> list[str]:
            return command

        name = f"bytes-{kind.value}" if own else kind.value
        return Program(name, line, {**os.environ, "OMP_NUM_THREADS": str(self.threads)})


def _end(supervisor: Supervisor) -> None:
    supervisor.kill()
    supervisor.settle()
