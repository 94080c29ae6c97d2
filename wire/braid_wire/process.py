"""What every process does when it starts: options, logging, threads, and dying with its parent."""

from __future__ import annotations

import atexit
import ctypes
import gc
import logging
import os
import queue
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

import click

from braid_wire.errors import ConfigInvalid, RequestInvalid, ServiceFault
from braid_wire.rpc import Tls

LOG_LEVELS = ("debug", "info", "warning", "error")

EXIT_OK = 0
EXIT_FAULT = 1
EXIT_USAGE = 2

_PR_SET_PDEATHSIG = 1
_LOOK_UP_S = 0.2

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class ServiceOptions:
    """The options that both attention services share."""

    address: str
    metrics_port: int
    metrics_host: str
    backend: str
    device: str
    threads: int
    parent: int | None
    tls_cert: Path | None
    tls_key: Path | None
    max_tokens: int
    grace_seconds: float
    audit_seconds: float
    log_level: str

    @property
    def tls(self) -> Tls | None:
        """Both PEM files, or None.

        Raises:
            RequestInvalid: only one of them is given.
        """
        if (self.tls_cert is None) != (self.tls_key is None):
            raise RequestInvalid("--tls-cert and --tls-key must be given together", field="tls")
        if self.tls_cert is None or self.tls_key is None:
            return None
        return Tls(self.tls_cert, self.tls_key)


def service_options(metrics_port: int) -> Callable[[Callable[[ServiceOptions], R]], Callable[..., R]]:
    """Decorates a click command's function with the common options; it gets a `ServiceOptions`.

    Args:
        metrics_port: the default of `--metrics-port`.
    """
    pem = click.Path(exists=True, dir_okay=False, path_type=Path)
    options: list[Callable[[Callable[..., R]], Callable[..., R]]] = [
        click.option(
            "--address", required=True, help="Where to serve: unix:PATH or HOST:PORT (0: a free port)."
        ),
        click.option(
            "--metrics-port",
            type=click.IntRange(0, 65535),
            default=metrics_port,
            show_default=True,
            help="Port of /metrics; 0 picks a free one.",
        ),
        click.option("--metrics-host", default="127.0.0.1", show_default=True, help="Host of /metrics."),
        click.option(
            "--backend",
            default="auto",
            show_default=True,
            help="Which kernels run: a backend's name, or auto for the fastest that loads.",
        ),
        click.option(
            "--device",
            default="cpu",
            show_default=True,
            help="Where the kernels run: cpu, cuda or cuda:N.",
        ),
        click.option(
            "--threads",
            type=click.IntRange(min=0),
            default=0,
            help="Threads of the kernels; 0 (the default): $OMP_NUM_THREADS, else one for each core.",
        ),
        click.option("--parent", type=int, help="Process id of the parent; this process ends when it does."),
        click.option("--tls-cert", type=pem, help="PEM certificate; TCP beyond loopback needs one."),
        click.option("--tls-key", type=pem, help="PEM key of the certificate."),
        click.option(
            "--max-tokens",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="Most tokens in one step; 0: no limit.",
        ),
        click.option(
            "--grace-seconds",
            type=click.FloatRange(min=0),
            default=10.0,
            show_default=True,
            help="Longest time that running calls get to finish after SIGTERM.",
        ),
        click.option(
            "--audit-seconds",
            type=click.FloatRange(min=0),
            envvar="BRAID_AUDIT_SECONDS",
            default=0.0,
            show_default=True,
            help="Compare a layer with the float64 reference every so often, each in turn; 0: never.",
        ),
        log_level_option(),
    ]

    def decorate(function: Callable[[ServiceOptions], R]) -> Callable[..., R]:
        def command(**values: Any) -> R:
            return function(ServiceOptions(**values))

        command.__doc__ = function.__doc__
        command.__name__ = function.__name__
        wrapped: Callable[..., R] = command
        for option in reversed(options):
            wrapped = option(wrapped)
        return wrapped

    return decorate


def log_level_option() -> Callable[[Callable[P, R]], Callable[P, R]]:
    """The `--log-level` option of every command; its default is $BRAID_LOG, else "info"."""
    return click.option(
        "--log-level",
        type=click.Choice(LOG_LEVELS, case_sensitive=False),
        envvar="BRAID_LOG",
        default="info",
        show_default=True,
        help="What is logged to stderr.",
    )


