"""`braid doctor`: what it finds on this machine, and on machines that lack something."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from braid_orchestrator.doctor import LARGE_PAGES, Finding, State, Wanted, examine, healthy
from braid_orchestrator.machine import Machine
from cli_harness import Place

GPU = "NVIDIA H200, 570.86.15, Default\n"


class Faked(Machine):
    """A machine on which all is well, but for what a test says otherwise."""

    def __init__(self, **different: object) -> None:
        self._said: dict[str, object] = {
            "osrelease": "6.1.0-38-amd64\n",
            "memfd": "",
            "memory": 64 << 30,
            "socket": "",
            "mode": 0o700,
            "owner": 1000,
            "large pages": "always [madvise] never\n",
            "files": 65536,
            "cores": 16,
            "programs": {"c++": "/usr/bin/c++"},
            "library": "",
            "requirements": ["torch>=2.8", "grpcio>=1.76"],
            "versions": {"torch": "2.13.0+cu128", "grpcio": "1.82.3"},
            "taken": {},
            "nvidia": (0, GPU),
            "cuda": 1,
            "environment": {},
            "files_there": set(),
            "links": {},
            **different,
        }

    def _of(self, name: str, key: object) -> object:
        mapping = self._said[name]
        assert isinstance(mapping, Mapping)
        return mapping.get(key)

    def which(self, program: str) -> str | None:
        return self._of("programs", program)  # type: ignore[return-value]

    def run(self, *command: str) -> tuple[int, str]:
        assert command[0] == "nvidia-smi"
        return self._said["nvidia"]  # type: ignore[return-value]

    def environment(self, name: str) -> str | None:
        return self._of("environment", name)  # type: ignore[return-value]

    def text(self, path: str) -> str | None:
        name = {"/proc/sys/kernel/osrelease": "osrelease", LARGE_PAGES: "large pages"}[path]
        return self._said[name]  # type: ignore[return-value]

    def exists(self, path: str) -> bool:
        return path in self._said["files_there"]  # type: ignore[operator]

    def link(self, path: str) -> str | None:
        return self._of("links", path)  # type: ignore[return-value]

    def memfd_error(self) -> str:
        return self._said["memfd"]  # type: ignore[return-value]

    def memory_bytes(self) -> int:
        return self._said["memory"]  # type: ignore[return-value]

    def open_files(self) -> int:
        return self._said["files"]  # type: ignore[return-value]

    def cores(self) -> int:
        return self._said["cores"]  # type: ignore[return-value]

    def socket_error(self, directory: Path) -> str:
        return self._said["socket"]  # type: ignore[return-value]

    def mode(self, path: Path) -> int:
        return self._said["mode"]  # type: ignore[return-value]

    def owner(self, path: Path) -> int:
        return self._said["owner"]  # type: ignore[return-value]

    def user(self) -> int:
        return 1000

    def port_error(self, port: int) -> str:
        return self._of("taken", port) or ""  # type: ignore[return-value]

    def version(self, distribution: str) -> str | None:
        return self._of("versions", distribution)  # type: ignore[return-value]

    def requirements(self) -> list[str]:
        return self._said["requirements"]  # type: ignore[return-value]

    def cuda_devices(self) -> int:
        return self._said["cuda"]  # type: ignore[return-value]

    def library_error(self) -> str:
        return self._said["library"]  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAID_RUNTIME_DIR", "/run/braid-test")


def test_a_good_machine() -> None:
    spaces = {f"/proc/{pid}/ns/{space}": space for pid in ("self", 7) for space in ("ipc", "pid")}
    machine = Faked(files_there={"/tmp/nvidia-mps/control"}, links=spaces)
    findings = list(examine(machine, Wanted(gpu=True, mps=True, gateway=True, peers=(7,))))
    assert {finding.state for finding in findings} == {State.OK}
    assert not any(finding.mend for finding in findings)
    names = {finding.name for finding in findings}
    assert {"shared memory", "namespaces of 7", "gpu ipc", "mps", "port 9400", "port 8000"} <= names


PEER = Wanted(gpu=True, peers=(7,))
SELF = {"/proc/self/ns/ipc": "ipc:[1]", "/proc/self/ns/pid": "pid:[1]"}


@pytest.mark.parametrize(
    ("different", "wanted", "name", "state", "found", "mend"),
    [
        ({"osrelease": "3.10.0"}, Wanted(), "kernel", "fail", "3.10", "4.5"),
        ({"osrelease": None}, Wanted(), "kernel", "fail", "unknown", "/proc"),
        ({"memfd": "ENOSYS"}, Wanted(), "shared memory", "fail", "ENOSYS", "memfd_create"),
        ({"memory": 1 << 30}, Wanted(), "memory", "warn", "1 GiB", "limit"),
        ({"large pages": "always madvise [never]"}, Wanted(), "large pages", "warn", "none", "madvise"),
        ({"large pages": None}, Wanted(), "large pages", "warn", "none", "madvise"),
        ({"socket": "Read-only"}, Wanted(), "runtime directory", "fail", "Read-only", "BRAID_RUNTIME_DIR"),
        ({"mode": 0o755}, Wanted(), "runtime directory", "fail", "755", "chmod 700"),
        ({"owner": 0}, Wanted(), "runtime directory", "fail", "another user", "chown 1000"),
        ({"files": 1024}, Wanted(), "open files", "warn", "1024", "ulimit -n"),
        ({"cores": 2}, Wanted(), "cores", "warn", "2", "embedded"),
        ({"programs": {}}, Wanted(), "compiler", "warn", "c++, g++", "g++"),
        (
            {"programs": {}, "environment": {"CXX": "icc"}},
            Wanted(),
            "compiler",
            "warn",
            "none of icc",
            "compiler",
        ),
        ({"library": "no <cmath>"}, Wanted(), "compiler", "warn", "no <cmath>", "headers"),
        ({"versions": {"torch": "2.7.0"}}, Wanted(), "packages", "fail", "torch is 2.7.0, not >=2.8", "pip"),
        ({"versions": {"torch": "2.8.0"}}, Wanted(), "packages", "fail", "grpcio is missing", "pip"),
        ({"taken": {9401: "in use"}}, Wanted(), "port 9401", "warn", "full: in use", "--metrics-port"),
        ({"taken": {8000: "in use"}}, Wanted(gateway=True), "port 8000", "warn", "gateway", "--gateway-port"),
        ({"links": SELF}, PEER, "namespaces of 7", "fail", "cannot be seen", "pid: service:anchor"),
        (
            {"links": {**SELF, "/proc/7/ns/ipc": "ipc:[2]", "/proc/7/ns/pid": "pid:[1]"}},
            PEER,
            "namespaces of 7",
            "fail",
            "ipc differ",
            "`ipc: service:anchor`",
        ),
        ({"nvidia": (127, "not found")}, Wanted(gpu=True), "gpu", "fail", "none", "driver"),
        ({"nvidia": (127, "not found")}, Wanted(), "gpu", "skip", "none", ""),
        ({"cuda": 0}, Wanted(gpu=True), "torch on the gpu", "fail", "no device", "CUDA"),
        ({"nvidia": (0, "T4, 418.1, Default\n")}, Wanted(gpu=True), "gpu ipc", "fail", "418", "450"),
        (
            {"nvidia": (0, "T4, 570.1, Exclusive_Process\n")},
            Wanted(gpu=True),
            "gpu ipc",
            "fail",
            "Exclusive",
            "-c DEFAULT",
        ),
        (
            {"environment": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}},
            Wanted(gpu=True),
            "gpu ipc",
            "warn",
            "expandable",
            "leave",
        ),
        ({}, Wanted(gpu=True, mps=True), "mps", "fail", "no daemon", "nvidia-cuda-mps-control"),
        ({}, Wanted(gpu=True), "mps", "skip", "take turns", ""),
    ],
)
def test_a_bad_machine(
    different: dict[str, object], wanted: Wanted, name: str, state: str, found: str, mend: str
) -> None:
    findings = list(examine(Faked(**different), wanted))
    finding = next(one for one in findings if one.name == name)
    assert finding.state is State(state)
    assert found in finding.found
    assert mend in finding.mend and bool(mend) == bool(finding.mend)
    assert healthy(findings) is (state != "fail")


def test_a_long_runtime_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAID_RUNTIME_DIR", "/run/" + "x" * 80)
    finding = next(one for one in examine(Faked(), Wanted()) if one.name == "runtime directory")
    assert finding.state is State.FAIL and "too long" in finding.found


def test_the_command(place: Place) -> None:
    done = place.braid("doctor", "--json")
    said = json.loads(done.out)
    findings = {one["name"]: one for one in said["findings"]}
    assert done.code == (0 if said["healthy"] else 1)
    for name in ("kernel", "shared memory", "runtime directory", "packages"):
        assert findings[name]["state"] == "ok", findings[name]
    assert set(findings["kernel"]) == set(Finding.__dataclass_fields__)
    text = place.braid("doctor")
    assert text.code == done.code
    assert "shared memory" in text.out and "Traceback" not in text.out + text.err


def test_a_directory_that_others_can_enter(place: Place, tmp_path_factory: pytest.TempPathFactory) -> None:
    open_to_all = tmp_path_factory.mktemp("r")
    open_to_all.chmod(0o777)
    other = Place(open_to_all, place.temporary)
    done = other.braid("doctor")
    assert done.code == 1
    assert f"chmod 700 {open_to_all}" in done.out.replace("\n", "")
