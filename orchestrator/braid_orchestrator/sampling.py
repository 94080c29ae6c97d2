"""Choosing the next token from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from braid_wire.errors import RequestInvalid


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the default is greedy.

    Raises:
        RequestInvalid: a value is outside its range.
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

    def __post_init__(self) -> None:
        _rule(
            "temperature", self.temperature, math.isfinite(self.temperature) and self.temperature >= 0, "≥ 0"
        )
        _rule("top_k", self.top_k, self.top_k >= 0, "≥ 0")
        _rule("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        _rule("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]")


class Sampler:
    """Chooses tokens for one request; its random numbers depend on its seed alone."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed % 2**63)

    def choose(self, logits: torch.Tensor) -> int:
        """The next token.

        Args:
            logits: float32 [V].
        """
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        return int(torch.multinomial(distribution(logits, self._sampling), 1, generator=self._random))


def distribution(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities [V] after temperature, top-k, min-p and top-p, in this order."""
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < len(logits):
        threshold = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < threshold, -math.inf)
    probabilities = logits.softmax(-1)
    if sampling.min_p > 0:
        low = probabilities < sampling.min_p * probabilities.max()
        probabilities = probabilities.masked_fill(low, 0)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        # A token stays while the mass of those before it is below top_p; the first always stays.
        mass = (ordered / ordered.sum()).cumsum(-1)
        drop = torch.zeros_like(ordered, dtype=torch.bool)
        drop[1:] = mass[:-1] >= sampling.top_p
        probabilities = probabilities.masked_fill(drop[order.argsort()], 0)
    return probabilities / probabilities.sum()


def _rule(field: str, value: float, holds: bool, rule: str) -> None:
    if not holds:
        raise RequestInvalid(f"{field} is {value}; it must be {rule}", field=field, value=value)
