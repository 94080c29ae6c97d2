"""Kill a service again and again while a cell generates: no token may change, nothing may hang.

    python benchmarks/kills.py --kills 200

Prints one JSON object: how many kills, how many steps were replayed, the longest time between two tokens, and
whether the tokens are those of an undisturbed run. Exits with 1 where they are not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

from braid_orchestrator.launcher import Launched, launch
from braid_orchestrator.settings import Settings

TINY = Path(__file__).parents[1] / "models" / "tiny"
PROMPT = "the quick brown fox"
# Tokens between two kills: a service that was started again must run before it is killed again.
APART = 12
GIVE_UP_S = 60.0


class Killer(threading.Thread):
    """Kills a service at a random moment, each time that tokens flow again."""

    def __init__(self, cell: Launched, made: list[int], kills: int, seed: int) -> None:
        super().__init__(name="killer", daemon=True)
        self.done = 0
        self._cell, self._made, self._kills = cell, made, kills
        self._chance = random.Random(seed)
        self._over = threading.Event()

    def run(self) -> None:
        while self.done < self._kills:
            enough = len(self._made) + APART
            while len(self._made) < enough:
                if self._over.wait(0.002):
                    return
            self._over.wait(self._chance.uniform(0, 0.02))
            pid = self._cell.pid(self._chance.choice(("full", "linear")))
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
                self.done += 1

    def end(self) -> None:
        """Stop, and wait for it."""
        self._over.set()
        self.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    tokens = (given.kills + 1) * (APART + 8)
    settings = Settings(given.model, threads=1, max_context=tokens + 64)
    with launch(settings) as cell, cell.client() as client:
        expected: list[int] = []
        for chunk in client.generate(PROMPT, tokens, ignore_eos=True):
            expected.extend(chunk.token_ids)
        made: list[int] = []
        killer = Killer(cell, made, given.kills, given.seed)
        killer.start()
        longest, last = 0.0, time.monotonic()
        for chunk in client.generate(PROMPT, tokens, ignore_eos=True):
            made.extend(chunk.token_ids)
            now = time.monotonic()
            longest, last = max(longest, now - last), now
        killer.end()
        status = client.status()
    same = made == expected
    report = {
        "kills": killer.done,
        "tokens": len(made),
        "replays": status.replays,
        "longest_pause_s": round(longest, 2),
        "same_tokens": same,
        "pages_and_slots_left": sum(pool.used for pool in status.pools),
    }
    print(json.dumps(report))
    return 0 if same and killer.done == given.kills and longest < GIVE_UP_S else 1


if __name__ == "__main__":
    sys.exit(main())
