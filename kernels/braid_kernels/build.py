"""Builds the C++ kernels with the machine's compiler, once, and caches the library.

The cache key covers sources, flags, compiler version and processor, so an upgraded compiler or a
home directory shared between unlike machines never loads a library that does not fit. Concurrent
builds are harmless: each compiles into a temporary file and renames it into place.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
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
    "-shared",
    "-fPIC",
    "-pthread",
    "-ffp-contract=off",  # products are fused where the source says so, and only there
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=default",
)
NATIVE = "-march=native"
TIMEOUT_S = 300


def cache_dir() -> Path:
    """$BRAID_CACHE_DIR, else $XDG_CACHE_HOME/braid, else ~/.cache/braid."""
    if explicit := os.environ.get("BRAID_CACHE_DIR"):
        return Path(explicit)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "braid"
    return Path.home() / ".cache" / "braid"


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
    for part in (compiler, version.stdout, " ".join((NATIVE, *FLAGS)), _processor()):
        digest.update(part.encode() + b"\0")
    for name in (*library.sources, *library.headers):
        digest.update((SOURCE_DIR / name).read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def _compile(compiler: str, sources_of: Library, target: Path) -> None:
    """Compile into `target`; without -march=native where the compiler does not know it."""
    sources = [str(SOURCE_DIR / name) for name in sources_of.sources]
    base = [compiler, *FLAGS, *sources, "-o", str(target)]
    result = _run([*base, NATIVE])
    if result.returncode and "march" in result.stderr:
        result = _run(base)
    if result.returncode:
        raise BuildError(f"{compiler} failed with status {result.returncode}", result.stderr.strip())


def build(wanted: Library = KERNELS) -> Path:
    """Path of a shared library, compiled now if the cache does not have it. Raises BuildError."""
    compiler = find_compiler()
    library = cache_dir() / f"{wanted.name}-{_key(compiler, wanted)}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as scratch:
            fresh = Path(scratch) / library.name
            logger.info("compiling %s with %s into %s", wanted.name, compiler, library)
            _compile(compiler, wanted, fresh)
            fresh.replace(library)  # atomic: a reader sees no library or a whole one
    except OSError as error:
        raise BuildError(f"the cache directory {library.parent} is not usable: {error}") from error
    return library
