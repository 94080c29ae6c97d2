"""Runs the command `braid` as users do, and cells that it serves."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braid_orchestrator.client import Client
from braid_orchestrator.discovery import CellInfo

BRAID = str(Path(sys.executable).with_name("braid"))
TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
START_S = 90.0

_NAMES = {b"braid_full_attn": "full", b"braid_linear_attn": "linear", b"braid_orchestrator": "orchestrator"}


@dataclass(frozen=True)
class Place:
    """Where the processes of the tests keep their files."""

    runtime: Path
    temporary: Path

    def environment(self, **more: str) -> dict[str, str]:
        """Of every process."""
        inherited = {name: value for name, value in os.environ.items() if name != "BRAID_LOG"}
        own = {"BRAID_RUNTIME_DIR": str(self.runtime), "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}
        return {**inherited, **own, **more}

    def braid(self, *arguments: object, stdin: str = "", timeout: float = START_S) -> Result:
        """Run a command to its end."""
        done = subprocess.run(
            [BRAID, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.environment(),
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """Begin a command."""
        return subprocess.Popen(
            [BRAID, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment(),
        )

    def cells(self) -> list[str]:
        """Names of the cells' directories."""
        return sorted(path.name for path in self.runtime.iterdir())


@dataclass(frozen=True)
class Result:
    """What a command came to."""

    code: int
    out: str
    err: str

    def refused(self, reason: str, *words: str) -> None:
        """It ended with 2, saying so in one line that names these words."""
        assert self.code == 2, self
        assert self.err.startswith(f"error {reason}: "), self.err
        assert self.err.count("\n") == 1, self.err
        for word in words:
            assert word in self.err
        assert self.out == ""


class Served:
    """A cell under `braid serve --json`."""

    def __init__(self, place: Place, model: Path, *options: object) -> None:
        quiet = ("--json", "--metrics-port", 0, "--log-level", "warning")
        self.process = place.start("serve", model, *quiet, *options)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        self.info = CellInfo.from_json(json.loads(line))
        self.client = Client(self.info.address)

    def pids(self) -> dict[str, int]:
        """Of its processes, by what they are."""
        found = {}
        for pid in children(self.process.pid):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            # One that has ended has no command line, and one that begins still has its parent's.
            if b"-m" in command:
                found[_NAMES[command[command.index(b"-m") + 1]]] = pid
        return found

    def page_frame(self) -> dict[str, Any]:
        """What its live page shows now."""
        with urllib.request.urlopen(f"{self.info.page}events", timeout=10) as events:
            for line in events:
                if line == b"event: frame\n":
                    found: dict[str, Any] = json.loads(events.readline().removeprefix(b"data: "))
                    return found
        raise AssertionError("the page told nothing")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal it and give its exit code."""
        self.client.close()
        self.process.send_signal(number)
        self.process.communicate(timeout=60)
        return self.process.returncode

    def end(self) -> None:
        """Whatever state it is in, it is gone afterwards."""
        self.client.close()
        self.process.kill()
        self.process.communicate()


def children(pid: int) -> list[int]:
    """Process ids of a process's children, whichever thread made them."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found += [int(word) for word in (task / "children").read_text().split()]
        except OSError:
            continue  # a thread that has ended meanwhile; its children are another one's now
    return found


def signal_another_thread(pid: int, number: int) -> None:
    """Signal a thread of a process that is not its main one, as the kernel may on a busy machine."""
    thread = next(int(task.name) for task in Path(f"/proc/{pid}/task").iterdir() if int(task.name) != pid)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.tgkill(pid, thread, number) != 0:
        raise OSError(ctypes.get_errno(), f"tgkill({pid}, {thread}, {number})")


def alive(pid: int) -> bool:
    """Whether a process runs; one that is only waited for does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def eventually(holds: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Wait for something to come true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.05)
    return holds()


def named_memory(pid: int) -> list[str]:
    """What a process has open or mapped that has a name in /dev/shm or /tmp, but for what is installed."""
    installed = (sys.prefix, sys.base_prefix, str(Path(__file__).resolve().parents[2]))
    opened = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            opened.append(str(link.readlink()))
        except OSError:
            continue  # closed meanwhile
    mapped = [line.split(maxsplit=5)[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    named = [name for name in {*opened, *mapped} if name.startswith(("/dev/shm/", "/tmp/"))]
    return [name for name in named if not name.startswith(installed)]
