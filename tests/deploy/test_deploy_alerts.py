"""A real Prometheus scrapes a real cell: rules have data, each alert fires for its cause, all resolve."""

from __future__ import annotations

import itertools
import math
import queue
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

import grpc
import pytest
from braid.v1 import attention_pb2, attention_pb2_grpc, common_pb2, orchestrator_pb2_grpc
from braid.v1 import orchestrator_pb2 as pb
from braid_orchestrator.layer_plan import build_plans, load_config
from braid_wire import rpc
from braid_wire.errors import BraidError
from compose_cell import FULL, LINEAR, ORCHESTRATOR, PORTS, TINY, ComposeCell, eventually
from monitored import HOLDS, PROMETHEUS, PROMTOOL, WINDOWS, Prometheus, quick_config, rules

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(600)]

VARIABLES = {
    "BRAID_POOL_BYTES": "8MiB",
    "BRAID_MAX_CONTEXT": "512",
    "BRAID_MAX_SEQUENCES": "4",
    "BRAID_AUDIT_SECONDS": "1",
}
USUAL_S = 25.0
_LONG = 400
FIRES_S = 60.0
RESOLVES_S = 90.0
ALERTS = [rule["alert"] for rule in rules() if "alert" in rule]
RECORDS = [rule["record"] for rule in rules() if "record" in rule]


class Watched:
    """A cell under light load, and a Prometheus that watches it."""

    def __init__(self, place: Path) -> None:
        self.cell = ComposeCell(place, VARIABLES)
        self.times: dict[str, tuple[float, float]] = {}
        """Alert → seconds from its cause to its firing, and from the cause's end to its resolving."""
        self._over = threading.Event()
        ports = self.cell.ports
        targets = {f"anchor:{PORTS[name]}": f"127.0.0.1:{ports[name]}" for name in self.cell.processes}
        self.cell.wait()
        self.prometheus = Prometheus(place, quick_config(place, targets))
        self._load = threading.Thread(target=self._ask)
        self._load.start()

    def close(self) -> None:
        self._over.set()
        self._load.join()
        self.prometheus.close()
        self.cell.close()

    def firing(self, alert: str, labels: Mapping[str, str]) -> bool:
        """Whether an alert fires now with all these labels."""
        wanted = {"alertname": alert, **labels}.items()
        return any(wanted <= one.items() for one in self.prometheus.firing_labels())

    def _ask(self) -> None:
        """Two short requests a second, whatever becomes of them."""
        with self.cell.client() as client:
            while not self._over.wait(0.5):
                with suppress(BraidError):
                    client.complete("def read(", max_tokens=6)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    for program in (PROMETHEUS, PROMTOOL):
        if not program.exists():
            pytest.skip(f"{program} is not installed (Debian's package prometheus)")
    started = Watched(tmp_path_factory.mktemp("w"))
    try:
        time.sleep(USUAL_S)
        yield started
    finally:
        started.close()


def test_nothing_fires_in_peace(watched: Watched) -> None:
    assert watched.prometheus.firing() == set()
    assert watched.prometheus.rule_errors() == []


@pytest.mark.parametrize("record", RECORDS)
def test_every_recording_rule_has_data(watched: Watched, record: str) -> None:
    values = [float(one["value"][1]) for one in watched.prometheus.query(record)]
    assert values and not any(math.isinf(value) for value in values)
    assert not all(math.isnan(value) for value in values)


