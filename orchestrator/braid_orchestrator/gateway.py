"""An OpenAI-compatible HTTP server in front of cells: the gateway `smg`, as a supervised process.

    python -m braid_orchestrator.gateway --worker 127.0.0.1:9500 --worker 127.0.0.1:9501 --port 8000

It speaks `vllm.grpc.engine.VllmEngine` to every cell, makes text of their tokens, and takes turns
between them. It has no authentication of its own, so it serves on this machine alone unless told otherwise.
"""

from __future__ import annotations

import http
import http.client
import importlib.util
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from braid_wire.errors import BraidError, ConfigInvalid, RequestInvalid, ServiceFault
from braid_wire.process import EXIT_FAULT, EXIT_OK, die_with_parent, log_level_option, setup_logging

from braid_orchestrator.frontends.tokenizer_archive import has_tokenizer
from braid_orchestrator.supervisor import Program, Ready, Supervisor, Watch

log = logging.getLogger(__name__)

GATEWAY = "gateway"
PORT = 8000
METRICS_PORT = 9403
HOST = "127.0.0.1"
_EVERYWHERE = ("0.0.0.0", "::")
EXTRA = "gateway"

START_TIMEOUT_S = 60.0
_STOP_S = 5.0
_PORT_TRIES = 3
_POLL_S = 0.05
_ASK_S = 1.0

# The gateway is chatty: its "info" is about every step of its own start.
_LOG_LEVELS = {"debug": "info", "info": "error", "warning": "error", "error": "error"}

_MANNERS: Mapping[str, object] = {
    "--policy": "round_robin",
    # A cell that starts again after a crash is found within a second or two.
    "--worker-startup-check-interval": 1,
    "--health-check-interval-secs": 1,
    "--health-failure-threshold": 1,
    "--health-success-threshold": 1,
    # A completion that is not streamed says nothing until it is whole; a cell that waits for a
    # service to come back says nothing either. Neither is stuck.
    "--worker-wedge-secs": 120,
    # What is under way has ended before the gateway is stopped: the cell drains first.
    "--shutdown-grace-period-secs": 1,
    "--history-backend": "none",
}
# A cell has a queue of its own, and says at once when that is full. That is no reason to shut it out
# until it is asked for its load again, or for a minute.
_SWITCHES = ("--disable-circuit-breaker", "--disable-worker-overload-protection")
# With nobody else to ask, asking again is the caller's to decide.
_ALONE = ("--disable-retries",)


@dataclass(frozen=True)
class Gateway:
    """A running gateway.

    Args:
        url: of the OpenAI-compatible API, without the trailing `/v1`.
        metrics_port: of its own `/metrics`.
    """

    url: str
    metrics_port: int


def check_installed() -> None:
    """Refuse where there is no gateway to start.

    Raises:
        ConfigInvalid: the package is not installed; it names the extra.
    """
    if importlib.util.find_spec("smg") is None:
        raise ConfigInvalid(
            f"the gateway needs the package smg; install 'braid-attention[{EXTRA}]'", field=GATEWAY
        )


def check_model(model: Path) -> None:
    """Refuse a model whose text the gateway could not make.

    Raises:
        ConfigInvalid: it has no tokenizer.
    """
    if not has_tokenizer(model):
        raise ConfigInvalid(f"{model.name} has no tokenizer, which the gateway needs", field="tokenizer")


