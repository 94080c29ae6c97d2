"""The OpenAI API over cells: the real gateway, the real client."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from braid_orchestrator import gateway as gateways
from braid_orchestrator.client import Client
from braid_wire.errors import ConfigInvalid, RequestInvalid, ServiceFault
from front_harness import BRAID, ENDLESS, LIMITS, TINY, Front, Served, children, eventually
from openai import AsyncOpenAI, OpenAI

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("smg") is None, reason="there is no package smg for this platform"
)

MODEL = "tiny"
TEXT = "def add("
CHAT: Any = [{"role": "user", "content": "Hello"}]
LONG = 600
"""Tokens of a request that something happens to while it runs: it must last until who waits for its start
has seen it, told the cell something, and been answered."""
RESTART_S = 90.0


@contextmanager
def gateway(place: Path, *workers: str) -> Iterator[str]:
    """A gateway with its files in `place`; gives its URL."""
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("HOME", "TMPDIR"):
                patch.setenv(name, str(place))
            launched = stack.enter_context(gateways.launch(workers))
        yield launched.url


def client_of(url: str) -> OpenAI:
    """One that shows every failure."""
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def url(shared_front: Front, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a gateway before the shared cell."""
    with gateway(tmp_path_factory.mktemp("gateway"), shared_front.address) as found:
        yield found


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with client_of(url) as made:
        yield made


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A cell and its gateway, as users start them."""
    place = tmp_path_factory.mktemp("s")
    cell = Served(place, "--gateway", "--gateway-port", 0, "--drain-seconds", 120)
    yield cell
    cell.end()


def kill(parent: int, word: str) -> None:
    """SIGKILL for the one child of a process that has a word in its command line."""
    (pid,) = children(parent, word)
    os.kill(pid, signal.SIGKILL)


def complete(client: OpenAI, max_tokens: int = 16, **options: Any) -> Any:
    return client.completions.create(model=MODEL, prompt=TEXT, max_tokens=max_tokens, **options)


def chat(client: OpenAI, max_tokens: int = 16, **options: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=max_tokens, **options)


def native_text(front: Front, max_tokens: int, text: str = TEXT) -> str:
    """What the cell's own service makes of it, greedily."""
    with Client(front.address) as own:
        return own.complete(text, max_tokens).text


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