@pytest.mark.parametrize("name", [FULL, LINEAR, ORCHESTRATOR])
def test_metrics_are_well_formed(watched: Watched, name: str) -> None:
    text = urllib.request.urlopen(f"http://127.0.0.1:{watched.cell.ports[name]}/metrics", timeout=5).read()
    done = subprocess.run([PROMTOOL, "check", "metrics"], input=text, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()


def test_every_alert_has_a_cause_here() -> None:
    assert sorted(CAUSES) == sorted(ALERTS)


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_fires_for_its_cause_and_resolves(watched: Watched, alert: str) -> None:
    cause, labels = CAUSES[alert]
    # Not even pending: what an earlier cause left behind must not count for this one.
    assert eventually(lambda: alert not in watched.prometheus.active(), RESOLVES_S), "it is not quiet"
    began = time.monotonic()
    with cause(watched):
        assert eventually(lambda: watched.firing(alert, labels), FIRES_S), "it does not fire"
        fired = time.monotonic() - began
    ended = time.monotonic()
    assert eventually(lambda: alert not in watched.prometheus.firing(), RESOLVES_S), "it does not resolve"
    watched.times[alert] = fired, time.monotonic() - ended
    watched.cell.wait()


def test_all_alerts_fired_and_resolved(watched: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nwith windows {WINDOWS} and holds {HOLDS} times as short:")
        for alert, (fired, resolved) in watched.times.items():
            print(f"  {alert:<22} fires after {fired:4.1f} s, resolves after {resolved:4.1f} s")
    assert set(watched.times) == set(ALERTS)


# Causes.


@contextmanager
def gone(watched: Watched) -> Iterator[None]:
    """A service dies and is not started again."""
    process = watched.cell.processes[LINEAR]
    process.held.set()
    process.kill()
    try:
        yield
    finally:
        process.held.clear()


@contextmanager
def dying(watched: Watched) -> Iterator[None]:
    """A service that dies again and again."""
    over = threading.Event()

    def kill() -> None:
        while not over.wait(4.0):
            watched.cell.processes[FULL].kill()

    with running(kill, over):
        yield


@contextmanager
def misrouted(watched: Watched) -> Iterator[None]:
    """An engine asks for a layer that the plan does not have."""
    with Engine(watched.cell.address) as engine:
        engine.ask(begin=begin({1: 1}))
        answer = engine.ask(layer=pb.EngineLayer(layer_id=99))
        assert answer.HasField("failed")
        yield


@contextmanager
def unplanned(watched: Watched) -> Iterator[None]:
    """A layer is attended in a step that nobody planned."""
    with rpc.channel(f"unix:{watched.cell.runtime}/full.sock") as channel:
        stub = attention_pb2_grpc.AttentionServiceStub(channel)
        epoch = stub.Describe(attention_pb2.DescribeRequest()).epoch
        request = attention_pb2.AttendRequest(role=common_pb2.ROLE_TARGET, epoch=epoch, step=1 << 40)
        with suppress(grpc.RpcError):
            stub.Attend(request, timeout=10)
    yield


@contextmanager
def held(watched: Watched) -> Iterator[None]:
    """An engine keeps sequences, first long and then short ones, and takes whatever the others give back."""
    over = threading.Event()
    with Engine(watched.cell.address) as engine:
        names = itertools.count(1)

        def take() -> None:
            while engine.step({next(names): _LONG}):
                pass
            while not over.is_set():
                if not engine.step({next(names): 1}):
                    over.wait(0.1)

        with running(take, over):
            yield


@contextmanager
def waiting(watched: Watched) -> Iterator[None]:
    """Requests come faster than they are answered."""
    over = threading.Event()

    def ask() -> None:
        with watched.cell.client() as client, suppress(BraidError):
            for _ in client.generate("def f(", 450, ignore_eos=True):
                if over.is_set():
                    return

    asking: list[threading.Thread] = []

    def arrive() -> None:
        while not over.wait(0.15):
            asking.append(threading.Thread(target=ask))
            asking[-1].start()

    with running(arrive, over):
        yield
    for thread in asking:
        thread.join()


@contextmanager
def slow(watched: Watched) -> Iterator[None]:
    """A service is stopped most of the time, as a machine that has other work does it."""
    over = threading.Event()

    def stop_and_go() -> None:
        process = watched.cell.processes[LINEAR].process
        assert process is not None
        while not over.wait(0.004):
            process.send_signal(19)
            time.sleep(0.03)
            process.send_signal(18)

    with running(stop_and_go, over):
        yield


@contextmanager
def wrong(watched: Watched) -> Iterator[None]:
    """A service comes back with a kernel that is wrong by a tenth."""
    process = watched.cell.processes[LINEAR]
    right = list(process.command)
    script = watched.cell.runtime.parent / "wrong.py"
    script.write_text(_WRONG)
    process.command[:] = [sys.executable, str(script), *right[right.index("--address") :]]
    process.kill()
    try:
        yield
    finally:
        process.command[:] = right
        process.kill()


_WRONG = """
from braid_linear_attn import core
from braid_linear_attn.__main__ import main


class Wrong(core._Runner):
    def __call__(self, inputs, planned, out):
        super().__call__(inputs, planned, out)
        out.mul_(1.1)


core._Runner = Wrong
main()
"""

CAUSES: dict[str, tuple[Callable[[Watched], AbstractContextManager[None]], dict[str, str]]] = {
    "BraidLayerSlow": (slow, {"role": "target", "kind": "linear"}),
    "BraidDispatchRefused": (misrouted, {"process": "orchestrator", "reason": "LAYER_UNKNOWN"}),
    "BraidPlanFailing": (unplanned, {"process": "full", "reason": "PLAN_MISSING"}),
    "BraidPagesShort": (held, {"role": "target"}),
    "BraidSlotsShort": (held, {"role": "target"}),
    "BraidQueueGrowing": (waiting, {}),
    "BraidAuditError": (wrong, {"process": "linear", "kind": "linear"}),
    "BraidProcessDown": (gone, {"process": "linear"}),
    "BraidEpochChurn": (dying, {}),
}
"""Alert → its cause, and the labels that tell where the cause is."""
ALERTS.sort(key=list(CAUSES).index)  # those that need quiet history first


# Tools.


@contextmanager
def running(work: object, over: threading.Event) -> Iterator[None]:
    """A thread for as long as the block lasts."""
    thread = threading.Thread(target=work)  # type: ignore[arg-type]
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def begin(spans: dict[int, int]) -> pb.EngineStep:
    """A step of the target role."""
    parts = [pb.EngineSpan(sequence_id=name, num_tokens=count) for name, count in spans.items()]
    return pb.EngineStep(role=common_pb2.ROLE_TARGET, spans=parts)


class Engine:
    """An engine with a body of its own, which is not interested in its results."""

    def __init__(self, address: str) -> None:
        self._closing = ExitStack()
        channel = self._closing.enter_context(rpc.channel(address))
        self._outbox: queue.SimpleQueue[pb.EngineRequest | None] = queue.SimpleQueue()
        stub = orchestrator_pb2_grpc.OrchestratorStub(channel)
        self._responses = stub.Attend(iter(self._outbox.get, None))
        plan = build_plans(load_config(TINY)).target
        self._layers = [spec.layer_id for spec in plan]

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self._outbox.put(None)
        self._closing.close()

    def ask(self, **message: object) -> pb.EngineResponse:
        """A message and its answer."""
        self._outbox.put(pb.EngineRequest(**message))  # type: ignore[arg-type]
        answer: pb.EngineResponse = next(self._responses)
        return answer

    def step(self, spans: dict[int, int]) -> bool:
        """A whole step; whether there was room for it."""
        if self.ask(begin=begin(spans)).HasField("failed"):
            return False
        for layer in self._layers:
            assert not self.ask(layer=pb.EngineLayer(layer_id=layer)).HasField("failed")
        return self.ask(commit=pb.EngineCommit()).HasField("committed")
