"""Checks of what two processes share on a card: memory by handles, and streams that wait for one another."""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from braid.v1 import attention_pb2 as pb
from braid.v1 import common_pb2
from braid_wire.arena import Allocator, ArenaOwner
from braid_wire.cuda_arena import GRANULARITY, IMPORTS, context_of
from braid_wire.cuda_doorbell import CudaStreams, DeviceBell, handovers_of
from braid_wire.doorbell import BELL_BYTES
from braid_wire.errors import ArenaUnknown, ServiceFault
from braid_wire.views import ArenaMap

from braid_orchestrator.bench.gpu.outcome import Outcome, Skip

DEVICE = torch.device("cuda", 0)
_SIZE = 256 << 20
_WAIT_S = 30.0
_ROUNDS = 2000
_LEFT_BEHIND = 64 << 20  # what torch and the driver keep for themselves

Talk = Any
"""A queue between two processes."""


def _peer(work: Callable[..., None], *arguments: Any) -> Any:
    """Another process that runs a function of this module."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def _hear(talk: Talk) -> Any:
    """What the other process says next.

    Raises:
        ServiceFault: nothing, for long; or that it failed.
    """
    try:
        said = talk.get(timeout=_WAIT_S)
    except queue.Empty:
        raise ServiceFault(f"the other process said nothing for {_WAIT_S:.0f} s") from None
    if isinstance(said, Exception):
        raise said
    return said


def arenas(outcome: Outcome, work: Path) -> None:
    """Both ways, at an offset, refused to the owner's own process, and nothing left behind."""
    context = context_of(0)
    context.make_current()
    torch.zeros(1, device=DEVICE)
    before, _ = context.driver.memory_info()
    owner = ArenaOwner(work / "arenas.sock")
    arena = owner.create_on(DEVICE, _SIZE, "check")
    outcome.note(
        "allocated at a multiple of 2 MiB", float(arena.memory.data_ptr() % GRANULARITY == 0), "", ">= 1"
    )
    outcome.note("zeroed", float(not arena.memory.any()), "", ">= 1")
    arena.memory[:1000] = torch.arange(1000, device=DEVICE) % 251
    torch.cuda.synchronize()
    described = owner.describe(arena)
    inner = common_pb2.Arena()
    inner.CopyFrom(described)
    inner.arena_id, inner.cuda.offset, inner.size_bytes = 99, 500, 500
    talk = multiprocessing.get_context("spawn").Queue()
    peer = _peer(_import, described.SerializeToString(), inner.SerializeToString(), talk)
    outcome.note(
        "what the importer read", float(_hear(talk) == (arena.memory[:1000].sum().item(), 1)), "", ">= 1"
    )
    outcome.note("what the importer wrote", float(arena.memory[-1].item()), "", ">= 7")
    outcome.note("mappings that it left", float(_hear(talk)), "", "<= 0")
    peer.join(_WAIT_S)
    shared = ArenaMap()
    same = shared.map(described).memory.data_ptr() == arena.memory.data_ptr()
    outcome.note("the own process shares the pointer", float(same), "", ">= 1")
    shared.close()
    owner.release(arena)
    del arena
    gc.collect()
    try:
        ArenaMap().map(described)
    except ArenaUnknown as error:
        outcome.note("after the end, the cause", error.metadata["cause"])
    else:
        raise ServiceFault("memory that was freed could be mapped")
    owner.close()
    torch.cuda.empty_cache()
    after, _ = context.driver.memory_info()
    outcome.note("memory left behind", float(before - after), "bytes", f"<= {_LEFT_BEHIND}")


def _import(whole: bytes, inner: bytes, talk: Talk) -> None:
    """The other process of `arenas`."""
    try:
        arenas = ArenaMap()
        all_of_it = arenas.map(common_pb2.Arena.FromString(whole))
        part = arenas.map(common_pb2.Arena.FromString(inner))
        total = all_of_it.memory[:1000].sum().item()
        equal = int(torch.equal(part.memory, all_of_it.memory[500:1000]))
        all_of_it.memory[-1] = 7
        torch.cuda.synchronize()
        talk.put((total, equal))
        del all_of_it, part
        arenas.close()
        gc.collect()
        talk.put(len(IMPORTS))
    except Exception as error:  # told to whoever waits
        talk.put(ServiceFault(f"{type(error).__name__}: {error}"))


def doorbells(outcome: Outcome, work: Path) -> None:
    """Round trips between two processes' streams, and a wait that is released from the host."""
    context = context_of(0)
    if pb.DEVICE_HANDOVER_STREAM_VALUES not in handovers_of(context):
        raise Skip("stream values do not work on this device")
    owner = ArenaOwner(work / "bells.sock")
    arena = owner.create(1 << 16, "bells")
    room = Allocator(arena)
    streams = CudaStreams(context, own=True)
    ours, theirs = (streams.bell(room.empty((BELL_BYTES,), torch.uint8)) for _ in range(2))
    talk = multiprocessing.get_context("spawn").Queue()
    peer = _peer(_answer, owner.describe(arena).SerializeToString(), talk)
    if _hear(talk) != os.getpid():
        peer_pid = peer.pid
        outcome.note("another process", str(peer_pid))
    with streams.entered():
        took = _ring(streams, ours, theirs)
        outcome.note("round trip between streams", took / _ROUNDS * 1e6, "us")
        outcome.note("one way", took / _ROUNDS * 5e5, "us", "<= 10")
        streams.wait(theirs, 1 << 40)
        time.sleep(0.05)
        held = not streams.idle()
        began = time.perf_counter()
        streams.drain([ours, theirs])
        outcome.note("a wait holds its stream", float(held), "", ">= 1")
        outcome.note("release from the host", (time.perf_counter() - began) * 1e6, "us")
    if _hear(talk) != "done":
        raise ServiceFault("the other process did not come to its end")
    peer.join(_WAIT_S)
    owner.close()


def _ring(streams: CudaStreams, ours: DeviceBell, theirs: DeviceBell) -> float:
    """Ring and wait in turn; seconds for all rounds, the first ones left out."""
    began = 0.0
    for value in range(1, 2 * _ROUNDS + 1):
        streams.ring(ours, value)
        streams.wait(theirs, value)
        if value % 64 == 0:
            streams.finish(lambda: None, _WAIT_S)
        if value == _ROUNDS:
            streams.finish(lambda: None, _WAIT_S)
            began = time.perf_counter()
    streams.finish(lambda: None, _WAIT_S)
    return time.perf_counter() - began


def _answer(described: bytes, talk: Talk) -> None:
    """The other process of `doorbells`: it answers every ring."""
    try:
        arenas = ArenaMap()
        memory = arenas.map(common_pb2.Arena.FromString(described)).memory
        streams = CudaStreams(context_of(0), own=True)
        theirs, ours = (streams.bell(memory[at : at + BELL_BYTES]) for at in (0, BELL_BYTES))
        talk.put(os.getpid())
        with streams.entered():
            for value in range(1, 2 * _ROUNDS + 1):
                streams.wait(theirs, value)
                streams.ring(ours, value)
                if value % 64 == 0:
                    streams.finish(lambda: None, _WAIT_S)
            streams.finish(lambda: None, _WAIT_S)
        talk.put("done")
    except Exception as error:  # told to whoever waits
        talk.put(ServiceFault(f"{type(error).__name__}: {error}"))
