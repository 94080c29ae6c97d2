"""Three real processes with the small model's own draft: the tokens that it makes without, in fewer steps."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import random
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from braid_orchestrator.client import Client
from braid_orchestrator.launcher import Launched, launch
from braid_orchestrator.sampling import Sampling
from braid_orchestrator.scrape import scrape
from braid_orchestrator.settings import Settings

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
PROMPTS = [
    "def read_lines(path):",
    'sizes = {"path": 41, "name": 73, "mode": 15, "text": 88}\nprint(sizes["name"])  #',
    "class Reader:",
    "for name in",
]
MANNERS = [
    Sampling(logprobs=2),
    Sampling(0.7, top_p=0.9, seed=7, repetition_penalty=1.1),
    Sampling(1.0, seed=8),
    Sampling(0.8, top_k=50, seed=9, presence_penalty=0.3, logprobs=0),
]
COUNT = 48
KILLS = 4


def made(client: Client) -> list[tuple[list[int], list[float | None]]]:
    """Tokens and log-probabilities of every prompt in its manner, all side by side."""

    def one(prompt: str, sampling: Sampling) -> tuple[list[int], list[float | None]]:
        chunks = list(client.generate(prompt, COUNT, sampling, ignore_eos=True))
        tokens = [token for chunk in chunks for token in chunk.token_ids]
        return tokens, [one.logprob for chunk in chunks for one in chunk.logprobs]

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(one, PROMPTS, MANNERS))


def drafted(cell: Launched) -> dict[str, float]:
    """Verified guesses by outcome."""
    samples = scrape(cell.info.metrics["orchestrator"])
    return {s.labels["outcome"]: s.value for s in samples if s.name == "braid_draft_tokens_total"}


@pytest.fixture(scope="module")
def expected() -> list[tuple[list[int], list[float | None]]]:
    with launch(Settings(TINY, threads=1)) as cell, cell.client() as client:
        assert drafted(cell) == {"accepted": 0, "rejected": 0}
        return made(client)


@pytest.fixture(scope="module")
def speculating() -> Iterator[Launched]:
    with launch(Settings(TINY, threads=1, speculative=3, speculative_adaptive=False)) as cell:
        yield cell


def test_the_same_tokens(speculating: Launched, expected: list[tuple[list[int], list[float | None]]]) -> None:
    with speculating.client() as client:
        for (tokens, logprobs), (wanted, told) in zip(made(client), expected, strict=True):
            assert len(tokens) == COUNT
            assert tokens == wanted
            assert logprobs == pytest.approx(told, abs=1e-4)
        assert all(pool.used == 0 for pool in client.status().pools)
    counts = drafted(speculating)
    assert counts["accepted"] > 0.4 * (counts["accepted"] + counts["rejected"])


def kill_now_and_then(cell: Launched, made: list[int], stop: threading.Event) -> None:
    """Kill one of the services at random moments, each time once tokens flow again."""
    chance = random.Random(2)
    for _ in range(KILLS):
        enough = len(made) + 10
        while len(made) < enough:
            if stop.wait(0.002):
                return
        stop.wait(chance.uniform(0, 0.03))
        pid = cell.pid(chance.choice(("full", "linear")))
        if pid is not None:
            os.kill(pid, signal.SIGKILL)


def test_kills_while_guesses_are_verified_change_no_token(speculating: Launched) -> None:
    # Long enough that most kills fall into it, though who reads and kills may wait for a core.
    count = 400 * KILLS
    sampling = Sampling(0.7, seed=3, top_p=0.95)

    def stream(client: Client, into: list[int]) -> list[int]:
        for chunk in client.generate(PROMPTS[0], count, sampling, ignore_eos=True):
            into.extend(chunk.token_ids)
        return into

    with speculating.client() as client:
        expected = stream(client, [])
        before = client.status().replays
        found: list[int] = []
        stop = threading.Event()
        killer = threading.Thread(target=kill_now_and_then, args=(speculating, found, stop))
        killer.start()
        try:
            stream(client, found)
        finally:
            stop.set()
            killer.join()
        status = client.status()
    assert found == expected
    assert status.replays - before >= KILLS // 2  # most kills fell into the generation
    assert all(pool.used == 0 for pool in status.pools)
