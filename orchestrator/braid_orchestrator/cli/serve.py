"""`braid serve`."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click
from braid_wire.metrics import PORTS
from braid_wire.process import EXIT_OK, Stop, log_level_option, settled, setup_logging, wait_for_stop
from braid_wire.rpc import Tls

from braid_orchestrator import console as consoles
from braid_orchestrator import gateway as gateways
from braid_orchestrator.cli.options import PEM, placement_option, setting_options
from braid_orchestrator.cli.session import loading
from braid_orchestrator.gateway import GATEWAY, Gateway
from braid_orchestrator.launcher import FULL, LINEAR, MODULES, ORCHESTRATOR, Endpoints, Launched, launch
from braid_orchestrator.plan_view import strip
from braid_orchestrator.settings import Settings, layer_summary
from braid_orchestrator.supervisor import echo_to_stderr
from braid_orchestrator.watching import Watching, watching_options

log = logging.getLogger(__name__)

EXIT_INTERRUPTED = 130


@click.command()
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option("--grpc", multiple=True, metavar="HOST:PORT", help="Also serve here; port 0: a free one.")
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65532),
    help="First of the neighbouring ports of /metrics (orchestrator, full, linear, gateway); 0: free ones.  "
    f"[default: {PORTS[ORCHESTRATOR]}]",
)
@click.option("--metrics-host", default="127.0.0.1", show_default=True, help="Host of /metrics.")
@click.option("--tls-cert", type=PEM, help="PEM certificate for --grpc; needed beyond loopback.")
@click.option("--tls-key", type=PEM, help="PEM key of the certificate.")
@click.option("--gateway", is_flag=True, help="Also serve the OpenAI API over HTTP, on this machine.")
@click.option(
    "--gateway-port",
    type=click.IntRange(0, 65535),
    default=gateways.PORT,
    show_default=True,
    help="With --gateway: its port; 0: a free one.",
)
@placement_option
@click.option(
    "--drain-seconds",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Longest time that accepted requests get to finish after SIGTERM or Ctrl-C.",
)
@click.option("--json", "json_out", is_flag=True, help="Print one line of JSON once it serves.")
@log_level_option()
@click.option(
    "--only",
    type=click.Choice(list(MODULES)),
    help="Run this one process in the foreground and supervise nothing; for containers.",
)
@click.option("--address", help="With --only: where it serves, unix:PATH or HOST:PORT.")
@click.option("--full", metavar="ADDRESS", help="With --only orchestrator: the full-attention service.")
@click.option("--linear", metavar="ADDRESS", help="With --only orchestrator: the linear-attention service.")
@click.option(
    "--runtime-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="With --only orchestrator: private directory, shared with the services.",
)
@watching_options
@setting_options()
def serve(
    settings: Settings,
    watching: Watching,
    model: Path | None,
    grpc: tuple[str, ...],
    metrics_port: int | None,
    metrics_host: str,
    tls_cert: Path | None,
    tls_key: Path | None,
    gateway: bool,
    gateway_port: int,
    placement: str,
    drain_seconds: float,
    json_out: bool,
    log_level: str,
    only: str | None,
    address: str | None,
    full: str | None,
    linear: str | None,
    runtime_dir: Path | None,
) -> int:
    """Start a cell and keep it running: orchestrator, full and linear attention.

    MODEL is the directory of a checkpoint. A process that dies is started again at the same address.
    SIGTERM and Ctrl-C drain the cell and stop it, with exit code 0; a second one stops it at once.
    """
    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key must be given together")
    tls = Tls(tls_cert, tls_key) if tls_cert is not None and tls_key is not None else None
    if model is not None:
        settings = replace(settings, model=model)
    explicit = {"--address": address, "--full": full, "--linear": linear, "--runtime-dir": runtime_dir}
    if only is not None:
        if gateway:
            raise click.UsageError("--gateway takes a whole cell; --only is one process")
        shared: dict[str, object] = {
            "--metrics-port": metrics_port,
            "--metrics-host": metrics_host,
            "--log-level": log_level,
        }
        if only == ORCHESTRATOR:
            shared["--drain-seconds"] = drain_seconds
        options = {**explicit, **shared, "--tls-cert": tls_cert, "--tls-key": tls_key}
        _become(only, options, settings, watching, grpc)
    given = [name for name, value in explicit.items() if value is not None]
    if given:
        raise click.UsageError(f"{', '.join(given)} without --only: a whole cell chooses its own")
    if model is None:
        raise click.UsageError("MODEL is missing")
    first = PORTS[ORCHESTRATOR] if metrics_port is None else metrics_port
    endpoints = Endpoints(grpc, Endpoints.usual_ports(first), metrics_host, tls, watching)
    front = None
    if gateway:
        front = _Front(gateway_port, first + len(PORTS) if first else 0)
        endpoints = front.check(settings, endpoints)
    setup_logging("supervisor", log_level)
    return _run(settings, endpoints, front, placement, drain_seconds, log_level, json_out)


def _become(
    name: str,
    options: Mapping[str, object],
    settings: Settings,
    watching: Watching,
    grpc: tuple[str, ...],
) -> NoReturn:
    """Turn into one process of a cell: same process id, its own signals and exit code."""
    given = {option: value for option, value in options.items() if value is not None}
    wanted = ["--address", "--full", "--linear"] if name == ORCHESTRATOR else ["--address"]
    missing = [option for option in wanted if option not in given]
    if missing:
        raise click.UsageError(f"--only {name} needs {', '.join(missing)}")
    foreign = given.keys() & {"--full", "--linear", "--runtime-dir"}
    if name != ORCHESTRATOR and (foreign or grpc):
        raise click.UsageError(f"--only {name} takes none of --full, --linear, --runtime-dir and --grpc")
    command = [sys.executable, "-m", MODULES[name]]
    command += [str(word) for pair in given.items() for word in pair]
    if name == ORCHESTRATOR:
        if settings.model == Path():
            raise click.UsageError("MODEL is missing")
        command += [word for address in grpc for word in ("--grpc", address)]
        command += [*settings.arguments(), *watching.arguments()]
    else:
        command += ["--threads", str(settings.threads), "--device", settings.device]
    if settings.threads:
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    os.execv(sys.executable, command)


@dataclass(frozen=True)
class _Front:
    """The gateway that is to stand before a cell."""

    port: int
    metrics_port: int

    def check(self, settings: Settings, endpoints: Endpoints) -> Endpoints:
        """Refuse early what cannot be, and give the cell an address of its own for the gateway.

        Raises:
            UsageError: the cell serves with TLS, which the gateway does not speak to it.
            ConfigInvalid: the gateway is not installed, or the model has no tokenizer.
            RequestInvalid: a port of it is taken.
        """
        if endpoints.tls is not None:
            raise click.UsageError("--gateway talks to the cell without TLS: leave --tls-cert out")
        gateways.check_installed()
        settings.plans()
        gateways.check_model(settings.model)
        gateways.free_port(self.port)
        gateways.free_port(self.metrics_port, "gateway_metrics_port")
        return replace(endpoints, grpc=(*endpoints.grpc, f"{gateways.HOST}:0"))

    @contextmanager
    def before(self, cell: Launched, log_level: str, lost: Callable[[], None]) -> Iterator[Gateway]:
        """The gateway, for as long as the block lasts."""
        workers = cell.info.grpc[-1:]
        with gateways.launch(
            workers, self.port, self.metrics_port, log_level, echo=echo_to_stderr, lost=lost
        ) as gateway:
            yield gateway


def _run(
    settings: Settings,
    endpoints: Endpoints,
    front: _Front | None,
    placement: str,
    drain_seconds: float,
    log_level: str,
    json_out: bool,
) -> int:
    """Start a cell, say where it is, and keep it until a signal comes."""
    with (
        loading(settings.model, consoles.stderr()) as watch,
        launch(
            settings, endpoints, placement, log_level, drain_seconds, echo=echo_to_stderr, watch=watch
        ) as cell,
    ):
        until = _Stop(cell)
        with front.before(cell, log_level, until.ask) if front is not None else nullcontext() as gateway:
            until.listen()
            watch.done()
            with settled():
                _announce(cell, gateway, settings, endpoints.metrics_host, json_out)
                until.wait(drain_seconds)
    return EXIT_OK


class _Stop:
    """Waits for the end of a cell; the first SIGTERM or SIGINT drains it, the second one ends it."""

    def __init__(self, cell: Launched) -> None:
        self._cell = cell
        self._asked = Stop()

    def listen(self) -> None:
        """From here on signals mean this."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)

    def wait(self, drain_seconds: float) -> None:
        """Return when the cell has stopped.

        Raises:
            BraidError: what ended a process that could not be kept running.
        """
        if self._cell.supervisor is not None:
            wait_for_stop(self._cell.supervisor.join)
            return
        wait_for_stop(self._asked.wait)
        with self._cell.client() as client:
            client.drain(drain_seconds)

    def ask(self) -> None:
        """Have the cell drain and stop."""
        self._asked.set()
        if self._cell.supervisor is not None:
            self._cell.supervisor.stop()

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._asked.is_set():
            log.warning("%s again: stopping at once", name)
            if self._cell.supervisor is None:
                sys.exit(EXIT_INTERRUPTED)
            self._cell.supervisor.kill()
        else:
            log.info("%s: draining; once more stops at once", name)
            self.ask()


