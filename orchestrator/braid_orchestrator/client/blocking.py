"""A client that blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
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


class Generation:
    """A request under way: iterate over it once; `completions` are there at the end.

    Leaving the iteration early gives the request up, as `cancel` does.
    """

    def __init__(self, call: Any, peer: str, completions: int) -> None:
        self._call = call
        self._peer = peer
        self._collected = Collector(completions)
        self._given_up = False

    def __iter__(self) -> Iterator[Chunk]:
        try:
            for message in self._call:
                chunk = self._collected.take(message)
                if chunk is not None:
                    yield chunk
        except grpc.RpcError as error:
            if self._given_up:
                raise RequestCancelled("the request was given up") from error
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


class Client:
    """Asks one cell.

    Args:
        address: `unix:PATH` or `HOST:PORT` of its orchestrator.
        ca: PEM of the authority behind a TLS address.
        timeout_s: longest wait for an answer to what takes no time.
    """

    def __init__(self, address: str, ca: Path | None = None, timeout_s: float = 10.0) -> None:
        self.address = address
        self._peer = f"the cell at {address}"
        self._timeout = timeout_s
        self._channel = rpc.channel(address, ca)
        self._stub = orchestrator_pb2_grpc.OrchestratorStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the cell; what is under way is given up."""
        self._channel.close()

    def generate(
        self,
        prompt: Prompt,
        max_tokens: int | None = 64,
        sampling: Sampling | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Continue a prompt; tokens come as they are made.

        Args:
            prompt: text, or token ids.
            max_tokens: most tokens to make; None: as many as a sequence has room for.
            sampling: how tokens are chosen; None: greedy.
            options: what `GenerateOptions` names.
        """
        request = generate_request(prompt, max_tokens, sampling, options)
        return Generation(
            self._stub.Generate(request, metadata=metadata_of(options)), self._peer, completions_of(options)
        )

    def complete(
        self,
        prompt: Prompt,
        max_tokens: int | None = 64,
        sampling: Sampling | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """Continue a prompt, wait for the end and give the first completion; arguments as in `generate`."""
        generation = self.generate(prompt, max_tokens, sampling, **options)
        for _ in generation:
            pass
        return generation.completion

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        chunk: int = 0,
        want_logits: bool = False,
        decode_tail: int = 0,
        timeout_s: float | None = None,
        mtp: bool = False,
    ) -> Scores:
        """Score given tokens, all sequences in packed steps.

        Args:
            sequences: token ids of each.
            chunk: most tokens of one sequence in a step; 0: as many as the cell takes.
            want_logits: fetch the logits too; the cell must be on this machine. Imports torch.
            decode_tail: feed so many last tokens of each one at a time.
            timeout_s: longest wait; None: as long as it takes.
            mtp: run the draft too and fetch its logits; needs `want_logits`.
        """
        request = score_request(sequences, chunk, want_logits, decode_tail, mtp)
        return scores_of(self._call(self._stub.Score, request, timeout_s), want_logits, mtp)

    def plan(self) -> pb.GetLayerPlanResponse:
        """The layer plan of each role."""
        response: pb.GetLayerPlanResponse = self._call(
            self._stub.GetLayerPlan, pb.GetLayerPlanRequest(), self._timeout
        )
        return response

    def status(self) -> pb.StatusResponse:
        """What the cell is doing, layer by layer."""
        response: pb.StatusResponse = self._call(self._stub.Status, pb.StatusRequest(), self._timeout)
        return response

    def drain(self, timeout_s: float) -> int:
        """Have the cell take nothing new and wait for what it has; gives what is left."""
        request = pb.DrainRequest(timeout_seconds=timeout_s)
        response: pb.DrainResponse = self._call(self._stub.Drain, request, timeout_s + self._timeout)
        return response.remaining

    def _call(self, method: Any, request: Message, timeout_s: float | None) -> Any:
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise typed(error, self._peer) from error
