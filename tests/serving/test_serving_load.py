"""Three processes under many requests at once: the answers of a quiet cell, soon and for everybody."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from braid_orchestrator.client import AsyncClient
from braid_orchestrator.launcher import PROCESSES, Launched, launch
from braid_orchestrator.settings import Settings
from braid_wire import rpc
from serving_harness import TINY, prompt
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2_grpc

CONCURRENT = 256
LEAVING = 32
DISTINCT = 64
MADE = (1, 6, 12, 24, 40)
ROUNDS = 6


@dataclass(frozen=True)
class Asked:
    """What a request asks."""

    tokens: list[int]
    made: int


def asked(index: int) -> Asked:
    """Some are one token long, some hundreds; one in three begins like others."""
    length = int(
        np.random.default_rng(index).choice([1, 3, 16, 40, 90, 220], p=[0.1, 0.1, 0.2, 0.3, 0.2, 0.1])
    )
    begin = prompt(32) if index % 3 == 0 else []
    return Asked([*begin, *prompt(length, 1 + index)], MADE[index % len(MADE)])


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    settings = Settings(TINY, max_tokens=1024, max_sequences=64, max_context=512, threads=1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("BRAID_RUNTIME_DIR", str(tmp_path_factory.mktemp("r")))
        with launch(settings) as launched:
            yield launched


def flush(cell: Launched) -> None:
    with rpc.channel(cell.address) as channel:
        stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        assert stub.FlushCache(common_pb2.FlushCacheRequest()).success


async def answer(client: AsyncClient, index: int) -> tuple[list[int], float]:
    """Its tokens, and how long they took."""
    work, began = asked(index), time.monotonic()
    done = await client.complete(work.tokens, work.made, ignore_eos=True)
    return list(done.token_ids), time.monotonic() - began


async def gives_up(client: AsyncClient, index: int) -> None:
    """Leaves after the first tokens, or at some moment before."""
    generation = client.generate(asked(index).tokens, 200, ignore_eos=True)
    if index % 16:
        await asyncio.sleep(0.05 * (index % 7))
        generation.cancel()
        return
    async for _ in generation:
        break


async def crowd(client: AsyncClient) -> tuple[list[tuple[list[int], float]], float]:
    """The answers of most while the others leave, and how long all of it took."""
    began = time.monotonic()
    leaving = [asyncio.create_task(gives_up(client, index)) for index in range(LEAVING)]
    found = await asyncio.gather(*(answer(client, index % DISTINCT) for index in range(CONCURRENT - LEAVING)))
    took = time.monotonic() - began
    await asyncio.gather(*leaving)
    return found, took


async def quiet(client: AsyncClient) -> None:
    """Nothing runs, waits or is held; those that left are ended with the next step."""
    while (status := await client.status()).running or status.waiting:
        await asyncio.sleep(0.01)
    assert not any(pool.used for pool in status.pools)


def processor_seconds(cell: Launched) -> float:
    """What the cell's processes and this one, which reads all answers, have used of the processors."""
    ticks = 0
    for name in PROCESSES:
        fields = Path(f"/proc/{cell.pid(name)}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK") + time.process_time()


def fairness(values: list[float]) -> float:
    """Jain's index: 1 where all have the same, 1/n where one has everything."""
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))


@pytest.mark.timeout(400)
def test_a_crowd_gets_what_each_would_get_alone(
    cell: Launched, record_property: Callable[[str, object], None]
) -> None:
    async def main() -> None:
        async with AsyncClient(cell.address) as client:
            gain = 0.0
            # Other work on the machine slows some rounds down: each is held against what was alone right
            # before it, and what the processors do for a token tells of the gain where a clock does not.
            for _ in range(ROUNDS):
                flush(cell)
                used = processor_seconds(cell)
                alone = [await answer(client, index) for index in range(DISTINCT)]
                one_by_one = sum(len(tokens) for tokens, _ in alone)
                rate = one_by_one / sum(seconds for _, seconds in alone)
                cheapness = one_by_one / (processor_seconds(cell) - used)
                flush(cell)
                used = processor_seconds(cell)
                found, took = await crowd(client)
                used = processor_seconds(cell) - used
                for index, (tokens, _) in enumerate(found):
                    assert tokens == alone[index % DISTINCT][0], index
                await quiet(client)
                made = sum(len(tokens) for tokens, _ in found)
                slowdowns = [seconds / alone[index % DISTINCT][1] for index, (_, seconds) in enumerate(found)]
                middle, worst = median(slowdowns), max(slowdowns)
                even = fairness([seconds for _, seconds in found])
                print(
                    f"{len(found)} answers and {LEAVING} that left in {took:.1f} s: "
                    f"{made / took:.0f} tokens/s, {made / took / rate:.1f} times one at a time, "
                    f"{made / used / cheapness:.1f} times for the processors' time; "
                    f"slowdown: median {middle:.0f}, max {worst:.0f}, ratio {worst / middle:.1f}; "
                    f"fairness of the time to the end: {even:.2f}"
                )
                gain = max(gain, made / took / rate, made / used / cheapness)
                # All came at once and ask for up to forty times as much as others: nobody is left behind.
                assert even > 0.5
                assert max(seconds for _, seconds in found) <= took
                if gain >= 4:
                    break
            record_property("throughput over one at a time", round(gain, 2))
            record_property("fairness", round(even, 3))
            assert gain >= 4

    asyncio.run(asyncio.wait_for(main(), 300))
    flush(cell)
