"""The wheel holds everything that is read at run time, whether it is made from the checkout or the sdist."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from compose_cell import ROOT

pytest.importorskip("hatchling", reason="hatchling is not installed")

FOLDERS = ("protos", "wire", "kernels", "full_attn_svc", "linear_attn_svc", "orchestrator")
PACKAGES = sorted(path.parent for folder in FOLDERS for path in (ROOT / folder).glob("*/__init__.py"))


def built(sort: str, source: Path, place: Path) -> Path:
    """The wheel or sdist of a source tree, made without the network."""
    place.mkdir()
    script = f"import sys; from hatchling.build import build_{sort}; build_{sort}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, place], cwd=source, check=True)
    (found,) = place.iterdir()
    return found


def names(wheel: Path) -> set[str]:
    """Files of a wheel without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("wheel", ROOT, tmp_path_factory.mktemp("w") / "dist")


def test_it_holds_every_file_of_every_package(wheel: Path) -> None:
    assert len(PACKAGES) == len(FOLDERS)
    expected = {
        path.relative_to(package.parent).as_posix()
        for package in PACKAGES
        for path in package.rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    assert names(wheel) == expected


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_every_package_is_typed_for_those_who_import_it(wheel: Path, package: Path) -> None:
    assert f"{package.name}/py.typed" in names(wheel)


def test_an_sdist_gives_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    sdist = built("sdist", ROOT, tmp_path / "dist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    again = built("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "again")
    assert names(again) == names(wheel)


def test_what_is_read_at_run_time_is_found_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    script = (
        "import pathlib, sys\n"
        "from importlib import resources\n"
        "from braid_kernels import build\n"
        "assert pathlib.Path(build.__file__).is_relative_to(sys.argv[1]), build.__file__\n"
        "for library in (build.KERNELS, build.WIRE):\n"
        "    for name in (*library.sources, *library.headers):\n"
        "        assert (build.SOURCE_DIR / name).stat().st_size, name\n"
        "assert resources.files('braid_orchestrator').joinpath('page/static/index.html').read_bytes()\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, tmp_path], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, check=True
    )
