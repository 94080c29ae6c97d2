"""However layers are handed over, and whatever is killed meanwhile: the same bits, the same tokens."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import random
import signal
import threading
from pathlib import Path

import pytest
import torch
from braid_orchestrator.client import Client
from braid_orchestrator.launcher import Launched, launch
from braid_orchestrator.settings import Settings

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
PROMPT = list(range(40, 80))
KILLS = 6


def logits(client: Client) -> list[torch.Tensor]:
    """Of prompts, chunks and single tokens, side by side."""
    return client.score([PROMPT, PROMPT[:1], PROMPT[5:30]], chunk=16, decode_tail=6, want_logits=True).logits


def tokens(client: Client, count: int) -> list[int]:
    return [token for chunk in client.generate(PROMPT, count, ignore_eos=True) for token in chunk.token_ids]


def of_a_cell(dispatch: str, overlap: str) -> list[torch.Tensor]:
    """Logits of short and long prompts; those of `logits` come first."""
    settings = Settings(TINY, dispatch=dispatch, overlap=overlap, threads=1)
    with launch(settings) as cell, cell.client() as client:
        assert all(service.description.doorbells for service in client.status().services)
        return [*logits(client), *client.score([PROMPT * 16], want_logits=True).logits]


@pytest.fixture(scope="module")
def doorbells() -> list[torch.Tensor]:
    """Of a cell whose layers are handed over by doorbells, on one lane."""
    return of_a_cell("walk", "off")


@pytest.mark.parametrize(("dispatch", "overlap"), [("rpc", "off"), ("walk", "on")])
def test_calls_doorbells_and_lanes_give_the_same_bits(
    dispatch: str, overlap: str, doorbells: list[torch.Tensor]
) -> None:
    for ours, theirs in zip(of_a_cell(dispatch, overlap), doorbells, strict=True):
        assert torch.equal(ours, theirs)


def test_without_a_compiler_the_same_model_runs_by_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doorbells: list[torch.Tensor]
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setenv("BRAID_CACHE_DIR", str(tmp_path))
    said: list[str] = []
    with launch(Settings(TINY, threads=1), echo=said.append) as cell, cell.client() as client:
        services = client.status().services
        assert [service.description.backend for service in services] == ["reference", "reference"]
        assert not any(service.description.doorbells for service in services)
        found = logits(client)
    for ours, theirs in zip(found, doorbells[: len(found)], strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
    warnings = [line for line in said if "doorbells" in line]
    assert len(warnings) == 2, said  # one for each service, naming the cause
    assert all("/nonexistent" in line for line in warnings)


def kill_now_and_then(cell: Launched, made: list[int], stop: threading.Event) -> None:
    """Kill one of the services at random moments, each time once tokens flow again."""
    chance = random.Random(1)
    for _ in range(KILLS):
        enough = len(made) + 10
        while len(made) < enough:
            if stop.wait(0.005):
                return
        if stop.wait(chance.uniform(0, 0.05)):
            return
        pid = cell.pid(chance.choice(("full", "linear")))
        if pid is not None:
            os.kill(pid, signal.SIGKILL)


@pytest.mark.timeout(600)  # seven starts of a service, one behind the other
def test_kills_at_random_points_of_walks_change_no_token() -> None:
    with launch(Settings(TINY, threads=1)) as cell, cell.client() as client:
        count = 40 * KILLS
        expected = tokens(client, count)
        made: list[int] = []
        stop = threading.Event()
        killer = threading.Thread(target=kill_now_and_then, args=(cell, made, stop))
        killer.start()
        try:
            for chunk in client.generate(PROMPT, count, ignore_eos=True):
                made.extend(chunk.token_ids)
        finally:
            stop.set()
            killer.join()
        status = client.status()
    assert made == expected
    assert status.replays >= KILLS // 2  # most kills fell into the generation
    assert all(pool.used == 0 for pool in status.pools)
