"""Ends that signals ask for: seen at whatever moment they come."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

from braid_wire.process import Stop, wait_for_stop

AT_EVERY_LINE = """
import signal, sys
from braid_wire import process

process._LOOK_UP_S = 0.01
for chosen in range(1, 40):
    stop, lines = process.Stop(), 0

    def trace(frame, event, argument):
        global lines
        lines += 1
        if lines == chosen:
            signal.raise_signal(signal.SIGTERM)
        return trace

    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    sys.settrace(trace)
    process.wait_for_stop(stop.wait)
    sys.settrace(None)
print("seen each time")
"""


def test_a_signal_is_seen_wherever_it_interrupts_the_wait() -> None:
    """Also while the main thread holds whatever lock the wait needs."""
    done = subprocess.run(
        [sys.executable, "-c", AT_EVERY_LINE], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.stdout == "seen each time\n", done.stderr


def test_a_stop_is_seen_from_any_thread_and_for_good() -> None:
    stop = Stop()
    assert not stop.is_set() and not stop.wait(0.001)
    timer = threading.Timer(0.05, stop.set)
    timer.start()
    wait_for_stop(stop.wait)
    timer.join()
    stop.set()
    began = time.monotonic()
    assert stop.is_set() and stop.wait(60) and stop.wait(60)
    assert time.monotonic() - began < 60