class _OneLine(logging.Formatter):
    """One line for each record, tracebacks included, so that lines of many processes can be mixed."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\n", " ⏎ ")


def setup_logging(service: str, level: str) -> None:
    """Log to stderr, one line per record, each with the service's name.

    Args:
        service: "orchestrator", "full" or "linear".
        level: one of `LOG_LEVELS`.

    Raises:
        ConfigInvalid: the level is unknown.
    """
    if level.lower() not in LOG_LEVELS:
        raise ConfigInvalid(
            f"log level is {level!r}; it must be one of {', '.join(LOG_LEVELS)}", field="log_level"
        )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine(f"%(asctime)s %(levelname)s {service}[%(process)d] %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def begin_loading() -> None:
    """Collect no garbage until `end_loading`: what imports and models make is here to stay."""
    gc.disable()


def end_loading() -> None:
    """Leave all that was made so far out of garbage collections from here on.

    A full collection of what torch and transformers alone make stops every thread for a quarter of a
    second, in the middle of some step; without them it takes microseconds.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


@contextmanager
def settled() -> Iterator[None]:
    """`end_loading` for as long as a block lasts, in a process whose interpreter ends in its usual way."""
    end_loading()
    try:
        yield
    finally:
        gc.unfreeze()


def leave(code: int) -> NoReturn:
    """End this process behind its exit handlers, without taking apart what ends with it anyway.

    The interpreter's own end takes torch and transformers to pieces first, for more than a second.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Stop:
    """What a signal's handler asks for, and the main thread waits for.

    Not an `Event`: the main thread holds the event's lock for moments of its `wait`, and a handler that
    runs in one of them, on that very thread, would wait for the lock for ever.
    """

    def __init__(self) -> None:
        self._asked = False
        # Its `put` is reentrant: it may interrupt a `get` of the same thread anywhere.
        self._woken: queue.SimpleQueue[None] = queue.SimpleQueue()

    def set(self) -> None:
        """Ask for the stop; from any thread, and from a handler."""
        self._asked = True
        self._woken.put(None)

    def is_set(self) -> bool:
        """Whether it was asked for."""
        return self._asked

    def wait(self, seconds: float) -> bool:
        """Wait until it is asked for, at most so long; whether it was. For one thread."""
        if not self._asked:
            with suppress(queue.Empty):
                self._woken.get(timeout=seconds)
        return self._asked


def wait_for_stop(wait: Callable[[float], bool]) -> None:
    """Wait on the main thread for what a signal's handler brings about.

    Python runs handlers on the main thread alone, and the kernel may give a signal to any thread: then a
    main thread that sleeps in a lock is not woken, and the signal is not seen. So it looks up now and then.

    Args:
        wait: waits for so many seconds, and says whether the end has come; what the handlers do must not
            wait for a lock that this holds (`Stop.wait` is made for it).
    """
    while not wait(_LOOK_UP_S):
        pass


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, however that ends.

    SIGKILL, not SIGTERM: an orderly end is the parent's to ask for, and with it gone there is nobody
    whose work could still be finished. All memory is anonymous, so nothing is left behind.

    The signal is bound to the thread that started this process, not to the parent as a whole: a
    parent must start its children from a thread that lives as long as it does.

    Raises:
        ServiceFault: the system refuses, or the parent is gone already.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise ServiceFault(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")
    # A parent that died before the call above sends nothing; then somebody else has adopted us.
    if os.getppid() != parent_pid:
        raise ServiceFault(
            f"parent {parent_pid} is gone; the parent now is {os.getppid()}", parent=parent_pid
        )


def thread_count(wanted: int) -> int:
    """How many threads the kernels get.

    Args:
        wanted: as an option said; 0: $OMP_NUM_THREADS, else one for each core this process may use.

    Raises:
        ConfigInvalid: $OMP_NUM_THREADS is no positive number.
    """
    if wanted > 0:
        return wanted
    text = os.environ.get("OMP_NUM_THREADS")
    if text is None:
        return len(os.sched_getaffinity(0))
    # OpenMP allows one number for each nesting level, "4,2"; only the outermost level is used here.
    first = text.split(",")[0].strip()
    if not first.isdecimal() or int(first) < 1:
        raise ConfigInvalid(
            f"OMP_NUM_THREADS is {text!r}; it must be a positive number", field="OMP_NUM_THREADS"
        )
    return int(first)
