"""A client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
import grpc.aio
from braid.v1 import orchestrator_pb2 as pb
from braid.v1 import orchestrator_pb2_grpc
from braid_wire import rpc
from braid_wire.errors import RequestCancelled
from google.protobuf.message import Message

from braid_orchestrator.client.messages import (
    Chunk,
    Collector,
    Completion,
    GenerateOptions,
    Prompt,
    Scores,
    completions_of,
    generate_request,
    metadata_of,
    score_request,
    scores_of,
    typed,
)
from braid_orchestrator.sampling import Sampling


class AsyncGeneration:
    """A request under way: iterate over it once; `completions` are there at the end.

    Leaving the iteration early gives the request up, and so does cancelling the task that iterates.
    `async with` gives it up where the block ends, at the latest.
    """

    def __init__(self, call: Any, peer: str, completions: int) -> None:
        self._call = call
        self._peer = peer
        self._collected = Collector(completions)
        self._given_up = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        try:
            async for message in self._call:
                chunk = self._collected.take(message)
                if chunk is not None:
                    yield chunk
        except asyncio.CancelledError as error:
            # The call says so both where the task is cancelled and where the call alone is.
            task = asyncio.current_task()
            if self._given_up and (task is None or not task.cancelling()):
                raise RequestCancelled("the request was given up") from error
            raise
        except grpc.RpcError as error:
            raise typed(error, self._peer) from error
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Give the request up; one that has ended stays as it is."""
        self._given_up = True
        self._call.cancel()

    @property
    def completions(self) -> tuple[Completion, ...]:
        """What it made, by index.

        Raises:
            RequestInvalid: it has not ended.
        """
        return self._collected.completions()

    @property
    def completion(self) -> Completion:
        """The first of `completions`; raises as they do."""
        return self.completions[0]


class AsyncClient:
    """Asks one cell, from the event loop that it was made in.

    Args:
        address: `unix:PATH` or `HOST:PORT` of its orchestrator.
        ca: PEM of the authority behind a TLS address.
        timeout_s: longest wait for an answer to what takes no time.
    """

    def __init__(self, address: str, ca: Path | None = None, timeout_s: float = 10.0) -> None:
        self.address = address
        self._peer = f"the cell at {address}"
        self._timeout = timeout_s
        self._channel = _channel(address, ca)
        self._stub = orchestrator_pb2_grpc.OrchestratorStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of the cell; what is under way is given up."""
        await self._channel.close()

    def generate(
        self,
        prompt: Prompt,
        max_tokens: int | None = 64,
        sampling: Sampling | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGeneration:
        """Continue a prompt; tokens come as they are made.

        Args:
            prompt: text, or token ids.
            max_tokens: most tokens to make; None: as many as a sequence has room for.
            sampling: how tokens are chosen; None: greedy.
            options: what `GenerateOptions` names.
        """
        request = generate_request(prompt, max_tokens, sampling, options)
        return AsyncGeneration(
            self._stub.Generate(request, metadata=metadata_of(options)), self._peer, completions_of(options)
        )

    async def complete(
        self,
        prompt: Prompt,
        max_tokens: int | None = 64,
        sampling: Sampling | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """Continue a prompt, wait for the end and give the first completion; arguments as in `generate`."""
        generation = self.generate(prompt, max_tokens, sampling, **options)
        async for _ in generation:
            pass
        return generation.completion

    async def score(
        self,
        sequences: Sequence[Sequence[int]],
        chunk: int = 0,
        want_logits: bool = False,
        decode_tail: int = 0,
        timeout_s: float | None = None,
        mtp: bool = False,
    ) -> Scores:
        """Score given tokens; arguments are those of `Client.score`."""
        request = score_request(sequences, chunk, want_logits, decode_tail, mtp)
        return scores_of(await self._call(self._stub.Score, request, timeout_s), want_logits, mtp)

    async def plan(self) -> pb.GetLayerPlanResponse:
        """The layer plan of each role."""
        response: pb.GetLayerPlanResponse = await self._call(
            self._stub.GetLayerPlan, pb.GetLayerPlanRequest(), self._timeout
        )
        return response

    async def status(self) -> pb.StatusResponse:
        """What the cell is doing, layer by layer."""
        response: pb.StatusResponse = await self._call(self._stub.Status, pb.StatusRequest(), self._timeout)
        return response

    async def drain(self, timeout_s: float) -> int:
        """Have the cell take nothing new and wait for what it has; gives what is left."""
        request = pb.DrainRequest(timeout_seconds=timeout_s)
        response: pb.DrainResponse = await self._call(self._stub.Drain, request, timeout_s + self._timeout)
        return response.remaining

    async def _call(self, method: Any, request: Message, timeout_s: float | None) -> Any:
        try:
            return await method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise typed(error, self._peer) from error


def _channel(address: str, ca: Path | None) -> grpc.aio.Channel:
    options = list(rpc.OPTIONS)
    if ca is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca.read_bytes()), options=options)
