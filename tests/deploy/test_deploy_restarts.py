"""The containers' processes, killed one by one: each restarts, and the cell serves again by itself."""

from __future__ import annotations

import http.client
import json
import re
import signal
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from braid_orchestrator.client import Client
from braid_wire.errors import BraidError
from compose_cell import FULL, GATEWAY, LINEAR, ORCHESTRATOR, ComposeCell, eventually

pytestmark = pytest.mark.deploy

PROMPT = "def read_lines(path):"
TOKENS = 60


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComposeCell]:
    """A cell that serves."""
    started = ComposeCell(tmp_path_factory.mktemp("c"), {"BRAID_POOL_BYTES": "64MiB"})
    try:
        started.wait()
        yield started
    finally:
        started.close()


@pytest.fixture(scope="module")
def expected(cell: ComposeCell) -> list[int]:
    """The tokens of a run that nobody disturbs."""
    with cell.client() as client:
        return tokens(client)


def tokens(client: Client, kill: threading.Event | None = None) -> list[int]:
    found: list[int] = []
    for chunk in client.generate(PROMPT, TOKENS, ignore_eos=True):
        found.extend(chunk.token_ids)
        if kill is not None and len(found) >= 10:
            kill.set()
    return found


def test_the_live_page_answers(cell: ComposeCell) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{cell.page}/", timeout=5) as response:
        assert b"<title>Braid" in response.read()


def test_a_start_warns_of_nothing(cell: ComposeCell) -> None:
    for name, log in cell.logs.items():
        said = log.read_text()
        assert "serving" in said, name
        assert not re.search("warn|error|corrupt|missing", said, re.IGNORECASE), (name, said)


@pytest.mark.parametrize("name", [FULL, LINEAR])
def test_a_killed_service(cell: ComposeCell, expected: list[int], name: str) -> None:
    at = threading.Event()
    process = cell.processes[name]
    before = process.process
    with cell.client() as client:
        replays = client.status().replays

        def kill() -> None:
            at.wait(30)
            process.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        assert tokens(client, at) == expected
        killer.join()
        # A request that was over too early for the kill finds the new process just the same.
        assert tokens(client) == expected
        assert client.status().replays > replays
    assert process.process is not before
    assert cell.health(name) == "SERVING"


def test_a_killed_orchestrator(cell: ComposeCell, expected: list[int]) -> None:
    with cell.client() as client:
        stream = iter(client.generate(PROMPT, 2000, ignore_eos=True))
        next(stream)
        cell.processes[ORCHESTRATOR].kill()
        with pytest.raises(BraidError):
            list(stream)
    assert cell.health(ORCHESTRATOR) != "SERVING"
    cell.wait()
    assert cell.health(ORCHESTRATOR) == "SERVING"
    with cell.client() as client:
        assert tokens(client) == expected


def test_all_killed_at_once(cell: ComposeCell, expected: list[int]) -> None:
    for process in cell.processes.values():
        process.kill(signal.SIGKILL)
    cell.wait()
    with cell.client() as client:
        assert tokens(client) == expected


def test_a_killed_gateway(tmp_path: Path) -> None:
    cell = ComposeCell(tmp_path, {"BRAID_POOL_BYTES": "64MiB"}, (FULL, LINEAR, ORCHESTRATOR, GATEWAY))
    try:
        assert eventually(lambda: completed(cell), 120)
        for name in (GATEWAY, ORCHESTRATOR):
            cell.processes[name].kill()
            assert eventually(lambda: not completed(cell), 10)
            assert eventually(lambda: completed(cell), 120)
    finally:
        cell.close()


def completed(cell: ComposeCell) -> bool:
    """Whether the gateway answers a completion."""
    connection = http.client.HTTPConnection("127.0.0.1", cell.http, timeout=10)
    body = {"model": "tiny", "prompt": "def ", "max_tokens": 4}
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status == 200 and bool(json.load(response)["choices"][0]["text"])
    except (OSError, http.client.HTTPException, ValueError):
        return False
    finally:
        connection.close()
