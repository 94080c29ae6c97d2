"""Requests: what a caller asked for, how far it has come, and how it hears of it."""

from __future__ import annotations

import itertools
import math
import queue
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property

import numpy as np
import torch
from braid_wire.batch import IntArray
from braid_wire.errors import BraidError, RequestInvalid, ServiceFault, StepTimeout
from braid_wire.layers import Mode, Role

from braid_orchestrator.guesses import Guess, Run, Trial, judge
from braid_orchestrator.memory import SequenceMemory, Span
from braid_orchestrator.sampler import Alternatives, Choice, Sampler, Turn, logprobs
from braid_orchestrator.sampling import Sampling
from braid_orchestrator.text import StopStrings, TextStream, Tokenizer

MOST_COMPLETIONS = 128
"""Most completions of one prompt in a call."""
MOST_STOP_STRINGS = 64
LONGEST_STOP_STRING = 1024
"""Characters; text that may become the string is held back for so long."""

_sequence_ids = itertools.count(1)


class Finish(Enum):
    """Why a request ended well."""

    STOP = "stop"
    LENGTH = "length"
    SCORED = "scored"


@dataclass(frozen=True)
class PromptLogprobs:
    """The prompt was read: `logprob` and `top` of each of its tokens after the first.

    It comes before the first `Token`, where it was asked for.
    """

    entries: tuple[tuple[float, Alternatives], ...]


@dataclass(frozen=True)
class Token:
    """A token was made."""

    token_id: int
    text: str = ""
    """What it adds to the text, where the request has a tokenizer. Bytes that are not yet a character
    wait, and so does what may become a stop string."""
    logprob: float | None = None
    """Its natural-log probability in the model's own distribution, where it was asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """Token ids and log-probabilities of the likeliest tokens at its place, where they were asked for."""


@dataclass(frozen=True)
class Scored:
    """Every token was fed; float32 [L, V]: the logits after each."""

    logits: torch.Tensor
    mtp_logits: torch.Tensor | None = None
    """float32 [L−1, V]: the draft's logits of the token after next, where they were asked for."""


@dataclass(frozen=True)
class Finished:
    """The request ended well."""

    reason: Finish
    stop: int | str | None = None
    """STOP: the token or the string that ended it."""
    text: str = ""
    """What of the text was held back until now."""


@dataclass(frozen=True)
class Failed:
    """The request ended with an error."""

    error: BraidError


Event = PromptLogprobs | Token | Scored | Finished | Failed


