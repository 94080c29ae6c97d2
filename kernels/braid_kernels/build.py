"""Builds the C++ kernels with the machine's compiler, once, and caches the library.

The cache key covers sources, flags, compiler version and processor, so an upgraded compiler or a
home directory shared between unlike machines never loads a library that does not fit. One process
compiles at a time, on every core, and those that wait for it find the library; where the cache's file system
knows no locks, each compiles for itself. A library comes into place whole, by a rename.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from braid_kernels.errors import BuildError

logger = logging.getLogger(__name__)

SOURCE_DIR = Path(__file__).parent / "cpp"


@dataclass(frozen=True)
class Library:
    """A shared library: what it is called, and the files of `cpp/` that it is made of."""

    name: str
    sources: tuple[str, ...]
    headers: tuple[str, ...] = ()


KERNELS = Library(
    "braid_kernels",
    (
        "pool.cpp",
        "linear.cpp",
        "mamba1.cpp",
        "short_conv.cpp",
        "attention.cpp",
        "gemm.cpp",
        "mixture.cpp",
        "program.cpp",
    ),
    ("common.h", "spans.h", "gemm.h", "elementary.h", "program.h"),
)
WIRE = Library("braid_wire", ("doorbell.cpp", "batch_check.cpp"))

FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-pthread",
    "-ffp-contract=off",  # products are fused where the source says so, and only there
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=default",
)
LINK = ("-shared", "-pthread")
NATIVE = "-march=native"
TIMEOUT_S = 300


def cache_dir() -> Path:
    """$BRAID_CACHE_DIR, else $XDG_CACHE_HOME/braid, else ~/.cache/braid."""
    if explicit := os.environ.get("BRAID_CACHE_DIR"):
        return Path(explicit)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "braid"
    return Path.home() / ".cache" / "braid"


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def find_compiler() -> str:
    """Path of $CXX, else of the first of c++, g++, clang++. Raises BuildError where there is none."""
    if wanted := os.environ.get("CXX"):
        found = shutil.which(wanted)
        if found is None:
            raise BuildError(f"the compiler named by $CXX does not exist: {wanted}")
        return found
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return found
    raise BuildError("no C++ compiler found (looked for c++, g++, clang++; set $CXX)")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} could not be started: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} did not finish in {TIMEOUT_S} s") from error


def _processor() -> str:
    """What -march=native would see: the processor's model and feature flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    keep = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    return platform.machine() + "".join(line for line in lines if line.startswith(keep))


def _key(compiler: str, library: Library) -> str:
    digest = hashlib.sha256()
    version = _run([compiler, "--version"])
    for part in (compiler, version.stdout, " ".join((NATIVE, *FLAGS, *LINK)), _processor()):
        digest.update(part.encode() + b"\0")
    for name in (*library.sources, *library.headers):
        digest.update((SOURCE_DIR / name).read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def _object(compiler: str, source: Path, scratch: Path) -> Path:
    """Compile one source; without -march=native where the compiler does not know it."""
    made = scratch / f"{source.stem}.o"
    base = [compiler, *FLAGS, "-c", str(source), "-o", str(made)]
    result = _run([*base, NATIVE])
    if result.returncode and "march" in result.stderr:
        result = _run(base)
    _expect_done(compiler, result)
    return made


def _expect_done(compiler: str, result: subprocess.CompletedProcess[str]) -> None:
    if result.returncode:
        raise BuildError(f"{compiler} failed with status {result.returncode}", result.stderr.strip())


def _compile(compiler: str, wanted: Library, scratch: Path) -> Path:
    """Compile a library's sources side by side, and link them."""
    sources = [SOURCE_DIR / name for name in wanted.sources]
    with ThreadPoolExecutor(cores()) as pool:
        objects = list(pool.map(lambda source: _object(compiler, source, scratch), sources))
    made = scratch / f"{wanted.name}.so"
    _expect_done(compiler, _run([compiler, *LINK, *map(str, objects), "-o", str(made)]))
    return made


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """No other process is in here for this directory."""
    place = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX)
        except OSError as error:
            logger.info("no locks in %s: %s", directory, error)
        yield
    finally:
        os.close(place)


def build(wanted: Library = KERNELS) -> Path:
    """Path of a shared library, compiled now if the cache does not have it. Raises BuildError."""
    compiler = find_compiler()
    library = cache_dir() / f"{wanted.name}-{_key(compiler, wanted)}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with _alone(library.parent):
            if not library.exists():  # nobody made it meanwhile
                logger.info("compiling %s with %s into %s", wanted.name, compiler, library)
                with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as scratch:
                    _compile(compiler, wanted, Path(scratch)).replace(library)
    except OSError as error:
        raise BuildError(f"the cache directory {library.parent} is not usable: {error}") from error
    return library
