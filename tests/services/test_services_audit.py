"""Audits: a service compares its layers with the reference, and a kernel that is wrong shows."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable, Iterator

import pytest
import torch
from braid_wire.audit import relative_error
from braid_wire.layers import Kind
from service_harness import MODULES, PATIENCE_S, Cell, MakeCell, Service, start_service

_ERROR = re.compile(r"^braid_audit_error\{(.*)\} (\S+)$", re.MULTILINE)
TOLERANCE = 1e-4
EVERY_S = ("--audit-seconds", "0.01")


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Kind, Service]]:
    """Both services, a layer of each audited every 10 ms."""
    base = tmp_path_factory.mktemp("a")
    found = {kind: start_service(kind, f"unix:{base}/{kind.value}", *EVERY_S) for kind in MODULES}
    yield found
    for service in found.values():
        service.kill()


def errors(service: Service) -> dict[tuple[str, int], float]:
    """(role, layer id) → its last audit's error."""
    url = f"http://127.0.0.1:{service.ready['metrics_port']}/metrics"
    text = urllib.request.urlopen(url, timeout=PATIENCE_S).read().decode()
    found = {}
    for labels, value in _ERROR.findall(text):
        named = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        assert (named["kind"], named["mechanism"]) in {("full", "gqa"), ("linear", "gated_delta")}
        found[named["role"], int(named["layer_id"])] = float(value)
    return found


def audit(cell: Cell, service: Service, layers: int) -> dict[tuple[str, int], float]:
    """Steps until every layer was audited."""
    first, second = cell.sequence(0), cell.sequence(1)
    cell.step((first, 7), (second, 3))
    end = time.monotonic() + PATIENCE_S
    while len(found := errors(service)) < layers:
        assert time.monotonic() < end, found
        if first.length < 20:
            cell.step((first, 1), (second, 1))
        else:
            first, second = cell.sequence(0), cell.sequence(1)
            cell.next_epoch()
            cell.step((first, 5), (second, 3))
        time.sleep(0.02)
    return found


def test_every_layer_agrees_with_the_reference(audited: dict[Kind, Service], make_cell: MakeCell) -> None:
    cell = make_cell(services=audited)
    cell.configure()
    for kind, layers in ((Kind.FULL, {1, 3}), (Kind.LINEAR, {0, 3})):
        found = audit(cell, audited[kind], 2)
        assert {layer for _, layer in found} == layers
        assert 0 <= max(found.values()) < TOLERANCE


WRONG = """
import click
from braid_wire.attention_servicer import run_service
from braid_wire.process import ServiceOptions, service_options
from {module} import core


class Wrong(core._Runner):
    def __call__(self, inputs, planned, out):
        super().__call__(inputs, planned, out)
        out.mul_(1.01)


core._Runner = Wrong


@click.command()
@service_options(metrics_port=0)
def main(options):
    run_service("{name}", options, lambda: core.load(options.backend, 1, options.max_tokens))


main()
"""


@pytest.mark.parametrize("kind", list(MODULES))
def test_a_wrong_kernel_shows(
    kind: Kind, services: dict[Kind, Service], make_cell: MakeCell, start_wrong: Callable[[Kind], Service]
) -> None:
    wrong = start_wrong(kind)
    cell = make_cell(services={kind: wrong})
    cell.configure()
    deadline = time.monotonic() + PATIENCE_S
    while not (found := errors(wrong)):
        assert time.monotonic() < deadline
        sent = cell.batch((cell.sequence(0), 4))
        cell.next_epoch()
        sent.message.epoch = cell.epoch
        cell.plan(kind, sent)
        for work in cell.all_work(kind, sent):
            cell.attend(kind, sent, work)
        time.sleep(0.02)
    assert all(0.005 < error < 0.02 for error in found.values()), found


@pytest.fixture
def start_wrong(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Kind], Service]]:
    """Starts services whose kernels are wrong by one part in a hundred."""
    made: list[Service] = []

    def start(kind: Kind) -> Service:
        base = tmp_path_factory.mktemp("w")
        script = base / "wrong.py"
        script.write_text(WRONG.format(module=MODULES[kind], name=kind.value))
        made.append(start_service(kind, f"unix:{base}/s", *EVERY_S, program=(str(script),)))
        return made[-1]

    yield start
    for service in made:
        service.kill()


def test_relative_error() -> None:
    right = torch.tensor([1.0, -4.0, float("nan")])
    assert relative_error(right, right) == 0
    assert relative_error(torch.tensor([1.0, -4.0, 0.0]), right) == float("inf")
    assert relative_error(torch.tensor([1.4, -4.0, float("nan")]), right) == pytest.approx(0.1)
