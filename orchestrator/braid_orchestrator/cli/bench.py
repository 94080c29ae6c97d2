"""`braid bench`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from braid_orchestrator import console as consoles
from braid_orchestrator.settings import DISPATCHES

_DTYPES = ("float32", "bfloat16")


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


@click.group()
def bench() -> None:
    """Measure a cell against transformers and the embedded placement, in one run.

    All peers have the same weights, dtype and threads, and take turns. Nothing is reported where
    their logits disagree.
    """


def _options(batches: str, contexts: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options of one benchmark."""
    options = [
        click.option(
            "--model",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            help="Checkpoint directory; without it, a 10 M-parameter hybrid with random weights.",
        ),
        click.option("--batch", type=Counts(), default=batches, show_default=True, help="Sequences."),
        click.option("--context", type=Counts(), default=contexts, show_default=True, help="Tokens of each."),
        click.option("--dtype", type=click.Choice(_DTYPES), default="float32", show_default=True),
        click.option("--dispatch", type=click.Choice(DISPATCHES), default="walk", show_default=True),
        click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of each peer."),
        click.option("--steps", type=click.IntRange(2), default=32, show_default=True, help="Decode steps."),
        click.option("--repeats", type=click.IntRange(1), default=5, show_default=True),
        click.option("--json", "json_out", is_flag=True, help="Print one JSON object."),
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@bench.command()
@_options("1,8,64", "512")
def decode(json_out: bool, **given: Any) -> None:
    """Tokens per second when every sequence makes one token a step."""
    _run("decode", json_out, given)


@bench.command()
@_options("1", "2048")
def prefill(json_out: bool, **given: Any) -> None:
    """Tokens per second of prompts that begin anew."""
    _run("prefill", json_out, given)


def _run(name: str, json_out: bool, given: dict[str, Any]) -> None:
    import torch
    from transformers.utils import logging as transformers_logging

    from braid_orchestrator import bench as benches

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    runs = {"decode": benches.decode, "prefill": benches.prefill}
    stderr = consoles.stderr()
    with stderr.status("starting") as spinner:
        options = benches.BenchOptions(
            model=given["model"],
            dtype=getattr(torch, given["dtype"]),
            dispatch=given["dispatch"],
            threads=given["threads"],
            batches=given["batch"],
            contexts=given["context"],
            steps=given["steps"],
            repeats=given["repeats"],
            progress=spinner.update,
        )
        rows = runs[name](options)
    if json_out:
        print(json.dumps({"bench": name, "rows": rows}, indent=2))
    else:
        benches.show(rows, consoles.stdout())
