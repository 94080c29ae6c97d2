"""Answers of `vllm.grpc.engine.VllmEngine`, from what requests tell of themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from braid_orchestrator.request import (
    Event,
    Failed,
    Finish,
    Finished,
    PromptLogprobs,
    Request,
    Token,
    merged,
)

_FINISH = {Finish.STOP: "stop", Finish.LENGTH: "length"}


@dataclass
class _Completion:
    """One of the completions of a prompt: what it told and was not answered yet."""

    request: Request
    tokens: list[Token] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None
    finished: Finished | None = None

    def take(self, event: Event) -> None:
        """Keep what an event says."""
        if isinstance(event, PromptLogprobs):
            self.prompt_logprobs = event
        elif isinstance(event, Token):
            self.tokens.append(event)
        elif isinstance(event, Finished):
            self.finished = event

    def chunk(self) -> pb.GenerateResponse:
        """The tokens that were made since."""
        tokens, self.tokens = self.tokens, []
        return pb.GenerateResponse(
            chunk=pb.GenerateStreamChunk(
                token_ids=[token.token_id for token in tokens],
                prompt_tokens=len(self.request.prompt),
                completion_tokens=len(tokens),
                cached_tokens=self.request.cached_tokens,
                output_logprobs=_output_logprobs(tokens),
                input_logprobs=self._input_logprobs(),
                index=self.request.index,
            )
        )

    def complete(self, finished: Finished) -> pb.GenerateResponse:
        """The end."""
        stop = finished.stop
        return pb.GenerateResponse(
            complete=pb.GenerateComplete(
                output_ids=[token.token_id for token in self.tokens],
                finish_reason=_FINISH[finished.reason],
                prompt_tokens=len(self.request.prompt),
                completion_tokens=self.request.made,
                cached_tokens=self.request.cached_tokens,
                output_logprobs=_output_logprobs(self.tokens),
                input_logprobs=self._input_logprobs(),
                index=self.request.index,
                matched_token_id=stop if isinstance(stop, int) else None,
                matched_stop_str=stop if isinstance(stop, str) else None,
            )
        )

    def _input_logprobs(self) -> pb.InputLogProbs | None:
        """Those of the prompt, whose first token has none; once."""
        told, self.prompt_logprobs = self.prompt_logprobs, None
        if told is None:
            return None
        values = [pb.InputTokenLogProb(value=logprob) for logprob, _ in told.entries]
        return pb.InputLogProbs(
            token_logprobs=[pb.InputTokenLogProb(), *values],
            token_ids=[int(token) for token in self.request.prompt],
            top_logprobs=[pb.TopLogProbs(), *(_top(top) for _, top in told.entries)],
        )


def responses_of(requests: Sequence[Request], stream: bool) -> Iterator[pb.GenerateResponse]:
    """What becomes of requests that `fan_out` made and the engine has.

    Args:
        stream: send each token as it is made, and an end without tokens for each completion;
            otherwise one message for each completion, in their order, when all have ended.

    Raises:
        BraidError: what ended one of them.
    """
    completions = {request.index: _Completion(request) for request in requests}
    for index, event in merged(requests):
        if isinstance(event, Failed):
            raise event.error
        completion = completions[index]
        completion.take(event)
        if stream and isinstance(event, Token):
            yield completion.chunk()
        elif stream and isinstance(event, Finished):
            yield completion.complete(event)
    if not stream:
        for completion in completions.values():
            if completion.finished is not None:
                yield completion.complete(completion.finished)


def _output_logprobs(tokens: Sequence[Token]) -> pb.OutputLogProbs | None:
    """Of tokens; None where they were not asked for."""
    told = [(token, token.logprob) for token in tokens if token.logprob is not None]
    if not told:
        return None
    return pb.OutputLogProbs(
        token_logprobs=[logprob for _, logprob in told],
        token_ids=[token.token_id for token, _ in told],
        top_logprobs=[_top(token.top) for token, _ in told],
    )


def _top(alternatives: Iterable[tuple[int, float]]) -> pb.TopLogProbs:
    pairs = list(alternatives)
    return pb.TopLogProbs(values=[logprob for _, logprob in pairs], token_ids=[token for token, _ in pairs])
