"""`braid bench serve`: a cell, a load on it, and the rows that come of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from braid_wire.errors import RequestInvalid
from braid_wire.process import thread_count
from rich.table import Table

from braid_orchestrator.bench import serve
from braid_orchestrator.bench.options import Row
from braid_orchestrator.bench.workload import Conversation, Lengths, Synthetic, read_conversations
from braid_orchestrator.client import Client
from braid_orchestrator.discovery import known
from braid_orchestrator.launcher import launch
from braid_orchestrator.layer_plan import build_plans, load_config
from braid_orchestrator.scrape import scrape
from braid_orchestrator.settings import Settings

_QUEUE = "braid_request_queue_seconds_bucket"
_COLUMNS: Mapping[str, str] = {
    "load": "load",
    "requests": "requests",
    "completed": "completed",
    "tokens_per_s": "tokens/s",
    "requests_per_s": "requests/s",
    "ttft_ms_p50": "TTFT ms p50",
    "ttft_ms_p99": "p99",
    "itl_ms_p50": "ITL ms p50",
    "itl_ms_p99": "p99",
    "e2e_ms_p50": "E2E ms p50",
    "e2e_ms_p99": "p99",
    "goodput_per_s": "goodput/s",
    "speedup": "speed-up",
    "fairness": "fairness",
}


def measure(
    given: Mapping[str, Any], progress: Callable[[str], None]
) -> tuple[list[Row], list[dict[str, Any]]]:
    """The rows of a report, and every request of the load.

    Args:
        given: the options of the command, by name.
        progress: told what is done.

    Raises:
        RequestInvalid: an option is wrong.
        BraidError: the cell cannot start, or is lost.
    """
    load = serve.Load(
        given["rate"], given["concurrency"], given["burstiness"], given["cancel_share"],
        given["slo_ttft_ms"], given["slo_itl_ms"], given["seed"],
    )  # fmt: skip
    Lengths.parse(given["input_tokens"]), Lengths.parse(given["output_tokens"])
    with _cell(given) as (address, threads, model, dtype):
        conversations = _conversations(given, model)
        asyncio.run(serve.run(address, conversations[:2], serve.Load(concurrency=1)))  # warms up
        about = {"bench": "serve", "model": model.name, "dtype": dtype, "threads": threads}
        rows: list[Row] = []
        alone: list[serve.Outcome] = []
        if given["speedup"]:
            progress(f"{given['requests']} requests one at a time")
            one = replace(load, rate=None, concurrency=1, cancel_share=0.0)
            alone, row = _run(address, conversations, one, "one at a time")
            rows.append({**about, **row})
        name = f"open loop, {load.rate:g}/s" if load.rate is not None else f"closed loop, {load.concurrency}"
        progress(f"{given['requests']} requests, {name}")
        outcomes, row = _run(address, conversations, load, name, alone)
        rows.append({**about, **row})
    return rows, serve.details(outcomes)


def table(rows: list[Row]) -> Table:
    """Rows for people."""
    found = Table(box=None, pad_edge=False, header_style="bold")
    keys = [key for key in _COLUMNS if any(row.get(key) is not None for row in rows)]
    for key in keys:
        found.add_column(_COLUMNS[key], justify="right")
    for row in rows:
        found.add_row(*("-" if row.get(key) is None else str(row[key]) for key in keys))
    return found


def _run(
    address: str,
    conversations: list[Conversation],
    load: serve.Load,
    name: str,
    alone: list[serve.Outcome] | None = None,
) -> tuple[list[serve.Outcome], Row]:
    """One load from an empty prefix cache, and its row."""
    serve.flush(address)
    before = _queue(address)
    outcomes = asyncio.run(serve.run(address, conversations, load))
    left = asyncio.run(serve.settle(address))
    row = serve.report(name, outcomes, load, alone or ())
    return outcomes, {**row, **serve.queueing(before, _queue(address)), "in_use_afterwards": left}


def _queue(address: str) -> dict[float, float]:
    """Buckets of the cell's queueing times; none where its metrics are not on this machine."""
    info = known(address)
    if info is None:
        return {}
    found: dict[float, float] = {}
    for sample in scrape(info.metrics["orchestrator"]):
        if sample.name == _QUEUE:
            bound = float(sample.labels["le"])
            found[bound] = found.get(bound, 0.0) + sample.value
    return found


@contextmanager
def _cell(given: Mapping[str, Any]) -> Iterator[tuple[str, int | None, Path, str]]:
    """(address, threads if they are known, model, dtype) of the cell that the load is for."""
    model, target = given["model"], given["target"]
    if (model is None) == (target is None):
        raise RequestInvalid("give a MODEL to serve, or the --target of a running cell", field="target")
    if target is not None:
        with Client(target) as client:
            running = Path(client.status().model)
        yield target, None, running, "of the cell"
        return
    threads = thread_count(given["threads"])
    settings = Settings(
        model,
        threads=threads,
        max_sequences=given["max_sequences"],
        max_tokens=given["max_tokens"],
        max_context=given["max_context"],
    )
    with launch(settings) as launched:
        yield launched.address, threads, model, settings.dtype


def _conversations(given: Mapping[str, Any], model: Path) -> list[Conversation]:
    outputs = Lengths.parse(given["output_tokens"])
    if given["dataset"] != "synthetic":
        return read_conversations(Path(given["dataset"]), given["requests"], outputs, given["seed"])
    synthetic = Synthetic(
        vocabulary=build_plans(load_config(model)).vocab_size,
        inputs=Lengths.parse(given["input_tokens"]),
        outputs=outputs,
        prefix_share=given["prefix_share"],
        prefix_tokens=given["prefix_tokens"],
        turns=given["turns"],
        seed=given["seed"],
    )
    return synthetic.conversations(given["requests"])
