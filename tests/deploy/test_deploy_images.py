"""The images really build, on a base made on this machine, and the cell in them answers.

Needs root, Debian's buildah and debootstrap, and a mirror. No registry and no engine: buildah runs build
steps and containers in a chroot.
"""

from __future__ import annotations

import configparser
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from compose_cell import FULL, LINEAR, ORCHESTRATOR, PORTS, ROOT, TINY, ComposeCell, entrypoint, eventually

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(1500)]

BASE = "localhost/braid-base"
IMAGES = {FULL: "full_attn_svc", LINEAR: "linear_attn_svc", ORCHESTRATOR: "orchestrator"}
PACKAGES = "python3,python3-venv,ca-certificates"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
UID = 10001
_DEBIAN = re.compile(r"^(?:URIs:|deb(?: \[.*\])?) *(https?://\S+/debian/?)(?:\s|$)", re.MULTILINE)


class Buildah:
    """buildah with a store of its own."""

    def __init__(self, place: Path) -> None:
        self._store = place / "s"
        self.command = ("buildah", "--root", str(self._store), "--runroot", str(place / "n"))
        self.command += ("--storage-driver", "overlay" if _overlays(place) else "vfs")

    def close(self) -> None:
        """Take down its containers and what it mounted."""
        self("rm", "--all")
        store = self._store / "overlay"
        if store.is_mount():
            subprocess.run(["umount", store], check=True)

    def __call__(self, *arguments: object) -> str:
        done = subprocess.run(
            [*self.command, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=ROOT
        )
        assert done.returncode == 0, (arguments, done.stdout[-2000:], done.stderr[-3000:])
        return done.stdout.strip()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Some gigabytes that are gone afterwards."""
    if os.geteuid() != 0:
        pytest.skip("building images in a chroot needs root")
    for program in ("buildah", "debootstrap"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian's package {program})")
    path = tmp_path_factory.mktemp("i")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def buildah(place: Path) -> Iterator[Buildah]:
    """With a base image: Debian and Python, from this machine's own mirror."""
    mirror = _mirror()
    if mirror is None:
        pytest.skip("this machine has no Debian mirror")
    root = place / "base"
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(root), mirror]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"debootstrap failed: {done.stdout[-300:]}")
    shutil.copy(CERTIFICATES, root / CERTIFICATES.relative_to("/"))
    with (root / "etc" / "pip.conf").open("w") as file:
        config = configparser.RawConfigParser()
        config["global"] = _pip()
        config.write(file)
    build = Buildah(place)
    try:
        container = build("from", "scratch")
        build("add", "-q", container, root, "/")
        build("config", "--env", f"PATH={SYSTEM_PATH}", container)
        build("commit", "-q", container, BASE)
        build("rm", container)
        shutil.rmtree(root)
        yield build
    finally:
        build.close()


@pytest.fixture(scope="module")
def images(buildah: Buildah) -> dict[str, str]:
    """Service → its image."""
    volumes = [word for path in _local_packages() for word in ("--volume", f"{path}:{path}:ro")]
    found = {}
    for name, folder in IMAGES.items():
        found[name] = f"localhost/braid-{folder.replace('_', '-')}"
        # With its layers kept, what the images have in common is built once.
        options = ("--layers", "--isolation", "chroot", *volumes, "--build-arg", f"BASE={BASE}")
        options += ("-t", found[name])
        buildah("bud", *options, "-f", f"{folder}/Dockerfile", ".")
    return found


class ImageCell(ComposeCell):
    """A cell each of whose processes runs in its image, as the image's user."""

    def __init__(self, place: Path, buildah: Buildah, images: dict[str, str]) -> None:
        self._buildah = buildah
        self._containers = {name: buildah("from", "--pull-never", image) for name, image in images.items()}
        self._shared = {name: place / name for name in ("run", "cache", "tmp")}
        for path in self._shared.values():
            path.mkdir(mode=0o700)
            os.chown(path, UID, UID)
        super().__init__(place, {"BRAID_POOL_BYTES": "64MiB"})
        self.address = f"unix:{self._shared['run']}/orchestrator.sock"

    def command(self, name: str) -> list[str]:
        service = self.services[name]
        volumes = [
            (self._shared["run"], "/run/braid"),
            (self._shared["cache"], "/var/cache/braid"),
            (self._shared["tmp"], "/tmp"),
            (TINY, "/models/tiny"),
        ]
        inside = [str(word) for word in (*entrypoint(service), *service["command"])]
        ports = {str(port): str(self.ports[one]) for one, port in PORTS.items()}
        ports |= {"127.0.0.1:50051": f"127.0.0.1:{self.grpc}"}
        variables = {**service["environment"], "OMP_NUM_THREADS": "1"}
        return [
            # What runs in the chroot outlives buildah, but not the first process of its PID namespace.
            *("unshare", "--pid", "--mount-proc", "--fork", "--kill-child"),
            *self._buildah.command,
            *("run", "--isolation", "chroot", "--user", f"{UID}:{UID}"),
            *(word for key, value in variables.items() for word in ("--env", f"{key}={value}")),
            *(word for ours, theirs in volumes for word in ("--volume", f"{ours}:{theirs}")),
            self._containers[name],
            "--",
            *(ports.get(word, word) for word in inside),
        ]


def test_the_cell_in_the_images_answers(place: Path, buildah: Buildah, images: dict[str, str]) -> None:
    cell = ImageCell(place, buildah, images)
    try:
        cell.wait(300)
        with cell.client() as client:
            said = client.complete("def add(", max_tokens=12)
            status = client.status()
        assert said.text
        assert {service.description.backend for service in status.services} == {"cpp"}
    finally:
        cell.close()
    assert eventually(lambda: not any(map(listens, (cell.ports[name] for name in IMAGES)))), "one still runs"


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_holds_no_more_than_it_needs(buildah: Buildah, images: dict[str, str], name: str) -> None:
    container = buildah("from", "--pull-never", images[name])
    run = ("run", "--isolation", "chroot", container, "--")
    found = set(buildah(*run, "sh", "-c", "ls /opt/braid/lib/python3*/site-packages").split())
    assert {"braid_wire", "torch", "grpc"} <= found
    assert ("transformers" in found) is (name == ORCHESTRATOR)
    assert not {"pytest", "hatchling", "mypy"} & found
    assert buildah(*run, "id", "-u") == str(UID)


def listens(port: int) -> bool:
    """Whether somebody does, on this machine's loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _overlays(place: Path) -> bool:
    """Whether directories can be laid over each other here; else every layer is a copy of all below it."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        lower, upper, work, merged = (Path(folder) / name for name in ("lower", "upper", "work", "merged"))
        for path in (lower, upper, work, merged):
            path.mkdir()
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        command = ["mount", "-t", "overlay", "overlay", "-o", options, merged]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return False
        subprocess.run(["umount", merged], check=True)
        return True


def _mirror() -> str | None:
    """Where this machine's packages come from."""
    for path in (Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")):
        found = _DEBIAN.search(path.read_text()) if path.is_file() else None
        if found:
            return found[1]
    return None


def _pip() -> dict[str, str]:
    """pip's settings on this machine."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(re.findall(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", done.stdout, re.MULTILINE))


def _local_packages() -> Sequence[Path]:
    """Directories of packages that pip's settings name."""
    found = []
    for key, value in _pip().items():
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.is_dir():
                found.append(path if key == "find-links" else path.parent)
    return sorted(set(found))
