"""Services as processes: starting, readiness, stopping, dying, and what is left behind."""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from braid.v1 import attention_pb2 as pb
from braid.v1 import attention_pb2_grpc
from braid_wire import errors
from braid_wire.layers import Kind
from braid_wire.rpc import channel
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from service_harness import ENVIRONMENT, MODULES, PATIENCE_S, Cell, MakeCell, Service, refused, start_service

SERVICE = "braid.v1.AttentionService"


@pytest.fixture
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the service that a test may kill makes its temporary files, and nobody else does."""
    return tmp_path_factory.mktemp("t")


@pytest.fixture
def own(runtime: Path, scratch: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A linear service that a test may kill."""
    service = start_service(
        Kind.LINEAR,
        f"unix:{tmp_path_factory.mktemp('o')}/linear",
        "--max-tokens",
        "8",
        "--backend",
        "reference",
        environment={"TMPDIR": str(scratch)},
    )
    yield service
    service.channel.close()
    service.kill()


def health(service: Service, name: str) -> int:
    stub = health_pb2_grpc.HealthStub(service.channel)
    status: int = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=PATIENCE_S).status
    return status


def test_the_ready_line(services: dict[Kind, Service], runtime: Path) -> None:
    for kind, service in services.items():
        assert service.ready["service"] == kind.value
        assert service.ready["address"] == f"unix:{runtime}/{kind.value}"
        assert service.ready["pid"] == service.process.pid
        url = f"http://127.0.0.1:{service.ready['metrics_port']}/metrics"
        text = urllib.request.urlopen(url, timeout=PATIENCE_S).read().decode()
        assert f'braid_build_info{{service="{kind.value}"' in text
        path = runtime / kind.value
        assert path.stat().st_mode & 0o777 == 0o600


def test_health_and_reflection(services: dict[Kind, Service]) -> None:
    for service in services.values():
        assert health(service, "") == health_pb2.HealthCheckResponse.SERVING
        assert health(service, SERVICE) == health_pb2.HealthCheckResponse.SERVING
        assert SERVICE in ProtoReflectionDescriptorDatabase(service.channel).get_services()


def test_before_configure(own: Service) -> None:
    stub = own.stub
    said = stub.Describe(pb.DescribeRequest())
    assert (said.epoch, said.max_tokens, said.backend) == (0, 8, "reference")
    batch = pb.Batch(role=1, epoch=1, step=1, num_tokens=1, num_sequences=1)
    with refused(errors.NotConfigured):
        stub.Plan(pb.PlanRequest(batch=batch))
    with refused(errors.NotConfigured):
        stub.Attend(pb.AttendRequest(role=1, epoch=1, step=1))
    (response,) = stub.Walk(iter([pb.WalkRequest(open=pb.OpenStep(plan=pb.PlanRequest(batch=batch)))]))
    assert type(errors.from_status(response.failed)) is errors.NotConfigured


def test_max_tokens(own: Service, make_cell: MakeCell) -> None:
    cell = make_cell(services={Kind.LINEAR: own})
    cell.configure()
    cell.step((cell.sequence(0), 8))
    with refused(errors.BatchInvalid):
        cell.plan(Kind.LINEAR, cell.batch((cell.sequence(1), 9)))


def test_sigterm_lets_an_open_step_finish(own: Service, make_cell: MakeCell) -> None:
    cell = make_cell(services={Kind.LINEAR: own})
    cell.configure()
    busy: queue.SimpleQueue[pb.WalkRequest | None] = queue.SimpleQueue()
    idle: queue.SimpleQueue[pb.WalkRequest | None] = queue.SimpleQueue()
    streams = [own.stub.Walk(iter(requests.get, None)) for requests in (busy, idle)]
    sent = cell.batch((cell.sequence(0), 3))
    works = cell.all_work(Kind.LINEAR, sent)
    busy.put(cell.open_request(sent, works))
    assert next(streams[0]).HasField("opened")
    own.process.send_signal(signal.SIGTERM)
    with pytest.raises(grpc.RpcError) as caught:  # the stream between steps is let go at once
        next(streams[1])
    assert type(errors.from_rpc_error(caught.value, "linear")) is errors.ServiceLost
    for index, work in enumerate(works):
        busy.put(pb.WalkRequest(run=pb.RunTicket(step=sent.message.step, index=index)))
        assert next(streams[0]).done.index == index
        cell.check(Kind.LINEAR, sent, work)
    busy.put(pb.WalkRequest(close=pb.CloseStep(step=sent.message.step)))
    assert list(streams[0]) == []
    idle.put(None)
    busy.put(None)
    assert own.process.wait(PATIENCE_S) == 0


