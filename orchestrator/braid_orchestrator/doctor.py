"""Examines a machine: what Braid needs of it, what is missing, and what mends that."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from braid_wire.metrics import PORTS
from braid_wire.runtime_dir import base_directory
from packaging.requirements import Requirement

from braid_orchestrator.gateway import METRICS_PORT as GATEWAY_METRICS_PORT
from braid_orchestrator.gateway import PORT as GATEWAY_PORT
from braid_orchestrator.machine import Machine
from braid_orchestrator.plan_view import human_bytes

_LEAST_MEMORY = 2 << 30
_LEAST_FILES = 4096
_CORES = 3  # one for each process
_LONGEST_DIRECTORY = 108 - 32  # of sockaddr_un, less the name of a cell's directory and socket
_SEAL_KERNEL = (4, 5)
_IPC_DRIVER = 450


LARGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"


class State(Enum):
    """Of one finding; `FAIL` keeps Braid from running as asked, `WARN` only from running well."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        name: what.
        state: how it is.
        found: what was seen.
        mend: what to do about it; empty where nothing need be done.
    """

    name: str
    state: State
    found: str
    mend: str = ""

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "state": self.state.value}


@dataclass(frozen=True)
class Wanted:
    """What the machine is to be used for.

    Args:
        gpu: the services run on a GPU.
        mps: they share it by the Multi-Process Service.
        gateway: an OpenAI-compatible server runs too.
        peers: process ids of the cell's other processes, to compare namespaces with.
    """

    gpu: bool = False
    mps: bool = False
    gateway: bool = False
    peers: tuple[int, ...] = ()


def examine(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    """Every finding, one after the other."""
    checks: list[Callable[[Machine], Finding]] = [
        _kernel,
        _shared_memory,
        _memory,
        _large_pages,
        _runtime_directory,
        _open_files,
        _cores,
        _compiler,
        _packages,
    ]
    for check in checks:
        yield check(machine)
    yield from _ports(machine, wanted)
    for pid in wanted.peers:
        yield _namespaces(machine, pid, wanted.gpu)
    yield from _gpu(machine, wanted)


def healthy(findings: list[Finding]) -> bool:
    """Whether nothing keeps Braid from running."""
    return all(finding.state is not State.FAIL for finding in findings)


def _kernel(machine: Machine) -> Finding:
    text = (machine.text("/proc/sys/kernel/osrelease") or "").strip()
    match = re.match(r"(\d+)\.(\d+)", text)
    if match is None:
        return Finding("kernel", State.FAIL, text or "unknown", "run on Linux, with /proc mounted")
    if (int(match[1]), int(match[2])) < _SEAL_KERNEL:
        return Finding("kernel", State.FAIL, text, "memory that is handed over needs Linux 4.5 or newer")
    return Finding("kernel", State.OK, text)


def _shared_memory(machine: Machine) -> Finding:
    error = machine.memfd_error()
    if error:
        mend = "allow the system call memfd_create and its seals (seccomp profile of the container)"
        return Finding("shared memory", State.FAIL, error, mend)
    return Finding("shared memory", State.OK, "memfd can be made, sealed and mapped")


def _memory(machine: Machine) -> Finding:
    free = machine.memory_bytes()
    if free < _LEAST_MEMORY:
        mend = "free memory, or raise the container's limit: weights and --pool-bytes need more"
        return Finding("memory", State.WARN, f"{human_bytes(free)} available", mend)
    return Finding("memory", State.OK, f"{human_bytes(free)} available")


def _large_pages(machine: Machine) -> Finding:
    said = machine.text(LARGE_PAGES)
    if said is None or "[never]" in said:
        mend = f"echo madvise > {LARGE_PAGES}: weights on the CPU are read up to a quarter faster"
        return Finding("large pages", State.WARN, "the system gives none", mend)
    return Finding("large pages", State.OK, "given to weights")


def _runtime_directory(machine: Machine) -> Finding:
    base, name = base_directory(), "runtime directory"
    error = machine.socket_error(base)
    if error:
        return Finding(
            name, State.FAIL, error, "set BRAID_RUNTIME_DIR to a directory of yours on a local disk"
        )
    if len(str(base)) + len("/00000000") > _LONGEST_DIRECTORY:
        return Finding(
            name, State.FAIL, f"{base} is too long for sockets", "set BRAID_RUNTIME_DIR to a shorter path"
        )
    if machine.owner(base) != machine.user():
        return Finding(
            name,
            State.FAIL,
            f"{base} is another user's",
            f"chown {machine.user()} {base}, or set BRAID_RUNTIME_DIR",
        )
    mode = machine.mode(base)
    if mode & 0o077:
        return Finding(
            name, State.FAIL, f"{base} has mode {mode:o}: others could reach the sockets", f"chmod 700 {base}"
        )
    return Finding(name, State.OK, str(base))


def _open_files(machine: Machine) -> Finding:
    limit = machine.open_files()
    if limit < _LEAST_FILES:
        mend = (
            f"raise it: `ulimit -n {_LEAST_FILES}`, LimitNOFILE= of the unit, or `ulimits:` of the container"
        )
        return Finding("open files", State.WARN, f"limit {limit}: about {limit // 2} clients", mend)
    return Finding("open files", State.OK, f"limit {limit}")


def _cores(machine: Machine) -> Finding:
    cores = machine.cores()
    if cores < _CORES:
        mend = "give the cell a core for each of its three processes, or use --placement embedded"
        return Finding("cores", State.WARN, f"{cores} for three processes", mend)
    return Finding("cores", State.OK, str(cores))


def _compiler(machine: Machine) -> Finding:
    wanted = machine.environment("CXX")
    names = [wanted] if wanted else ["c++", "g++", "clang++"]
    found = next((path for path in map(machine.which, names) if path), None)
    if found is None:
        mend = "install a C++ compiler (Debian: g++); without it the slow reference runs, and no doorbells"
        return Finding("compiler", State.WARN, f"none of {', '.join(names)}", mend)
    error = machine.library_error()
    if error:
        mend = "make the cache writable (BRAID_CACHE_DIR), and install C++ headers (Debian: g++, libc6-dev)"
        return Finding("compiler", State.WARN, f"{found}: {error}", mend)
    return Finding("compiler", State.OK, f"{found} builds the kernels")


def _packages(machine: Machine) -> Finding:
    wrong = []
    for text in machine.requirements():
        asked = Requirement(text)
        version = machine.version(asked.name)
        if version is None:
            wrong.append(f"{asked.name} is missing")
        elif not asked.specifier.contains(version, prereleases=True):
            wrong.append(f"{asked.name} is {version}, not {asked.specifier}")
    if wrong:
        return Finding("packages", State.FAIL, "; ".join(wrong), "pip install -c constraints.txt .")
    return Finding(
        "packages", State.OK, f"torch {machine.version('torch')}, grpcio {machine.version('grpcio')}"
    )


def _ports(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    ports = dict(PORTS)
    if wanted.gateway:
        ports |= {"gateway": GATEWAY_PORT, "gateway metrics": GATEWAY_METRICS_PORT}
    for name, port in ports.items():
        error = machine.port_error(port)
        if error:
            mend = "stop what listens there (`ss -ltnp`), or choose others: --metrics-port, --gateway-port"
            yield Finding(f"port {port}", State.WARN, f"{name}: {error}", mend)
        else:
            yield Finding(f"port {port}", State.OK, f"free for {name}")


def _namespaces(machine: Machine, pid: int, gpu: bool) -> Finding:
    name = f"namespaces of {pid}"
    differ = []
    for space in ("ipc", "pid"):
        own, other = machine.link(f"/proc/self/ns/{space}"), machine.link(f"/proc/{pid}/ns/{space}")
        if other is None:
            mend = "run as its user, in one PID namespace with it (`pid: service:anchor`)"
            return Finding(name, State.FAIL, "the process cannot be seen", mend)
        if own != other:
            differ.append(space)
    if differ:
        mend = "; ".join(f"`{space}: service:anchor`" for space in differ)
        state = State.FAIL if gpu else State.WARN
        return Finding(name, state, f"{' and '.join(differ)} differ; CUDA IPC handles do not open", mend)
    return Finding(name, State.OK, "ipc and pid are shared")


def _gpu(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    code, said = machine.run(
        "nvidia-smi", "--query-gpu=name,driver_version,compute_mode", "--format=csv,noheader"
    )
    devices = [line.split(", ") for line in said.strip().splitlines()] if code == 0 else []
    missing = State.FAIL if wanted.gpu else State.SKIP
    if not devices:
        mend = (
            "install NVIDIA's driver; in a container, the container toolkit and `device_ids`"
            if wanted.gpu
            else ""
        )
        yield Finding("gpu", missing, "none", mend)
        return
    name, driver, mode = devices[0]
    yield Finding("gpu", State.OK, f"{len(devices)} × {name}, driver {driver}")
    if machine.cuda_devices() == 0:
        mend = "install a build of torch for CUDA, and check CUDA_VISIBLE_DEVICES"
        yield Finding("torch on the gpu", missing, "torch sees no device", mend if wanted.gpu else "")
        return
    yield _ipc(machine, driver, mode, wanted)
    yield _mps(machine, wanted)


def _ipc(machine: Machine, driver: str, mode: str, wanted: Wanted) -> Finding:
    visible = machine.environment("CUDA_VISIBLE_DEVICES")
    allocator = machine.environment("PYTORCH_CUDA_ALLOC_CONF") or ""
    if int(driver.split(".")[0]) < _IPC_DRIVER:
        return Finding("gpu ipc", State.FAIL, f"driver {driver}", f"install driver {_IPC_DRIVER} or newer")
    if mode.strip() in ("Exclusive_Process", "Prohibited") and not wanted.mps:
        mend = "nvidia-smi -c DEFAULT, or share it by MPS (--mps)"
        return Finding("gpu ipc", State.FAIL, f"compute mode is {mode}: one process alone may use it", mend)
    if "expandable_segments:True" in allocator.replace(" ", ""):
        mend = "leave expandable_segments out of PYTORCH_CUDA_ALLOC_CONF: such memory has no IPC handles"
        return Finding("gpu ipc", State.WARN, allocator, mend)
    return Finding("gpu ipc", State.OK, f"visible devices: {visible or 'all'}")


def _mps(machine: Machine, wanted: Wanted) -> Finding:
    pipes = machine.environment("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps"
    if machine.exists(f"{pipes}/control"):
        return Finding("mps", State.OK, f"a daemon serves at {pipes}")
    if wanted.mps:
        mend = (
            "start nvidia-cuda-mps-control -d, or the profile mps; a client that finds no daemon runs "
            "without MPS and does not say so"
        )
        return Finding("mps", State.FAIL, f"no daemon at {pipes}", mend)
    return Finding("mps", State.SKIP, "not asked for: the three processes take turns on the GPU")
