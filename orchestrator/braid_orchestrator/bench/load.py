"""A machine that has other work: a busy process on every core."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from braid_wire.errors import ServiceFault

# Imports nothing of ours: it must be at work at once. It ends with its parent.
_SPIN = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
parent = os.getppid()
print(flush=True)
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


@contextmanager
def busy_cores() -> Iterator[int]:
    """One process at normal priority that never sleeps, on each core that this process may use.

    Gives their number.

    Raises:
        ServiceFault: one did not start.
    """
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        for core in cores:
            process = subprocess.Popen(
                [sys.executable, "-S", "-c", _SPIN, str(core)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            if process.stdout is None or not process.stdout.readline():
                raise ServiceFault(f"the busy process of core {core} did not start")
        yield len(cores)
