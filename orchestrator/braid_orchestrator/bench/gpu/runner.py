"""Runs checks one after the other, each in a process of its own."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from braid_orchestrator.bench.gpu.outcome import ERROR, FAILED, PASSED, SKIPPED, TIMEOUT, Outcome, Skip

# Below this no check is begun: it would only be cut off.
_LEAST_S = 10.0
_MODULE = "braid_orchestrator.bench.gpu"
_CAUSE_CHARACTERS = 600


@dataclass(frozen=True)
class Check:
    """One check.

    Args:
        name: in the report.
        function: "module:function"; called with the `Outcome` to fill and a directory that all checks of a
            run share. What it raises ends it; `Skip` says that it cannot be made.
        limit_s: longest time that it may take.
        about: one line, for the report.
    """

    name: str
    function: str
    limit_s: float
    about: str


def run_all(
    checks: Sequence[Check],
    work: Path,
    budget_s: float,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Outcome]:
    """Run every check that the time allows; those that it does not are skipped, and say so.

    Args:
        checks: in their order.
        work: directory for what checks share.
        budget_s: of all together.
        progress: told of each.
    """
    deadline = time.monotonic() + budget_s
    found = []
    for check in checks:
        left = deadline - time.monotonic()
        if left < _LEAST_S:
            found.append(Outcome(check.name, SKIPPED, f"no time was left of {budget_s:.0f} s"))
        else:
            progress(f"{check.name}: {check.about}")
            found.append(run_one(check, work, min(check.limit_s, left)))
        progress(f"{check.name}: {found[-1].status} {found[-1].cause}".rstrip())
    return found


def run_one(check: Check, work: Path, limit_s: float) -> Outcome:
    """Run one check in a process of its own; whatever becomes of that, an outcome comes back."""
    result = work / f"{check.name}.json"
    result.unlink(missing_ok=True)
    log = work / f"{check.name}.log"
    command = [sys.executable, "-m", _MODULE, "--child", check.name, "--function", check.function]
    command += ["--work", str(work)]
    began = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    outcome = Outcome.read(result) if result.exists() else Outcome(check.name, ERROR)
    outcome.seconds = round(time.monotonic() - began, 1)
    if code is None:
        outcome.status, outcome.cause = TIMEOUT, f"it took longer than {limit_s:.0f} s. {last_words(log)}"
    elif code != 0:
        outcome.status = ERROR
        outcome.cause = outcome.cause or f"{ended(code)}. {last_words(log)}"
    return outcome


def ended(code: int) -> str:
    """How a process ended."""
    return f"it was killed by {signal.Signals(-code).name}" if code < 0 else f"it exited with {code}"


def last_words(log: Path) -> str:
    """The end of what a process printed."""
    return " ".join(log.read_text(errors="replace").split())[-_CAUSE_CHARACTERS:]


def child(name: str, function: str, work: Path) -> int:
    """Make one check here, in the process that `run_one` started; the exit code.

    What it found is written after a failure too: figures that were there are not lost.
    """
    outcome = Outcome(name)
    code = 0
    try:
        module, _, attribute = function.partition(":")
        getattr(importlib.import_module(module), attribute)(outcome, work)
    except Skip as reason:
        outcome.status, outcome.cause = SKIPPED, str(reason)
    except Exception as error:
        # Whatever it was, it is this check's finding, and the others go on.
        outcome.status, outcome.cause = ERROR, f"{type(error).__name__}: {error}"[:_CAUSE_CHARACTERS]
        code = 1
        raise
    finally:
        outcome.write(work / f"{name}.json")
    return code


def succeeded(outcomes: Sequence[Outcome]) -> bool:
    """Whether nothing failed; what was skipped failed not."""
    return all(one.status in (PASSED, SKIPPED) for one in outcomes)


__all__ = ["FAILED", "Check", "child", "run_all", "run_one", "succeeded"]
