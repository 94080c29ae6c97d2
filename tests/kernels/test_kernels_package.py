"""Geometry checks, the registry, and what happens without a compiler."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import braid_kernels
import pytest
from braid_kernels import (
    BuildError,
    GatedDelta,
    Geometry,
    GeometryError,
    Gqa,
    KimiDelta,
    Lightning,
    Mamba2,
    Mla,
    UnknownBackendError,
    default_full_backend,
    default_linear_backend,
    full_backend,
    linear_backend,
    signature,
)
from braid_kernels.build import build

PACKAGE_PARENT = Path(braid_kernels.__file__).parent.parent


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("num_kv_heads", lambda: Gqa(6, 4, 8, 8, 1.0)),
        ("head_dim", lambda: Gqa(4, 4, 0, 8, 1.0)),
        ("scale", lambda: Gqa(4, 4, 8, 8, math.nan)),
        ("sliding_window", lambda: Gqa(4, 4, 8, 8, 1.0, -1)),
        ("qk_rope_head_dim", lambda: Mla(4, 8, -1, 8, 8, 1.0)),
        ("num_k_heads", lambda: GatedDelta(3, 4, 8, 8, 4, 1.0)),
        ("conv_width", lambda: GatedDelta(2, 4, 8, 8, 1, 1.0)),
        ("beta_scale", lambda: GatedDelta(2, 4, 8, 8, 4, 1.0, 0.0)),
        ("gate_lower_bound", lambda: KimiDelta(2, 8, 4, 1.0, 5.0)),
        ("activation", lambda: Lightning(2, 8, 1.0, "gelu")),
        ("num_groups", lambda: Mamba2(4, 8, 8, 3, 4)),
        ("dt_max", lambda: Mamba2(4, 8, 8, 2, 4, 1.0, 0.5)),
    ],
)
def test_geometry_errors_name_the_field(field: str, make: Callable[[], Geometry]) -> None:
    with pytest.raises(GeometryError) as caught:
        make()
    assert caught.value.field == field
    assert caught.value.rule


def test_signature_has_the_widths_of_the_contract() -> None:
    sig = signature(GatedDelta(16, 32, 128, 128, 4, 128**-0.5))
    assert sig.inputs["mixed_qkv"] == (8192,)
    assert (sig.state, sig.conv) == ((32, 128, 128), (8192, 3))
    assert signature(Mla(32, 128, 64, 128, 512, 1.0)).caches == {"latent": (576,)}
    assert signature(Mamba2(128, 64, 128, 1, 4)).inputs["xBC"] == (8448,)


def test_unknown_backends_are_refused_with_the_known_ones() -> None:
    for get in (linear_backend, full_backend):
        with pytest.raises(UnknownBackendError) as caught:
            get("flash")
        assert {"cpp", "reference"} <= set(caught.value.known)
        assert "flash" in str(caught.value) and "reference" in str(caught.value)


def test_the_default_is_cpp_where_it_builds() -> None:
    assert default_linear_backend() is linear_backend("cpp")
    assert default_full_backend() is full_backend("cpp")


def test_importing_the_package_compiles_nothing(tmp_path: Path) -> None:
    code = "import braid_kernels, sys; print('braid_kernels.build' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT), "BRAID_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert not list(tmp_path.iterdir())


FALLBACK = """
import logging, torch
logging.basicConfig(format="%(levelname)s %(message)s")
from braid_kernels import default_full_backend, default_linear_backend, Gqa
from braid_kernels.testing import Span, full_case, linear_case, small_linear_geometries
for _ in range(3):
    linear, full = default_linear_backend(), default_full_backend()
