"""What the prefix cache is worth: the time to the first token with and without it, and how much it finds.

    python benchmarks/prefix.py --out benchmarks/results/prefix.json

Two cells of three processes, one with a cache and one without, take turns at the same requests:

* shared: prompts with the same beginning and an end of their own, one after the other
* turns: conversations side by side; each turn sends all that was said before, and something new

Answers must be the same tokens, or nothing is reported. `found` is the part of the prompts' tokens that
need not be computed; the first prompt of all, which finds nothing, counts in conversations only.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from braid_orchestrator.bench import stats
from braid_orchestrator.bench.record import record
from braid_orchestrator.client import Client
from braid_orchestrator.launcher import launch
from braid_orchestrator.settings import Settings

TINY = Path(__file__).resolve().parents[1] / "models" / "tiny"
VOCAB = 2048
OWN = 16
"""Tokens of its own behind a shared beginning."""
SYSTEM, SAID, MADE = 200, 20, 32
"""Tokens that all conversations begin with, that each turn adds, and that it is answered with."""
MS = 1e3


@dataclass
class Turns:
    """What one cell did with one load."""

    first_s: list[float] = field(default_factory=list)
    """Time to the first token of each request."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answers: list[tuple[int, ...]] = field(default_factory=list)


def main() -> int:
    """The exit status: 1 where a cache changed a token."""
    given = arguments()
    loads = {"shared": lambda *args: shared(given, *args), "turns": lambda *args: conversations(given, *args)}
    found = {(name, on): Turns() for name in loads for on in (False, True)}
    with ExitStack() as stack:
        clients = {
            on: stack.enter_context(stack.enter_context(launch(settings(given, on))).client())
            for on in (False, True)
        }
        for name, send in loads.items():
            for repeat in range(given.repeats + 1):  # the first one warms up
                for way in stats.in_turn(["without", "with"], repeat):
                    turns = found[name, way == "with"] if repeat else Turns()
                    send(clients[way == "with"], repeat, turns)
    wrong = [name for name in loads if found[name, True].answers != found[name, False].answers]
    if wrong:
        print(f"other tokens than without a cache: {wrong}", file=sys.stderr)
        return 1
    rows = [row(name, given, found) for name in loads]
    report = record("prefix", " ".join(["python benchmarks/prefix.py", *typed(sys.argv[1:])]), rows)
    if given.out is not None:
        given.out.write_text(json.dumps(report, indent=1) + "\n")
    show(rows)
    return 0


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=int, default=2048, help="tokens of the shared beginning")
    parser.add_argument("--requests", type=int, default=6, help="with it, in a repeat")
    parser.add_argument("--users", type=int, default=6, help="conversations side by side")
    parser.add_argument("--turns", type=int, default=6, help="of each conversation")
    parser.add_argument("--repeats", type=int, default=4, help="that count")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def typed(words: Sequence[str]) -> list[str]:
    """The command line but for where the report goes."""
    kept = list(words)
    if "--out" in kept:
        at = kept.index("--out")
        del kept[at : at + 2]
    return kept


def settings(given: argparse.Namespace, cached: bool) -> Settings:
    """Of a cell."""
    longest = max(given.shared + OWN, SYSTEM + given.turns * (SAID + MADE))
    return Settings(TINY, threads=1, prefix_cache=cached, max_context=longest + MADE)


def tokens(count: int, *seed: int) -> list[int]:
    """Token ids that mean nothing; none is an end token."""
    return np.random.default_rng(seed).integers(8, VOCAB, count).tolist()


def ask(client: Client, prompt: Sequence[int], made: int, turns: Turns) -> list[int]:
    """One request; what it makes."""
    began, first = time.perf_counter(), 0.0
    found: list[int] = []
    generation = client.generate(prompt, made, ignore_eos=True)
    for chunk in generation:
        first = first or time.perf_counter() - began
        found.extend(chunk.token_ids)
    turns.first_s.append(first)
    turns.prompt_tokens += generation.completion.prompt_tokens
    turns.cached_tokens += generation.completion.cached_tokens
    return found


def shared(given: argparse.Namespace, client: Client, repeat: int, turns: Turns) -> None:
    """Requests with one beginning, of which the first, that does not count, leaves it in the cache."""
    begin = tokens(given.shared, repeat)
    ask(client, [*begin, *tokens(OWN, repeat, 0)], 1, Turns())
    for number in range(1, given.requests + 1):
        turns.answers.append(tuple(ask(client, [*begin, *tokens(OWN, repeat, number)], 1, turns)))


def conversations(given: argparse.Namespace, client: Client, repeat: int, turns: Turns) -> None:
    """Users that talk at the same time; all begin alike."""
    histories = [tokens(SYSTEM, repeat) for _ in range(given.users)]
    with ThreadPoolExecutor(given.users) as pool:
        for turn in range(given.turns):
            for user, history in enumerate(histories):
                history += tokens(SAID, repeat, user, turn)
            answers = list(pool.map(lambda history: ask(client, history, MADE, turns), histories))
            for history, made in zip(histories, answers, strict=True):
                history += made
                turns.answers.append(tuple(made))


def row(name: str, given: argparse.Namespace, found: Mapping[tuple[str, bool], Turns]) -> dict[str, Any]:
    """One line of the report."""
    without, cached = found[name, False], found[name, True]
    size = {"shared": given.shared} if name == "shared" else {"users": given.users, "turns": given.turns}
    return {
        "load": name,
        **size,
        "requests": len(cached.first_s),
        "found": round(cached.cached_tokens / cached.prompt_tokens, 3),
        "first_token_ms_without": round(statistics.median(without.first_s) * MS, 1),
        "first_token_ms": round(statistics.median(cached.first_s) * MS, 1),
        "first_token_ms_p90_without": round(float(np.quantile(without.first_s, 0.9)) * MS, 1),
        "first_token_ms_p90": round(float(np.quantile(cached.first_s, 0.9)) * MS, 1),
        "ratio": round(statistics.median(without.first_s) / statistics.median(cached.first_s), 2),
    }


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table for people."""
    names = ("load", "requests", "found", "first_token_ms_without", "first_token_ms", "ratio")
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for one in rows:
        print("| " + " | ".join(str(one[name]) for name in names) + " |")


if __name__ == "__main__":
    sys.exit(main())