def free_port(wanted: int = 0, name: str = "gateway_port") -> int:
    """A port that can be listened at: the wanted one, or with 0 any.

    Args:
        name: what it is for, in the error.

    Raises:
        RequestInvalid: the wanted one is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, wanted))
        except OSError as error:
            raise RequestInvalid(
                f"{name.replace('_', ' ')} {HOST}:{wanted} cannot be used: {error.strerror}",
                field=name,
                value=wanted,
            ) from error
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def launch(
    workers: Sequence[str],
    port: int = 0,
    metrics_port: int = 0,
    log_level: str = "warning",
    echo: Callable[[str], None] = lambda line: None,
    watch: Watch = lambda name, what: None,
    lost: Callable[[], None] = lambda: None,
) -> Iterator[Gateway]:
    """A gateway that is kept running for as long as the block lasts, and then stopped in order.

    Args:
        workers: `HOST:PORT` of each cell's orchestrator, without TLS.
        port: where it serves HTTP; 0: a free one.
        metrics_port: of its own metrics; 0: a free one.
        log_level: one of `LOG_LEVELS`.
        echo: called with every line that it prints.
        watch: told how the start goes on.
        lost: called once if it cannot be kept running; the block's end then raises why.

    Raises:
        BraidError: it cannot start, or could not be kept running.
    """
    check_installed()

    def supervised() -> Supervisor:
        ports = (free_port(port), free_port(metrics_port, "gateway_metrics_port"))
        environment = {**os.environ, "BRAID_LOG": log_level}
        program = Program(
            GATEWAY, lambda before: _command(workers, ports, log_level), environment, 0, _STOP_S
        )
        return Supervisor([program], lambda line: echo(line) if _says_something(line) else None, watch)

    supervisor, ready = _first_ready(supervised, 1 if port and metrics_port else _PORT_TRIES)
    failures: list[BraidError] = []
    try:
        watcher = threading.Thread(target=_wait, args=(supervisor, failures, lost), name="gateway")
        watcher.start()
        try:
            yield Gateway(ready.addresses[0], ready.metrics_port)
        finally:
            supervisor.stop()
            watcher.join()
    finally:
        supervisor.kill()
        supervisor.settle()
    if failures:
        raise failures[0]


def _first_ready(make: Callable[[], Supervisor], tries: int) -> tuple[Supervisor, Ready]:
    """One that serves: somebody else may take a free port between the search for it and its use."""
    while True:
        supervisor, tries = make(), tries - 1
        supervisor.start()
        try:
            return supervisor, supervisor.wait_ready(START_TIMEOUT_S)[GATEWAY]
        except BaseException as error:
            supervisor.kill()
            supervisor.settle()
            if not isinstance(error, ServiceFault) or "in use" not in error.message or not tries:
                raise
            log.info("a port of the gateway was taken meanwhile; others are tried: %s", error.message)


def _wait(supervisor: Supervisor, failures: list[BraidError], lost: Callable[[], None]) -> None:
    try:
        supervisor.join()
    except BraidError as error:
        failures.append(error)
        lost()


def _says_something(line: str) -> bool:
    """Whether a line is more than a part of the picture, drawn in Braille, that it greets with."""
    return bool(line.strip()) and not any("\u2800" <= character <= "\u28ff" for character in line)


def _command(workers: Sequence[str], ports: tuple[int, int], log_level: str) -> list[str]:
    return [
        *(sys.executable, "-m", __name__),
        *(word for worker in workers for word in ("--worker", worker)),
        *("--port", str(ports[0])),
        *("--metrics-port", str(ports[1])),
        *("--parent", str(os.getpid())),
        *("--log-level", log_level),
    ]


# The gateway's process.


@click.command("braid-gateway")
@click.option("--worker", "workers", multiple=True, required=True, metavar="HOST:PORT", help="A cell.")
@click.option(
    "--host",
    default=HOST,
    show_default=True,
    help="Literal address of HTTP and /metrics. There is no authentication: beyond loopback, only in a "
    "network namespace whose published ports you control.",
)
@click.option("--port", type=click.IntRange(1, 65535), default=PORT, show_default=True, help="Of HTTP.")
@click.option(
    "--metrics-port",
    type=click.IntRange(1, 65535),
    default=METRICS_PORT,
    show_default=True,
    help="Port of /metrics.",
)
@click.option("--parent", type=int, help="Process id of the parent; this process ends when it does.")
@log_level_option()
def main(
    workers: tuple[str, ...], host: str, port: int, metrics_port: int, parent: int | None, log_level: str
) -> None:
    """Serve the OpenAI API over cells.

    Prints one line of JSON on stdout once a cell can be asked. Exits with 0 after SIGTERM.
    """
    setup_logging(GATEWAY, log_level)
    if parent is not None:
        die_with_parent(parent)
    check_installed()
    announcer = threading.Thread(target=_announce, args=(host, port, metrics_port), daemon=True)
    announcer.start()
    # Its command line, in this process: a child of ours would need a supervisor of its own.
    from smg.cli import main as smg

    try:
        smg(["launch", *_arguments(workers, (host, port, metrics_port), log_level)])
    except Exception as error:
        fault = ServiceFault(f"the gateway failed: {error}")
        print(json.dumps({"error": {"reason": fault.reason, "message": fault.message}}), flush=True)
        sys.exit(EXIT_FAULT)
    sys.exit(EXIT_OK)


def _arguments(workers: Sequence[str], at: tuple[str, int, int], log_level: str) -> list[str]:
    """Of `smg launch`; `at` is its host, port and metrics port."""
    host, port, metrics_port = at
    options = {
        "--host": host,
        "--port": port,
        "--prometheus-host": host,
        "--prometheus-port": metrics_port,
        "--log-level": _LOG_LEVELS[log_level.lower()],
        **_MANNERS,
    }
    words = [str(word) for pair in options.items() for word in pair]
    switches = _SWITCHES + (_ALONE if len(workers) == 1 else ())
    return [*words, *switches, "--worker-urls", *(f"grpc://{worker}" for worker in workers)]


def _announce(host: str, port: int, metrics_port: int) -> None:
    """Say where it serves, once it could answer: it knows a cell, and has its tokenizer."""
    asked = HOST if host in _EVERYWHERE else host
    while not (_ask(asked, port, "/readiness") and _ask(asked, port, "/v1/tokenizers").get("tokenizers")):
        time.sleep(_POLL_S)
    url = f"http://{asked}:{port}"
    ready = {"service": GATEWAY, "address": url, "metrics_port": metrics_port, "pid": os.getpid()}
    print(json.dumps(ready), flush=True)


def _ask(host: str, port: int, path: str) -> dict[str, Any]:
    """What it answers in JSON; empty where it refuses, or does not answer yet."""
    connection = http.client.HTTPConnection(host, port, timeout=_ASK_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        said = json.load(response) if response.status == http.HTTPStatus.OK else {}
    except (OSError, http.client.HTTPException, ValueError):
        return {}
    finally:
        connection.close()
    return said if isinstance(said, dict) else {}


if __name__ == "__main__":
    main(prog_name="braid-gateway")