@dataclass
class Request:
    """One sequence under way.

    Args:
        request_id: unique among live requests.
        prompt: token ids, at least one.
        sampling: how tokens are chosen.
        max_tokens: most tokens to make; None: as many as the context has room for; 0: score the
            prompt instead.
        stop_ids: tokens that end the request and are not given out.
        stop_strings: texts that end the request where they first stand in what is made, from token
            `sampling.min_tokens` on; they need a tokenizer.
        include_stop_str_in_output: a stop string that ends the request is given out too.
        end_ids: the model's own end tokens, which count as stop tokens.
        ignore_eos: they do not.
        deadline_s: the request fails with `StepTimeout` where it has not ended so long after its
            arrival, seconds; None: never.
        tokenizer: makes the text of tokens; None: there is no text.
        chunk: most prompt tokens of one step; 0: as many as the budget allows.
        decode_tail: last prompt tokens that are fed one at a time, as if they had been made.
        mtp: run the draft over the prompt too, and score with it; only where nothing is made.
        mrope_positions: int64 [3, L], a time, a height and a width position for each prompt token;
            what is made counts on from the largest in all three. For models that take them.
        cache_salt: what it computes is used again by requests with the same salt alone.
        trace: W3C trace context of the call, by header.
        index: which of several completions of one prompt.
        events: where its events go, each with the index.

    Raises:
        RequestInvalid: a value breaks its rule.
    """

    request_id: str
    prompt: IntArray
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = 0
    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    end_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    deadline_s: float | None = None
    tokenizer: Tokenizer | None = None
    chunk: int = 0
    decode_tail: int = 0
    mtp: bool = False
    mrope_positions: IntArray | None = None
    cache_salt: str = ""
    trace: Mapping[str, str] = field(default_factory=dict)
    index: int = 0
    events: queue.SimpleQueue[tuple[int, Event]] = field(default_factory=queue.SimpleQueue, repr=False)

    def __post_init__(self) -> None:
        self._check()
        self.tokens: list[int] = [int(token) for token in self.prompt]
        sequence_id = next(_sequence_ids)
        roles = (Role.TARGET, Role.DRAFT) if self.mtp else (Role.TARGET,)
        self.memories = {role: SequenceMemory(sequence_id) for role in roles}
        # What a draft expects to be made next; the next step verifies it.
        self.guesses: Sequence[Guess] = ()
        self.cancelled = False
        self.cached_tokens = 0
        self._refed = 0
        self.arrived = time.monotonic()
        self.began: float | None = None
        self.ended: float | None = None
        self.served_s = 0.0
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.stops = self.stop_ids if self.ignore_eos else self.stop_ids | self.end_ids
        self.sampler = Sampler(self.sampling, self.prompt, self.stops)
        self._stop_strings = StopStrings(self.stop_strings, self.include_stop_str_in_output)
        self._prompt_logprobs: list[tuple[float, Alternatives]] | None = (
            None if self.sampling.prompt_logprobs is None else []
        )
        self._scored: list[torch.Tensor] = []
        self._drafted: list[torch.Tensor] = []

    @property
    def memory(self) -> SequenceMemory:
        """What the sequence holds in the target role."""
        return self.memories[Role.TARGET]

    @property
    def scores(self) -> bool:
        """Whether the prompt is scored and nothing is made."""
        return self.max_tokens == 0

    @property
    def total_tokens(self) -> int:
        """Tokens that the sequence can reach; before `settle`, at least so many."""
        return len(self.prompt) + (1 if self.max_tokens is None else self.max_tokens)

    @property
    def made(self) -> int:
        """Tokens made so far."""
        return len(self.tokens) - len(self.prompt)

    @property
    def decoding(self) -> bool:
        """Whether the next span is one token that follows on what was fed."""
        fed = self.memory.length
        return fed > 0 and fed >= self._prompt_end

    @property
    def slowdown(self) -> float | None:
        """How many times as long as the steps that it took part in it was here; None before its end."""
        if self.ended is None or self.served_s == 0:
            return None
        return max((self.ended - self.arrived) / self.served_s, 1.0)

    @property
    def wanted(self) -> int:
        """Most tokens that the next span can have, where it is not decoding."""
        left = max(self._prompt_end - self.memory.length, 1)
        return min(left, self.chunk or left)

    @property
    def cache_namespace(self) -> str | None:
        """Which requests can share what it computes; None: none can."""
        # Positions that tokens do not tell, and what a draft made of hidden states, are its own.
        own = self.mrope_positions is not None or Role.DRAFT in self.memories
        return None if own else self.cache_salt

    @property
    def reads_whole_prompt(self) -> bool:
        """Whether logits of the prompt's own tokens are still wanted, so that none may be left out."""
        return self.scores or self._prompt_logprobs is not None

    def expired(self, now: float) -> StepTimeout | None:
        """The error that it ends with, where its time is over at `now` (of `time.monotonic`)."""
        if self.deadline_s is None or now - self.arrived < self.deadline_s:
            return None
        return StepTimeout(
            f"request {self.request_id} has not ended within its {self.deadline_s:g} s; "
            f"it made {self.made} tokens",
            field="deadline_s",
            value=self.deadline_s,
        )

    def settle(self, vocab_size: int, max_context: int) -> None:
        """Hold it against a model and a cell: check token ids, and settle a `max_tokens` left open.

        Raises:
            RequestInvalid: a token id is not in the vocabulary, or no token is left that can be made.
        """
        low, high = int(self.prompt.min()), int(self.prompt.max())
        if low < 0 or high >= vocab_size:
            raise RequestInvalid(
                f"the prompt has token id {high if low >= 0 else low}; ids are 0 … {vocab_size - 1}",
                field="prompt",
            )
        self.sampling.check_vocabulary(vocab_size)
        if self.sampling.min_tokens and len([stop for stop in self.stops if stop < vocab_size]) == vocab_size:
            raise RequestInvalid(
                "every token is a stop token, so min_tokens leaves none to make",
                field="min_tokens",
                value=self.sampling.min_tokens,
            )
        if self.max_tokens is None:
            # At least one, so that a prompt without room behind it is refused as too long.
            self.max_tokens = max(max_context - len(self.prompt), 1)
            self._check_min_tokens(self.max_tokens)

    @property
    def rest(self) -> int:
        """Tokens that it may still make; before `settle`, it is not known where it was left open."""
        return (self.max_tokens or 0) - self.made

    def next_span(self, budget: int) -> Span:
        """What to feed in a step that has room for `budget` (at least 1) tokens; guesses are verified."""
        fed = self.memory.length
        if self.decoding:
            # Guesses follow the last token: they are of use where that is the one to feed.
            last = fed == len(self.tokens) - 1
            guesses = self.guesses[: budget - 1] if last else ()
            tokens = [self.tokens[fed], *(guess.token_id for guess in guesses)]
            return self.span(self.memory, fed, tokens, Mode.VERIFY if len(tokens) > 1 else Mode.DECODE)
        end = fed + min(self.wanted, budget)
        return self.span(self.memory, fed, self.tokens[fed:end], Mode.EXTEND)

    def restarted(self) -> None:
        """Note that all it held is gone: what it made so far is fed again, behind the prompt and like it."""
        self._refed = len(self.tokens) if self.made else 0
        self._scored.clear()
        self._drafted.clear()

    def draft_span(self, fed: Span) -> Span | None:
        """What the draft is fed after the step that committed `fed`, for a prompt that it scores too.

        None where there is nothing to feed.
        """
        memory = self.memories.get(Role.DRAFT)
        if memory is None:
            return None
        begin, end = memory.length, min(self.memory.length, len(self.tokens) - 1)
        if begin >= end:
            return None
        return self.span(memory, begin, self.tokens[begin + 1 : end + 1], fed.mode)

    def span(self, memory: SequenceMemory, begin: int, tokens: Sequence[int], mode: Mode) -> Span:
        """Tokens for one of its memories, at positions from `begin` on.

        A draft's row t takes the hidden state of token t, at its position, and token t + 1.
        """
        return Span(memory, np.array(tokens, dtype=np.int64), mode, self._mrope(begin, len(tokens)))

    def rows_wanted(self, span: Span) -> int:
        """How many of a span's last tokens need logits: all, one or none."""
        if self.scores or span.mode is Mode.VERIFY:
            return len(span.tokens)
        if self._prompt_logprobs is not None:
            end = self.memory.length + len(span.tokens)
            return max(end - max(self.memory.length, len(self._prompt_logprobs)), 0)
        return 1 if self.memory.length + len(span.tokens) == len(self.tokens) else 0

    def trial(self, span: Span) -> Trial:
        """What chooses the tokens behind the last rows of a span that is not committed yet.

        One turn where it feeds all there is, and one more behind every guess that it verifies; else none.
        """
        if self.scores or self.memory.length + len(span.tokens) < len(self.tokens):
            return Trial(())
        made = self.tokens[len(self.prompt) :]
        guesses = self.guesses[: len(span.tokens) - 1] if span.mode is Mode.VERIFY else ()
        turns = [Turn(self.sampler, made)]
        for guess in guesses:
            turns.append(Turn(self.sampler, [*turns[-1].tokens, guess.token_id]))
        return Trial(turns, guesses)

    def until_end(self, run: Run) -> Run:
        """A run up to the first token that ends the request, where there is one."""
        for place, choice in enumerate(run):
            if isinstance(choice, Choice) and choice.token_id in self.stops:
                return run[: place + 1]
        return run

    def advance(self, logits: torch.Tensor, choice: Choice | ServiceFault | None) -> Finished | Failed | None:
        """Take what a committed step gave, tell the caller, and say whether and how it ends.

        Args:
            logits: float32 [n, V], n as `rows_wanted` said before the step.
            choice: what was chosen, of several one after the other; None where nothing was.
        """
        if self.scores:
            return self._take_scores(logits)
        if self._prompt_logprobs is not None:
            self._take_prompt_logprobs(self._prompt_logprobs, logits)
        if isinstance(choice, ServiceFault):
            return Failed(choice)
        return None if choice is None else self._take_token(choice)

    def take_draft(self, logits: torch.Tensor) -> None:
        """Keep the draft's logits [n, V] of the rows that `draft_span` named."""
        self._drafted.append(logits)

    def tell(self, event: Event) -> None:
        """Let the caller hear of something."""
        self.events.put((self.index, event))

    def stream(self) -> Iterator[Event]:
        """Events as they come; the last one is `Finished` or `Failed`."""
        for _, event in merged([self]):
            yield event

    @property
    def _prompt_end(self) -> int:
        """Tokens that are fed in prompt spans."""
        return max(len(self.prompt) - self.decode_tail, self._refed)

    @cached_property
    def _text(self) -> TextStream | None:
        # Made with the first token, when the prompt's ids have been checked.
        return None if self.tokenizer is None else self.tokenizer.stream(self.tokens[: len(self.prompt)])

    def _take_scores(self, logits: torch.Tensor) -> Finished | None:
        self._scored.append(logits)
        if self.memory.length < len(self.tokens):
            return None
        drafted = torch.cat(self._drafted) if self._drafted else None
        self.tell(Scored(torch.cat(self._scored), drafted))
        return Finished(Finish.SCORED)

    def _take_prompt_logprobs(self, found: list[tuple[float, Alternatives]], logits: torch.Tensor) -> None:
        """Add those of the prompt tokens that follow on the rows; tell them when they are complete."""
        end = min(self.memory.length, len(self.prompt) - 1)
        following = torch.from_numpy(self.prompt[len(found) + 1 : end + 1]).to(logits.device)
        if len(following):
            found += logprobs(logits[: len(following)], following, self.sampling.prompt_logprobs or 0)
        if len(found) == len(self.prompt) - 1:
            self.tell(PromptLogprobs(tuple(found)))
            self._prompt_logprobs = None

    def _take_token(self, choice: Choice) -> Finished | None:
        token = choice.token_id
        if token in self.stops:
            return Finished(Finish.STOP, token, self._stop_strings.rest())
        decoder = self._text
        text = decoder.push(token) if decoder is not None else ""
        self.tokens.append(token)
        self.guesses = ()
        text, stop = self._stop_strings.push(text, armed=self.made >= self.sampling.min_tokens)
        self.tell(Token(token, text, choice.logprob, choice.top))
        if stop is not None:
            return Finished(Finish.STOP, stop)
        if self.made == self.max_tokens:
            return Finished(Finish.LENGTH, text=self._stop_strings.rest())
        return None

    def _mrope(self, start: int, count: int) -> IntArray | None:
        """int64 [3, count]: the positions of tokens from `start` on; None for plain ones."""
        grid = self.mrope_positions
        if grid is None:
            return None
        length = grid.shape[1]
        made = grid.max() + 1 + np.arange(max(start + count - length, 0))
        return np.concatenate([grid, np.broadcast_to(made, (3, len(made)))], axis=1)[:, start : start + count]

    def _check(self) -> None:
        if len(self.prompt) < 1:
            raise RequestInvalid("the prompt is empty; it must have at least one token", field="prompt")
        for name in ("max_tokens", "chunk", "decode_tail"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise RequestInvalid(f"{name} is {value}; it must not be negative", field=name, value=value)
        if self.mtp and not self.scores:
            raise RequestInvalid("mtp scores a prompt; max_tokens must be 0", field="mtp")
        if self.scores and self.sampling.prompt_logprobs is not None:
            raise RequestInvalid(
                "prompt_logprobs is set, but max_tokens is 0: every logit of the prompt is told anyway",
                field="prompt_logprobs",
            )
        if self.max_tokens is not None:
            self._check_min_tokens(self.max_tokens)
        if self.deadline_s is not None and not 0 < self.deadline_s < math.inf:
            raise RequestInvalid(
                f"deadline_s is {self.deadline_s}; it must be finite and above 0",
                field="deadline_s",
                value=self.deadline_s,
            )
        self._check_stop_strings()
        self._check_mrope()

    def _check_min_tokens(self, most: int) -> None:
        if self.sampling.min_tokens > most:
            raise RequestInvalid(
                f"min_tokens is {self.sampling.min_tokens}; it must be at most max_tokens, which is {most}",
                field="min_tokens",
                value=self.sampling.min_tokens,
            )

    def _check_stop_strings(self) -> None:
        if len(self.stop_strings) > MOST_STOP_STRINGS:
            raise RequestInvalid(
                f"there are {len(self.stop_strings)} stop strings; at most {MOST_STOP_STRINGS} can be",
                field="stop_strings",
            )
        for string in self.stop_strings:
            if not 1 <= len(string) <= LONGEST_STOP_STRING:
                raise RequestInvalid(
                    f"a stop string has {len(string)} characters; it must have 1 … {LONGEST_STOP_STRING}",
                    field="stop_strings",
                )
        if self.stop_strings and self.tokenizer is None:
            raise RequestInvalid(
                "stop_strings are set, but the model has no tokenizer to make text with; use stop tokens",
                field="stop_strings",
            )

    def _check_mrope(self) -> None:
        grid = self.mrope_positions
        if grid is None:
            return
        expected = (3, len(self.prompt))
        if grid.shape != expected or grid.dtype != np.int64 or (grid < 0).any():
            raise RequestInvalid(
                f"mrope_positions is {grid.dtype} {list(grid.shape)}; "
                f"it must be int64 {list(expected)} and not negative",
                field="mrope_positions",
            )


def fan_out(request: Request, completions: int) -> list[Request]:
    """Several completions of one prompt, with one stream of events, to be read with `merged`.

    Completion i has the index i, the id "ID-i" and the seed (seed + i) mod 2⁶⁴, so that it makes what
    a single request with that seed would make; without a seed each draws on its own. Only the first
    tells the prompt's log-probabilities.

    Args:
        request: not submitted; where there is one completion, it is that.
        completions: how many, 1 … `MOST_COMPLETIONS`.

    Raises:
        RequestInvalid: there are too few or too many.
    """
    if not 1 <= completions <= MOST_COMPLETIONS:
        raise RequestInvalid(
            f"n is {completions}; it must be in [1, {MOST_COMPLETIONS}]", field="n", value=completions
        )
    if completions == 1:
        return [request]
    wanted = request.sampling
    return [
        replace(
            request,
            request_id=f"{request.request_id}-{index}",
            sampling=replace(
                wanted,
                seed=None if wanted.seed is None else (wanted.seed + index) % 2**64,
                prompt_logprobs=wanted.prompt_logprobs if index == 0 else None,
            ),
            index=index,
        )
        for index in range(completions)
    ]


def merged(requests: Sequence[Request]) -> Iterator[tuple[int, Event]]:
    """Index and event, as they come, of requests that `fan_out` made; each ends as `stream` says."""
    left = len(requests)
    while left:
        index, event = requests[0].events.get()
        yield index, event
        left -= isinstance(event, Finished | Failed)


def choose_next(
    requests: Sequence[Request], spans: Sequence[Span], rows: Sequence[torch.Tensor]
) -> list[Run]:
    """What each request makes next, all in one batch; nothing for those that make nothing yet.

    Args:
        requests: that take part in a step.
        spans: what each fed; not committed yet.
        rows: float32 [n, V] of each, n as `rows_wanted` said before the step.
    """
    trials = [request.trial(span) for request, span in zip(requests, spans, strict=True)]
    wanted = [piece[-len(trial.turns) :] for piece, trial in zip(rows, trials, strict=True) if trial.turns]
    if not wanted:
        return [()] * len(requests)
    runs = iter(judge([trial for trial in trials if trial.turns], torch.cat(wanted)))
    return [
        request.until_end(next(runs)) if trial.turns else ()
        for request, trial in zip(requests, trials, strict=True)
    ]
