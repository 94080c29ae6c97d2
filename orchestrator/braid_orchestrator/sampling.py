"""How a caller wants tokens to be chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from braid_wire.errors import RequestInvalid

MOST_LOGPROBS = 20
"""Most alternatives that are told of a token."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the default is greedy.

    Logits go through, in this order: bias, repetition penalty, frequency and presence penalties,
    the mask of the stop tokens. Greedy takes the likeliest token of what comes out. Otherwise follow
    temperature, top-k, top-p (of the mass that top-k left) and min-p, and a draw.

    Raises:
        RequestInvalid: a value is outside its range, not a number, or not an integer where it must be.
    """

    temperature: float = 0.0
    """0: the likeliest token."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens with at least this mass."""
    min_p: float = 0.0
    """Drop tokens below this fraction of the likeliest one's probability."""
    seed: int | None = None
    """Of the random numbers, modulo 2⁶⁴; None: chosen at random. Token k depends on the seed, on k and
    on the logits, and on nothing else."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens that stand in the prompt or were made are divided by it, others
    multiplied; 1: neither."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that were made."""
    frequency_penalty: float = 0.0
    """Taken from the logits of tokens that were made, times how often they were."""
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Token id → what is added to its logit."""
    min_tokens: int = 0
    """So many tokens are made before a stop token can be."""
    logprobs: int | None = None
    """Tell the log-probability of every token made, and so many of the likeliest at its place."""
    prompt_logprobs: int | None = None
    """The same for every token of the prompt after the first."""

    def __post_init__(self) -> None:
        _in_range("temperature", self.temperature, 0)
        _integer("top_k", self.top_k, 0)
        _rule("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        _in_range("min_p", self.min_p, 0, 1)
        if self.seed is not None:
            _integer("seed", self.seed)
        penalty = self.repetition_penalty
        _rule("repetition_penalty", penalty, 0 < penalty < math.inf, "finite and above 0")
        _in_range("presence_penalty", self.presence_penalty, -2, 2)
        _in_range("frequency_penalty", self.frequency_penalty, -2, 2)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        for token, bias in self.logit_bias.items():
            _integer("logit_bias", token, 0)
            _in_range("logit_bias", bias, -100, 100)
        _integer("min_tokens", self.min_tokens, 0)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MOST_LOGPROBS)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check token ids against the model.

        Raises:
            RequestInvalid: a biased token is not in the vocabulary.
        """
        for token in self.logit_bias:
            if token >= vocab_size:
                raise RequestInvalid(
                    f"logit_bias has token id {token}; ids are 0 … {vocab_size - 1}",
                    field="logit_bias",
                    value=token,
                )


def _in_range(name: str, value: float, low: float, high: float | None = None) -> None:
    if high is None:
        _rule(name, value, low <= value < math.inf, f"finite and at least {low}")
    else:
        _rule(name, value, low <= value <= high, f"in [{low}, {high}]")


def _integer(name: str, value: object, low: int | None = None, high: int | None = None) -> None:
    rule = "an integer"
    if low is not None:
        rule += f" of at least {low}" if high is None else f" in [{low}, {high}]"
    holds = isinstance(value, int) and (low is None or value >= low) and (high is None or value <= high)
    _rule(name, value, holds, rule)


def _rule(name: str, value: object, holds: bool, rule: str) -> None:
    if not holds:
        raise RequestInvalid(f"{name} is {value}; it must be {rule}", field=name, value=value)
