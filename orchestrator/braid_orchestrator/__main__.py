"""`python -m braid_orchestrator`: serves one cell, given its two services."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
from braid_wire.metrics import PORTS
from braid_wire.process import begin_loading, log_level_option
from braid_wire.rpc import Tls

from braid_orchestrator.cli.options import PEM, setting_options
from braid_orchestrator.settings import Settings
from braid_orchestrator.watching import Watching, watching_options


@click.command("braid-orchestrator")
@click.option("--model", required=True, type=click.Path(path_type=Path), help="Directory of the checkpoint.")
@click.option("--full", required=True, metavar="ADDRESS", help="The full-attention service.")
@click.option("--linear", required=True, metavar="ADDRESS", help="The linear-attention service.")
@click.option(
    "--address", "addresses", multiple=True, required=True, help="Where to serve: unix:PATH or HOST:PORT."
)
@click.option("--grpc", multiple=True, metavar="HOST:PORT", help="A further address to serve at.")
@click.option(
    "--runtime-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Private directory for the socket that hands over memory; the default is one of its own.",
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    default=PORTS["orchestrator"],
    show_default=True,
    help="Port of /metrics; 0 picks a free one.",
)
@click.option("--metrics-host", default="127.0.0.1", show_default=True, help="Host of /metrics.")
@click.option("--tls-cert", type=PEM, help="PEM certificate; TCP beyond loopback needs one.")
@click.option("--tls-key", type=PEM, help="PEM key of the certificate.")
@click.option("--parent", type=int, help="Process id of the parent; this process ends when it does.")
@click.option(
    "--drain-seconds",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Longest time that accepted requests get to finish after SIGTERM.",
)
@log_level_option()
@watching_options
@setting_options()
def main(
    settings: Settings,
    watching: Watching,
    model: Path,
    full: str,
    linear: str,
    addresses: tuple[str, ...],
    grpc: tuple[str, ...],
    runtime_dir: Path | None,
    metrics_port: int,
    metrics_host: str,
    tls_cert: Path | None,
    tls_key: Path | None,
    parent: int | None,
    drain_seconds: float,
    log_level: str,
) -> None:
    """Serve a model whose attention runs in two services.

    Prints one line of JSON on stdout once it serves. Exits with 0 after SIGTERM, 2 on bad usage, 1
    on a fault.
    """
    begin_loading()
    # Imported here so that --help and a refused option do not wait for torch.
    from braid_orchestrator.node import NodeOptions, run_node

    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key must be given together")
    options = NodeOptions(
        addresses=(*addresses, *grpc),
        full=full,
        linear=linear,
        runtime_dir=runtime_dir,
        metrics_port=metrics_port,
        metrics_host=metrics_host,
        tls=Tls(tls_cert, tls_key) if tls_cert is not None and tls_key is not None else None,
        parent=parent,
        drain_seconds=drain_seconds,
        log_level=log_level,
        watching=watching,
    )
    run_node(replace(settings, model=model), options)


if __name__ == "__main__":
    main(prog_name="braid-orchestrator")
