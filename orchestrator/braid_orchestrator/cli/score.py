"""`braid score`."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from braid.v1 import common_pb2
from braid_wire import convert
from braid_wire.errors import LayerPlanDisputed, RequestInvalid, ServiceFault, ServiceLost
from braid_wire.layers import digest
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open

from braid_orchestrator import console as consoles
from braid_orchestrator.cli.options import connect_options, placement_option, setting_options
from braid_orchestrator.cli.session import Session, session
from braid_orchestrator.layer_plan import ModelPlans
from braid_orchestrator.scrape import scrape, total
from braid_orchestrator.settings import Settings

_PREFIX, _OUT_PREFIX, _MTP_PREFIX = "ids_", "logits_", "mtp_logits_"
_LOOK_S = 0.2  # between two looks at how far the scoring is


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--ids",
    "source",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Safetensors file with one integer tensor ids_NAME [L] for each sequence.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write logits_NAME, float32 [L, V], of each.",
)
@click.option(
    "--chunk",
    type=click.IntRange(min=0),
    default=0,
    help="Most tokens of one sequence in a step; 0 (the default): as many as fit.",
)
@click.option(
    "--decode-tail",
    type=click.IntRange(min=0),
    default=0,
    help="Feed so many last tokens of each sequence one at a time, as if they had been made.",
)
@click.option(
    "--mtp",
    is_flag=True,
    help="Run the draft (MTP) layers too and write mtp_logits_NAME, float32 [L-1, V], of each.",
)
@placement_option
@connect_options
@setting_options()
def score(
    settings: Settings,
    model: Path,
    source: Path,
    out: Path,
    chunk: int,
    decode_tail: int,
    mtp: bool,
    placement: str,
    connect: str | None,
    ca: Path | None,
) -> None:
    """Compute the logits of given tokens, all sequences in packed steps through the services.

    Limits that the sequences do not fit in are raised. A cell joined with --connect must be on this
    machine and hold the same layers as MODEL.
    """
    settings = replace(settings, model=model)
    plans = settings.plans()
    sequences = read_ids(source, plans.vocab_size)
    if not out.resolve().parent.is_dir():
        raise RequestInvalid(f"{out.parent} is not a directory", field="out")
    settings = settings.raised_for([len(ids) for ids in sequences.values()])
    terminal = consoles.stderr()
    with session(settings, connect, ca, placement, terminal) as cell:
        if connect is not None:
            _expect_same_layers(cell, plans)
        tokens = [ids.tolist() for ids in sequences.values()]
        with _progress(cell, sum(map(len, tokens)), terminal):
            scores = cell.client.score(tokens, chunk, want_logits=True, decode_tail=decode_tail, mtp=mtp)
    logits = {_OUT_PREFIX + name: rows.numpy() for name, rows in zip(sequences, scores.logits, strict=True)}
    for name, rows in zip(sequences, scores.mtp_logits, strict=mtp):
        if rows is not None:
            logits[_MTP_PREFIX + name] = rows.numpy()
    _write(out, logits)
    noun = "sequence" if len(tokens) == 1 else "sequences"
    terminal.print(
        f"{len(tokens)} {noun}, {sum(map(len, tokens)):,} tokens in {scores.steps} steps → {out}", style="dim"
    )


def read_ids(path: Path, vocab_size: int) -> dict[str, np.ndarray]:
    """The sequences of a file, by name: int64 [L] each.

    Raises:
        RequestInvalid: the file has none, or one is not a row of token ids of the model.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            found = {
                key.removeprefix(_PREFIX): file.get_tensor(key)
                for key in file.keys()  # noqa: SIM118 (the file is no mapping)
                if key.startswith(_PREFIX)
            }
    except (SafetensorError, OSError, TypeError) as error:
        raise RequestInvalid(f"{path} cannot be read as safetensors: {error}", field="ids") from error
    if not found:
        raise RequestInvalid(f"{path} has no tensor whose name begins with {_PREFIX}", field="ids")
    for name, ids in found.items():
        _check_ids(_PREFIX + name, ids, vocab_size)
    return {name: ids.astype(np.int64) for name, ids in found.items()}


def _check_ids(name: str, ids: np.ndarray, vocab_size: int) -> None:
    if ids.dtype.kind not in "iu":
        raise RequestInvalid(f"{name} is {ids.dtype}; token ids are integers", field=name)
    if ids.ndim != 1 or len(ids) < 1:
        raise RequestInvalid(f"{name} is {list(ids.shape)}; it must be [L] with L ≥ 1", field=name)
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if len(wrong):
        raise RequestInvalid(
            f"{name} has token id {int(wrong[0])}; ids are 0 … {vocab_size - 1}",
            field=name,
            value=int(wrong[0]),
        )


def _expect_same_layers(cell: Session, plans: ModelPlans) -> None:
    target = next(plan for plan in cell.client.plan().plans if plan.role == common_pb2.ROLE_TARGET)
    if digest(convert.plan_from_pb(target)) != digest(plans.target):
        raise LayerPlanDisputed(f"the cell at {cell.client.address} holds other layers than this model")


def _write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """All of the file, or none of it."""
    from safetensors.numpy import save_file

    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, draft)
        draft.replace(path)
    except OSError as error:
        raise RequestInvalid(f"{path} cannot be written: {error}", field="out") from error
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def _progress(cell: Session, tokens: int, terminal: Console) -> Iterator[None]:
    """A bar on a terminal, moved by what the orchestrator counts."""
    if not terminal.is_terminal or cell.info is None:
        yield
        return
    done = threading.Event()
    columns: list[Any] = [
        TextColumn("scoring"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=terminal, transient=True) as bar:
        task = bar.add_task("", total=tokens)
        port = cell.info.metrics["orchestrator"]
        watcher = threading.Thread(
            target=_watch, args=(port, done, lambda fed: bar.update(task, completed=fed)), daemon=True
        )
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


def _watch(port: int, done: threading.Event, show: Any) -> None:
    before: float | None = None
    while not done.wait(_LOOK_S):
        try:
            fed = total(scrape(port), "braid_prompt_tokens_total")
        except (ServiceLost, ServiceFault):
            continue  # it comes back, or the scoring fails and says why
        before = fed if before is None else before
        show(fed - before)