def test_kill_leaves_nothing_behind(own: Service, scratch: Path, make_cell: MakeCell) -> None:
    cell = make_cell(services={Kind.LINEAR: own})
    cell.configure()
    sequence = cell.sequence(0)
    cell.step((sequence, 3))
    files = named_files(own.process.pid)
    own.kill()
    with pytest.raises(grpc.RpcError) as caught:
        cell.plan(Kind.LINEAR, cell.batch((sequence, 1)))
    assert type(errors.from_rpc_error(caught.value, "linear")) is errors.ServiceLost
    assert files == set() and list(scratch.iterdir()) == []
    # The state is the orchestrator's: a fresh process goes on where the dead one was.
    heir = start_service(Kind.LINEAR, str(own.ready["address"]))
    try:
        cell.services = {Kind.LINEAR: heir}
        cell.configure()
        cell.step((sequence, 1))
    finally:
        heir.kill()
        heir.channel.close()


def named_files(pid: int) -> set[str]:
    """The files for temporary things that a process has open or mapped and that have a name, so that they
    outlive it. Other processes of the tests have theirs in the same directories."""
    found = set[str]()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.add(str(fd.readlink()))
    found = {path for path in found if path.startswith((f"{tempfile.gettempdir()}/", "/dev/shm/"))}
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        *_, path = line.split(maxsplit=5)
        if path.startswith("/dev/shm/"):
            found.add(path)
    return {path for path in found if not path.endswith(" (deleted)")}


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_dies_with_its_parent(runtime: Path, signal_number: int) -> None:
    starter = (
        "import os, subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-m', 'braid_linear_attn', '--address', sys.argv[1], '--backend',"
        " 'reference', '--metrics-port', '0', '--parent', str(os.getpid())])\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", starter, f"unix:{runtime}/orphan"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=ENVIRONMENT,
    )
    assert parent.stdout is not None
    child = json.loads(parent.stdout.readline())["pid"]
    parent.send_signal(signal_number)
    parent.wait(PATIENCE_S)
    deadline = time.monotonic() + PATIENCE_S
    while not has_ended(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.stdout.close()


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or dead and waiting for an init that reaps."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # the latter where it went behind the opening
        return True
    return stat.rpartition(")")[2].split()[0] in ("Z", "X")


def run(kind: Kind, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", MODULES[kind], *options],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
        env={**ENVIRONMENT, **environment},
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((), "--address"),
        (("--address", "unix:/nowhere/at/all"), "cannot listen"),
        (("--address", "0.0.0.0:0"), "needs TLS"),
        (("--address", "nonsense"), "nonsense"),
        (("--address", "unix:{runtime}/x", "--backend", "quantum"), "quantum"),
        (("--address", "127.0.0.1:0", "--metrics-port", "{metrics_port}"), "metrics port"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_usage_exits_with_2(
    services: dict[Kind, Service], runtime: Path, options: tuple[str, ...], told: str
) -> None:
    values = {"runtime": runtime, "metrics_port": services[Kind.FULL].ready["metrics_port"]}
    given = [option.format(**values) for option in options]
    if "--metrics-port" not in given:
        given += ["--metrics-port", "0"]
    done = run(Kind.FULL, *given)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr.splitlines()[-1]
    assert done.stdout == "" and "Traceback" not in done.stderr


def test_a_bad_environment_exits_with_2(runtime: Path) -> None:
    done = run(Kind.LINEAR, "--address", f"unix:{runtime}/y", OMP_NUM_THREADS="many")
    assert done.returncode == 2 and "OMP_NUM_THREADS" in done.stderr and "Traceback" not in done.stderr


def test_a_parent_that_is_gone_is_a_fault(runtime: Path) -> None:
    done = run(Kind.LINEAR, "--address", f"unix:{runtime}/z", "--parent", "1999999")
    assert done.returncode == 1 and "is gone" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command makes the certificate")
def test_tcp_with_tls(runtime: Path, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    done = run(Kind.FULL, "--address", "0.0.0.0:0", "--tls-cert", str(certificate))
    assert done.returncode == 2 and "together" in done.stderr
    service = start_service(
        Kind.FULL,
        "0.0.0.0:0",
        *("--tls-cert", str(certificate), "--tls-key", str(key), "--backend", "reference"),
    )
    try:
        port = str(service.ready["address"]).rpartition(":")[2]
        with channel(f"localhost:{port}", ca=certificate) as trusted:
            stub = attention_pb2_grpc.AttentionServiceStub(trusted)
            assert stub.Describe(pb.DescribeRequest(), timeout=PATIENCE_S).pid == service.process.pid
        with channel(f"localhost:{port}") as plain, pytest.raises(grpc.RpcError):
            attention_pb2_grpc.AttentionServiceStub(plain).Describe(pb.DescribeRequest(), timeout=2)
    finally:
        assert service.stop() == 0


def test_services_live_side_by_side(cell: Cell) -> None:
    cell.step((cell.sequence(0), 2))
