"""The files of a deployment agree with each other, with the code, and with the tools that read them."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from braid_orchestrator.gateway import METRICS_PORT
from braid_orchestrator.watching import PAGE_PORT
from braid_wire.metrics import PORTS as METRICS_PORTS
from compose_cell import FULL, GATEWAY, LINEAR, ORCHESTRATOR, PORTS, ROOT, read_compose
from compose_check import problems
from monitored import FOLDER, PROMTOOL, rules

Json = dict[str, Any]
IMAGES = ("full_attn_svc", "linear_attn_svc", "orchestrator")
RUNBOOK = (ROOT / "deploy" / "RUNBOOK.md").read_text()


def tool(name: str) -> str:
    """A program, or a skip."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


# The compose file.


def test_nothing_is_wrong_with_the_compose_file() -> None:
    assert problems(read_compose()) == []


def _at(path: str, value: object) -> Callable[[Json], None]:
    """Puts a value somewhere in a compose file; None takes it away."""

    def change(compose: Json) -> None:
        *way, last = path.split(".")
        place = compose["services"]
        for key in way:
            place = place[key]
        if value is None:
            del place[last]
        else:
            place[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_at("linear.ports", ["127.0.0.1:1:1"]), "linear: ports do not go with network_mode"),
        (_at("anchor.ports", ["8000:8000"]), "anchor: port 8000:8000 is published beyond loopback"),
        (_at("anchor.ipc", "private"), "full: ipc of anchor is not shareable"),
        (_at("full.pid", None), "full: CUDA IPC needs ipc and pid of one service"),
        (_at("full.ipc", "service:full-cpu"), "full: ipc of full-cpu is not shareable"),
        (_at("full.pid", "service:nobody"), "full: pid names nobody"),
        (
            _at("linear.deploy", {"resources": {"reservations": {"devices": [{"device_ids": ["1"]}]}}}),
            "linear: device_ids ['1'] differ from ['0']",
        ),
        (
            _at("linear.deploy", {"resources": {"reservations": {"devices": [{"count": 1}]}}}),
            "linear: its device is not pinned",
        ),
        (_at("full-cpu.restart", "no"), "full-cpu: is not restarted"),
        (_at("gateway.healthcheck", None), "gateway: has no health check"),
        (_at("prometheus.user", "root"), "prometheus: runs as root"),
        (_at("grafana.read_only", False), "grafana: its root can be written"),
        (_at("full-cpu.cap_drop", None), "full-cpu: keeps capabilities"),
        (_at("full-cpu.volumes", ["nothing:/x"]), "full-cpu: volume nothing is not declared"),
        (_at("full-cpu.depends_on", {"full": {}}), "full-cpu: depends on full, which its profiles leave out"),
        (_at("linear-cpu.command", ["--metrics-port", "9401"]), "linear-cpu: port 9401 of anchor's network"),
        (_at("orchestrator.depends_on", {"anchor": {}}), "orchestrator: is not stopped before full"),
        (_at("linear.environment.TRITON_CACHE_DIR", None), "linear: TRITON_CACHE_DIR is on no volume"),
        (_at("full.environment", {"CUDA_CACHE_PATH": "/tmp/cuda"}), "full: CUDA_CACHE_PATH is on no volume"),
        (_at("grafana.ports", ["127.0.0.1:9090:3000"]), "grafana: port 9090 of the host is prometheus's"),
    ],
)
def test_what_is_wrong_is_found(change: Callable[[Json], None], words: str) -> None:
    broken = copy.deepcopy(read_compose())
    change(broken)
    assert any(line.startswith(words) for line in problems(broken)), problems(broken)


def test_ports_are_those_of_the_code_and_of_prometheus() -> None:
    compose = read_compose()["services"]
    wanted = {
        ORCHESTRATOR: METRICS_PORTS["orchestrator"],
        FULL: METRICS_PORTS["full"],
        LINEAR: METRICS_PORTS["linear"],
        GATEWAY: METRICS_PORT,
    }
    assert wanted == PORTS
    for name, port in wanted.items():
        words = compose[name]["command"]
        assert words[words.index("--metrics-port") + 1] == str(port)
    scraped = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    targets = {target for job in scraped for static in job["static_configs"] for target in static["targets"]}
    assert {f"anchor:{port}" for port in wanted.values()} <= targets


def test_the_live_page_is_published() -> None:
    compose = read_compose()["services"]
    words = compose[ORCHESTRATOR]["command"]
    assert words[words.index("--page-port") + 1] == str(PAGE_PORT)
    assert f"127.0.0.1:{PAGE_PORT}:{PAGE_PORT}" in compose["anchor"]["ports"]


