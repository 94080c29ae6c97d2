"""Rates and percentiles over the last while, from counters that only ever grow."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from braid_wire.metrics import TallyMetric
from prometheus_client import Counter, Histogram


@dataclass(frozen=True)
class Buckets:
    """A histogram at one moment: cumulative counts of observations up to each bound."""

    bounds: tuple[float, ...]
    counts: tuple[float, ...]

    @classmethod
    def of(cls, histogram: Histogram | TallyMetric) -> Buckets:
        """Now, over all its labels."""
        found: dict[float, float] = {}
        for family in histogram.collect():
            for sample in family.samples:
                if sample.name.endswith("_bucket"):
                    bound = float(sample.labels["le"])
                    found[bound] = found.get(bound, 0.0) + sample.value
        return cls(tuple(found), tuple(found.values()))

    def since(self, before: Buckets | None) -> Buckets:
        """What was observed between two moments; all of it where there is no earlier one."""
        if before is None:
            return self
        return Buckets(self.bounds, tuple(a - b for a, b in zip(self.counts, before.counts, strict=True)))

    @property
    def total(self) -> float:
        """Observations."""
        return self.counts[-1] if self.counts else 0.0

    def quantile(self, share: float) -> float | None:
        """Below which a share of the observations lies, linear inside a bucket as Prometheus has it.

        None without observations; the last finite bound where it lies beyond.
        """
        if self.total == 0:
            return None
        rank, low, under = share * self.total, 0.0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=True):
            if count >= rank:
                if bound == float("inf"):
                    return low
                return low + (bound - low) * (rank - under) / max(count - under, 1e-12)
            low, under = bound, count
        return low


class Percentiles:
    """Percentiles of a histogram over its last readings; of everything while nothing is new.

    Args:
        histogram: that is read.
        readings: how many of them the window holds.
    """

    def __init__(self, histogram: Histogram | TallyMetric, readings: int) -> None:
        self._histogram = histogram
        self._past: deque[Buckets] = deque(maxlen=readings)

    def read(self, shares: Sequence[float]) -> list[float | None]:
        """Each percentile now, seconds."""
        now = Buckets.of(self._histogram)
        recent = now.since(self._past[0] if self._past else None)
        self._past.append(now)
        chosen = recent if recent.total else now
        return [chosen.quantile(share) for share in shares]


def count_of(counter: Counter) -> float:
    """The value of a counter, summed over its labels."""
    return sum(
        sample.value
        for family in counter.collect()
        for sample in family.samples
        if sample.name.endswith("_total")
    )
