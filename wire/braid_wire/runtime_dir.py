"""Private directories for the sockets of running cells.

A socket's file outlives a killed process, so every cell has a directory of its own that it holds
locked, and whoever makes the next one sweeps away those whose lock is free. They lie where the
system keeps run-time files, never in /tmp.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from braid_wire.errors import RequestInvalid

_LOCK = "lock"
# sockaddr_un holds 108 bytes; the longest socket name in a cell's directory is shorter than 32.
_MAX_PATH = 108 - 32


def base_directory() -> Path:
    """Where cells keep their directories: $BRAID_RUNTIME_DIR, else the user's run-time directory."""
    chosen = os.environ.get("BRAID_RUNTIME_DIR")
    if chosen:
        return Path(chosen)
    user = os.environ.get("XDG_RUNTIME_DIR")
    if user and Path(user).is_dir():
        return Path(user) / "braid"
    if os.access("/run", os.W_OK):
        return Path(f"/run/braid-{os.getuid()}")
    return Path.home() / ".cache" / "braid" / "run"


@dataclass
class RuntimeDirectory:
    """A cell's private directory (0700), locked while its owner lives."""

    path: Path
    _lock_fd: int

    @classmethod
    def create(cls) -> RuntimeDirectory:
        """Make one, after sweeping away those of dead owners.

        Raises:
            RequestInvalid: it cannot be made, or its path is too long for a socket.
        """
        base = base_directory()
        path = base / secrets.token_hex(4)
        if len(os.fsencode(path)) > _MAX_PATH:
            raise RequestInvalid(
                f"run-time directory {path} is too long for Unix sockets; "
                "set BRAID_RUNTIME_DIR to a shorter one",
                field="BRAID_RUNTIME_DIR",
            )
        try:
            base.mkdir(mode=0o700, parents=True, exist_ok=True)
            sweep(base)
            # Named only once it is locked: a sweep that came between would take it for a dead one's.
            unnamed = base / f".{path.name}"
            unnamed.mkdir(mode=0o700)
            lock_fd = _lock(unnamed)
            unnamed.rename(path)
        except OSError as error:
            raise RequestInvalid(
                f"run-time directory {path} cannot be made: {error}; set BRAID_RUNTIME_DIR",
                field="BRAID_RUNTIME_DIR",
            ) from error
        return cls(path, lock_fd)

    def close(self) -> None:
        """Remove the directory and free its lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock_fd)


def sweep(base: Path) -> None:
    """Remove the directories under `base` whose owners are dead."""
    for path in base.iterdir():
        if path.name.startswith(".") or not (path / _LOCK).exists():
            continue
        try:
            fd = _lock(path)
        except OSError:
            continue  # its owner lives
        shutil.rmtree(path, ignore_errors=True)
        os.close(fd)


def _lock(path: Path) -> int:
    """Lock a directory without waiting; `OSError` where another process holds it."""
    # Not inherited: the lock must go with its owner, whatever children it leaves.
    fd = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd
