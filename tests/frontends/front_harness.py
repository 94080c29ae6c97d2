"""A cell in this process behind its gRPC server, and a cell under `braid serve`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from braid_orchestrator.cell import Cell, CellOptions
from braid_orchestrator.launcher import embedded_hosts
from braid_orchestrator.link import EmbeddedLink
from braid_orchestrator.node import Node
from braid_orchestrator.request import Request
from braid_orchestrator.store import Limits
from braid_wire import rpc
from braid_wire.errors import QueueFull
from braid_wire.layers import Role
from grpc_health.v1 import health_pb2, health_pb2_grpc
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
BRAID = str(Path(sys.executable).with_name("braid"))
LIMITS = Limits(max_tokens=256, max_sequences=4, max_context=4096, page_size=16, pool_bytes=1 << 26)
MAX_WAITING = 8
ENDLESS = LIMITS.max_context - 64
"""Tokens of a request that a test wants to end before it is done: it takes several seconds alone."""
FREED_STEPS = 800
"""Steps within which a request that is given up must be gone. Alone on a machine they take less than a
second; in steps, other work on it does not count, and an endless request takes five times as many."""


class Front:
    """A cell that serves, a channel to it, and a stub of the frontend's service."""

    def __init__(self, directory: Path) -> None:
        self.node = Node(["127.0.0.1:0"])
        links = {kind: EmbeddedLink(kind, host) for kind, host in embedded_hosts(1).items()}
        options = CellOptions(limits=LIMITS, max_waiting=MAX_WAITING)
        self.cell = Cell(TINY, links, directory / "arenas.sock", options)
        self.node.serve(self.cell, 0)
        (self.address,) = self.node.addresses
        self.channel = rpc.channel(self.address)
        self.stub = vllm_engine_pb2_grpc.VllmEngineStub(self.channel)

    def close(self) -> None:
        """End it."""
        self.channel.close()
        self.node.stop()

    def generate(
        self, prompt: Sequence[int], stream: bool = False, request_id: str = "", **sampling: Any
    ) -> Any:
        """The call."""
        return self.stub.Generate(
            pb.GenerateRequest(
                request_id=request_id,
                tokenized=pb.TokenizedInput(input_ids=prompt),
                sampling_params=pb.SamplingParams(**sampling),
                stream=stream,
            )
        )

    def complete(self, prompt: Sequence[int], **sampling: Any) -> pb.GenerateComplete:
        """The answer to one that is not streamed."""
        (response,) = self.generate(prompt, **sampling)
        return response.complete

    def health(self, service: str) -> int:
        """As `grpc.health.v1` tells it."""
        request = health_pb2.HealthCheckRequest(service=service)
        return health_pb2_grpc.HealthStub(self.channel).Check(request).status

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits, and nothing is held."""
        memory, load = self.cell.store.memory[Role.TARGET], self.cell.engine.load
        pools = [pool for pool in (memory.pages, memory.slots) if pool is not None]
        return not (load.running or load.waiting or any(pool.used for pool in pools))

    @contextmanager
    def freeing(self) -> Iterator[None]:
        """A request is given up in the block: soon nothing runs or is held."""
        before = self.cell.walker.steps
        yield
        assert eventually(lambda: self.idle)
        assert self.cell.walker.steps - before < FREED_STEPS

    @contextmanager
    def full(self, room: int = 0) -> Iterator[None]:
        """For the length of the block, all run that can, and all but `room` wait that may."""
        works: list[Request] = []

        def filled() -> bool:
            load = self.cell.engine.load
            if load.running + load.waiting < LIMITS.max_sequences + MAX_WAITING - room:
                works.append(Request(f"filler-{len(works)}", np.array([5, 6, 7]), max_tokens=ENDLESS))
                with suppress(QueueFull):  # until the first ones run
                    self.cell.engine.submit(works[-1])
            return load.running == LIMITS.max_sequences and load.waiting == MAX_WAITING - room

        try:
            assert eventually(filled)
            yield
        finally:
            for work in works:
                self.cell.engine.cancel(work)
        assert eventually(lambda: self.idle)


class Served:
    """A cell under `braid serve --json`, in the directories of `place`."""

    def __init__(self, place: Path, *options: object) -> None:
        for name in ("r", "t"):
            (place / name).mkdir(mode=0o700)
        inherited = {name: value for name, value in os.environ.items() if name != "BRAID_LOG"}
        own = {
            "BRAID_RUNTIME_DIR": str(place / "r"),
            "TMPDIR": str(place / "t"),
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [BRAID, "serve", str(TINY), "--json", "--metrics-port", "0", "--log-level", "warning"]
            + [str(option) for option in options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**inherited, **own},
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        self.said: dict[str, Any] = json.loads(line)

    def end(self) -> None:
        """Whatever state it is in, it is gone afterwards."""
        self.process.kill()
        self.process.communicate()


def eventually(holds: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Wait for something to come true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.01)
    return holds()


def children(parent: int, word: str) -> set[int]:
    """Process ids of a process's children that have a word in their command lines."""
    found = set()
    for task in Path(f"/proc/{parent}/task").iterdir():
        # Threads and processes may end while they are looked at.
        with suppress(OSError):
            for pid in map(int, (task / "children").read_text().split()):
                with suppress(OSError):
                    if word in Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "):
                        found.add(pid)
    return found
