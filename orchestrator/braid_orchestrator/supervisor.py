"""Starts processes, keeps them running, and stops them in order.

One thread does it all: it starts every child (the kernel ties a child's death to that of the thread
that made it), reads what they print, and sees them end. Others only ask it to stop.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from braid_wire.errors import (
    BraidError,
    RequestInvalid,
    ServiceFault,
    ServiceLost,
    StepTimeout,
    from_reason,
)
from braid_wire.process import EXIT_FAULT, EXIT_USAGE

log = logging.getLogger(__name__)

_MOST_FAILED_STARTS = 3
_FIRST_BACKOFF_S = 0.1
_LONGEST_BACKOFF_S = 5.0
# A process that lived this long has recovered from whatever ended the one before.
_STEADY_S = 10.0
# Behind a process's own time to drain.
_STOP_MARGIN_S = 8.0
_KEPT_LINES = 20


@dataclass(frozen=True)
class Ready:
    """What a process said of itself when it began to serve."""

    addresses: tuple[str, ...]
    metrics_port: int
    pid: int
    page: str = ""
    """URL of its live page; empty: it has none."""


@dataclass(frozen=True)
class Program:
    """A process to keep running.

    Args:
        name: for people.
        command: its command line, given what it said when it last served (None at first), so that
            it comes back at the same addresses and ports.
        environment: of the process.
        stop_order: processes of a lower number are stopped, and waited for, first.
        stop_seconds: how long it may take to stop by itself.
    """

    name: str
    command: Callable[[Ready | None], Sequence[str]]
    environment: Mapping[str, str]
    stop_order: int = 0
    stop_seconds: float = 10.0


Watch = Callable[[str, str], None]
"""Told on the supervisor's thread: (process, "starting", "ready" or "lost")."""


