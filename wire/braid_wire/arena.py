"""Arenas: large shared allocations, owned by one process and mapped by others.

On a CPU an arena is a memfd: anonymous memory behind a file descriptor, handed to the peer over a
Unix socket. It has no name anywhere, so nothing stays behind when every process is killed. On a GPU it is
an allocation of its own, whose IPC handle travels in the message (`cuda_arena`).
"""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import socket
import struct
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import torch
from braid.v1 import common_pb2

from braid_wire.errors import ArenaUnknown, PoolExhausted, ViewInvalid

ALIGNMENT = 64
"""Bytes; every allocation inside an arena begins on a cache line."""


_REQUEST = struct.Struct("<I")
_FOUND, _MISSING = b"\x01", b"\x00"
_HANDOVER_TIMEOUT_S = 10.0


class Arena(ABC):
    """One shared allocation; `memory` is all of it as a uint8 tensor on `device`."""

    def __init__(self, arena_id: int, size_bytes: int, device: torch.device, label: str) -> None:
        self.arena_id = arena_id
        self.size_bytes = size_bytes
        self.device = device
        self.label = label

    @property
    @abstractmethod
    def memory(self) -> torch.Tensor:
        """uint8 [size_bytes]: the whole allocation."""

    @abstractmethod
    def describe(self, handover: str) -> common_pb2.Arena:
        """The message from which another process can map it."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory up; it goes when the last tensor over it does."""