def _announce(
    cell: Launched, gateway: Gateway | None, settings: Settings, metrics_host: str, json_out: bool
) -> None:
    if json_out:
        more = {} if gateway is None else {GATEWAY: gateway.url}
        print(json.dumps({**cell.info.to_json(), **more}), flush=True)
        return
    plans, console = settings.plans(), consoles.stdout()
    console.print(f"[bold]{settings.model.resolve().name}[/]  {layer_summary(plans)}")
    console.print(strip(plans.target, console.width, console.options.ascii_only))
    table = consoles.table(("process", "left"), ("address", "left"), ("metrics", "left"))
    for name in (ORCHESTRATOR, FULL, LINEAR):
        port = cell.info.metrics[name]
        addresses = [cell.info.address, *cell.info.grpc] if name == ORCHESTRATOR else []
        table.add_row(name, "  ".join(addresses), f"http://{metrics_host}:{port}/metrics")
    if gateway is not None:
        table.add_row(GATEWAY, f"{gateway.url}/v1", f"http://{gateways.HOST}:{gateway.metrics_port}/metrics")
    console.print(table)
    if cell.info.page:
        console.print(f"live page  [bold]{cell.info.page}[/]")
    console.print(f'braid generate {settings.model} "def " --connect {cell.address}', style="dim")
    sys.stdout.flush()
