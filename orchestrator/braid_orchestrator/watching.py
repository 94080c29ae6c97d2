"""Where a cell can be watched: its live page and its traces, in words that a command line can carry.

Nothing here imports what serves them: a command that only starts processes must be quick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import click
from braid_wire.errors import ConfigInvalid
from braid_wire.metrics import PORTS

if TYPE_CHECKING:
    from braid_orchestrator.tracing import Traces

PAGE_OFFSET = 4
"""The page's port lies so far behind the first one of `/metrics`, where none is named."""
PAGE_PORT = PORTS["orchestrator"] + PAGE_OFFSET

_LAST_PORT = 65535

Command = Callable[..., Any]


@dataclass(frozen=True)
class Watching:
    """How a cell lets itself be watched.

    Args:
        page_port: of the live page; 0 picks a free one, None: there is no page.
        page_host: where it listens.
        page_names: names by which browsers may call it, beside `localhost` and addresses.
        otlp_endpoint: URL of the collector that gets a trace of each request; empty: nobody does.
    """

    page_port: int | None = None
    page_host: str = "127.0.0.1"
    page_names: tuple[str, ...] = ()
    otlp_endpoint: str = ""

    def traces(self, model: str) -> Traces | None:
        """Where traces of a model's requests go; None where nobody wants them.

        Raises:
            RequestInvalid: the endpoint is no URL of a collector.
            ConfigInvalid: the extra `otel` is not installed.
        """
        if not self.otlp_endpoint:
            return None
        try:
            from braid_orchestrator.tracing import Traces
        except ModuleNotFoundError as missing:
            raise ConfigInvalid(
                f"traces need OpenTelemetry, but {missing.name} is not installed; "
                "install the extra: braid-attention[otel]",
                field="otlp_endpoint",
            ) from missing
        return Traces.to_collector(model, self.otlp_endpoint)

    def arguments(self) -> list[str]:
        """The same as options of `python -m braid_orchestrator`."""
        page = ["--no-page"] if self.page_port is None else ["--page-port", str(self.page_port)]
        names = [word for name in self.page_names for word in ("--page-name", name)]
        traces = ["--otlp-endpoint", self.otlp_endpoint] if self.otlp_endpoint else []
        return [*page, "--page-host", self.page_host, *names, *traces]


def watching_options(command: Command) -> Command:
    """The options of `Watching`; the command, which must have `metrics_port` too, gets `watching`."""
    options = [
        click.option(
            "--page-port",
            type=click.IntRange(0, 65535),
            help="Port of the live page; 0: a free one.  "
            f"[default: {PAGE_PORT}; behind --metrics-port, where that is given]",
        ),
        click.option("--page-host", default="127.0.0.1", show_default=True, help="Host of the live page."),
        click.option(
            "--page-name",
            "page_names",
            multiple=True,
            metavar="NAME",
            help="A name by which browsers may call the page, beside localhost and addresses.",
        ),
        click.option("--no-page", is_flag=True, help="Serve no page."),
        click.option(
            "--otlp-endpoint",
            default="",
            metavar="URL",
            help="Send a trace of each request there by OTLP over gRPC: http://HOST:4317.",
        ),
    ]

    @wraps(command)
    def call(
        page_port: int | None,
        page_host: str,
        page_names: tuple[str, ...],
        no_page: bool,
        otlp_endpoint: str,
        metrics_port: int | None,
        **values: Any,
    ) -> Any:
        if no_page and page_port is not None:
            raise click.UsageError("--page-port and --no-page contradict each other")
        port = _usual_port(metrics_port) if page_port is None else page_port
        watching = Watching(None if no_page else port, page_host, page_names, otlp_endpoint)
        return command(watching=watching, metrics_port=metrics_port, **values)

    wrapped: Command = call
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped


def _usual_port(metrics_port: int | None) -> int:
    """The page's port where none is named; 0, a free one, where /metrics has a free one too."""
    if metrics_port is None:
        return PAGE_PORT
    behind = metrics_port + PAGE_OFFSET
    return behind if metrics_port and behind <= _LAST_PORT else 0
