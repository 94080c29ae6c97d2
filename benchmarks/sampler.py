"""How long it takes to choose tokens with top-p from flat logits, beside a sort of the same logits.

    python benchmarks/sampler.py [--rows N] [--vocabulary N]

Flat logits are the worst case: the mass is reached only behind most of the vocabulary.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from braid_orchestrator.sampler import Sampler, Turn, choose
from braid_orchestrator.sampling import Sampling

REPEATS = 5


def main() -> None:
    """Print a line for each top-p, medians of neighbouring turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=150_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logits = torch.randn(options.rows, options.vocabulary) * 0.5
    print(f"{options.rows} rows of {options.vocabulary:,} logits, one thread")
    for top_p in (0.5, 0.9, 0.99, 0.9999):
        turns = [
            Turn(Sampler(Sampling(temperature=1.0, top_p=top_p, seed=row)), []) for row in range(options.rows)
        ]
        chosen, ratios = [], []
        for _ in range(REPEATS):
            chosen.append(timed(lambda turns=turns: choose(turns, logits)))
            sorting = timed(lambda: [row.sort(stable=True, descending=True) for row in logits])
            ratios.append(sorting / chosen[-1])
        print(f"top_p {top_p}: {median(chosen):.3f} s; a sort takes {median(ratios):.2f} times as long")


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
