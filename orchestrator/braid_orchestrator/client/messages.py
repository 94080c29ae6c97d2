"""What clients ask and are told, to and from the messages of the contract."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

import grpc
from braid.v1 import orchestrator_pb2 as pb
from braid_wire.errors import (
    BraidError,
    RequestInvalid,
    ServiceFault,
    ServiceLost,
    StepTimeout,
    from_rpc_error,
)

from braid_orchestrator.sampling import Sampling

if TYPE_CHECKING:
    import torch

_FINISH = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}

Prompt = str | Sequence[int]
"""Text, or token ids."""


class GenerateOptions(TypedDict, total=False):
    """What a generation may be asked beside its prompt, length and sampling."""

    stop_token_ids: Sequence[int]
    """Stop at these, too; they are no part of the output."""
    stop_strings: Sequence[str]
    """Stop where one of these stands in the text, which ends before it."""
    include_stop_str_in_output: bool
    """The text ends behind it."""
    ignore_eos: bool
    """Go on behind the model's own end tokens."""
    n: int
    """Completions to make; i draws with the seed (seed + i) mod 2⁶⁴."""
    deadline_s: float
    """Longest time to take, seconds, waiting included."""
    request_id: str
    """Unique among live requests; otherwise the cell makes one."""
    traceparent: str
    """W3C trace context of the caller: the cell's spans of the request become a part of its trace."""
    tracestate: str
    """Of the same, where there is one."""


@dataclass(frozen=True)
class TokenLogprob:
    """The probability of a token in its place, and of others there."""

    token_id: int
    logprob: float
    """Natural log, of the model's own distribution."""
    top: tuple[tuple[int, float], ...] = ()
    """Token id and log-probability of the likeliest there, the likeliest first."""


@dataclass(frozen=True)
class Chunk:
    """Tokens that were just made, and the text that they complete."""

    token_ids: tuple[int, ...]
    text: str
    index: int = 0
    """Of the completion that they belong to."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of each token, where they were asked for."""


