"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from braid_wire.errors import RequestInvalid

from braid_orchestrator.settings import DISPATCHES, DTYPES, STATE_DTYPES, Settings, parse_bytes

Command = Callable[..., Any]
PEM = click.Path(exists=True, dir_okay=False, path_type=Path)
_COUNT = click.IntRange(min=1)
_DEFAULTS = Settings(Path())


class Bytes(click.ParamType):
    """A number of bytes: 4096, 512MiB, 1.5GiB."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_bytes(value)
        except RequestInvalid as error:
            self.fail(error.message, param, ctx)


def setting_options(command: Command) -> Command:
    """The options of `Settings` but its model; the command gets `settings`, still without one."""
    names = ("dtype", "state_dtype", "dispatch", "threads", "trust_remote_code", *_LIMITS)

    def call(**values: Any) -> Any:
        given = {name: values.pop(name) for name in names}
        return command(settings=Settings(Path(), **given), **values)

    call.__doc__, call.__name__ = command.__doc__, command.__name__
    wrapped: Command = call
    for option in reversed(_options()):
        wrapped = option(wrapped)
    # click collects the options of one function on it; those of the wrapped one come first.
    call.__click_params__ = [  # type: ignore[attr-defined]
        *call.__dict__.get("__click_params__", []),
        *command.__dict__.get("__click_params__", []),
    ]
    return wrapped


_LIMITS = ("max_tokens", "max_sequences", "max_context", "page_size", "pool_bytes")


def _options() -> list[Callable[[Command], Command]]:
    return [
        click.option(
            "--dtype",
            type=click.Choice(DTYPES),
            default=_DEFAULTS.dtype,
            show_default=True,
            help="Of weights, activations and pages; auto: the checkpoint's own.",
        ),
        click.option(
            "--state-dtype",
            type=click.Choice(STATE_DTYPES),
            default=_DEFAULTS.state_dtype,
            show_default=True,
            help="Of recurrent states.",
        ),
        click.option(
            "--dispatch",
            type=click.Choice(DISPATCHES),
            default=_DEFAULTS.dispatch,
            show_default=True,
            help="How a layer reaches its service: messages on one stream, or a call for each.",
        ),
        click.option(
            "--threads",
            type=click.IntRange(min=0),
            default=_DEFAULTS.threads,
            help="Threads of each process; 0 (the default): $OMP_NUM_THREADS, else one for each core.",
        ),
        _limit("--max-tokens", _DEFAULTS.max_tokens, "Most tokens of one step."),
        _limit("--max-sequences", _DEFAULTS.max_sequences, "Most sequences of one step."),
        _limit("--max-context", _DEFAULTS.max_context, "Most tokens of one sequence."),
        _limit("--page-size", _DEFAULTS.page_size, "Positions in a page."),
        click.option(
            "--pool-bytes",
            type=Bytes(),
            default="1GiB",
            show_default=True,
            help="Memory of all pages and states; it is taken as it is used.",
        ),
        click.option(
            "--trust-remote-code", is_flag=True, help="Run code that lies in the model's directory."
        ),
    ]


def _limit(name: str, default: int, text: str) -> Callable[[Command], Command]:
    return click.option(name, type=_COUNT, default=default, show_default=True, help=text)


def connect_options(command: Command) -> Command:
    """`--connect` and `--ca`: which running cell to ask."""
    command = click.option("--ca", type=PEM, help="PEM of the authority behind a TLS address.")(command)
    return click.option(
        "--connect",
        metavar="ADDRESS",
        help="A running cell: unix:PATH or HOST:PORT.",
    )(command)
