"""Figures out of repeated measurements."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

MICROSECONDS = 1e6


def spread(values: Sequence[float]) -> float:
    """Largest minus smallest, as a part of the median."""
    return round((max(values) - min(values)) / statistics.median(values), 3)


def ratio(peer: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as fast as a peer: the median over pairs of neighbouring runs.

    Pairs were neighbours in time, so that a slow minute does not fake a difference.
    """
    return round(statistics.median(theirs / mine for theirs, mine in zip(peer, ours, strict=True)), 3)


def quantile(seconds: Sequence[float], part: float) -> float | None:
    """A quantile in microseconds, to a tenth; None where nothing was measured."""
    return round(float(np.quantile(seconds, part)) * MICROSECONDS, 1) if seconds else None


def in_turn(names: Sequence[str], repeat: int) -> list[str]:
    """The order of a repeat: each begins with another one, so that none always follows the same."""
    first = repeat % len(names)
    return [*names[first:], *names[:first]]
