"""The supervisor with processes that do nothing but start, fail and end."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from braid_orchestrator.supervisor import Program, Ready, Supervisor
from braid_wire.errors import ConfigInvalid, RequestInvalid, ServiceFault
from cli_harness import alive, eventually

SERVE = """
import json, os, sys, time
port = int(sys.argv[1]) or 4711
print(json.dumps({"service": "x", "address": "a", "metrics_port": port, "pid": os.getpid()}), flush=True)
time.sleep(60)
"""
SLOW_TO_STOP = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SERVE

Make = Callable[..., Supervisor]


def program(name: str, code: str, stop_order: int = 0, stop_seconds: float = 1.0) -> Program:
    def command(before: Ready | None) -> list[str]:
        return [sys.executable, "-c", code, str(before.metrics_port if before else 0)]

    return Program(name, command, dict(os.environ), stop_order, stop_seconds)


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Supervisor] = []

    def start(*programs: Program, **how: object) -> Supervisor:
        made.append(Supervisor(programs, **how))  # type: ignore[arg-type]
        made[-1].start()
        return made[-1]

    yield start
    for supervisor in made:
        supervisor.kill()
        supervisor.settle()


def pid(supervisor: Supervisor, name: str) -> int:
    ready = supervisor.ready(name)
    return ready.pid if ready is not None else 0


def test_restarts_at_the_same_port(make: Make) -> None:
    supervisor = make(program("one", SERVE))
    first = supervisor.wait_ready(10)["one"]
    os.kill(first.pid, signal.SIGKILL)
    assert eventually(lambda: pid(supervisor, "one") not in (0, first.pid))
    assert supervisor.wait_ready(10)["one"].metrics_port == first.metrics_port == 4711


def test_lines_are_passed_on(make: Make) -> None:
    lines: list[str] = []
    code = "import sys\nprint('out')\nprint('{\"not\": \"ours\"}')\nsys.stderr.write('no newline')\n" + SERVE
    make(program("one", code), echo=lines.append).wait_ready(10)
    assert eventually(lambda: sorted(lines) == ["out", '{"not": "ours"}'])


def test_bad_usage_fails_at_once_with_its_message(make: Make) -> None:
    bad = "import sys; print('the reason', file=sys.stderr); sys.exit(2)"
    supervisor = make(program("one", SERVE), program("two", bad))
    with pytest.raises(RequestInvalid, match="two exited with code 2 at its start: the reason"):
        supervisor.wait_ready(10)
    supervisor.settle()


def test_typed_error_of_a_process_is_raised(make: Make) -> None:
    error = '{"error": {"reason": "CONFIG_INVALID", "message": "field x is wrong"}}'
    supervisor = make(program("one", f"import sys; print('{error}'); sys.exit(2)"))
    with pytest.raises(ConfigInvalid, match="field x is wrong"):
        supervisor.wait_ready(10)


def test_dying_again_and_again_at_start_gives_up(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "starts"
    die = f"open({str(file)!r}, 'a').write('x'); import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    supervisor = make(program("one", die))
    with pytest.raises(ServiceFault, match="one was killed by SIGSEGV at its start"):
        supervisor.wait_ready(20)
    assert file.read_text() == "xxx"


def test_restart_that_fails_ends_the_others(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "once"
    code = f"import os, sys\nif os.path.exists({str(file)!r}): sys.exit(2)\nopen({str(file)!r}, 'w')\n{SERVE}"
    supervisor = make(program("one", code), program("two", SERVE))
    ready = supervisor.wait_ready(10)
    os.kill(ready["one"].pid, signal.SIGKILL)
    with pytest.raises(RequestInvalid, match="one exited with code 2"):
        supervisor.join(10)
    assert not alive(ready["two"].pid)


def test_a_port_that_is_taken_for_a_moment_ends_nothing(make: Make, tmp_path: Path) -> None:
    """While a process is started again its ports are anybody's: it has another try, as from any loss."""
    file = tmp_path / "starts"
    code = (
        f"import sys\nfile = open({str(file)!r}, 'a+')\nfile.write('x')\nfile.flush()\nfile.seek(0)\n"
        f"if len(file.read()) == 2: sys.exit(2)\n{SERVE}"
    )
    supervisor = make(program("one", code))
    first = supervisor.wait_ready(60)["one"]
    os.kill(first.pid, signal.SIGKILL)
    assert eventually(lambda: pid(supervisor, "one") not in (0, first.pid), 60)
    assert file.read_text() == "xxx"


def test_stops_in_order(make: Make) -> None:
    seen: list[str] = []

    def watch(name: str, what: str) -> None:
        if what == "lost":
            seen.append(name)

    orders = {"last": 2, "first": 0, "second": 1}
    supervisor = make(*(program(name, SERVE, order) for name, order in orders.items()), watch=watch)
    supervisor.wait_ready(10)
    supervisor.stop()
    assert supervisor.join(10)
    assert seen == ["first", "second", "last"]


def test_one_that_ignores_the_request_is_killed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("braid_orchestrator.supervisor._STOP_MARGIN_S", 0.2)
    supervisor = make(program("one", SLOW_TO_STOP, stop_seconds=0.2))
    ready = supervisor.wait_ready(10)
    supervisor.stop()
    assert supervisor.join(20)
    assert not alive(ready["one"].pid)


def test_kill_does_not_wait(make: Make) -> None:
    supervisor = make(program("one", SLOW_TO_STOP, stop_seconds=30))
    supervisor.wait_ready(10)
    began = time.monotonic()
    supervisor.stop()
    assert not supervisor.join(0.3)
    supervisor.kill()
    assert supervisor.join(20)
    assert time.monotonic() - began < 20
