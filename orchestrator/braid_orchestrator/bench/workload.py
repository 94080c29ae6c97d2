"""What a load asks: synthetic conversations, or those of a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from braid_wire.errors import RequestInvalid

_HUMAN = ("human", "user")


@dataclass(frozen=True)
class Turn:
    """One request of a conversation: what is added to all before it, and how much is wanted."""

    prompt: str | tuple[int, ...]
    max_tokens: int


Conversation = tuple[Turn, ...]


@dataclass(frozen=True)
class Lengths:
    """Integers from `low` to `high`, evenly spread on a logarithmic scale: many short, some long.

    Raises:
        RequestInvalid: the bounds are no such range.
    """

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise RequestInvalid(
                f"lengths {self.low}:{self.high}; they must be 1 <= LOW <= HIGH",
                field="lengths",
                value=self.low,
            )

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """ "N" or "LOW:HIGH"; RequestInvalid for anything else."""
        low, _, high = text.partition(":")
        if not low.isdigit() or not (high or low).isdigit():
            raise RequestInvalid(f"{text!r} is no length; write N or LOW:HIGH", field="lengths", value=text)
        return cls(int(low), int(high or low))

    def draw(self, random: np.random.Generator) -> int:
        """One of them."""
        return int(np.exp(random.uniform(np.log(self.low), np.log(self.high + 1))))


@dataclass(frozen=True)
class Synthetic:
    """Token ids that mean nothing.

    Args:
        vocabulary: ids are 8 … vocabulary − 1.
        inputs: tokens of a conversation's first prompt, and of what each later turn adds.
        outputs: tokens that each turn makes.
        prefix_share: part of the conversations whose first prompt begins with the same tokens.
        prefix_tokens: how many those are.
        turns: of each conversation.
        seed: the same seed asks the same.

    Raises:
        RequestInvalid: `prefix_share` is no part, or there is no turn.
    """

    vocabulary: int
    inputs: Lengths
    outputs: Lengths
    prefix_share: float = 0.0
    prefix_tokens: int = 64
    turns: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.prefix_share <= 1:
            raise RequestInvalid(
                f"prefix_share is {self.prefix_share}; it must be in [0, 1]",
                field="prefix_share",
                value=self.prefix_share,
            )
        if self.turns < 1:
            raise RequestInvalid(
                f"turns is {self.turns}; it must be at least 1", field="turns", value=self.turns
            )

    def conversations(self, requests: int) -> list[Conversation]:
        """As many as make so many requests; the last may be shorter."""
        common = tuple(
            np.random.default_rng(self.seed).integers(8, self.vocabulary, self.prefix_tokens).tolist()
        )
        counts = [min(self.turns, requests - begin) for begin in range(0, requests, self.turns)]
        return [self._conversation(index, count, common) for index, count in enumerate(counts)]

    def _conversation(self, index: int, turns: int, common: tuple[int, ...]) -> Conversation:
        random = np.random.default_rng((self.seed, index))
        prefix = common if random.random() < self.prefix_share else ()
        found = []
        for turn in range(turns):
            new = tuple(random.integers(8, self.vocabulary, self.inputs.draw(random)).tolist())
            found.append(Turn(new if turn else prefix + new, self.outputs.draw(random)))
        return tuple(found)


def read_conversations(path: Path, requests: int, outputs: Lengths, seed: int = 0) -> list[Conversation]:
    """The conversations of a JSONL file, from its begin on and again, until they make so many requests.

    Each line is an object with one of: `prompt` (text, or a list of token ids); `messages`, of objects with
    `role` and `content`; `conversations`, of objects with `from` and `value`, as ShareGPT has them. What
    users say becomes a turn each; what the file answers is left out, for the model answers itself.
    `max_tokens` gives the length of the answers; without it they are drawn from `outputs`.

    Raises:
        RequestInvalid: the file cannot be read, or a line is none of these; the line is named.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestInvalid(f"{path} cannot be read: {error}", field="dataset", value=str(path)) from error
    random = np.random.default_rng(seed)
    known = [
        _line(path, number, line, outputs, random) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not known:
        raise RequestInvalid(f"{path} has no conversation", field="dataset", value=str(path))
    found: list[Conversation] = []
    while requests > 0:
        conversation = known[len(found) % len(known)][:requests]
        found.append(conversation)
        requests -= len(conversation)
    return found


def _line(path: Path, number: int, line: str, outputs: Lengths, random: np.random.Generator) -> Conversation:
    def refuse(why: str) -> RequestInvalid:
        return RequestInvalid(f"{path}, line {number}: {why}", field="dataset", value=number)

    try:
        said = json.loads(line)
    except ValueError as error:
        raise refuse(f"it is not JSON: {error}") from error
    if not isinstance(said, dict):
        raise refuse("it is no object")
    prompts = _prompts(said)
    if not prompts:
        raise refuse("it has no prompt, and nothing that a user says")
    wanted = said.get("max_tokens")
    if wanted is not None and (not isinstance(wanted, int) or wanted < 1):
        raise refuse(f"max_tokens is {wanted!r}; it must be an integer of at least 1")
    return tuple(Turn(prompt, wanted or outputs.draw(random)) for prompt in prompts)


def _prompts(said: Mapping[str, Any]) -> list[str | tuple[int, ...]]:
    prompt = said.get("prompt")
    if isinstance(prompt, str) and prompt:
        return [prompt]
    if isinstance(prompt, list) and prompt and all(isinstance(token, int) for token in prompt):
        return [tuple(prompt)]
    for name, who, what in (("messages", "role", "content"), ("conversations", "from", "value")):
        parts = said.get(name)
        if isinstance(parts, list):
            texts = [part.get(what) for part in parts if isinstance(part, dict) and part.get(who) in _HUMAN]
            return [text for text in texts if isinstance(text, str) and text]
    return []
