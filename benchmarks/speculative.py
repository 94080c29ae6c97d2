"""Speculative decoding with the small model's own draft, beside plain decoding, in one run.

    python benchmarks/speculative.py --out benchmarks/results/speculative.json

A cell for each number of guesses, and one that finds the number out, three processes each; they take
turns at the same requests. The prompts are pieces of modules that neither the model nor its draft was
trained on, and questions about key-value pairs. Greedy answers must be those of plain decoding, or
nothing is reported.

* accepted: guesses that counted, of those that were verified
* tokens_a_step: tokens that a request makes in a step of the target
* ratio: tokens per second over those of plain decoding, the median over turns that were neighbours
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from braid_orchestrator.bench import stats
from braid_orchestrator.bench.record import record
from braid_orchestrator.client import Client
from braid_orchestrator.launcher import Launched, launch
from braid_orchestrator.sampling import Sampling
from braid_orchestrator.scrape import scrape
from braid_orchestrator.settings import Settings

TINY = Path(__file__).resolve().parents[1] / "models" / "tiny"
sys.path.append(str(TINY))

from recall import make_cases  # noqa: E402
from train import encode_texts, read_sources  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

CONTEXT = 96
"""Tokens of a text prompt."""
PLAIN = "none"


@dataclass(frozen=True)
class Load:
    """Requests that are sent side by side.

    Args:
        name: for people.
        prompts: token ids of each.
        sampling: of all.
    """

    name: str
    prompts: Sequence[Sequence[int]]
    sampling: Sampling


@dataclass
class Turns:
    """What one cell did with one load."""

    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    accepted: float = 0.0
    rejected: float = 0.0
    answers: list[list[int]] = field(default_factory=list)


def main() -> int:
    """The exit status: 1 where a greedy answer is not that of plain decoding."""
    given = arguments()
    ways = make_ways(given.guesses)
    loads = make_loads(given)
    found = {(way, load.name): Turns() for way in ways for load in loads}
    with ExitStack() as stack:
        cells = {way: stack.enter_context(launch(one)) for way, one in ways.items()}
        clients = {way: stack.enter_context(cell.client()) for way, cell in cells.items()}
        for load in loads:
            for repeat in range(given.repeats + 1):  # the first one warms up
                for way in stats.in_turn(list(ways), repeat):
                    turns = found[way, load.name]
                    take_turn(cells[way], clients[way], load, given.tokens, turns, repeat > 0)
    rows = [row(way, load, found, given.repeats) for load in loads for way in ways]
    wrong = [
        (way, load.name)
        for load in loads
        for way in ways
        if load.sampling.greedy and found[way, load.name].answers != found[PLAIN, load.name].answers
    ]
    if wrong:
        print(f"other tokens than plain decoding: {wrong}", file=sys.stderr)
        return 1
    command = " ".join(["python benchmarks/speculative.py", *typed(sys.argv[1:])])
    report = record("speculative", command, rows)
    if given.out is not None:
        given.out.write_text(json.dumps(report, indent=1) + "\n")
    show(rows)
    return 0


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--guesses", type=int, nargs="+", default=[1, 2, 3, 4], help="beside none")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="requests side by side")
    parser.add_argument("--tokens", type=int, default=128, help="made by each request")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each cell that count")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def typed(words: Sequence[str]) -> list[str]:
    """The command line but for where the report goes."""
    kept = list(words)
    if "--out" in kept:
        at = kept.index("--out")
        del kept[at : at + 2]
    return kept


def make_ways(guesses: Sequence[int]) -> dict[str, Settings]:
    """Of the cells, by number of guesses; nothing is cached, so that every turn does the same work."""
    plain = Settings(TINY, threads=1, prefix_cache=False, max_context=1024)
    fixed = {
        str(number): replace(plain, speculative=number, speculative_adaptive=False)
        for number in sorted(guesses)
    }
    return {PLAIN: plain, **fixed, f"up to {max(guesses)}": replace(plain, speculative=max(guesses))}


def make_loads(given: argparse.Namespace) -> list[Load]:
    """Text and questions, greedy; text at temperature 0.8; for each number of requests."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY)
    stream = encode_texts(tokenizer, read_sources().held_out)
    most = max(given.batch)
    starts = np.linspace(0, len(stream) - CONTEXT, most).astype(int)
    texts = [stream[start : start + CONTEXT].tolist() for start in starts]
    cases = make_cases(tokenizer, 8, most)
    questions = [tokenizer.encode(case.prompt) for case in cases]
    loads = []
    for count in given.batch:
        loads.append(Load(f"text, greedy, {count}", texts[:count], Sampling()))
        loads.append(Load(f"text, temperature 0.8, {count}", texts[:count], Sampling(0.8)))
        loads.append(Load(f"questions, greedy, {count}", questions[:count], Sampling()))
    return loads


def take_turn(cell: Launched, client: Client, load: Load, count: int, turns: Turns, counts: bool) -> None:
    """Send a load, and note how long its tokens took behind the first of each."""
    before = drafted(cell)

    def one(prompt: Sequence[int]) -> tuple[list[int], float, float]:
        made: list[int] = []
        first = last = time.perf_counter()
        for chunk in client.generate(prompt, count, load.sampling, ignore_eos=True):
            last = time.perf_counter()
            first = last if not made else first
            made.extend(chunk.token_ids)
        return made, first, last

    with ThreadPoolExecutor(len(load.prompts)) as pool:
        done = list(pool.map(one, load.prompts))
    if not counts:
        return
    turns.seconds.append(max(last for _, _, last in done) - min(first for _, first, _ in done))
    turns.tokens += sum(len(made) - 1 for made, _, _ in done)
    turns.answers = [made for made, _, _ in done]
    after = drafted(cell)
    turns.accepted += after["accepted"] - before["accepted"]
    turns.rejected += after["rejected"] - before["rejected"]


def drafted(cell: Launched) -> dict[str, float]:
    """Verified guesses by outcome."""
    samples = scrape(cell.info.metrics["orchestrator"])
    return {s.labels["outcome"]: s.value for s in samples if s.name == "braid_draft_tokens_total"}


def row(way: str, load: Load, found: Mapping[tuple[str, str], Turns], repeats: int) -> dict[str, Any]:
    """One line of the report."""
    own, plain = found[way, load.name], found[PLAIN, load.name]
    verified = own.accepted + own.rejected
    made = own.tokens / repeats
    return {
        "load": load.name,
        "guesses": way,
        "accepted": round(own.accepted / verified, 3) if verified else None,
        "tokens_a_step": round(own.tokens / (own.tokens - own.accepted), 2),
        "tokens_per_s": round(made / statistics.median(own.seconds), 1),
        "ratio": stats.ratio(plain.seconds, own.seconds),
        "spread": stats.spread(own.seconds),
        "repeats": repeats,
    }


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table for people."""
    names = [name for name in rows[0] if name != "repeats"]
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for one in rows:
        print("| " + " | ".join("–" if one[name] is None else str(one[name]) for name in names) + " |")


if __name__ == "__main__":
    sys.exit(main())
