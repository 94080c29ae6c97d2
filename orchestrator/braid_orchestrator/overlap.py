"""Two-batch overlap: whether a step is split in two lanes, and where.

While one lane is in a service, the other is in the body. That pays where both take about as long; a
small step is faster in one piece, because each lane reads all weights again. Which one holds is
measured, not guessed: steps of like size are run both ways for a while, and then the faster way.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from braid_wire.layers import Mode, Role

from braid_orchestrator.memory import Span

# A prompt that lies in both lanes is cut at a multiple of this, so that chunked recurrences see the
# chunks that they would see in one piece.
ALIGNMENT = 256
# And no piece is shorter than this, because short spans are summed in another order than long ones.
_SHORTEST = 128
# Steps of one way that are looked at before the ways are compared, and how much faster two lanes
# must be. A way that lost is looked at again after a while, because contexts grow.
_TRIALS = 3
_MARGIN = 0.97
_RETRY_AFTER = 512


class OverlapMode(Enum):
    """Whether steps are split."""

    OFF = "off"
    AUTO = "auto"
    """Where it has shown to be faster."""
    ON = "on"
    """Wherever a step can be split."""


@dataclass(frozen=True)
class Division:
    """A step in two lanes: lane 0 has the first `sequences` spans, lane 1 the rest."""

    spans: tuple[Span, ...]
    sequences: int

    def expand(self, kept: Sequence[int]) -> list[int]:
        """Counts of the step's own spans as counts of these: both pieces of a prompt that was cut count."""
        given = iter(kept)
        return [
            len(span.tokens) if span.follows else min(next(given), len(span.tokens)) for span in self.spans
        ]


def divide(spans: Sequence[Span], cut_prompts: bool = True) -> Division | None:
    """Split a step in halves of about as many tokens; None where it cannot be split.

    Args:
        spans: of the step.
        cut_prompts: whether a long prompt may lie in both lanes; any other sequence lies in one.
    """
    lengths = [len(span.tokens) for span in spans]
    half = sum(lengths) / 2
    begins = 0
    index = 0
    while begins + lengths[index] < half:
        begins += lengths[index]
        index += 1
    length, wanted = lengths[index], half - begins
    if cut_prompts and spans[index].mode is Mode.EXTEND and lengths[index] >= 2 * ALIGNMENT:
        at = round(wanted / ALIGNMENT) * ALIGNMENT
        if 0 < at <= lengths[index] - _SHORTEST:
            return Division((*spans[:index], *spans[index].cut(at), *spans[index + 1 :]), index + 1)
    before = index if wanted < length - wanted else index + 1
    if not 0 < before < len(spans):
        return None
    return Division(tuple(spans), before)


@dataclass
class _Ways:
    """How long steps of one size took, seconds, in one lane and in two."""

    took: tuple[deque[float], deque[float]] = field(
        default_factory=lambda: (deque(maxlen=_TRIALS), deque(maxlen=_TRIALS))
    )
    steps: int = 0

    def lanes(self) -> int:
        """1 or 2: the way of the next step."""
        one, two = self.took
        if min(len(one), len(two)) < _TRIALS:
            return 1 if len(one) <= len(two) else 2
        best = 2 if statistics.median(two) < _MARGIN * statistics.median(one) else 1
        return 3 - best if self.steps % _RETRY_AFTER < 2 else best


@dataclass(frozen=True)
class Choice:
    """How one step is run."""

    division: Division | None
    """None: in one piece."""
    ways: _Ways
    """Of steps of its size, which is told before it: what it commits changes it."""

    def took(self, lanes: int, seconds: float) -> None:
        """Remember how long the step took in so many lanes."""
        self.ways.steps += 1
        self.ways.took[lanes - 1].append(seconds)


class Overlap:
    """Decides for each step of a cell.

    Args:
        mode: AUTO or ON.
        cut_prompts: whether a prompt gives the same bits in two pieces as in one.
    """

    def __init__(self, mode: OverlapMode, cut_prompts: bool = True) -> None:
        self.mode = mode
        self._cut_prompts = cut_prompts
        self._ways: dict[tuple[object, ...], _Ways] = {}

    def choose(self, role: Role, spans: Sequence[Span]) -> Choice:
        """How to run a step that is not staged yet."""
        ways = self._of(role, spans)
        if self.mode is OverlapMode.AUTO and ways.lanes() == 1:
            return Choice(None, ways)
        return Choice(divide(spans, self._cut_prompts), ways)

    def _of(self, role: Role, spans: Sequence[Span]) -> _Ways:
        tokens = sum(len(span.tokens) for span in spans)
        context = sum(span.memory.length for span in spans)
        # A chunk of a prompt is like other chunks of about its length behind about as much context.
        size = (role, len(spans).bit_length(), tokens.bit_length(), context.bit_length())
        return self._ways.setdefault(size, _Ways())