def test_completions_streamed_and_whole_are_equal(front: Front, client: OpenAI) -> None:
    whole = complete(client, 40)
    assert whole.choices[0].text == native_text(front, 40)
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 40)
    chunks = list(complete(client, 40, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].text
    assert sum(1 for piece in pieces if piece) > 10
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 40
    assert chunks[-1].usage.prompt_tokens == 3


def test_chat_goes_through_the_template(front: Front, client: OpenAI) -> None:
    whole = chat(client)
    text = whole.choices[0].message.content
    template = front.cell.model / "chat_template.jinja"
    assert template.exists()
    rendered = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert text == native_text(front, 16, rendered)
    chunks = list(chat(client, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


def test_several_prompts_and_several_choices(client: OpenAI) -> None:
    batch = client.completions.create(model=MODEL, prompt=[TEXT, "class "], max_tokens=8)
    alone = [
        client.completions.create(model=MODEL, prompt=text, max_tokens=8).choices[0].text
        for text in (TEXT, "class ")
    ]
    assert [choice.text for choice in batch.choices] == alone
    several = chat(client, n=3, seed=5, temperature=1.2)
    first = chat(client, seed=5, temperature=1.2)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in several.choices}) == 3
    assert several.choices[0].message.content == first.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_cut_the_text(front: Front, client: OpenAI, stream: bool) -> None:
    plain = native_text(front, 40)
    stop = plain[17:23]
    expected = plain[: plain.index(stop)]
    done = complete(client, 40, stop=["nowhere", stop], stream=stream)
    choices = [chunk.choices[0] for chunk in done] if stream else done.choices
    assert "".join(choice.text for choice in choices) == expected
    assert choices[-1].finish_reason == "stop"
    if not stream:
        assert done.usage.completion_tokens < 40  # the cell stopped, not the gateway alone


def test_a_seed_repeats_and_temperature_varies(client: OpenAI) -> None:
    def texts(**options: Any) -> list[str]:
        return [complete(client, 24, **options).choices[0].text for _ in range(2)]

    first, again = texts(temperature=1.3, seed=4)
    assert first == again
    assert complete(client, 24, temperature=1.3, seed=5).choices[0].text != first
    assert len(set(texts(temperature=1.3))) == 2
    assert len(set(texts(temperature=0))) == 1


def test_logprobs(front: Front, client: OpenAI) -> None:
    whole = chat(client, 6, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(whole) == 6
    for token in whole:
        assert token.top_logprobs[0].token == token.token  # greedy: the likeliest
        values = [alternative.logprob for alternative in token.top_logprobs]
        assert len(values) == 3
        assert token.logprob == values[0] > values[1] >= values[2]
    streamed = [
        entry
        for chunk in chat(client, 6, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs is not None
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in whole]
    assert [entry.logprob for entry in streamed] == pytest.approx(
        [entry.logprob for entry in whole], abs=1e-4
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request_within_a_second(front: Front, url: str, stream: bool) -> None:
    async def ask(client: AsyncOpenAI) -> None:
        endless: Any = {"max_tokens": ENDLESS, "stream": stream, "extra_body": {"ignore_eos": True}}
        answer = await client.completions.create(model=MODEL, prompt=TEXT, **endless)
        async for _ in answer:
            pass

    async def leave() -> None:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            asking = asyncio.create_task(ask(client))
            async with asyncio.timeout(30):
                while front.cell.engine.load.running != 1:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            with front.freeing():
                asking.cancel()
                await asyncio.wait([asking])
                assert asking.cancelled()

    asyncio.run(leave())


def test_a_full_cell_gives_429_and_serves_again(front: Front, client: OpenAI) -> None:
    with front.full():
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError, match="wait already"):
                complete(client, 1, stream=stream)
    assert complete(client, 1).choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_tokens": LIMITS.max_context + 1}, str(LIMITS.max_context)),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 3}, "top_p"),
        ({"logprobs": 90}, "logprobs"),
        ({"extra_body": {"min_p": 2}}, "min_p"),
        ({"extra_body": {"regex": "a+"}}, "regex"),
        ({"extra_body": {"json_schema": '{"type": "object"}'}}, "json_schema"),
    ],
)
def test_bad_requests_give_400_and_name_the_field(
    client: OpenAI, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **{"max_tokens": 4, **options})
    assert named in str(caught.value)


def test_what_the_cell_does_not_do_is_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="json_schema"):
        chat(client, response_format={"type": "json_object"})
    with pytest.raises(openai.APIStatusError, match="no embeddings"):
        client.embeddings.create(model=MODEL, input="x", encoding_format="float")


def test_a_prompt_that_is_too_long_is_a_bad_request(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model=MODEL, prompt="a b " * LIMITS.max_context, max_tokens=1)


def test_a_served_gateway_is_started_again_at_its_address(served: Served) -> None:
    with client_of(served.said["gateway"]) as client:
        before = complete(client).choices[0].text
        kill(served.process.pid, "smg::")

        def answers() -> bool:
            try:
                return complete(client).choices[0].text == before
            except openai.APIError:
                return False

        assert eventually(answers, RESTART_S)


def test_two_cells_survive_the_loss_of_one(front: Front, served: Served, tmp_path: Path) -> None:
    expected = native_text(front, 40)
    long = native_text(front, LONG)
    with (
        gateway(tmp_path, front.address, served.said["grpc"][-1]) as url,
        client_of(url) as client,
        Client(served.said["address"]) as other,
        ThreadPoolExecutor(4) as pool,
    ):
        before = front.cell.walker.steps, other.status().steps
        assert {complete(client, 40).choices[0].text for _ in range(4)} == {expected}
        assert front.cell.walker.steps > before[0]
        assert other.status().steps > before[1]  # they took turns

        streams = [pool.submit(drained, client) for _ in range(4)]
        assert eventually(lambda: other.status().running >= 1 and front.cell.engine.load.running >= 1)
        kill(served.process.pid, "braid_orchestrator ")
        assert {complete(client, 1).choices[0].text for _ in range(4)} == {native_text(front, 1)}
        outcomes = [stream.result(120) for stream in streams]
        assert outcomes.count(long) >= 2  # those of the cell that lives
        assert all(found in (long, None) for found in outcomes)  # no text is cut without a word
        assert {complete(client, 40).choices[0].text for _ in range(6)} == {expected}


