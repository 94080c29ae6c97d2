"""How many tokens to guess ahead: as many as have shown to pay.

A guess costs time, in the draft and in the step that verifies it, and brings a token as often as it is
right. Both are measured while requests run: what a step of about so many requests takes with each
number of guesses, the draft's part included, and how often a guess at each depth is right where all
before it are. The number that makes most tokens in a second is taken, which may be none. What numbers
cost is compared within a short trial in which they take turns, and then held for a while: a machine
that is slower a minute later is slower for all of them.
"""

from __future__ import annotations

import statistics

import numpy as np

# Steps of every number in a trial, steps between two trials, and how much faster than none a number must be.
_TRIALS = 5
_HELD = 256
_MARGIN = 1.03
# What one more verified span leaves of the weight of those before it.
_FADE = 0.99


class _Ways:
    """What steps of about one number of requests take, by number of guesses; begins with a trial.

    Args:
        numbers: of guesses, from none on, that there are.
    """

    def __init__(self, numbers: int) -> None:
        self.costs: np.ndarray | None = None
        """Seconds, medians of the last trial; None: one is under way."""
        self._numbers = numbers
        self._begin()

    def next(self) -> int:
        """The number of guesses of the trial's next step, the largest first."""
        number = min(reversed(range(self._numbers)), key=lambda one: self._tries[one])
        self._tries[number] += 1
        # Requests that are always about to end never have many guesses: a trial does not wait for that.
        if min(self._tries) > 2 * _TRIALS:
            self._settle()
        return number

    def hold(self) -> None:
        """Count a step behind a trial; after many of them, there is another one."""
        self._held += 1
        if self._held >= _HELD:
            self._begin()

    def add(self, number: int, seconds: float) -> None:
        """Remember a step."""
        if self.costs is None:
            self._took[number].append(seconds)
            if min(len(took) for took in self._took) >= _TRIALS:
                self._settle()

    def _begin(self) -> None:
        self.costs = None
        self._took: list[list[float]] = [[] for _ in range(self._numbers)]
        self._tries = [0] * self._numbers
        self._held = 0

    def _settle(self) -> None:
        self.costs = np.array([statistics.median(took) if took else np.inf for took in self._took])


class Pace:
    """Decides for each step of a cell.

    Args:
        most: tokens that are guessed ahead.
        adaptive: whether fewer are where fewer pay.
    """

    def __init__(self, most: int, adaptive: bool = True) -> None:
        self._most = most
        self._adaptive = adaptive
        self._reached = np.zeros(most)
        self._right = np.zeros(most)
        self._ways: dict[int, _Ways] = {}

    def guesses(self, requests: int) -> int:
        """How many tokens to guess for each of so many requests, at least one."""
        if not self._adaptive:
            return self._most
        ways = self._of(requests)
        if (costs := ways.costs) is None:
            return ways.next()
        ways.hold()
        rates = self.expected() / costs
        best = int(rates.argmax())
        return best if rates[best] > _MARGIN * rates[0] else 0

    def took(self, requests: int, number: int, seconds: float) -> None:
        """Remember a step of so many requests, all of which had so many guesses verified.

        Args:
            requests: at least one.
            number: in [0, most].
            seconds: from the beginning of its guesses to its end.
        """
        self._of(requests).add(number, seconds)

    def verified(self, number: int, right: int) -> None:
        """Remember how many of a request's guesses counted."""
        reached = min(right + 1, number)
        self._reached *= _FADE
        self._right *= _FADE
        self._reached[:reached] += 1
        self._right[:right] += 1

    def expected(self) -> np.ndarray:
        """float64 [most + 1]: tokens that a request makes in a step, by number of guesses."""
        rates = np.divide(self._right, self._reached, out=np.zeros(self._most), where=self._reached > 0)
        return 1 + np.concatenate([[0.0], rates.cumprod().cumsum()])

    def _of(self, requests: int) -> _Ways:
        return self._ways.setdefault(requests.bit_length(), _Ways(self._most + 1))
