"""One frame a second for however many listen: made once, kept once, and not at all for nobody."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from braid_wire.errors import QueueFull

from braid_orchestrator.page.snapshots import Snapshots

log = logging.getLogger(__name__)

PERIOD_S = 1.0
MOST_LISTENERS = 16


class Broadcast:
    """Server-sent events of a cell.

    A listener that is slow misses frames; it never makes others wait, and nothing is stored for it.

    Args:
        snapshots: what is told.
        period_s: from frame to frame.
    """

    def __init__(self, snapshots: Snapshots, period_s: float = PERIOD_S) -> None:
        self._snapshots = snapshots
        self._period = period_s
        self._first = event("cell", snapshots.description())
        self._change = threading.Condition()
        self._listeners = 0
        self._number = 0
        self._frame = b""
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def listeners(self) -> int:
        """How many listen."""
        return self._listeners

    @contextmanager
    def listen(self) -> Iterator[Iterator[bytes]]:
        """Events, the description first, until the broadcast ends.

        Raises:
            QueueFull: too many listen already.
        """
        with self._change:
            if self._listeners >= MOST_LISTENERS:
                raise QueueFull(f"{self._listeners} pages are open already", waiting=self._listeners)
            self._listeners += 1
            if self._thread is None:
                self._snapshots.restart()
                self._frame = b""
                self._thread = threading.Thread(target=self._work, name="page", daemon=True)
                self._thread.start()
        try:
            yield self._events()
        finally:
            with self._change:
                self._listeners -= 1
                self._change.notify_all()

    def close(self) -> None:
        """Let every listener go."""
        with self._change:
            self._closed = True
            self._change.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _events(self) -> Iterator[bytes]:
        yield self._first
        with self._change:
            seen, frame = self._number, self._frame
        if frame:
            yield frame
        while True:
            with self._change:
                while self._number == seen and not self._closed:
                    self._change.wait()
                if self._closed:
                    return
                seen, frame = self._number, self._frame
            yield frame

    def _work(self) -> None:
        """Make frames for as long as somebody listens."""
        while True:
            frame = self._made()
            with self._change:
                if frame:
                    self._number += 1
                    self._frame = frame
                    self._change.notify_all()
                self._change.wait_for(lambda: self._closed or not self._listeners, self._period)
                if self._closed or not self._listeners:
                    self._thread = None
                    return

    def _made(self) -> bytes:
        """The next frame; empty where it cannot be made, which ends no page and no cell."""
        try:
            return event("frame", self._snapshots.frame())
        except Exception:
            log.exception("a frame of the page failed by our own fault")
            return b""


def event(name: str, data: object) -> bytes:
    """A server-sent event; JSON has no line breaks."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return f"event: {name}\ndata: {text}\n\n".encode()
