"""`braid trace`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from braid_wire.errors import ConfigInvalid

from braid_orchestrator import console as consoles
from braid_orchestrator.settings import DISPATCHES, OVERLAPS

if TYPE_CHECKING:
    from braid_orchestrator.bench.trace import TraceOptions
    from braid_orchestrator.timeline import Timeline


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    required=True,
    help="The file to write: a Chrome trace in JSON, for ui.perfetto.dev.",
)
@click.option(
    "--steps", type=click.IntRange(1), default=16, show_default=True, help="Decode steps behind the prompt."
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=64, show_default=True, help="Of each.")
@click.option("--dtype", type=click.Choice(("float32", "bfloat16")), default="float32", show_default=True)
@click.option("--dispatch", type=click.Choice(DISPATCHES), default="walk", show_default=True)
@click.option(
    "--overlap",
    type=click.Choice(OVERLAPS),
    default="off",
    show_default=True,
    help="Whether steps run in two lanes; auto tries both ways first.",
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of each process.")
def trace(model: Path, out: Path, **given: Any) -> None:
    """Record when every layer of some steps was handed over, received, computed and taken back.

    MODEL runs in a cell of three processes on prompts of random tokens, after a few steps that nobody
    records. The trace has one process for each of the cell's, with a track for each lane.
    """
    if not model.is_dir():
        raise ConfigInvalid(f"{model} is not a directory with a model", field="model")

    import torch
    from transformers.utils import logging as transformers_logging

    from braid_orchestrator.bench.trace import TraceOptions, record_steps

    transformers_logging.disable_progress_bar()
    dtype = getattr(torch, given.pop("dtype"))
    options = TraceOptions(model=model, dtype=dtype, **given)
    with consoles.stderr().status("running"):
        timeline = record_steps(options)
    about = {"model": model.name, "command": "braid trace", **given}
    out.write_text(json.dumps(timeline.to_json(about)) + "\n")
    _show(timeline, options, out)


def _show(timeline: Timeline, options: TraceOptions, out: Path) -> None:
    seconds = timeline.shares()
    share = {name: f"{value / seconds['steps']:.0%}" for name, value in seconds.items()}
    consoles.stdout().print(
        f"{out}: a prompt and {options.steps} decode steps, {seconds['steps'] * 1e3:.1f} ms: body "
        f"{share['body']}, waiting {share['waits']}; kernels {share['kernels']}, hops {share['hops']}; "
        "open it at ui.perfetto.dev"
    )