def drained(client: OpenAI) -> str | None:
    """The text of a long stream; None where it broke off with an error."""
    try:
        chunks = complete(client, LONG, stream=True, extra_body={"ignore_eos": True})
        return "".join(chunk.choices[0].text for chunk in chunks)
    except openai.APIError:
        return None


def test_sigterm_drains_with_503_and_loses_nothing(served: Served) -> None:
    with client_of(served.said["gateway"]) as client, ThreadPoolExecutor(4) as pool:
        # Its orchestrator may have been killed a moment ago: the gateway finds it again.
        assert eventually(lambda: answers(client), RESTART_S)
        expected = complete(client, LONG, extra_body={"ignore_eos": True}).choices[0].text
        with Client(served.said["address"]) as own:
            accepted = [pool.submit(whole_text, client, stream) for stream in (True, False, True, False)]
            assert eventually(lambda: own.status().running == 4)
            served.process.send_signal(signal.SIGTERM)
            assert eventually(lambda: own.status().state == "draining")
        with pytest.raises(openai.InternalServerError) as caught:
            complete(client, 1)
        assert caught.value.status_code == 503
        assert [text.result(120) for text in accepted] == [expected] * 4
    assert served.process.wait(120) == 0


def answers(client: OpenAI) -> bool:
    try:
        complete(client, 1)
    except openai.APIError:
        return False
    return True


def whole_text(client: OpenAI, stream: bool) -> str:
    done = complete(client, LONG, stream=stream, extra_body={"ignore_eos": True})
    return "".join(chunk.choices[0].text for chunk in done) if stream else done.choices[0].text


def test_a_gateway_that_cannot_be_kept_running_says_why(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The thief must be faster than the gateway that is started in the place of the first one.
    monkeypatch.setattr("braid_orchestrator.supervisor._FIRST_BACKOFF_S", 2.0)
    lost, others = threading.Event(), children(os.getpid(), "smg::")
    with (
        pytest.raises(ServiceFault, match="in use"),
        gateways.launch([front.address], lost=lost.set) as running,
        socket.socket() as thief,
    ):
        (gateway,) = children(os.getpid(), "smg::") - others
        os.kill(gateway, signal.SIGKILL)
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        assert eventually(lambda: taken(thief, int(running.url.rpartition(":")[2])))
        monkeypatch.undo()
        assert lost.wait(RESTART_S)


def test_a_free_port_that_somebody_takes_meanwhile_is_given_up_for_another(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as thief:
        assert taken(thief, 0)
        port = thief.getsockname()[1]
        search, found = gateways.free_port, iter([port])
        monkeypatch.setattr(gateways, "free_port", lambda *wanted: next(found, 0) or search(*wanted))
        with gateways.launch([front.address]) as running, client_of(running.url) as client:
            assert running.url != f"http://{gateways.HOST}:{port}"
            assert complete(client, 1).choices


def taken(thief: socket.socket, port: int) -> bool:
    """Whether the port, which a dead process may still hold, could be taken."""
    try:
        thief.bind((gateways.HOST, port))
    except OSError:
        return False
    thief.listen()
    return True


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--only", "full", "--address", "unix:x"], "--only is one process"),
        (["--tls-cert", "pyproject.toml", "--tls-key", "pyproject.toml"], "without TLS"),
        (["--gateway-port", "TAKEN"], "gateway port 127.0.0.1:TAKEN cannot be used"),
    ],
)
def test_serve_refuses_at_once_what_cannot_be(options: list[str], says: str) -> None:
    with socket.socket() as other:
        assert taken(other, 0)
        port = str(other.getsockname()[1])
        given = [option.replace("TAKEN", port) for option in options]
        done = subprocess.run(
            [BRAID, "serve", str(TINY), "--gateway", *given],
            capture_output=True,
            text=True,
            cwd=TINY.parents[1],
            timeout=60,
        )
    assert done.returncode == 2
    assert says.replace("TAKEN", port) in done.stderr


def test_a_gateway_that_cannot_be_is_refused(
    front: Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    with pytest.raises(ConfigInvalid, match="no tokenizer"):
        gateways.check_model(tmp_path)
    gateways.check_model(TINY)
    taken = int(url.rpartition(":")[2])
    with pytest.raises(RequestInvalid, match=f"{taken}.*in use"), gateways.launch([front.address], taken):
        pass
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigInvalid, match=r"smg.*braid-attention\[gateway\]"):
        gateways.check_installed()
