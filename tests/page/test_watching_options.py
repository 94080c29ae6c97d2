"""How a command line says where a cell can be watched."""

from __future__ import annotations

from typing import Any

import click
import pytest
from braid_orchestrator.watching import PAGE_PORT, Watching, watching_options
from click.testing import CliRunner


def parsed(*arguments: str) -> tuple[Watching, int | None]:
    """What a command with these options gets."""
    found: list[Any] = []

    @click.command()
    @click.option("--metrics-port", type=int)
    @watching_options
    def command(watching: Watching, metrics_port: int | None) -> None:
        found.append((watching, metrics_port))

    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    if done.exit_code != 0:
        raise click.UsageError(done.output)
    (got,) = found
    return got


@pytest.mark.parametrize(
    ("arguments", "port"),
    [
        ((), PAGE_PORT),
        (("--metrics-port", "0"), 0),
        (("--metrics-port", "9500"), 9504),
        (("--metrics-port", "65533"), 0),
        (("--metrics-port", "9500", "--page-port", "0"), 0),
        (("--page-port", "8080"), 8080),
        (("--no-page",), None),
    ],
)
def test_the_page_lies_behind_the_metrics(arguments: tuple[str, ...], port: int | None) -> None:
    assert parsed(*arguments)[0].page_port == port


def test_a_port_for_no_page_is_refused() -> None:
    with pytest.raises(click.UsageError, match="contradict"):
        parsed("--no-page", "--page-port", "8080")


@pytest.mark.parametrize(
    "watching",
    [
        Watching(),
        Watching(0),
        Watching(8080, "::1", ("a.example", "b"), "http://127.0.0.1:4317"),
        Watching(None, otlp_endpoint="https://collector:4317"),
    ],
)
def test_a_process_is_told_what_the_command_was(watching: Watching) -> None:
    assert parsed(*watching.arguments()) == (watching, None)
