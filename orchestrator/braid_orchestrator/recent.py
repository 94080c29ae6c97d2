"""The last errors of a cell, for people who look at it: bounded, and equal ones counted together."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, replace

from braid_wire.errors import BraidError, RequestCancelled

MOST_ERRORS = 32
LONGEST_MESSAGE = 400
"""Characters; a message is one sentence."""


@dataclass(frozen=True)
class RecentError:
    """Errors with one reason and one message that came one after the other."""

    reason: str
    """Of the error table."""
    message: str
    first: float
    """Unix time, seconds."""
    last: float
    count: int = 1


class RecentErrors:
    """A ring of errors, the newest last; any thread may note one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._errors: deque[RecentError] = deque(maxlen=MOST_ERRORS)

    def note(self, error: BraidError) -> None:
        """Remember an error; a caller that left is none."""
        if isinstance(error, RequestCancelled):
            return
        message = error.message
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[: LONGEST_MESSAGE - 1]}…"
        now = time.time()
        with self._lock:
            newest = self._errors[-1] if self._errors else None
            if newest is not None and (newest.reason, newest.message) == (error.reason, message):
                self._errors[-1] = replace(newest, last=now, count=newest.count + 1)
            else:
                self._errors.append(RecentError(error.reason, message, now, now))

    def newest_first(self) -> list[RecentError]:
        """What is remembered."""
        with self._lock:
            return list(reversed(self._errors))
