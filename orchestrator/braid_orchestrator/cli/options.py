"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click
from braid_wire.errors import RequestInvalid

from braid_orchestrator.settings import (
    DISPATCHES,
    DTYPES,
    MOST_GUESSES,
    OVERLAPS,
    PLACEMENTS,
    SEGMENTS,
    STATE_DTYPES,
    Settings,
    parse_bytes,
)

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


def setting_options(without: tuple[str, ...] = ()) -> Callable[[Command], Command]:
    """The options of `Settings` but its model, which the command sets; it gets `settings`.

    Args:
        without: names of settings that the command has no option for.
    """
    options = {name: option for name, option in _options().items() if name not in without}

    def decorate(command: Command) -> Command:
        @wraps(command)
        def call(**values: Any) -> Any:
            given = {name: values.pop(name) for name in options}
            return command(settings=Settings(Path(), **given), **values)

        wrapped: Command = call
        for option in reversed(options.values()):
            wrapped = option(wrapped)
        return wrapped

    return decorate


def _options() -> dict[str, Callable[[Command], Command]]:
    """Setting → its option, in the order of the help text."""
    return {
        "dtype": click.option(
            "--dtype",
            type=click.Choice(DTYPES),
            default=_DEFAULTS.dtype,
            show_default=True,
            help="Of weights, activations and pages; auto: the checkpoint's own.",
        ),
        "state_dtype": click.option(
            "--state-dtype",
            type=click.Choice(STATE_DTYPES),
            default=_DEFAULTS.state_dtype,
            show_default=True,
            help="Of recurrent states.",
        ),
        "device": click.option(
            "--device",
            default=_DEFAULTS.device,
            show_default=True,
            metavar="cpu|cuda|cuda:N",
            help="Where the model and all attention run.",
        ),
        "dispatch": click.option(
            "--dispatch",
            type=click.Choice(DISPATCHES),
            default=_DEFAULTS.dispatch,
            show_default=True,
            help="How a layer reaches its service: messages on one stream, or a call for each.",
        ),
        "threads": click.option(
            "--threads",
            type=click.IntRange(min=0),
            default=_DEFAULTS.threads,
            help="Threads of each process; 0 (the default): $OMP_NUM_THREADS, else one for each core.",
        ),
        "segments": click.option(
            "--segments",
            type=click.Choice(SEGMENTS),
            default=_DEFAULTS.segments,
            show_default=True,
            help="What runs the model between its attention layers; off: its own modules.",
        ),
        "overlap": click.option(
            "--overlap",
            type=click.Choice(OVERLAPS),
            default=_DEFAULTS.overlap,
            show_default=True,
            help="Run steps in two lanes, one in the body while the other is in a service.",
        ),
        "max_tokens": _limit("--max-tokens", _DEFAULTS.max_tokens, "Most tokens of one step."),
        "max_sequences": _limit("--max-sequences", _DEFAULTS.max_sequences, "Most sequences of one step."),
        "max_context": _limit("--max-context", _DEFAULTS.max_context, "Most tokens of one sequence."),
        "page_size": _limit("--page-size", _DEFAULTS.page_size, "Positions in a page."),
        "pool_bytes": click.option(
            "--pool-bytes",
            type=Bytes(),
            default="1GiB",
            show_default=True,
            help="Memory of all pages and states; it is taken as it is used.",
        ),
        "max_waiting": _limit("--max-waiting", _DEFAULTS.max_waiting, "Most requests that wait for a place."),
        "prefix_cache": click.option(
            "--prefix-cache/--no-prefix-cache",
            default=_DEFAULTS.prefix_cache,
            show_default=True,
            help="Compute what requests have in common at their beginning once.",
        ),
        "speculative": click.option(
            "--speculative",
            type=click.IntRange(0, MOST_GUESSES),
            default=_DEFAULTS.speculative,
            show_default=True,
            help="Tokens that the model's own draft (MTP) guesses ahead; 0: none.",
        ),
        "speculative_adaptive": click.option(
            "--speculative-adaptive/--speculative-fixed",
            default=_DEFAULTS.speculative_adaptive,
            show_default=True,
            help="Guess fewer tokens, or none, where that has shown to be faster.",
        ),
        "trust_remote_code": click.option(
            "--trust-remote-code", is_flag=True, help="Run code that lies in the model's directory."
        ),
    }


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


def placement_option(command: Command) -> Command:
    """`--placement` of a cell that the command starts."""
    return click.option(
        "--placement",
        type=click.Choice(PLACEMENTS),
        default=PLACEMENTS[0],
        show_default=True,
        help="Of a cell that is started here: three processes, or everything in this one.",
    )(command)
