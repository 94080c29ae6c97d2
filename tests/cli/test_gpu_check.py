"""The GPU check's own logic, with checks that need no GPU: isolation, bounds, the report, the exit code."""

from __future__ import annotations

import importlib
import json
import math
import time
from pathlib import Path

import pytest
import torch
from braid_orchestrator.bench.gpu import report, runner
from braid_orchestrator.bench.gpu.__main__ import CHECKS, EXIT_NO_DEVICE, main
from braid_orchestrator.bench.gpu.outcome import Measure, Outcome
from braid_orchestrator.bench.gpu.runner import Check
from braid_wire.errors import RequestInvalid
from click.testing import CliRunner


def check(name: str, limit_s: float = 30.0) -> Check:
    return Check(name, f"gpu_standins:{name}", limit_s, f"The stand-in that {name}.")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Every stand-in, one run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
        names = ("holds", "falls_short", "raises", "dies", "skips")
        # It must come as far as its last words, on a machine with other work too.
        checks = [check(name) for name in names] + [check("hangs", 6.0)]
        outcomes = runner.run_all(checks, tmp_path_factory.mktemp("work"), 120)
    return {one.check: one for one in outcomes}


def test_one_check_that_fails_stops_no_other(finished: dict[str, Outcome]) -> None:
    assert {name: one.status for name, one in finished.items()} == {
        "holds": "passed",
        "falls_short": "failed",
        "raises": "error",
        "dies": "error",
        "skips": "skipped",
        "hangs": "timeout",
    }
    assert not runner.succeeded(list(finished.values()))
    assert runner.succeeded([finished["holds"], finished["skips"]])


def test_each_cause_is_told(finished: dict[str, Outcome]) -> None:
    assert finished["raises"].cause == "ValueError: a kernel gave NaN"
    assert [m.name for m in finished["raises"].measures] == ["before"]  # figures before the failure stay
    assert "SIGKILL" in finished["dies"].cause and "illegal memory access" in finished["dies"].cause
    assert "longer than 6 s" in finished["hangs"].cause and "doorbell" in finished["hangs"].cause
    assert finished["hangs"].seconds < 40
    assert "stream values" in finished["skips"].cause
    assert "hop is 12.5, not <= 10" in finished["falls_short"].cause
    assert len(finished["falls_short"].measures) == 3 and "after" not in finished["falls_short"].cause


def test_bounds() -> None:
    assert Measure("x", 0.8, "", ">= 0.8").holds and not Measure("x", 0.79, "", ">= 0.8").holds
    assert Measure("x", 3.0).holds and Measure("x", "words").holds
    assert not Measure("x", math.nan, "", ">= 0").holds and not Measure("x", math.nan, "", "<= 0").holds
    for wrong in (Measure("x", 1.0, "", "about 3"), Measure("x", "words", "", ">= 1")):
        with pytest.raises(RequestInvalid):
            _ = wrong.holds


def test_checks_beyond_the_time_are_skipped_and_say_so(tmp_path: Path) -> None:
    began = time.monotonic()
    (outcome,) = runner.run_all([check("hangs")], tmp_path, 1.0)
    assert (outcome.status, time.monotonic() - began < 20) == ("skipped", True)  # and not its limit, 30 s
    assert "no time was left" in outcome.cause


def test_the_report(finished: dict[str, Outcome], tmp_path: Path) -> None:
    checks = [check(name) for name in finished]
    facts = {"name": "a card", "cuda": "13.0"}
    paths = report.write(tmp_path / "results", "make gpu-check", checks, list(finished.values()), facts)
    found = json.loads(paths[0].read_text())
    assert found["device"] == facts and found["bench"] == "gpu-check" and found["versions"]["torch"]
    rows = {row["check"]: row for row in found["rows"]}
    assert [m["holds"] for m in rows["falls_short"]["measures"]] == [False, False, True]
    page = paths[1].read_text()
    assert (
        "| hop | 12.5 us | <= 10 | **no** |" in page
        and "| rate | 0.9 of the copy rate | >= 0.8 | yes |" in page
    )
    assert "| dies | error |" in page and "a card" in page


def test_every_check_exists_and_all_fit_into_eight_minutes() -> None:
    for one in CHECKS:
        module, _, function = one.function.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
        assert 0 < one.limit_s < 480
    assert len({one.name for one in CHECKS}) == len(CHECKS)


def test_without_a_device_nothing_is_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(main, ["--out", str(tmp_path)])
    assert result.exit_code == EXIT_NO_DEVICE
    assert result.output.strip() == "gpu-check: this machine has no CUDA device; nothing was checked"
    assert not list(tmp_path.iterdir())
