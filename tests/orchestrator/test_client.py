"""Both clients over gRPC: what they get, what they are refused, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from braid.v1 import orchestrator_pb2 as pb
from braid.v1 import orchestrator_pb2_grpc
from braid_orchestrator.client import AsyncClient, Chunk, Client, Sampling
from braid_orchestrator.client.messages import Collector
from braid_orchestrator.launcher import launch
from braid_orchestrator.settings import Settings
from braid_wire import rpc
from braid_wire.errors import (
    BraidError,
    Draining,
    RequestCancelled,
    RequestInvalid,
    ServiceFault,
    ServiceLost,
    StepTimeout,
    from_rpc_error,
)

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
VOCAB = 2048
CONTEXT = 2048
LONG = 1900
"""Tokens of a request that something happens to while it runs."""
PROMPT = "def read(self, size=-1):\n    "
WARM = Sampling(0.9, top_p=0.95, seed=5, presence_penalty=0.5, logprobs=2, prompt_logprobs=1)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("BRAID_RUNTIME_DIR", str(tmp_path_factory.mktemp("r")))
        patched.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
        yield


@pytest.fixture(scope="module")
def address(runtime: None) -> Iterator[str]:
    settings = Settings(TINY, max_sequences=4, max_context=CONTEXT, pool_bytes=1 << 26)
    with launch(settings, placement="embedded") as cell:
        yield cell.address


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    """A client of a cell that holds nothing in the end."""
    with Client(address) as made:
        yield made
        assert eventually_idle(made)


def idle(status: pb.StatusResponse) -> bool:
    return not any(pool.used for pool in status.pools) and status.running == status.waiting == 0


def eventually(holds: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not (found := holds()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def eventually_idle(client: Client) -> bool:
    return eventually(lambda: idle(client.status()))


def eventually_running(client: Client, count: int) -> bool:
    return eventually(lambda: client.status().running == count)


def run(address: str, use: Callable[[AsyncClient], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        async with AsyncClient(address) as client:
            return await asyncio.wait_for(use(client), 120)

    return asyncio.run(main())


def test_a_completion_tells_all_that_was_asked(client: Client) -> None:
    generation = client.generate(PROMPT, 20, WARM, stop_strings=["never to be seen"])
    chunks = list(generation)
    found = generation.completion
    assert [chunk.token_ids for chunk in chunks if chunk.token_ids] == [(token,) for token in found.token_ids]
    assert found.text == "".join(chunk.text for chunk in chunks)
    assert (found.finish_reason, found.stop, found.completion_tokens) == ("length", None, 20)
    assert (found.index, found.cached_tokens) == (0, 0)
    assert [entry.token_id for entry in found.logprobs] == list(found.token_ids)
    assert all(len(entry.top) == 2 and entry.logprob <= 0 for entry in found.logprobs)
    assert len(found.prompt_logprobs) == found.prompt_tokens - 1
    assert all(len(entry.top) == 1 for entry in found.prompt_logprobs)


def test_logprobs_are_those_of_score(client: Client) -> None:
    ids = list(range(40, 60))
    found = client.complete(ids, 15, WARM)
    (scores,) = client.score([[*ids, *found.token_ids]]).logprobs
    told = [entry.logprob for entry in (*found.prompt_logprobs, *found.logprobs)]
    assert told == pytest.approx(scores, abs=1e-4)


def test_stops_are_told(client: Client) -> None:
    plain = client.complete(PROMPT, 30, ignore_eos=True)
    stop = plain.text[10:13]
    found = client.complete(PROMPT, 30, stop_strings=[stop], ignore_eos=True)
    assert (found.finish_reason, found.stop) == ("stop", stop)
    assert found.text == plain.text[: plain.text.index(stop)]
    more = {"stop_strings": [stop], "include_stop_str_in_output": True, "ignore_eos": True}
    assert client.complete(PROMPT, 30, **more).text == found.text + stop  # type: ignore[arg-type]
    by_id = client.complete(PROMPT, 30, stop_token_ids=[plain.token_ids[6]])
    assert by_id.stop == plain.token_ids[6]
    assert by_id.token_ids == plain.token_ids[: plain.token_ids.index(by_id.stop)]


def test_three_completions(client: Client) -> None:
    generation = client.generate(PROMPT, 12, WARM, n=3)
    chunks = list(generation)
    assert {chunk.index for chunk in chunks} == {0, 1, 2}
    assert [found.index for found in generation.completions] == [0, 1, 2]
    for index, found in enumerate(generation.completions):
        assert found.text == "".join(chunk.text for chunk in chunks if chunk.index == index)
        assert bool(found.prompt_logprobs) == (index == 0)
        seed = Sampling(0.9, top_p=0.95, seed=5 + index, presence_penalty=0.5)
        assert client.complete(PROMPT, 12, seed).token_ids == found.token_ids
    assert len({found.token_ids for found in generation.completions}) == 3


def test_without_max_tokens_the_context_is_filled(client: Client) -> None:
    found = client.complete([5] * (CONTEXT - 12), None, ignore_eos=True)
    assert (found.finish_reason, found.completion_tokens) == ("length", 12)


def test_leaving_early_gives_up(client: Client) -> None:
    for completions in (1, 3):
        stream = iter(client.generate(PROMPT, LONG, Sampling(1.0), n=completions, ignore_eos=True))
        next(stream)
        assert eventually_running(client, completions)  # others may begin a step later
        stream.close()  # type: ignore[attr-defined]
        assert eventually_idle(client)
    generation = client.generate(PROMPT, LONG, ignore_eos=True)
    with pytest.raises(RequestInvalid):
        _ = generation.completion
    with pytest.raises(RequestCancelled):
        for _ in generation:
            generation.cancel()


def test_a_deadline_is_an_error_of_the_table(client: Client) -> None:
    with pytest.raises(StepTimeout, match=r"0\.05") as error:
        client.complete(PROMPT, LONG, deadline_s=0.05, ignore_eos=True)
    assert error.value.metadata["field"] == "deadline_s"


def test_a_request_that_fails_takes_its_siblings_along(client: Client) -> None:
    blocker = iter(client.generate(PROMPT, LONG, request_id="r-2", ignore_eos=True))
    next(blocker)
    with pytest.raises(RequestInvalid, match="r-2"):
        client.complete(PROMPT, LONG, n=3, request_id="r")
    assert eventually_running(client, 1)  # r-0 and r-1 are gone
    blocker.close()  # type: ignore[attr-defined]


def test_asyncio_gets_the_same(address: str, client: Client) -> None:
    async def use(other: AsyncClient) -> None:
        generation = other.generate(PROMPT, 20, WARM, n=2)
        chunks = [chunk async for chunk in generation]
        expected = client.generate(PROMPT, 20, WARM, n=2)
        assert {chunk.index for chunk in chunks} == {chunk.index for chunk in expected}
        assert generation.completions == expected.completions
        assert await other.complete(PROMPT, 20, WARM) == expected.completion
        ids = [[5, 6, 7], [8]]
        assert (await other.score(ids)).logprobs == client.score(ids).logprobs
        (logits, _) = (await other.score(ids, want_logits=True)).logits
        assert logits.shape == (3, VOCAB)
        assert (await other.status()).model == client.status().model
        assert await other.plan() == client.plan()
        together = await asyncio.gather(*(other.complete(PROMPT, 20, WARM) for _ in range(3)))
        assert together == [expected.completion] * 3

    run(address, use)


def test_asyncio_gives_up_in_every_way(address: str, client: Client) -> None:
    def long(other: AsyncClient) -> Any:
        return other.generate(PROMPT, LONG, Sampling(1.0), ignore_eos=True)

    async def idle_again(other: AsyncClient) -> bool:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            if idle(await other.status()):
                return True
            await asyncio.sleep(0.02)
        return False

    async def first(generation: Any) -> Chunk:
        async for chunk in generation:
            return chunk  # leaves the iteration
        raise AssertionError("there was nothing")

    async def read(generation: Any, started: asyncio.Event) -> None:
        async for _ in generation:
            started.set()

    async def use(other: AsyncClient) -> None:
        assert (await first(long(other))).token_ids
        assert await idle_again(other)
        chunks = long(other).__aiter__()
        await anext(chunks)
        await chunks.aclose()
        assert await idle_again(other)
        async with long(other) as generation:
            assert (await other.status()) is not None
        with pytest.raises(RequestCancelled):
            await read(generation, asyncio.Event())
        assert await idle_again(other)
        started = asyncio.Event()
        task = asyncio.create_task(read(long(other), started))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await idle_again(other)

    run(address, use)


def test_asyncio_is_told_the_errors_of_the_table(address: str, tmp_path: Path) -> None:
    async def use(other: AsyncClient) -> None:
        with pytest.raises(RequestInvalid) as error:
            await other.complete([VOCAB], 3)
        assert error.value.metadata["field"] == "prompt"
        with pytest.raises(RequestInvalid):
            await other.score([])
        with pytest.raises(StepTimeout):
            await other.complete(PROMPT, LONG, deadline_s=0.03, ignore_eos=True)

    async def nobody(other: AsyncClient) -> None:
        for ask in (other.status(), other.complete([1], 1), other.score([[1]]), other.drain(0.1)):
            with pytest.raises(ServiceLost):
                await ask

    run(address, use)
    run(f"unix:{tmp_path}/none.sock", nobody)


NAN, INF = math.nan, math.inf


def sampling(**more: Any) -> dict[str, Any]:
    return {"sampling": pb.SamplingParams(**more)}


BAD: list[tuple[str, dict[str, Any]]] = [
    *(("temperature", sampling(temperature=bad)) for bad in (NAN, INF, -0.5)),
    *(("top_p", sampling(top_p=bad)) for bad in (NAN, INF, 0.0, -1.0, 1.01)),
    *(("min_p", sampling(min_p=bad)) for bad in (NAN, INF, -0.1, 1.01)),
    *(("repetition_penalty", sampling(repetition_penalty=bad)) for bad in (NAN, INF, 0.0, -1.0)),
    *(("presence_penalty", sampling(presence_penalty=bad)) for bad in (NAN, INF, 2.5, -2.5)),
    *(("frequency_penalty", sampling(frequency_penalty=bad)) for bad in (NAN, INF, 2.5, -2.5)),
    *(("logit_bias", sampling(logit_bias={3: bad})) for bad in (NAN, INF, 101, -101)),
    ("logit_bias", sampling(logit_bias={VOCAB: 1})),
    ("min_tokens", sampling(min_tokens=6)),
    ("logprobs", sampling(logprobs=21)),
    ("prompt_logprobs", sampling(prompt_logprobs=21)),
    ("max_tokens", {"max_tokens": 0}),
    ("n", {"n": 129}),
    *(("deadline_s", {"deadline_s": bad}) for bad in (NAN, INF, 0.0, -1.0)),
    ("stop_strings", {"stop_strings": [""]}),
    ("stop_strings", {"stop_strings": ["x"] * 65}),
    ("stop_strings", {"stop_strings": ["x" * 1025]}),
    ("prompt", {"tokens": pb.TokenIds(ids=[VOCAB])}),
    ("prompt", {"tokens": pb.TokenIds()}),
]


def test_bad_values_are_refused_by_name(address: str, client: Client) -> None:
    with rpc.channel(address) as channel:
        stub = orchestrator_pb2_grpc.OrchestratorStub(channel)
        for field, more in BAD:
            request = pb.GenerateRequest(**{"max_tokens": 5, "tokens": pb.TokenIds(ids=[5, 6])} | more)
            with pytest.raises(grpc.RpcError) as refused:
                list(stub.Generate(request))
            error = from_rpc_error(refused.value, "the cell")
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT, more
            assert isinstance(error, RequestInvalid), (more, error)
            assert error.metadata["field"] == field, more
            assert idle(client.status()), more


def test_the_client_refuses_what_fits_no_message(client: Client) -> None:
    for more in ({"max_tokens": -1}, {"stop_token_ids": [-1]}, {"n": 0}, {"n": 2**40}):
        with pytest.raises(RequestInvalid):
            client.complete("x", **more)  # type: ignore[arg-type]
    with pytest.raises(RequestInvalid):
        client.complete([-1])


@pytest.mark.parametrize(
    "message",
    [pb.GenerateResponse(finish_reason=99), pb.GenerateResponse(index=2)],  # type: ignore[arg-type]
)
def test_what_a_newer_cell_might_say_is_a_fault(message: pb.GenerateResponse) -> None:
    with pytest.raises(ServiceFault):
        Collector(2).take(message)


def test_asyncio_drains(runtime: None) -> None:
    async def use(other: AsyncClient) -> None:
        running = other.generate(PROMPT, LONG, ignore_eos=True)
        chunks = running.__aiter__()
        await anext(chunks)
        assert await other.drain(0.05) == 1
        with pytest.raises(Draining):
            await other.complete(PROMPT, 1)
        await chunks.aclose()
        assert await other.drain(20) == 0

    settings = Settings(TINY, max_sequences=4, max_context=CONTEXT, pool_bytes=1 << 26)
    with launch(settings, placement="embedded") as cell:
        run(cell.address, use)
    with Client(cell.address) as gone, pytest.raises(BraidError):
        gone.complete(PROMPT, 1)
