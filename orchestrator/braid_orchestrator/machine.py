"""What Braid needs to know of the machine that it runs on; every look at it goes through `Machine`."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path

_RUN_S = 20.0


class Machine:
    """This machine. Tests put others in its place."""

    def which(self, program: str) -> str | None:
        """Path of a program."""
        return shutil.which(program)

    def run(self, *command: str) -> tuple[int, str]:
        """Exit code and output of a command; 127 where it cannot be started or does not end."""
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_RUN_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return 127, str(error)
        return done.returncode, done.stdout + done.stderr

    def environment(self, name: str) -> str | None:
        """Of an environment variable, its value."""
        return os.environ.get(name)

    def text(self, path: str) -> str | None:
        """Content of a file; None where it cannot be read."""
        try:
            return Path(path).read_text(errors="replace").strip("\0")
        except OSError:
            return None

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""
        return Path(path).exists()

    def link(self, path: str) -> str | None:
        """Where a symbolic link of /proc leads."""
        try:
            return str(Path(path).readlink())
        except OSError:
            return None

    def memfd_error(self) -> str:
        """Why sealed anonymous memory cannot be made and mapped; empty where it can."""
        from braid_wire.arena import HostArena
        from braid_wire.errors import BraidError

        try:
            arena = HostArena.create(0, 1 << 20, "doctor")
        except (BraidError, OSError) as error:
            return str(error)
        arena.memory[-1] = 1
        arena.close()
        return ""

    def memory_bytes(self) -> int:
        """Memory that can still be taken, bytes, within the limit of the cgroup."""
        available = 0
        for line in (self.text("/proc/meminfo") or "").splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
        limit = (self.text("/sys/fs/cgroup/memory.max") or "max").strip()
        used = (self.text("/sys/fs/cgroup/memory.current") or "0").strip()
        return min(available, int(limit) - int(used)) if limit.isdecimal() and used.isdecimal() else available

    def open_files(self) -> int:
        """Files that a process may have open."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return soft if soft != resource.RLIM_INFINITY else 1 << 30

    def cores(self) -> int:
        """Cores that this process may use."""
        return len(os.sched_getaffinity(0))

    def socket_error(self, directory: Path) -> str:
        """Why no private socket can be made under a directory; empty where one can."""
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (
                tempfile.TemporaryDirectory(dir=directory, prefix=".doctor-") as scratch,
                socket.socket(socket.AF_UNIX) as listener,
            ):
                listener.bind(str(Path(scratch) / "s"))
        except OSError as error:
            return str(error)
        return ""

    def mode(self, path: Path) -> int:
        """Permission bits."""
        return path.stat().st_mode & 0o777

    def owner(self, path: Path) -> int:
        """User id of a file's owner."""
        return path.stat().st_uid

    def user(self) -> int:
        """Effective user id of this process."""
        return os.geteuid()

    def port_error(self, port: int) -> str:
        """Why a port of loopback cannot be listened at; empty where it can."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                return error.strerror or str(error)
        return ""

    def version(self, distribution: str) -> str | None:
        """Installed version of a package."""
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            return None

    def requirements(self) -> list[str]:
        """What the package asks of others, without extras."""
        return [text for text in metadata.requires("braid-attention") or [] if "extra ==" not in text]

    def cuda_devices(self) -> int:
        """GPUs that torch can use."""
        import torch

        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    def library_error(self) -> str:
        """Why the C++ kernels cannot be built; empty where they can."""
        from braid_kernels.build import build
        from braid_kernels.errors import BuildError

        try:
            build()
        except BuildError as error:
            return str(error)
        return ""
