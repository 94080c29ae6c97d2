"""A client of a running cell.

    with Client("unix:/run/user/1000/braid/1a2b3c4d/orchestrator.sock") as client:
        for chunk in client.generate("def add(", max_tokens=32):
            print(chunk.text, end="", flush=True)

Every method raises the typed errors of `braid_wire.errors`; a cell that cannot be reached is
`ServiceLost`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import grpc
from braid.v1 import orchestrator_pb2 as pb
from braid.v1 import orchestrator_pb2_grpc
from braid_wire import rpc
from braid_wire.errors import BraidError, RequestInvalid, ServiceLost, StepTimeout, from_rpc_error
from google.protobuf.message import Message

if TYPE_CHECKING:
    import torch

_FINISH = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}

Prompt = str | Sequence[int]
"""Text, or token ids."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the default is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def to_pb(self) -> pb.SamplingParams:
        """The message."""
        return pb.SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Chunk:
    """Tokens that were just made, and the text that they complete."""

    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Completion:
    """All that a request made."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    """"stop" or "length"."""
    prompt_tokens: int
    completion_tokens: int


class Generation:
    """A request under way: iterate over it once; `completion` is there at the end."""

    def __init__(self, call: Any, peer: str) -> None:
        self._call = call
        self._peer = peer
        self._chunks: list[Chunk] = []
        self._completion: Completion | None = None

    def __iter__(self) -> Iterator[Chunk]:
        try:
            for message in self._call:
                chunk = Chunk(tuple(message.token_ids), message.text)
                if chunk.token_ids or chunk.text:
                    self._chunks.append(chunk)
                    yield chunk
                if message.finish_reason:
                    self._completion = self._complete(message)
        except grpc.RpcError as error:
            raise _typed(error, self._peer) from error
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Give the request up; one that has ended stays as it is."""
        self._call.cancel()

    @property
    def completion(self) -> Completion:
        """What it made.

        Raises:
            RequestInvalid: it has not ended.
        """
        if self._completion is None:
            raise RequestInvalid("the generation has not ended")
        return self._completion

    def _complete(self, last: pb.GenerateResponse) -> Completion:
        return Completion(
            token_ids=tuple(token for chunk in self._chunks for token in chunk.token_ids),
            text="".join(chunk.text for chunk in self._chunks),
            finish_reason=_FINISH[last.finish_reason],
            prompt_tokens=last.prompt_tokens,
            completion_tokens=last.completion_tokens,
        )


@dataclass(frozen=True)
class Scores:
    """Scores of some sequences, in their order."""

    logprobs: list[list[float]]
    """[L−1] of each: natural-log probability of token t+1 after tokens 0 … t."""
    steps: int
    logits: list[torch.Tensor] = field(default_factory=list)
    """float32 [L, V] of each, where they were asked for."""
    mtp_logits: list[torch.Tensor | None] = field(default_factory=list)
    """float32 [L−1, V] of each, where the draft's were asked for; None where L is 1."""


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
        max_tokens: int = 64,
        sampling: Sampling | None = None,
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        request_id: str = "",
    ) -> Generation:
        """Continue a prompt; tokens come as they are made."""
        request = pb.GenerateRequest(
            request_id=request_id,
            sampling=(sampling or Sampling()).to_pb(),
            max_tokens=max_tokens,
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
        )
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.tokens.CopyFrom(_token_ids(prompt))
        return Generation(self._stub.Generate(request), self._peer)

    def complete(self, prompt: Prompt, max_tokens: int = 64, sampling: Sampling | None = None) -> Completion:
        """Continue a prompt and wait for the end."""
        generation = self.generate(prompt, max_tokens, sampling)
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
        request = pb.ScoreRequest(
            sequences=[_token_ids(sequence) for sequence in sequences],
            chunk=chunk,
            want_logits=want_logits,
            decode_tail=decode_tail,
            mtp=mtp,
        )
        response: pb.ScoreResponse = self._call(self._stub.Score, request, timeout_s)
        logits, mtp_logits = _fetch_logits(response) if want_logits else ([], [])
        return Scores(
            logprobs=[list(score.token_logprobs) for score in response.scores],
            steps=response.steps,
            logits=logits,
            mtp_logits=mtp_logits if mtp else [],
        )

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
            raise _typed(error, self._peer) from error


def _typed(error: grpc.RpcError, peer: str) -> BraidError:
    found = from_rpc_error(error, peer)
    # A time-out of the transport's own: nobody answers there.
    if isinstance(found, StepTimeout) and found.metadata.get("peer") == peer:
        return ServiceLost(found.message, peer=peer)
    return found


def _token_ids(ids: Sequence[int]) -> pb.TokenIds:
    try:
        return pb.TokenIds(ids=ids)
    except ValueError as error:
        raise RequestInvalid(f"token ids are 0 … 2³²−1: {error}", field="ids") from error


def _fetch_logits(response: pb.ScoreResponse) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Take over the memory that the cell put logits into: the target's, and the draft's."""
    from braid_wire.views import ArenaMap

    arenas = ArenaMap()
    arenas.map(response.logits_arena)
    logits = [arenas.resolve(score.logits, "logits") for score in response.scores]
    mtp_logits = [
        arenas.resolve(score.mtp_logits, "mtp_logits") if score.HasField("mtp_logits") else None
        for score in response.scores
    ]
    arenas.close()  # the tensors keep the memory
    return logits, mtp_logits
