"""A cell with a page, requests to it, and what its event stream tells."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from braid_orchestrator.cell import Cell, CellOptions
from braid_orchestrator.client import Client
from braid_orchestrator.launcher import embedded_hosts
from braid_orchestrator.link import EmbeddedLink
from braid_orchestrator.node import Node
from braid_orchestrator.page import Page
from braid_orchestrator.page.server import Place
from braid_orchestrator.store import Limits
from braid_orchestrator.watching import Watching

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
CHROMIUM = Path("/usr/bin/chromium")
LIMITS = Limits(max_tokens=128, max_sequences=4, max_context=4096, page_size=16, pool_bytes=1 << 26)
PERIOD_S = 0.1

Json = dict[str, Any]


class Watched:
    """A cell in this process whose page makes ten frames a second."""

    def __init__(self, directory: Path) -> None:
        self.node = Node(["127.0.0.1:0"])
        links = {kind: EmbeddedLink(kind, host) for kind, host in embedded_hosts(1).items()}
        self.cell = Cell(TINY, links, directory / "arenas.sock", CellOptions(limits=LIMITS, speculative=2))
        self.node.serve(self.cell, 0, watching=Watching(page_port=None))
        self.page = Page(self.cell, Place(names=("cell.example",)), PERIOD_S)
        self.client = Client(self.node.addresses[0])

    def close(self) -> None:
        """End it."""
        self.client.close()
        self.page.close()
        self.node.stop()

    def unwatched(self) -> bool:
        """Wait until no frames are made any more."""
        return eventually(lambda: not any(thread.name == "page" for thread in threading.enumerate()))

    def request(self, method: str, path: str, **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Status, headers and body of a request; `_` in a header's name is `-`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.page.port, timeout=10)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, headers=named)
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    @contextmanager
    def events(self) -> Iterator[Iterator[tuple[str, Json]]]:
        """Its events, as a browser gets them."""
        connection = http.client.HTTPConnection("127.0.0.1", self.page.port, timeout=10)
        connection.request("GET", "/events")
        response = connection.getresponse()
        try:
            assert response.status == 200, response.read()
            yield _parsed(response)
        finally:
            response.close()
            connection.close()

    def frame(self, right: Callable[[Json], bool] = lambda frame: True) -> Json:
        """The first frame of a new stream, which nobody else follows, that is right."""
        assert self.unwatched()
        end = time.monotonic() + 60
        with self.events() as events:
            for name, data in events:
                if name == "frame" and right(data):
                    return data
                assert time.monotonic() < end, data
        raise AssertionError("the stream ended")


def _parsed(lines: http.client.HTTPResponse) -> Iterator[tuple[str, Json]]:
    while line := lines.readline():
        name = line.decode().removeprefix("event: ").strip()
        data = json.loads(lines.readline().decode().removeprefix("data: "))
        assert lines.readline() == b"\n"
        yield name, data


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Wait for something to come true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.01)
    return holds()
