"""What counting steps and layers costs a decode step of one sequence: on against off, in turns.

    python benchmarks/metrics_cost.py [--model DIR] [--turns 1500] [--steps 2] [--out FILE]

The same cell is switched on and off every few steps, so that both meet the same machine; the cost is the
median over neighbouring turns. `process`: the services are processes of their own, and what the
orchestrator counts is switched. `embedded`: everything is in this process, and what both services count is
switched too, though they do that beside the step elsewhere. Exits with 1 where `process` costs over 1 %.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from braid_orchestrator.bench.cells import Services
from braid_orchestrator.bench.model import checkpoint
from braid_orchestrator.bench.options import BenchOptions, Row
from braid_orchestrator.bench.peers import CellPeer
from braid_orchestrator.bench.record import record
from braid_orchestrator.bench.runs import limits
from braid_orchestrator.threads import use_threads
from braid_wire.metrics import ProcessMetrics

CONTEXT = 512
MOST = 0.01


def main() -> int:
    """Print the figures; the exit code says whether they hold."""
    arguments = parse()
    use_threads(1)
    options = BenchOptions()
    room = limits((1,), (CONTEXT,), 2 * (arguments.turns + 2) * arguments.steps)
    rows = []
    with checkpoint(arguments.model) as directory, Services(1) as services:
        with services.remote(directory, options.setup(room)) as cell:
            rows.append(measure("process", CellPeer("braid", cell), [cell.metrics], arguments))
        with services.embedded(directory, options.setup(room)) as cell:
            switched = [cell.metrics, *(host.metrics for host in services.hosts)]
            rows.append(measure("embedded", CellPeer("braid", cell), switched, arguments))
    for row in rows:
        print(
            f"{row['placement']:9} step {row['step_us']:8.1f} µs   counting {row['cost']:+.2%}   "
            f"95 % interval {row['cost_low']:+.2%} to {row['cost_high']:+.2%}"
        )
    if arguments.out is not None:
        report = record("metrics_cost", shlex.join(sys.argv), rows)
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if rows[0]["cost"] <= MOST else 1


def measure(
    placement: str, peer: CellPeer, metrics: Sequence[ProcessMetrics], arguments: argparse.Namespace
) -> Row:
    """Turns with and without, side by side."""
    random = np.random.default_rng(0)
    peer.enter()
    peer.prefill(random.integers(0, peer.cell.plans.vocab_size, (1, CONTEXT)))
    token = np.array([1])
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(arguments.turns + 1):
        for on in (True, False) if turn % 2 else (False, True):
            for one in metrics:
                one.recording = on
            began = time.perf_counter()
            for _ in range(arguments.steps):
                peer.decode(token)
            if turn:  # the first one warms up
                seconds[on].append((time.perf_counter() - began) / arguments.steps)
    costs = [on / off - 1 for on, off in zip(seconds[True], seconds[False], strict=True)]
    low, high = median_interval(costs)
    return {
        "placement": placement,
        "step_us": round(statistics.median(seconds[False]) * 1e6, 1),
        "cost": round(statistics.median(costs), 5),
        "cost_low": round(low, 5),
        "cost_high": round(high, 5),
        "turns": arguments.turns,
        "steps": arguments.steps,
    }


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Between which two values the median of all such turns lies, with 95 % certainty, by their ranks alone.

    The number of values below the median is binomial; its normal approximation is good for 20 and more.
    """
    ordered, count = sorted(values), len(values)
    reach = math.ceil(1.96 * math.sqrt(count) / 2)
    middle = count // 2
    return ordered[max(middle - reach, 0)], ordered[min(middle + reach, count - 1)]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint; a random one of 10 M")
    parser.add_argument("--turns", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report here, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
