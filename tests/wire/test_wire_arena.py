"""Arenas: handed over whole, never shrinking, and gone with their processes."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from braid.v1 import common_pb2
from braid_wire.arena import ALIGNMENT, Allocator, ArenaOwner, HostArena, map_arena
from braid_wire.errors import ArenaUnknown, PoolExhausted, ViewInvalid


def test_both_sides_see_the_same_memory(owner: ArenaOwner) -> None:
    ours = owner.create(4096, "kv")
    assert not ours.memory.any()
    theirs = map_arena(owner.describe(ours))
    assert (theirs.arena_id, theirs.size_bytes, theirs.label) == (ours.arena_id, 4096, "kv")
    ours.memory[17] = 3
    theirs.memory[18] = 4
    assert theirs.memory[17] == 3 and ours.memory[18] == 4
    theirs.close()
    assert ours.memory[18] == 4


def test_an_arena_can_neither_shrink_nor_grow(owner: ArenaOwner) -> None:
    arena = owner.create(8192, "state")
    mapped = map_arena(owner.describe(arena))
    assert isinstance(mapped, HostArena)
    for fd in (arena.fd, mapped.fd):
        for size in (0, 4096, 16384):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    mapped.close()


def test_memory_that_could_shrink_is_not_mapped(short_path: Path) -> None:
    """A peer that truncates unsealed memory would kill whoever touches it (SIGBUS)."""
    path = short_path / "evil"
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 4096)
    plain = os.open(short_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(plain, 4096)
    for fd in (unsealed, plain):
        described = _hand_over(path, fd)
        with pytest.raises(ArenaUnknown, match="shrink"):
            map_arena(described)
        path.unlink()
        os.close(fd)


def _hand_over(path: Path, fd: int) -> common_pb2.Arena:
    """Play an owner that hands over `fd` once."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(1)

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            connection.recv(64)
            socket.send_fds(connection, [b"\x01"], [fd])

    threading.Thread(target=serve, daemon=True).start()
    return common_pb2.Arena(arena_id=1, size_bytes=4096, device="cpu", handover_socket=str(path))


def test_a_once_arena_is_handed_over_once(owner: ArenaOwner) -> None:
    arena = owner.create(4096, "logits", once=True)
    arena.memory.fill_(7)
    described = owner.describe(arena)
    taken = map_arena(described)
    assert (taken.memory == 7).all()
    with pytest.raises(ArenaUnknown):
        map_arena(described)
    owner.release(arena)  # allowed
    taken.close()


def test_a_released_arena_is_not_handed_over(owner: ArenaOwner) -> None:
    arena = owner.create(4096, "kv")
    described = owner.describe(arena)
    kept = map_arena(described)
    owner.release(arena)
    with pytest.raises(ArenaUnknown):
        map_arena(described)
    with pytest.raises(ArenaUnknown, match="closed"):
        _ = arena.memory
    kept.memory.fill_(1)  # what is mapped stays
    kept.close()


def test_a_closed_owner(short_path: Path) -> None:
    before = set(threading.enumerate())
    owner = ArenaOwner(short_path / "arenas")
    map_arena(owner.describe(owner.create(4096, "kv"))).close()
    (thread,) = [one for one in threading.enumerate() if one.name == "arena-handover" and one not in before]
    time.sleep(0.05)  # it waits for the next peer
    assert (short_path / "arenas").stat().st_mode & 0o777 == 0o600
    described = owner.describe(owner.create(4096, "kv"))
    owner.close()
    assert not (short_path / "arenas").exists()
    with pytest.raises(ArenaUnknown, match="cannot be fetched"):
        map_arena(described)
    thread.join(60)
    assert not thread.is_alive()


def test_garbage_on_the_handover_socket(owner: ArenaOwner) -> None:
    arena = owner.create(4096, "kv")
    for data in (b"", b"x", b"y" * 64, b"\xff\xff\xff\xff", b"z" * 1000):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(str(owner.socket_path))
            if data:
                connection.send(data)
    map_arena(owner.describe(arena)).close()


def open_arenas() -> int:
    """File descriptors of arenas in this process, mappings included."""
    gc.collect()  # what earlier tests left in cycles may go at any time
    found = 0
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # another thread closed it
            found += "memfd:braid" in str(fd.readlink())
    return found


def test_a_wrong_announcement(owner: ArenaOwner) -> None:
    described = owner.describe(owner.create(4096, "kv"))
    before = open_arenas()
    for size in (0, 4097, 1 << 60):
        described.size_bytes = size
        with pytest.raises(ViewInvalid):
            map_arena(described)
    described.size_bytes = 100  # less is allowed
    map_arena(described).close()
    assert open_arenas() == before


def test_an_arena_that_nobody_closes_goes_with_its_last_user(owner: ArenaOwner) -> None:
    described = owner.describe(owner.create(4096, "kv"))
    before = open_arenas()
    mapped = map_arena(described)
    kept = mapped.memory[:8]
    assert open_arenas() == before + 2  # its own, and that of its mapping
    del mapped
    assert open_arenas() == before + 1
    kept.fill_(1)
    del kept
    assert open_arenas() == before


def test_impossible_sizes(owner: ArenaOwner) -> None:
    with pytest.raises(ViewInvalid):
        owner.create(0, "nothing")
    with pytest.raises(PoolExhausted):
        owner.create(1 << 62, "everything")


def test_the_allocator_cuts_aligned_pieces(owner: ArenaOwner) -> None:
    room = Allocator(owner.create(1024, "kv"))
    start = room.arena.memory.data_ptr()
    first, second = room.empty((3,), torch.uint8), room.empty((2, 5), torch.float32)
    assert first.data_ptr() == start and second.data_ptr() == start + ALIGNMENT
    assert second.is_contiguous() and second.shape == (2, 5)
    with pytest.raises(PoolExhausted):
        room.empty((1000,), torch.uint8)
    room.reset()
    assert room.empty((1024,), torch.uint8).data_ptr() == start
