"""What it costs to be watched: layers counted, a page followed, requests traced; at batch 1.

    python benchmarks/watching.py [--turns 15] [--tokens 200] [--out watching.json]

One cell of three processes on models/tiny. Counting is timed by itself (`metrics_cost.py` switches it on and
off); the page is followed in every other turn of one run, and told as the median, over neighbouring turns, of
how much longer a step takes with it. The reader is in this process and takes its part of the time too.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from braid_orchestrator.bench.cells import Services
from braid_orchestrator.cell import Cell, CellOptions
from braid_orchestrator.page import Page, Place
from braid_orchestrator.request import Finish, Finished, Request
from braid_orchestrator.step import Step
from braid_orchestrator.store import Limits
from braid_orchestrator.threads import use_threads

TINY = Path(__file__).resolve().parent.parent / "models" / "tiny"
LIMITS = Limits(max_tokens=256, max_sequences=4, max_context=1024, page_size=16, pool_bytes=1 << 27)
TIMES = 500


@dataclass(frozen=True)
class Cost:
    """Of one way to watch."""

    name: str
    without_us: float
    with_us: float
    share: float
    """By how much a step is longer, median over neighbouring turns."""


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--out", type=Path, help="Write JSON there too.")
    options = parser.parse_args()
    use_threads(1)
    with Services(1) as services, services.remote(TINY, CellOptions(limits=LIMITS)) as cell:
        step_us(cell, options.tokens)
        costs = [
            compare("a page that is followed", cell, options, nullcontext, lambda: followed(cell)),
        ]
        bookkeeping_us = record_us(cell, options.tokens)
    traced_us = trace_us()
    for cost in costs:
        times = f"{cost.without_us:8.1f} µs a step without, {cost.with_us:8.1f} with"
        print(f"{cost.name:24} {times}: {cost.share:+.2%}")
    print(f"{'counting, by itself':24} {bookkeeping_us:8.1f} µs a step")
    print(f"{'a request to be traced':24} {traced_us:8.1f} µs of the engine's thread")
    if options.out:
        found = {
            "costs": [asdict(cost) for cost in costs],
            "record_us": bookkeeping_us,
            "trace_us": traced_us,
        }
        options.out.write_text(json.dumps(found, indent=2) + "\n")
    return 0


Switch = Callable[[], AbstractContextManager[object]]


def compare(name: str, cell: Cell, options: argparse.Namespace, off: Switch, on: Switch) -> Cost:
    """Both in turns."""
    times: dict[str, list[float]] = {"off": [], "on": []}
    for _ in range(options.turns):
        for key, switch in (("off", off), ("on", on)):
            with switch():
                times[key].append(step_us(cell, options.tokens))
    shares = [after / before - 1 for before, after in zip(times["off"], times["on"], strict=True)]
    return Cost(
        name,
        statistics.median(times["off"]),
        statistics.median(times["on"]),
        statistics.median(shares),
    )


def step_us(cell: Cell, tokens: int) -> float:
    """Mean time of the decode steps of one request."""
    prompt = np.random.default_rng(0).integers(8, 2000, 32)
    request = Request("bench", prompt, max_tokens=tokens)
    cell.engine.submit(request)
    times = [time.perf_counter() for _ in request.stream()]
    return (times[-2] - times[0]) / (len(times) - 2) * 1e6


@contextmanager
def followed(cell: Cell) -> Iterator[None]:
    """Somebody follows the page."""
    page = Page(cell, Place())
    connection = http.client.HTTPConnection("127.0.0.1", page.port)
    connection.request("GET", "/events")
    response = connection.getresponse()

    def read() -> None:
        while response.readline():
            pass

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield
    finally:
        page.close()
        reader.join()
        connection.close()


def record_us(cell: Cell, tokens: int) -> float:
    """Counting one step's layers, over and over."""
    seen: list[tuple[Step, int]] = []
    record = cell.dispatcher.record
    cell.dispatcher.record = lambda *step: seen.append(step)  # type: ignore[method-assign]
    step_us(cell, tokens)
    cell.dispatcher.record = record  # type: ignore[method-assign]
    return repeated(lambda: record(*seen[-1]), TIMES)


def trace_us() -> float:
    """What the engine does for the trace of one request; its spans are made elsewhere."""
    from braid_orchestrator.tracing import Traces

    traces = Traces.to_collector("tiny", "http://127.0.0.1:9")
    request = Request("bench", np.array([5, 6, 7]), max_tokens=4)
    request.began, request.first_token = request.arrived, request.arrived
    took = repeated(lambda: traces.ended(request, Finished(Finish.LENGTH)), TIMES)
    traces.close()
    return took


def repeated(act: Callable[[], object], times: int) -> float:
    """Median of five means, microseconds."""
    means: Sequence[float] = [_mean_us(act, times) for _ in range(5)]
    return statistics.median(means)


def _mean_us(act: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        act()
    return (time.perf_counter() - began) / times * 1e6


if __name__ == "__main__":
    sys.exit(main())
