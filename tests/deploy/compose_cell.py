"""The processes of docker-compose.yml's `cpu` profile, run as docker runs them: its own command lines, each
started again whenever it ends. Only paths, addresses and ports are others."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from braid_orchestrator.client import Client
from braid_wire import health
from braid_wire.errors import BraidError

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models" / "tiny"
COMPOSE = ROOT / "docker-compose.yml"
FULL, LINEAR, ORCHESTRATOR, GATEWAY = "full-cpu", "linear-cpu", "orchestrator-cpu", "gateway"
PORTS = {ORCHESTRATOR: 9400, FULL: 9401, LINEAR: 9402, GATEWAY: 9403}
"""Process → port of `/metrics` in the compose file."""

_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")
_FIRST_BACKOFF_S, _STEADY_S = 0.1, 10.0
_START_S = 120.0

Json = dict[str, Any]


def read_compose(variables: Mapping[str, str] | None = None) -> Json:
    """The compose file, its variables replaced by these or by their defaults."""

    def value(match: re.Match[str]) -> str:
        name, sort, word = match.groups()
        found = (variables or {}).get(name)
        return found if found is not None else (word if sort == "-" else f"<{name}>")

    said: Json = yaml.safe_load(_VARIABLE.sub(value, COMPOSE.read_text()))
    return said


def entrypoint(service: Json) -> list[str]:
    """Of a service: its own, else its image's."""
    if "entrypoint" in service:
        return list(service["entrypoint"])
    text = (ROOT / service["build"]["dockerfile"]).read_text()
    found = re.search(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)
    assert found is not None
    words: list[str] = json.loads(found[1])
    return words


class Restarted:
    """A process that is started again whenever it ends, as docker's `restart: unless-stopped` does it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.command = list(command)
        self.held = threading.Event()
        """Set: it is not started again for now."""
        self.process: subprocess.Popen[bytes] | None = None
        self._environment = dict(environment)
        self._log = log
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Signal the process of the moment."""
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> None:
        """End it for good."""
        self._stopping.set()
        while self._thread.is_alive():
            if self.process is not None:
                self.process.kill()
            self._thread.join(0.1)

    def _work(self) -> None:
        backoff = _FIRST_BACKOFF_S
        while not self._stopping.is_set():
            began = time.monotonic()
            with self._log.open("ab") as log:
                self.process = subprocess.Popen(
                    self.command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
                self.process.wait()
            backoff = _FIRST_BACKOFF_S if time.monotonic() - began > _STEADY_S else 2 * backoff
            self._stopping.wait(backoff)
            while self.held.is_set() and not self._stopping.wait(0.05):
                pass


class ComposeCell:
    """The `cpu` profile as plain processes.

    Args:
        place: a short directory for sockets and logs.
        variables: of the compose file.
        names: which services run.
    """

    def __init__(
        self,
        place: Path,
        variables: Mapping[str, str] | None = None,
        names: Sequence[str] = (FULL, LINEAR, ORCHESTRATOR),
    ) -> None:
        self.runtime = place / "r"
        self.runtime.mkdir(mode=0o700)
        self.ports = {name: free_port() for name in PORTS}
        self.http, self.grpc, self.page = free_port(), free_port(), free_port()
        self.services = read_compose({"BRAID_MODEL_NAME": "tiny", **(variables or {})})["services"]
        self.logs = {name: place / f"{name}.log" for name in names}
        self.address = f"unix:{self.runtime}/orchestrator.sock"
        self.processes = {
            name: Restarted(self.command(name), self._environment(name), self.logs[name]) for name in names
        }

    def command(self, name: str) -> list[str]:
        """A service's command line, at the places of this test."""
        service = self.services[name]
        return [self.local(str(word)) for word in (*entrypoint(service), *service["command"])]

    def local(self, word: str) -> str:
        """A word of the compose file, with paths and ports of this test."""
        exact = {str(port): str(self.ports[name]) for name, port in PORTS.items()}
        exact |= {
            "python": sys.executable,
            "braid": str(Path(sys.executable).with_name("braid")),
            "/models/tiny": str(TINY),
            "0.0.0.0": "127.0.0.1",
            "127.0.0.1:50051": f"127.0.0.1:{self.grpc}",
            "8000": str(self.http),
            "9404": str(self.page),
        }
        return exact.get(word, word.replace("/run/braid", str(self.runtime)))

    def client(self) -> Client:
        """Of its orchestrator."""
        return Client(self.address)

    def health(self, name: str) -> str:
        """What a service's health check asks, and is answered."""
        words = self.services[name]["healthcheck"]["test"]
        assert words[:4] == ["CMD", "python", "-m", "braid_wire.health"]
        return health.check(self.local(words[4]), words[words.index("--service") + 1])

    def wait(self, seconds: float = _START_S) -> None:
        """Until a request is answered."""
        end = time.monotonic() + seconds
        while True:
            try:
                with self.client() as client:
                    client.complete("def ", max_tokens=1)
                return
            except BraidError as error:
                logs = {name: log.read_text()[-2000:] for name, log in self.logs.items() if log.exists()}
                assert time.monotonic() < end, (error, logs)
                time.sleep(0.1)

    def close(self) -> None:
        """End all of it."""
        for process in self.processes.values():
            process.stop()

    def _environment(self, name: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("BRAID_")}
        cache = {key: os.environ[key] for key in ("BRAID_CACHE_DIR",) if key in os.environ}
        said = {key: str(value) for key, value in self.services[name]["environment"].items() if key != "HOME"}
        return {**kept, **cache, **said, "OMP_NUM_THREADS": "1"}


def eventually(holds: Callable[[], bool], seconds: float = 30.0, every: float = 0.1) -> bool:
    """Wait for something to come true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(every)
    return holds()


def free_port() -> int:
    """One that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