assert (linear.name, full.name) == ("reference", "reference")
case = linear_case(small_linear_geometries()["gated_delta"], [Span.final(3, -1, 0)], slots=1).run(linear)
assert not case.out.isnan().any()
assert not full_case(Gqa(2, 1, 8, 8, 1.0), [3], [0]).run(full).out.isnan().any()
print("served")
"""


@pytest.mark.parametrize("environment", [{"CXX": "/nonexistent"}, {"PATH": "/nonexistent"}, {"CXX": "false"}])
def test_without_a_compiler_the_reference_stands_in_with_one_warning(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    env = {k: v for k, v in os.environ.items() if k != "CXX"}
    env |= {"PYTHONPATH": str(PACKAGE_PARENT), "BRAID_CACHE_DIR": str(tmp_path), **environment}
    done = subprocess.run(
        [sys.executable, "-c", FALLBACK], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "served"
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert "reference stands in" in warnings[0]


def test_a_compile_error_carries_the_compilers_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "broken-c++"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'error: no such luck' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("BRAID_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(BuildError, match="no such luck") as caught:
        build()
    assert "no such luck" in caught.value.output


COUNTING = """#!/bin/sh
[ "$1" = --version ] && exit 0
case "$*" in *-shared*) echo linked >> {count}; sleep 0.2;; esac
while [ "$1" != -o ]; do shift; done
echo library > "$2"
"""


def counting_compiler(place: Path) -> tuple[Path, dict[str, str]]:
    """Where a compiler notes what it links, and the environment that names it and an empty cache."""
    compiler, count = place / "counting-c++", place / "count"
    compiler.write_text(COUNTING.format(count=count))
    compiler.chmod(0o755)
    return count, {"CXX": str(compiler), "BRAID_CACHE_DIR": str(place / "cache")}


def test_a_cached_library_is_not_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, environment = counting_compiler(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert build() == build()
    assert count.read_text() == "linked\n"
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".so"]


def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    count, environment = counting_compiler(tmp_path)
    env = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT), **environment}
    code = "from braid_kernels.build import build; print(build())"
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    told = {process.communicate(timeout=120)[0] for process in started}
    assert [process.returncode for process in started] == [0] * 4
    assert len(told) == 1
    assert count.read_text() == "linked\n"


def test_a_forked_child_can_compute(tmp_path: Path) -> None:
    """The parent's worker threads do not exist in the child; the pool must notice."""
    code = """
import os, torch
torch.set_num_threads(1)  # torch's own pool does not survive a fork
from braid_kernels import linear_backend
from braid_kernels.native import set_num_threads
from braid_kernels.testing import Span, linear_case, small_linear_geometries, same_bits
set_num_threads(2)
spans = [Span.final(300, -1, i) for i in range(4)]
case = linear_case(small_linear_geometries()["gated_delta"], spans, slots=4)
expected = case.run(linear_backend("cpp")).out
pid = os.fork()
if pid == 0:
    os._exit(0 if same_bits(case.run(linear_backend("cpp")).out, expected) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    env = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=150)


SHARING = """
import os, sys, torch
from braid_kernels.native import mind_peers, set_num_threads
from braid_kernels.native.gemm import Part, gemm, pack
from braid_kernels.testing import same_bits
torch.set_num_threads(1)
threads = int(sys.argv[1])
small, large = torch.randn(8, 256), torch.randn(2048, 256)
weight = pack(torch.randn(512, 256))
def made(rows):
    out = torch.empty(len(rows), 512)
    gemm(rows, weight, [Part(out, 0)])
    return out
def workers():
    return len(os.listdir("/proc/self/task"))
set_num_threads(1)
expected = made(small), made(large)
before, found = workers(), []
set_num_threads(threads)
if sys.argv[2] == "peers":
    mind_peers()
for rows, alone in zip((small, large), expected):
    assert same_bits(made(rows), alone)
    found.append(workers() - before)
print(*found)
"""


@pytest.mark.parametrize("peers", ["none", "peers"])
def test_small_regions_are_not_shared_where_peers_have_no_core(peers: str) -> None:
    threads = max(len(os.sched_getaffinity(0)), 2)
    env = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)}
    done = subprocess.run(
        [sys.executable, "-c", SHARING, str(threads), peers],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    small, large = map(int, done.stdout.split())
    assert large == threads - 1
    assert small == (0 if peers == "peers" else large)


NARROW = """
import braid_kernels.build as build
build.NATIVE = "-msse2"
from braid_kernels import Gqa, Mla, full_backend, linear_backend
from braid_kernels.native.library import library
from braid_kernels.testing import Span, difference, full_case, linear_case, small_linear_geometries
assert library().braid_vector_lanes() == 4
spans = [Span.final(37, 0, 1), Span(3, 0, (2, 3, 4)), Span(1, -1, (5,)), Span(0)]
for geometry in small_linear_geometries().values():
    case = linear_case(geometry, spans, slots=6)
    actual, expected = (case.run(linear_backend(name)) for name in ("cpp", "reference"))
    assert difference(actual.out, expected.out) < 5e-6
    assert difference(actual.state_pool, expected.state_pool) < 5e-6
mla = Mla(3, 17, 0, 21, 33, 0.2)
for geometry in (Gqa(6, 2, 33, 47, 0.17), Gqa(4, 1, 64, 64, 0.125, sliding_window=20), mla):
    case = full_case(geometry, [1, 65, 3], [1100, 17, 40])
    actual, expected = (case.run(full_backend(name)) for name in ("cpp", "reference"))
    assert difference(actual.out, expected.out) < 5e-6
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="builds for another x86 than this one")
def test_the_same_source_serves_narrow_vectors(tmp_path: Path) -> None:
    """Four lanes and no fused multiply-add: the path of machines unlike the one the tests run on."""
    env = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT), "BRAID_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", NARROW], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
