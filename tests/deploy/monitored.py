"""A real Prometheus with the project's own configuration, at test speed.

Targets are those of the test. Of the rules nothing is different but their times: every window is `WINDOWS`
times as short and every `for` `HOLDS` times, beside a scrape each second in place of 15.
"""

from __future__ import annotations

import json
import re
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from compose_cell import ROOT, eventually, free_port

FOLDER = ROOT / "deploy" / "prometheus"
PROMETHEUS, PROMTOOL = Path("/usr/bin/prometheus"), Path("/usr/bin/promtool")
EVERY = "1s"
WINDOWS = 6
"""No shorter: in a window a process that dies must have come back at least twice."""
HOLDS = 30

_UNITS = {"s": 1, "m": 60, "h": 3600}
_SPAN = re.compile(r"(\d+)([smh])")
_WINDOW = re.compile(r"(?<=\[)\d+[smh](?=\])")

Json = dict[str, Any]


def rules() -> list[Json]:
    """All rules, as their files have them."""
    found = []
    for path in sorted((FOLDER / "rules").glob("*.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            found += group["rules"]
    return found


def shorter(span: str, times: int) -> str:
    """A span of time as Prometheus writes it, so many times as short, in whole seconds."""
    found = _SPAN.fullmatch(span)
    assert found is not None, span
    seconds, rest = divmod(int(found[1]) * _UNITS[found[2]], times)
    assert seconds and not rest, (span, times)
    return f"{seconds}s"


def quick_rule(rule: Json) -> Json:
    """A rule at test speed."""
    quick = {**rule, "expr": _WINDOW.sub(lambda span: shorter(span[0], WINDOWS), rule["expr"])}
    if "for" in rule:
        quick["for"] = shorter(rule["for"], HOLDS)
    return quick


def quick_config(place: Path, targets: Mapping[str, str]) -> Path:
    """The configuration, with other intervals and targets; gives its path.

    Args:
        place: where it is written.
        targets: address in the configuration → address here; jobs with others are left out.
    """
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": EVERY, "evaluation_interval": EVERY}
    jobs = []
    for job in config["scrape_configs"]:
        kept = [
            {**static, "targets": [targets[name] for name in static["targets"]]}
            for static in job["static_configs"]
            if all(name in targets for name in static["targets"])
        ]
        jobs += [{**job, "static_configs": kept}] if kept else []
    config["scrape_configs"] = jobs
    files = []
    for name in config["rule_files"]:
        groups = yaml.safe_load((FOLDER / name).read_text())["groups"]
        for group in groups:
            group["rules"] = [quick_rule(rule) for rule in group["rules"]]
        path = place / Path(name).name
        path.write_text(json.dumps({"groups": groups}))  # JSON is YAML
        files.append(str(path))
    config["rule_files"] = files
    path = place / "prometheus.yml"
    path.write_text(json.dumps(config))
    return path


class Prometheus:
    """The program, running.

    Args:
        place: for its data.
        config: path of its configuration.
    """

    def __init__(self, place: Path, config: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self._process = subprocess.Popen(
            [
                PROMETHEUS,
                f"--config.file={config}",
                f"--storage.tsdb.path={place / 'tsdb'}",
                f"--web.listen-address={self.url.removeprefix('http://')}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        assert eventually(self._ready), "Prometheus does not come up"

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def query(self, expr: str) -> list[Json]:
        """Series of an instant query."""
        found: list[Json] = self._get(f"query?{urllib.parse.urlencode({'query': expr})}")["result"]
        return found

    def active(self) -> set[str]:
        """Names of the alerts that fire now or soon will, if their condition lasts."""
        return {one["labels"]["alertname"] for one in self._get("alerts")["alerts"]}

    def firing(self) -> set[str]:
        """Names of the alerts that fire now."""
        return {labels["alertname"] for labels in self.firing_labels()}

    def firing_labels(self) -> list[dict[str, str]]:
        """Labels of the alerts that fire now."""
        return [one["labels"] for one in self._get("alerts")["alerts"] if one["state"] == "firing"]

    def rule_errors(self) -> list[str]:
        """Of the last evaluation of every rule."""
        groups = self._get("rules")["groups"]
        return [rule["lastError"] for group in groups for rule in group["rules"] if rule.get("lastError")]

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}", timeout=20) as response:
            return json.load(response)["data"]

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=1) as response:
                return bool(response.status == 200)
        except OSError:
            return False
