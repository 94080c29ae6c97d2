"""A real cell under load and a real Prometheus that scrapes it."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
from braid.v1 import attention_pb2 as attention
from braid.v1 import attention_pb2_grpc, common_pb2
from braid_orchestrator.client import Client
from braid_orchestrator.discovery import CellInfo
from braid_wire import rpc
from braid_wire.errors import BraidError

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models" / "tiny"
PROMETHEUS = Path("/usr/bin/prometheus")
SCRAPE_MS = 500
OPTIONS = ("--metrics-port", "0", "--speculative", "2", "--max-sequences", "4", "--log-level", "error")
LOAD_S = 10.0

Json = dict[str, Any]


@contextmanager
def served(place: Path) -> Iterator[CellInfo]:
    """A cell of three processes that drafts."""
    runtime = place / "r"
    runtime.mkdir(mode=0o700)
    inherited = {name: value for name, value in os.environ.items() if name != "BRAID_LOG"}
    process = subprocess.Popen(
        [Path(sys.executable).with_name("braid"), "serve", TINY, "--json", *OPTIONS],
        stdout=subprocess.PIPE,
        text=True,
        env={**inherited, "BRAID_RUNTIME_DIR": str(runtime), "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        yield CellInfo.from_json(json.loads(process.stdout.readline()))
    finally:
        process.terminate()
        process.communicate()


def load(cell: CellInfo, seconds: float) -> None:
    """Requests with prompts in common, and some that are refused, here and at a service."""
    end = time.monotonic() + seconds
    with Client(cell.address) as client:
        addresses = {service.name: service.address for service in client.status().services}
        turn = 0
        while time.monotonic() < end:
            turn += 1
            generations = [
                client.generate("import os\n" * 24 + f"def function_{turn}_{place}(", 24, ignore_eos=True)
                for place in range(3)
            ]
            for generation in generations:
                for _ in generation:
                    pass
            with suppress(BraidError):
                client.complete([1 << 30], 4)
            attend_unplanned(addresses["full"])


def attend_unplanned(address: str) -> None:
    """Ask the full service for a layer of the linear one, in a step that nobody planned."""
    with rpc.channel(address) as channel:
        request = attention.AttendRequest(
            role=common_pb2.ROLE_TARGET, epoch=1, step=1 << 40, ticket=attention.Ticket(layer_id=0)
        )
        with suppress(grpc.RpcError):
            attention_pb2_grpc.AttentionServiceStub(channel).Attend(request, timeout=10)


class Prometheus:
    """The program from Debian, scraping some ports of this machine."""

    def __init__(self, place: Path, ports: Sequence[int]) -> None:
        config = {
            "global": {"scrape_interval": f"{SCRAPE_MS}ms"},
            "scrape_configs": [
                {
                    "job_name": "braid",
                    "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in ports]}],
                }
            ],
        }
        (place / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        self.url = f"http://127.0.0.1:{free_port()}"
        self._process = subprocess.Popen(
            [
                PROMETHEUS,
                f"--config.file={place / 'prometheus.yml'}",
                f"--storage.tsdb.path={place / 'tsdb'}",
                f"--web.listen-address={self.url.removeprefix('http://')}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        assert eventually(self._ready), "Prometheus does not come up"

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def get(self, path: str, **parameters: object) -> Any:
        """The data of an answer of its API; an error is raised with what it says."""
        query = urllib.parse.urlencode({name.rstrip("_"): value for name, value in parameters.items()})
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=20) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def label_values(self, metric: str, label: str) -> list[str]:
        """Values of a label among the series of a selector."""
        found: list[str] = self.get(f"label/{label}/values", **{"match[]": metric})
        return found

    def series(self, expr: str, start: float, end: float) -> list[Json]:
        """Series of a range query."""
        found: list[Json] = self.get("query_range", query=expr, start=start, end=end, step="1s")["result"]
        return found

    def instant(self, expr: str, at: float) -> list[Json]:
        """Series of an instant query, shaped as those of a range query."""
        found = self.get("query", query=expr, time=at)["result"]
        return [{"metric": one["metric"], "values": [one["value"]]} for one in found]

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=1) as response:
                return bool(response.status == 200)
        except OSError:
            return False


def finite(series: Sequence[Json]) -> list[float]:
    """All its values that are numbers."""
    values = [float(value) for one in series for _, value in one["values"]]
    return [value for value in values if math.isfinite(value)]


def free_port() -> int:
    """One that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def eventually(holds: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Wait for something to come true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.1)
    return holds()
