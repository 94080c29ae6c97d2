"""Checks that need no GPU, one for each way in which a check can end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from braid_orchestrator.bench.gpu.outcome import Outcome, Skip


def holds(outcome: Outcome, work: Path) -> None:
    outcome.note("rate", 0.9, "of the copy rate", ">= 0.8")
    outcome.note("name", "a card")
    (work / "shared").write_text("left by the first")


def falls_short(outcome: Outcome, work: Path) -> None:
    outcome.note("hop", 12.5, "us", "<= 10")
    outcome.note("tax", float("nan"), "", "<= 0.05")
    outcome.note("after", float((work / "shared").read_text() == "left by the first"), "", ">= 1")


def raises(outcome: Outcome, work: Path) -> None:
    outcome.note("before", 1.0)
    raise ValueError("a kernel gave NaN")


def dies(outcome: Outcome, work: Path) -> None:
    print("an illegal memory access was encountered", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(outcome: Outcome, work: Path) -> None:
    print("waiting for a doorbell", flush=True)
    time.sleep(60)


def skips(outcome: Outcome, work: Path) -> None:
    raise Skip("stream values do not work on this device")