@dataclass(frozen=True)
class Completion:
    """All that a request made."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    """"stop" or "length"."""
    prompt_tokens: int
    completion_tokens: int
    index: int = 0
    stop: int | str | None = None
    """The token or the string that it stopped at."""
    cached_tokens: int = 0
    """Tokens of the prompt that the cell had not to compute again."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of each token, where they were asked for."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of each token of the prompt after the first, where they were asked for; of completion 0 only."""


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


class Collector:
    """Puts completions together from what comes of them.

    Args:
        completions: how many there will be.
    """

    def __init__(self, completions: int) -> None:
        self._chunks: list[list[Chunk]] = [[] for _ in range(completions)]
        self._prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self._done: dict[int, Completion] = {}

    def take(self, message: pb.GenerateResponse) -> Chunk | None:
        """What a message brings of the output, where it brings any.

        Raises:
            ServiceFault: the message makes no sense to this client.
        """
        if message.index >= len(self._chunks):
            raise ServiceFault(f"the cell told of completion {message.index} of {len(self._chunks)}")
        self._prompt_logprobs += _logprobs(message.prompt_logprobs)
        chunk = Chunk(tuple(message.token_ids), message.text, message.index, _logprobs(message.logprobs))
        told = bool(chunk.token_ids or chunk.text)
        if told:
            self._chunks[chunk.index].append(chunk)
        if message.finish_reason:
            self._done[message.index] = self._complete(message)
        return chunk if told else None

    def completions(self) -> tuple[Completion, ...]:
        """All of them.

        Raises:
            RequestInvalid: not all have ended.
        """
        if len(self._done) < len(self._chunks):
            raise RequestInvalid("the generation has not ended")
        return tuple(self._done[index] for index in range(len(self._chunks)))

    def _complete(self, last: pb.GenerateResponse) -> Completion:
        if last.finish_reason not in _FINISH:
            raise ServiceFault(f"the cell gives a finish reason that this client lacks: {last.finish_reason}")
        chunks = self._chunks[last.index]
        which = last.WhichOneof("stop")
        return Completion(
            token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
            text="".join(chunk.text for chunk in chunks),
            finish_reason=_FINISH[last.finish_reason],
            prompt_tokens=last.prompt_tokens,
            completion_tokens=last.completion_tokens,
            index=last.index,
            stop=None if which is None else getattr(last, which),
            cached_tokens=last.cached_tokens,
            logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs),
            prompt_logprobs=self._prompt_logprobs if last.index == 0 else (),
        )


def generate_request(
    prompt: Prompt, max_tokens: int | None, sampling: Sampling | None, options: GenerateOptions
) -> pb.GenerateRequest:
    """The message that asks for a generation.

    Raises:
        RequestInvalid: a value does not fit its field.
    """
    try:
        request = pb.GenerateRequest(
            request_id=options.get("request_id", ""),
            sampling=_sampling(sampling or Sampling()),
            max_tokens=max_tokens,
            stop_token_ids=options.get("stop_token_ids", ()),
            ignore_eos=options.get("ignore_eos", False),
            stop_strings=options.get("stop_strings", ()),
            include_stop_str_in_output=options.get("include_stop_str_in_output", False),
            n=completions_of(options),
            deadline_s=options.get("deadline_s"),
        )
    except ValueError as error:
        raise RequestInvalid(f"the request does not fit its message: {error}") from error
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.tokens.CopyFrom(token_ids(prompt))
    return request


def metadata_of(options: GenerateOptions) -> list[tuple[str, str]]:
    """The headers of the call."""
    named = {"traceparent": options.get("traceparent"), "tracestate": options.get("tracestate")}
    return [(name, value) for name, value in named.items() if value]


def completions_of(options: GenerateOptions) -> int:
    """How many completions are asked for.

    Raises:
        RequestInvalid: fewer than one.
    """
    completions = options.get("n", 1)
    if completions < 1:
        raise RequestInvalid(f"n is {completions}; it must be at least 1", field="n", value=completions)
    return completions


def score_request(
    sequences: Iterable[Sequence[int]], chunk: int, want_logits: bool, decode_tail: int, mtp: bool
) -> pb.ScoreRequest:
    """The message that asks for scores."""
    return pb.ScoreRequest(
        sequences=[token_ids(sequence) for sequence in sequences],
        chunk=chunk,
        want_logits=want_logits,
        decode_tail=decode_tail,
        mtp=mtp,
    )


def scores_of(response: pb.ScoreResponse, want_logits: bool, mtp: bool) -> Scores:
    """What a cell answered; takes over the memory that it put logits into."""
    logits, mtp_logits = _fetch_logits(response) if want_logits else ([], [])
    return Scores(
        logprobs=[list(score.token_logprobs) for score in response.scores],
        steps=response.steps,
        logits=logits,
        mtp_logits=mtp_logits if mtp else [],
    )


def token_ids(ids: Sequence[int]) -> pb.TokenIds:
    """The message of some tokens.

    Raises:
        RequestInvalid: one is no token id.
    """
    try:
        return pb.TokenIds(ids=ids)
    except ValueError as error:
        raise RequestInvalid(f"token ids are 0 … 2³²−1: {error}", field="ids") from error


def typed(error: grpc.RpcError, peer: str) -> BraidError:
    """The error of the table behind a call that failed."""
    found = from_rpc_error(error, peer)
    # A time-out of the transport's own: nobody answers there.
    if isinstance(found, StepTimeout) and found.metadata.get("peer") == peer:
        return ServiceLost(found.message, peer=peer)
    return found


def _sampling(wanted: Sampling) -> pb.SamplingParams:
    return pb.SamplingParams(
        temperature=wanted.temperature,
        top_k=wanted.top_k,
        top_p=wanted.top_p,
        min_p=wanted.min_p,
        seed=None if wanted.seed is None else wanted.seed % 2**64,
        repetition_penalty=wanted.repetition_penalty,
        presence_penalty=wanted.presence_penalty,
        frequency_penalty=wanted.frequency_penalty,
        logit_bias=wanted.logit_bias,
        min_tokens=wanted.min_tokens,
        logprobs=wanted.logprobs,
        prompt_logprobs=wanted.prompt_logprobs,
    )


def _logprobs(entries: Iterable[pb.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            entry.token.token_id,
            entry.token.logprob,
            tuple((other.token_id, other.logprob) for other in entry.top),
        )
        for entry in entries
    )


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