@dataclass
class _Child:
    """A program and its process of the moment."""

    program: Program
    process: subprocess.Popen[bytes] | None = None
    pidfd: int = -1
    ready: Ready | None = None
    last_ready: Ready | None = None
    began: float = 0.0
    failed_starts: int = 0
    losses: int = 0
    restart_at: float | None = None
    error: BraidError | None = None
    unread: dict[int, bytes] = field(default_factory=dict)
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_LINES))

    @property
    def alive(self) -> bool:
        return self.process is not None

    def signal(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(number)


class Supervisor:
    """Keeps some processes running.

    Args:
        programs: the processes.
        echo: called with every line that a process prints, but for those meant for this class.
        watch: told of every change.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        echo: Callable[[str], None] = lambda line: None,
        watch: Watch = lambda name, what: None,
    ) -> None:
        self._children = [_Child(program) for program in programs]
        self._echo = echo
        self._watch = watch
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._change = threading.Condition()
        self._stopping = False
        self._killing = False
        self._ended = False
        self._stop_deadline: dict[int, float] = {}
        self._failure: BraidError | None = None
        self._thread = threading.Thread(target=self._work, name="supervisor", daemon=True)

    def start(self) -> None:
        """Start every process."""
        self._thread.start()

    def wait_ready(self, timeout_s: float) -> dict[str, Ready]:
        """Wait until all serve, and give what each said.

        Raises:
            BraidError: what ended a process that cannot start.
            StepTimeout: not all were ready in time.
        """
        with self._change:
            done = self._change.wait_for(lambda: self._ended or self._failure or self._all_ready(), timeout_s)
            if self._failure is not None:
                raise self._failure
            if not done:
                waiting = [child.program.name for child in self._children if child.ready is None]
                raise StepTimeout(f"{', '.join(waiting)} did not start within {timeout_s:.0f} s")
            if self._ended:
                raise ServiceFault("the processes were stopped while they started")
            return {child.program.name: child.ready for child in self._children if child.ready is not None}

    def ready(self, name: str) -> Ready | None:
        """What a process said when it began to serve; None while it does not."""
        with self._change:
            return next(child.ready for child in self._children if child.program.name == name)

    def stop(self) -> None:
        """Ask for an orderly end; `join` waits for it."""
        self._stopping = True
        self._wake()

    def kill(self) -> None:
        """End every process at once."""
        self._killing = self._stopping = True
        self._wake()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until all processes have ended; False after the time.

        Raises:
            BraidError: what ended a process that could not be kept running.
        """
        with self._change:
            ended = self._change.wait_for(lambda: self._ended, timeout_s)
            if ended and self._failure is not None:
                raise self._failure
            return ended

    def settle(self) -> None:
        """Wait until all processes have ended, whatever ended them."""
        with self._change:
            self._change.wait_for(lambda: self._ended)

    # The supervisor's thread.

    def _work(self) -> None:
        try:
            for child in self._children:
                self._spawn(child)
            while not (self._stopping and not any(child.alive for child in self._children)):
                self._poll()
                if self._stopping:
                    self._advance_stop()
                else:
                    self._restart_due()
        except Exception as error:
            log.exception("the supervisor failed")
            self._fail(ServiceFault(f"the supervisor failed: {type(error).__name__}: {error}"))
        finally:
            self._end()

    def _poll(self) -> None:
        """Wait for something to happen, and see to it."""
        for key, _ in self._selector.select(self._timeout()):
            if key.fd == self._wake_read:
                os.read(self._wake_read, 4096)
                continue
            child: _Child = key.data
            if key.fd == child.pidfd:
                self._reap(child)
            elif key.fd in child.unread:
                self._read(child, key.fd)

    def _timeout(self) -> float | None:
        """Until the next thing that happens by the clock."""
        due = [child.restart_at for child in self._children if child.restart_at is not None]
        due += self._stop_deadline.values()
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _spawn(self, child: _Child) -> None:
        self._watch(child.program.name, "starting")
        child.error, child.restart_at, child.began = None, None, time.monotonic()
        child.lines.clear()
        process = subprocess.Popen(
            list(child.program.command(child.last_ready)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(child.program.environment),
            # Its own group: Ctrl-C on a terminal must reach the supervisor alone, which drains.
            process_group=0,
        )
        child.process, child.pidfd = process, os.pidfd_open(process.pid)
        self._selector.register(child.pidfd, selectors.EVENT_READ, child)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                os.set_blocking(stream.fileno(), False)
                child.unread[stream.fileno()] = b""
                self._selector.register(stream.fileno(), selectors.EVENT_READ, child)

    def _read(self, child: _Child, fd: int) -> None:
        """Take what a process has printed so far, line by line."""
        while True:
            try:
                data = os.read(fd, 65536)
            except BlockingIOError:
                return
            if not data:
                self._selector.unregister(fd)
                rest = child.unread.pop(fd)
                if rest:
                    self._line(child, rest)
                return
            *lines, child.unread[fd] = (child.unread[fd] + data).split(b"\n")
            for line in lines:
                self._line(child, line)

    def _line(self, child: _Child, data: bytes) -> None:
        line = data.decode(errors="replace").rstrip()
        said = _message(line)
        if said is None:
            child.lines.append(line)
            self._echo(line)
        elif "error" in said:
            error = said["error"]
            child.error = from_reason(str(error["reason"]), str(error["message"]), {})
        else:
            self._note_ready(child, said)

    def _note_ready(self, child: _Child, said: Mapping[str, Any]) -> None:
        addresses = tuple(said.get("addresses") or [said["address"]])
        with self._change:
            child.ready = child.last_ready = Ready(
                addresses, int(said["metrics_port"]), int(said["pid"]), str(said.get("page", ""))
            )
            child.failed_starts = 0
            self._change.notify_all()
        self._watch(child.program.name, "ready")

    def _reap(self, child: _Child) -> None:
        """See to a process that has ended."""
        process = child.process
        if process is None:
            return
        for fd in list(child.unread):
            self._read(child, fd)
        code = process.wait()
        self._forget(child, process)
        was_ready = child.ready is not None
        with self._change:
            child.ready = None
            self._change.notify_all()
        self._watch(child.program.name, "lost")
        if self._stopping:
            if code != 0 and not self._killing:
                log.warning("%s %s while it stopped", child.program.name, _how(code))
            return
        if not was_ready:
            child.failed_starts += 1
            if _hopeless(child, code):
                self._fail(_failure(child, code))
                return
        self._schedule(child, code)

    def _forget(self, child: _Child, process: subprocess.Popen[bytes]) -> None:
        """Close what belongs to a process that is gone."""
        self._selector.unregister(child.pidfd)
        os.close(child.pidfd)
        for fd in list(child.unread):
            # Something that the process started may still hold the other end.
            self._selector.unregister(fd)
        child.unread.clear()
        for stream in (process.stdout, process.stderr):
            _close(stream)
        child.process, child.pidfd = None, -1

    def _schedule(self, child: _Child, code: int) -> None:
        """Start a lost process again: at once, and later if it keeps being lost."""
        now = time.monotonic()
        child.losses = 0 if now - child.began > _STEADY_S else child.losses + 1
        delay = min(_FIRST_BACKOFF_S * 2 ** (child.losses - 1), _LONGEST_BACKOFF_S) if child.losses else 0.0
        child.restart_at = now + delay
        log.warning("%s %s; it is restarted in %.1f s", child.program.name, _how(code), delay)

    def _restart_due(self) -> None:
        for child in self._children:
            if child.restart_at is not None and child.restart_at <= time.monotonic():
                self._spawn(child)

    def _fail(self, error: BraidError) -> None:
        with self._change:
            self._failure = self._failure or error
            self._change.notify_all()
        self._killing = self._stopping = True
        self._wake()

    def _advance_stop(self) -> None:
        """Ask the next processes to stop, or end those that had their time."""
        for child in self._children:
            child.restart_at = None
        alive = [child for child in self._children if child.alive]
        if self._killing:
            for child in alive:
                child.signal(signal.SIGKILL)
            self._stop_deadline.clear()
            return
        order = min((child.program.stop_order for child in alive), default=None)
        if order is None:
            return
        group = [child for child in alive if child.program.stop_order == order]
        if order not in self._stop_deadline:
            seconds = max(child.program.stop_seconds for child in group) + _STOP_MARGIN_S
            self._stop_deadline = {order: time.monotonic() + seconds}
            for child in group:
                child.signal(signal.SIGTERM)
        elif self._stop_deadline[order] <= time.monotonic():
            log.warning("%s did not stop in time", ", ".join(child.program.name for child in group))
            self._killing = True
            self._wake()

    def _end(self) -> None:
        for child in self._children:
            if child.process is not None:
                child.process.kill()
                child.process.wait()
                self._forget(child, child.process)
        self._selector.close()
        with self._change:
            self._ended = True
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._change.notify_all()

    def _all_ready(self) -> bool:
        return all(child.ready is not None for child in self._children)

    def _wake(self) -> None:
        with self._change:
            if not self._ended:
                os.write(self._wake_write, b"!")


def _message(line: str) -> dict[str, Any] | None:
    """A line of JSON that a process prints for its supervisor; None for any other line."""
    if not line.startswith("{"):
        return None
    try:
        said = json.loads(line)
    except ValueError:
        return None
    if not isinstance(said, dict) or not (
        {"service", "metrics_port", "pid"} <= said.keys() or "error" in said
    ):
        return None
    return said


def _hopeless(child: _Child, code: int) -> bool:
    """Whether a process that ended before it served would only end so again."""
    if child.failed_starts >= _MOST_FAILED_STARTS:
        return True
    if child.last_ready is not None:
        # It comes back at ports that were its own, and anybody's while it was gone: one that is taken by a
        # connection of somebody else's is free again in a moment.
        return False
    # One that has never served fails of its own accord, unless it waited for another one.
    return code == EXIT_USAGE or (code == EXIT_FAULT and not isinstance(child.error, ServiceLost))


def _failure(child: _Child, code: int) -> BraidError:
    """Why a process cannot start: what it said, or its last line."""
    if child.error is not None:
        return child.error
    # Of a traceback, which is logged on one line, the end says most.
    last = child.lines[-1].rpartition("⏎ ")[2] if child.lines else "it said nothing"
    message = f"{child.program.name} {_how(code)} at its start: {last}"
    return RequestInvalid(message) if code == EXIT_USAGE else ServiceFault(message)


def _how(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def _close(stream: IO[bytes] | None) -> None:
    if stream is not None:
        stream.close()


def echo_to_stderr(line: str) -> None:
    """Pass a process's line on."""
    print(line, file=sys.stderr, flush=True)
