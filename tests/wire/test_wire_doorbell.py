"""Doorbells: no ring is lost, waiting has a limit, and whoever gives up releases the other side."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from braid_wire import doorbell
from braid_wire.arena import Allocator, ArenaOwner, HostArena, map_arena
from braid_wire.doorbell import BELL_BYTES, Doorbell
from braid_wire.errors import ServiceLost, StepTimeout, ViewInvalid

HANDOFFS = 60_000
LOST_S = 100
"""A waiter that nobody woke by then looks: as long as the other process may take to start."""


def bells(arena: HostArena) -> tuple[Doorbell, Doorbell]:
    """The first two bells of an arena."""
    allocator = Allocator(arena)
    first, second = (Doorbell(allocator.empty((BELL_BYTES,), torch.uint8)) for _ in range(2))
    return first, second


def nothing() -> None:
    """The peer lives."""


def lost() -> None:
    """Called where a waiter was not woken within a slice of its wait."""
    raise AssertionError("a ring was lost")


def answer(described: bytes, spin_ns: int, count: int) -> None:
    """The other process: every ring is answered."""
    from braid.v1 import common_pb2

    doorbell._SPIN_NS, doorbell._SLICE_NS = spin_ns, LOST_S * 10**9
    arena = map_arena(common_pb2.Arena.FromString(described))
    assert isinstance(arena, HostArena)
    asked, answered = bells(arena)
    for value in range(1, count + 1):
        asked.wait(value, lost, LOST_S)
        answered.ring(value)


@pytest.fixture
def owner(tmp_path: Path) -> ArenaOwner:
    return ArenaOwner(tmp_path / "arenas.sock")


@pytest.mark.parametrize("spin_ns", [0, 2_000, 400_000], ids=["asleep", "now and then", "awake"])
def test_no_ring_is_lost_between_processes(
    owner: ArenaOwner, spin_ns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doorbell, "_SPIN_NS", spin_ns)
    # Usually a waiter looks every 20 ms by itself, and would find what no wake-up told it.
    monkeypatch.setattr(doorbell, "_SLICE_NS", LOST_S * 10**9)
    arena = owner.create(4096, "bells")
    asked, answered = bells(arena)
    described = owner.describe(arena).SerializeToString()
    other = multiprocessing.get_context("spawn").Process(
        target=answer, args=(described, spin_ns, HANDOFFS), daemon=True
    )
    other.start()
    for value in range(1, HANDOFFS + 1):
        asked.ring(value)
        answered.wait(value, lost, LOST_S)
    other.join(60)
    assert other.exitcode == 0
    assert (asked.value, answered.value) == (HANDOFFS, HANDOFFS)
    owner.close()


def test_waiting_has_a_limit(owner: ArenaOwner) -> None:
    bell, _ = bells(owner.create(4096, "bells"))
    began, looks = time.monotonic(), list[float]()
    with pytest.raises(StepTimeout, match="stands at 0, not 1"):
        bell.wait(1, lambda: looks.append(time.monotonic() - began), 0.1)
    assert time.monotonic() - began > 0.09
    assert len(looks) == 5  # of 20 ms each, whatever a busy machine makes of them
    owner.close()


def test_a_peer_that_is_gone_is_noticed_while_waiting(owner: ArenaOwner) -> None:
    bell, _ = bells(owner.create(4096, "bells"))

    looks = 0

    def gone() -> None:
        nonlocal looks
        looks += 1
        raise ServiceLost("gone")

    began = time.monotonic()
    with pytest.raises(ServiceLost):
        bell.wait(1, gone, 60)
    assert looks == 1  # the first, after 20 ms
    assert time.monotonic() - began < 30
    owner.close()


def test_giving_up_releases_a_sleeping_waiter_for_good(owner: ArenaOwner) -> None:
    bell, _ = bells(owner.create(4096, "bells"))
    threading.Timer(0.05, bell.fail).start()
    bell.wait(7, nothing, 30)
    assert bell.failed
    bell.wait(10**9, nothing, 30)
    owner.close()


def test_what_is_no_bell_is_refused() -> None:
    memory = torch.zeros(4 * BELL_BYTES, dtype=torch.uint8)
    start = -memory.data_ptr() % BELL_BYTES
    Doorbell(memory[start : start + BELL_BYTES])
    for wrong in (
        memory[start + 8 : start + 8 + BELL_BYTES],
        memory[start : start + 32],
        memory[start : start + BELL_BYTES].view(torch.int64),
        memory[start : start + 2 * BELL_BYTES : 2],
    ):
        with pytest.raises(ViewInvalid):
            Doorbell(wrong)


def test_without_a_compiler_there_are_no_doorbells_and_one_warning(tmp_path: Path) -> None:
    code = "from braid_wire import doorbell; print(doorbell.available(), doorbell.available())"
    environment = {**os.environ, "CXX": "/nonexistent", "BRAID_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=150, env=environment
    )
    assert done.stdout.split() == ["False", "False"]
    assert done.stderr.count("no doorbells") == 1
