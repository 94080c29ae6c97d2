"""`braid bench`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from braid_orchestrator import console as consoles
from braid_orchestrator.settings import DISPATCHES, OVERLAPS, SEGMENTS

if TYPE_CHECKING:
    from braid_orchestrator.bench.options import BenchOptions, Row

_DTYPES = ("float32", "bfloat16")
# Those of the package `bench`, which is not imported for its names alone: that takes seconds.
TRANSPORT_NAMES = ("doorbells", "grpc_stream", "grpc_unary", "grpc_bytes")
LOAD_NAMES = ("free", "loaded")

Command = Callable[..., None]


class Counts(click.ParamType):
    """Positive integers with commas between them: 1,8,64."""

    name = "counts"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            counts = tuple(int(word) for word in str(value).split(","))
        except ValueError:
            counts = ()
        if not counts or min(counts) < 1:
            self.fail(f"{value!r} is not a list of positive integers such as 1,8,64", param, ctx)
        return counts


class Names(click.ParamType):
    """Some of a few names, with commas between them."""

    name = "names"

    def __init__(self, known: Sequence[str]) -> None:
        self._known = known

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(dict.fromkeys(word for word in str(value).split(",") if word))
        unknown = [name for name in names if name not in self._known]
        if unknown:
            self.fail(f"{', '.join(unknown)} is none of {', '.join(self._known)}", param, ctx)
        return names


@dataclass(frozen=True)
class _Defaults:
    """Of the options that every benchmark has."""

    batches: str
    contexts: str
    steps: int = 32
    repeats: int = 5


@click.group()
def bench() -> None:
    """Measure a cell against its peers, in one run.

    All peers have the same weights, dtype and threads, and take turns. Nothing is reported where
    their logits disagree.
    """


def _options(defaults: _Defaults, *more: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """The options of one benchmark: the common ones, and its own."""
    options: list[Callable[[Command], Command]] = [
        click.option(
            "--model",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            help="Checkpoint directory; without it, a 10 M-parameter hybrid with random weights.",
        ),
        click.option(
            "--batch", type=Counts(), default=defaults.batches, show_default=True, help="Sequences."
        ),
        click.option(
            "--context", type=Counts(), default=defaults.contexts, show_default=True, help="Tokens of each."
        ),
        click.option("--dtype", type=click.Choice(_DTYPES), default="float32", show_default=True),
        click.option(
            "--segments",
            type=click.Choice(SEGMENTS),
            default="auto",
            show_default=True,
            help="What runs the body between its layers.",
        ),
        click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of each peer."),
        click.option(
            "--steps",
            type=click.IntRange(2),
            default=defaults.steps,
            show_default=True,
            help="Decode steps of a turn.",
        ),
        click.option(
            "--repeats",
            type=click.IntRange(1),
            default=defaults.repeats,
            show_default=True,
            help="Turns of each peer that count; one more warms up.",
        ),
        *more,
        click.option("--json", "json_out", is_flag=True, help="Print one JSON object."),
        click.option(
            "--out",
            type=click.Path(dir_okay=False, writable=True, path_type=Path),
            help="Write the JSON object to a file, too.",
        ),
    ]

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_DISPATCH = click.option("--dispatch", type=click.Choice(DISPATCHES), default="walk", show_default=True)
_OVERLAP = click.option(
    "--overlap",
    type=click.Choice(OVERLAPS),
    default="auto",
    show_default=True,
    help="Whether steps run in two lanes.",
)
_PEERS = click.option(
    "--peers",
    type=Names(("embedded", *TRANSPORT_NAMES[1:])),
    default="embedded",
    show_default=True,
    help="Beside transformers: the embedded placement, or cells with other transports.",
)
_TRANSPORT = click.option(
    "--transport", type=Names(TRANSPORT_NAMES), default=",".join(TRANSPORT_NAMES), show_default=True
)
_LOAD = click.option(
    "--load",
    type=Names(LOAD_NAMES),
    default=",".join(LOAD_NAMES),
    show_default=True,
    help="free: nothing else runs; loaded: a busy process on every core.",
)


_PROMPTS = click.option(
    "--prompts", type=Counts(), default="8", show_default=True, help="Sequences that are prefilled."
)
PHASE_NAMES = ("decode", "prefill")
_PHASE = click.option("--phase", type=Names(PHASE_NAMES), default=",".join(PHASE_NAMES), show_default=True)
SWEEP_NAMES = ("layers", "batch", "context")
_SWEEP = click.option(
    "--sweep", type=Names(SWEEP_NAMES), default=",".join(SWEEP_NAMES), show_default=True, help="What varies."
)
_RANGES = (
    click.option("--layers", type=Counts(), default="8,16,32,64,96", show_default=True, help="Of the model."),
    click.option(
        "--layers-context",
        type=click.IntRange(1),
        default=256,
        show_default=True,
        help="Tokens of the one sequence while layers vary.",
    ),
    click.option(
        "--batch-context",
        type=click.IntRange(1),
        default=64,
        show_default=True,
        help="Tokens of each sequence while their number varies.",
    ),
)


@bench.command()
@_options(_Defaults("1,8,64", "512"), _DISPATCH, _OVERLAP, _PEERS)
def decode(**given: Any) -> None:
    """Tokens per second when every sequence makes one token a step."""
    from braid_orchestrator.bench import runs

    _run("decode", given, runs.decode)


@bench.command()
@_options(_Defaults("1", "2048"), _DISPATCH, _OVERLAP, _PEERS)
def prefill(**given: Any) -> None:
    """Tokens per second of prompts that begin anew."""
    from braid_orchestrator.bench import runs

    _run("prefill", given, runs.prefill)


@bench.command()
@_options(_Defaults("1,8", "128"), _TRANSPORT, _LOAD)
def hop(transport: tuple[str, ...], load: tuple[str, ...], **given: Any) -> None:
    """Time in a layer that is not its kernel, transport against transport."""
    from braid_orchestrator.bench import hop as hops

    _run("hop", given, lambda options: hops.hop(options, transport, load))


@bench.command()
@_options(_Defaults("1,4,16,64,256", "1024,4096,16384,65536,131072", 8, 3), _SWEEP, *_RANGES)
def scale(sweep: tuple[str, ...], **given: Any) -> None:
    """Time of a decode step, and memory, against layers, sequences and context.

    One size varies at a time. The layers sweep needs the model of random weights. Contexts beyond 4096
    tokens are strung together from prompts of 2048: a step reads as much as after one long prompt.
    """
    from braid_orchestrator.bench import scale as scales

    ranges = scales.Ranges(
        layers=given["layers"],
        layers_context=given["layers_context"],
        batches=given["batch"],
        batches_context=given["batch_context"],
        contexts=given["context"],
    )
    _run("scale", given, lambda options: scales.scale(options, ranges, sweep))


@bench.command()
@_options(_Defaults("8,64", "256,1024", 24, 5), _PROMPTS, _PHASE)
def overlap(prompts: tuple[int, ...], phase: tuple[str, ...], **given: Any) -> None:
    """Two lanes, of which one is in the body while the other is in a service, against one."""
    from braid_orchestrator.bench import overlap as overlaps

    _run("overlap", given, lambda options: overlaps.overlap(options, prompts, phase))


@bench.command()
@click.argument("model", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--target", help="Address of a running cell; without it, MODEL is served for the time.")
@click.option("--rate", type=float, help="Open loop: conversations that begin in a second.")
@click.option("--burstiness", type=float, default=1.0, show_default=True, help="1: Poisson; less: bursts.")
@click.option(
    "--concurrency", type=click.IntRange(1), help="Conversations under way: all the time, or at most."
)
@click.option("--requests", type=click.IntRange(1), default=64, show_default=True)
@click.option("--dataset", default="synthetic", show_default=True, help="synthetic, or a JSONL file.")
@click.option(
    "--input-tokens", default="16:256", show_default=True, help="N or LOW:HIGH, of synthetic prompts."
)
@click.option("--output-tokens", default="8:64", show_default=True, help="N or LOW:HIGH.")
@click.option(
    "--prefix-share", type=float, default=0.0, show_default=True, help="Of prompts that begin alike."
)
@click.option("--prefix-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--turns", type=click.IntRange(1), default=1, show_default=True, help="Of each conversation.")
@click.option("--cancel-share", type=float, default=0.0, show_default=True, help="Given up after a token.")
@click.option("--slo-ttft-ms", type=float, help="What counts as goodput: time to the first token,")
@click.option("--slo-itl-ms", type=float, help="and the mean between tokens.")
@click.option("--speedup", is_flag=True, help="Run the same requests one at a time, too, and compare.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--max-sequences", type=click.IntRange(1), default=64, show_default=True, help="Of an own cell."
)
@click.option(
    "--max-tokens", type=click.IntRange(1), default=1024, show_default=True, help="Of an own cell's step."
)
@click.option(
    "--max-context", type=click.IntRange(1), default=1024, show_default=True, help="Of an own cell."
)
@click.option(
    "--threads",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of each process of an own cell; 0: as `braid serve` chooses.",
)
@click.option("--details", type=click.Path(dir_okay=False, path_type=Path), help="Every request, as JSON.")
@click.option("--json", "json_out", is_flag=True, help="Print one JSON object.")
@click.option("--out", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Write it, too.")
def serve(**given: Any) -> None:
    """Load on a serving cell: times to the first token, between tokens and in all, as percentiles.

    Open loop (--rate): requests arrive by a clock, and times count from then. Closed loop
    (--concurrency alone): so many are always under way.
    """
    from braid_orchestrator.bench import serve_run
    from braid_orchestrator.bench.record import record

    with consoles.stderr().status("starting") as spinner:
        rows, requests = serve_run.measure(given, lambda text: spinner.update(text))
    found = record("serve", _typed(click.get_current_context()), rows)
    if given["details"] is not None:
        given["details"].write_text(json.dumps(requests, indent=1) + "\n")
    if given["out"] is not None:
        given["out"].write_text(json.dumps(found, indent=1) + "\n")
    if given["json_out"]:
        print(json.dumps(found, indent=2))
    else:
        consoles.stdout().print(serve_run.table(rows))


def _run(name: str, given: dict[str, Any], measure: Callable[[BenchOptions], list[Row]]) -> None:
    from transformers.utils import logging as transformers_logging

    from braid_orchestrator.bench.record import record
    from braid_orchestrator.bench.view import show

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with consoles.stderr().status("starting") as spinner:
        rows = measure(_bench_options(given, lambda text: spinner.update(text)))
    found = record(name, _typed(click.get_current_context()), rows)
    if given["out"] is not None:
        given["out"].write_text(json.dumps(found, indent=1) + "\n")
    if given["json_out"]:
        print(json.dumps(found, indent=2))
    else:
        show(rows, consoles.stdout())


def _bench_options(given: dict[str, Any], progress: Callable[[str], None]) -> BenchOptions:
    import torch

    from braid_orchestrator.bench.options import BenchOptions

    kept = {name: given[name] for name in ("dispatch", "overlap", "peers") if name in given}
    return BenchOptions(
        model=given["model"],
        dtype=getattr(torch, given["dtype"]),
        segments=given["segments"],
        threads=given["threads"],
        batches=given["batch"],
        contexts=given["context"],
        steps=given["steps"],
        repeats=given["repeats"],
        progress=progress,
        **kept,
    )


def _typed(context: click.Context) -> str:
    """The command line as it was typed, but for where its report goes."""
    words = context.command_path.split()
    for param in context.command.params:
        value = context.params.get(param.name or "")
        if param.name in ("out", "json_out") or value is None:
            continue
        if context.get_parameter_source(param.name or "") is ParameterSource.COMMANDLINE:
            words += _typed_parameter(param, value)
    return shlex.join(words)


def _typed_parameter(param: click.Parameter, value: object) -> list[str]:
    """As it was typed: an argument has no name, a flag no value."""
    text = ",".join(str(item) for item in value) if isinstance(value, tuple) else str(value)
    if isinstance(param, click.Argument):
        return [text]
    return [param.opts[0]] if isinstance(param, click.Option) and param.is_flag else [param.opts[0], text]