def test_profiles_differ_in_nothing_but_the_gpu() -> None:
    compose = read_compose()["services"]
    for name in ("full", "linear", "orchestrator"):
        on_gpu, on_cpu = compose[name], compose[f"{name}-cpu"]
        assert on_gpu["command"] == on_cpu["command"]
        assert on_gpu["healthcheck"] == on_cpu["healthcheck"]
        assert on_gpu["deploy"]["resources"]["limits"] == on_cpu["deploy"]["resources"]["limits"]
        assert set(on_cpu["volumes"]) <= set(on_gpu["volumes"])
        assert on_cpu["environment"].items() <= on_gpu["environment"].items()


@pytest.mark.parametrize("profiles", [("cpu",), ("gpu",), ("gpu", "mps")])
def test_docker_compose_takes_the_file(profiles: tuple[str, ...]) -> None:
    command = [tool("docker-compose"), "-f", str(ROOT / "docker-compose.yml")]
    command += [word for profile in profiles for word in ("--profile", profile)]
    done = subprocess.run(
        [*command, "config"],
        capture_output=True,
        text=True,
        env={**os.environ, "BRAID_MODEL": "/models/tiny"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    assert all(set(service.get("profiles", [])) for service in services.values())


def test_every_variable_is_in_the_example() -> None:
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    named = set(re.findall(r"^#? ?(\w+)=", (ROOT / "deploy" / "env.example").read_text(), re.MULTILINE))
    assert used - named <= {"BRAID_TAG", "BRAID_LOG", "BRAID_METRICS_KEPT"}
    assert named <= used


# Images.


@pytest.mark.parametrize("folder", IMAGES)
def test_hadolint_has_nothing_to_say(folder: str) -> None:
    done = subprocess.run(
        [tool("hadolint"), ROOT / folder / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_images_share_their_stages() -> None:
    texts = [(ROOT / folder / "Dockerfile").read_text().splitlines() for folder in IMAGES]
    for one, folder in zip(texts, IMAGES, strict=True):
        assert len(one) == len(texts[0])
        assert f"COPY {folder}/${{REQUIREMENTS}} ./wanted.txt" in one
        differing = [line for line, other in zip(one, texts[0], strict=True) if line != other]
        assert len(differing) <= 4


@pytest.mark.parametrize("folder", IMAGES[:2])
def test_a_service_needs_no_more_than_its_requirements(folder: str) -> None:
    """It loads its kernels where what only the orchestrator needs is not installed."""
    mine, theirs = (
        {line for line in (ROOT / one / "requirements.txt").read_text().splitlines() if line[0] != "#"}
        for one in (folder, "orchestrator")
    )
    absent = [name.replace("-", "_") for name in theirs - mine]
    assert {"transformers", "safetensors", "rich", "smg"} <= set(absent)
    package = {"full_attn_svc": "braid_full_attn", "linear_attn_svc": "braid_linear_attn"}[folder]
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r}))\n"
        f"import {package}.__main__, braid_wire.health\n"
        f"from {package}.core import load\nload('reference', 1)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# Prometheus and the runbook.


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", FOLDER / "prometheus.yml"),
        ("check", "rules", FOLDER / "rules" / "recording.yml", FOLDER / "rules" / "alerts.yml"),
        ("test", "rules", FOLDER / "rules_test.yml"),
    ],
    ids=lambda arguments: " ".join(map(str, arguments[:2])),
)
def test_promtool(arguments: tuple[str | Path, ...]) -> None:
    if not PROMTOOL.exists():
        pytest.skip(f"{PROMTOOL} is not installed (Debian's package prometheus)")
    done = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_and_has_a_runbook_entry() -> None:
    tests = (FOLDER / "rules_test.yml").read_text()
    for rule in rules():
        if "alert" not in rule:
            continue
        name = rule["alert"]
        assert rule["annotations"]["runbook"] == f"deploy/RUNBOOK.md#{name.lower()}"
        entry = re.search(rf"^### {name}\n(.*?)(?=^##|\Z)", RUNBOOK, re.MULTILINE | re.DOTALL)
        assert entry is not None, name
        for part in ("**Means.**", "**Look.**", "**Do.**"):
            assert part in entry[1], (name, part)
        assert f"alertname: {name}" in tests
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    assert set(re.findall(r"^### (Braid\w+)", RUNBOOK, re.MULTILINE)) == alerts


def test_grafana_reads_what_is_mounted() -> None:
    provisioning = ROOT / "deploy" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert (source["uid"], source["url"]) == ("braid-prometheus", "http://prometheus:9090")
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "braid.yml").read_text())["providers"]
    volumes = read_compose()["services"]["grafana"]["volumes"]
    assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in volumes
    assert "./deploy/grafana/provisioning:/etc/grafana/provisioning:ro" in volumes