class HostArena(Arena):
    """Anonymous shared memory of a CPU process."""

    def __init__(self, arena_id: int, fd: int, size_bytes: int, label: str) -> None:
        super().__init__(arena_id, size_bytes, torch.device("cpu"), label)
        self.fd = fd
        self._memory: torch.Tensor | None = torch.frombuffer(
            mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE), dtype=torch.uint8
        )
        # At the latest with this object: a host that lives in the orchestrator's process is let go of as it
        # is, and nobody closes what it has mapped.
        self._close_fd = weakref.finalize(self, os.close, fd)
        self._close_fd.atexit = False

    @classmethod
    def create(cls, arena_id: int, size_bytes: int, label: str) -> HostArena:
        """Allocate zeroed memory.

        Raises:
            PoolExhausted: the machine has not that much memory.
        """
        if size_bytes < 1:
            raise ViewInvalid(f"arena {label!r} has {size_bytes} bytes; it needs at least 1", label=label)
        fd = os.memfd_create(f"braid-{label}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size_bytes)
            # Sealed, so that no peer can shrink it under another's feet (SIGBUS).
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls(arena_id, fd, size_bytes, label)
        except OSError as error:
            os.close(fd)
            raise PoolExhausted(
                f"arena {label!r} of {size_bytes} bytes cannot be allocated: {error}", label=label
            ) from error

    @property
    def memory(self) -> torch.Tensor:
        if self._memory is None:
            raise ArenaUnknown(f"arena {self.arena_id} ({self.label}) is closed", arena_id=self.arena_id)
        return self._memory

    def describe(self, handover: str) -> common_pb2.Arena:
        return common_pb2.Arena(
            arena_id=self.arena_id,
            size_bytes=self.size_bytes,
            device="cpu",
            label=self.label,
            handover_socket=handover,
        )

    def close(self) -> None:
        self._memory = None
        self._close_fd()


class Allocator:
    """Cuts one arena into aligned tensors, front to back; nothing is given back singly."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.used = 0

    def reset(self) -> None:
        """Start again from the front; tensors handed out before must no longer be used."""
        self.used = 0

    def empty(self, shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor of the next free bytes, its content unspecified.

        Raises:
            PoolExhausted: the arena is full.
        """
        extents = tuple(shape)
        count = 1
        for extent in extents:
            count *= extent
        start, end = self.used, self.used + count * dtype.itemsize
        if end > self.arena.size_bytes:
            raise PoolExhausted(
                f"arena {self.arena.label!r} is full: {end} bytes wanted, {self.arena.size_bytes} there",
                label=self.arena.label,
            )
        self.used = -(-end // ALIGNMENT) * ALIGNMENT
        return self.arena.memory[start:end].view(dtype).view(extents)


class ArenaOwner:
    """Makes a process's arenas and hands them to peers of the same user over a Unix socket.

    Args:
        socket_path: where to listen; its directory must be private to the user.
    """

    def __init__(self, socket_path: Path) -> None:
        self.socket_path = socket_path
        self._ids = itertools.count(1)
        self._arenas: dict[int, Arena] = {}
        self._once: set[int] = set()
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(socket_path))
        socket_path.chmod(0o600)
        self._listener.listen(16)
        self._thread = threading.Thread(target=self._serve, name="arena-handover", daemon=True)
        self._thread.start()

    def create(self, size_bytes: int, label: str, once: bool = False) -> HostArena:
        """Allocate host memory; with `once`, this process forgets it as soon as a peer has it.

        Raises:
            PoolExhausted: there is not that much memory.
        """
        with self._lock:
            arena = HostArena.create(next(self._ids), size_bytes, label)
            self._arenas[arena.arena_id] = arena
            if once:
                self._once.add(arena.arena_id)
        return arena

    def create_on(self, device: torch.device, size_bytes: int, label: str) -> Arena:
        """Allocate memory of a device, or of the host where that is the device.

        Raises:
            PoolExhausted: there is not that much memory.
            ArenaUnknown: there is no such device.
            ServiceFault: there is no CUDA driver.
        """
        if device.type == "cpu":
            return self.create(size_bytes, label)
        # Imported here: a CPU cell needs none of it.
        from braid_wire.cuda_arena import CudaArena, context_of

        with self._lock:
            arena = CudaArena.create(next(self._ids), size_bytes, label, context_of(device.index or 0))
            self._arenas[arena.arena_id] = arena
        return arena

    def release(self, arena: Arena) -> None:
        """Close an arena; releasing one that a peer has taken for good is allowed."""
        with self._lock:
            self._once.discard(arena.arena_id)
            found = self._arenas.pop(arena.arena_id, None)
        if found is not None:
            found.close()

    def describe(self, arena: Arena) -> common_pb2.Arena:
        """The message from which a peer can map the arena."""
        return arena.describe(str(self.socket_path))

    def close(self) -> None:
        """Close the socket and every arena."""
        # A thread that waits in accept() sleeps through a close of its socket; a shutdown wakes it.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.socket_path.unlink(missing_ok=True)
        with self._lock:
            arenas, self._arenas = list(self._arenas.values()), {}
        for arena in arenas:
            arena.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            with connection:
                try:
                    self._answer(connection)
                except OSError:
                    continue  # this peer went away; the next one counts

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(_HANDOVER_TIMEOUT_S)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _, uid, _ = struct.unpack("3i", credentials)
        request = connection.recv(64)
        if uid not in (os.geteuid(), 0) or len(request) != _REQUEST.size:
            connection.send(_MISSING)
            return
        (arena_id,) = _REQUEST.unpack(request)
        with self._lock:
            arena = self._arenas.get(arena_id)
            if not isinstance(arena, HostArena):
                connection.send(_MISSING)
                return
            socket.send_fds(connection, [_FOUND], [arena.fd])
            forget = arena_id in self._once
        if forget:
            self.release(arena)


def map_arena(described: common_pb2.Arena) -> Arena:
    """Map an arena of another process.

    Raises:
        ArenaUnknown: no handle, an unknown device, or the owner does not hand it over.
        ViewInvalid: the memory is smaller than announced.
    """
    which = described.WhichOneof("handle")
    if which == "cuda_ipc_handle" and described.device.startswith("cuda"):
        from braid_wire.cuda_arena import map_cuda

        return map_cuda(described)
    if which != "handover_socket" or described.device != "cpu":
        raise ArenaUnknown(
            f"arena {described.arena_id} ({described.label}) on {described.device!r} has handle {which}; a "
            "CPU arena is handed over by a socket, a CUDA one by an IPC handle",
            arena_id=described.arena_id,
            device=described.device,
        )
    fd = _fetch(described)
    size = os.fstat(fd).st_size
    if size < described.size_bytes or described.size_bytes < 1:
        os.close(fd)
        raise ViewInvalid(
            f"arena {described.arena_id} is announced with {described.size_bytes} bytes but has {size}",
            arena_id=described.arena_id,
        )
    if not _is_sealed(fd):
        os.close(fd)
        raise ArenaUnknown(
            f"arena {described.arena_id} ({described.label}) is memory that its owner could shrink",
            arena_id=described.arena_id,
        )
    try:
        return HostArena(described.arena_id, fd, described.size_bytes, described.label)
    except OSError as error:
        os.close(fd)
        raise ArenaUnknown(
            f"arena {described.arena_id} ({described.label}) cannot be mapped: {error}",
            arena_id=described.arena_id,
        ) from error


def _is_sealed(fd: int) -> bool:
    """Whether the memory behind `fd` can never shrink: touching what has gone would kill us (SIGBUS)."""
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:  # no memfd at all
        return False


def _fetch(described: common_pb2.Arena) -> int:
    """The file descriptor behind a handover socket."""
    path = described.handover_socket
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(_HANDOVER_TIMEOUT_S)
            connection.connect(path)
            connection.send(_REQUEST.pack(described.arena_id))
            answer, fds, _, _ = socket.recv_fds(connection, 1, 1)
    except OSError as error:
        raise ArenaUnknown(
            f"arena {described.arena_id} ({described.label}) cannot be fetched from {path}: {error}",
            arena_id=described.arena_id,
        ) from error
    if answer != _FOUND or len(fds) != 1:
        raise ArenaUnknown(
            f"the owner at {path} has no arena {described.arena_id} ({described.label}) for this process",
            arena_id=described.arena_id,
        )
    return int(fds[0])
