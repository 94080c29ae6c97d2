"""Servers: who may listen where, health, and directories that dead owners leave."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from braid_wire.errors import RequestInvalid
from braid_wire.rpc import Server, Tls, channel
from braid_wire.runtime_dir import RuntimeDirectory, base_directory, sweep
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def health(connection: grpc.Channel, name: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(connection)
    status: int = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=60).status
    return status


@pytest.mark.parametrize("address", ["0.0.0.0:0", "192.0.2.1:0", "[::]:0"])
def test_beyond_loopback_needs_tls(address: str) -> None:
    with pytest.raises(RequestInvalid, match="TLS"):
        Server([]).listen(address)


@pytest.mark.parametrize("address", ["nonsense", "example.com:80", "127.0.0.1", "", "unix:/nowhere/at/all"])
def test_malformed_addresses(address: str) -> None:
    with pytest.raises(RequestInvalid):
        Server([]).listen(address)


def test_loopback_and_readiness() -> None:
    server = Server(["test.Service"])
    address = server.listen("127.0.0.1:0")
    assert not address.endswith(":0")
    server.start()
    with channel(address) as connection:
        assert (health(connection), health(connection, "test.Service")) == (SERVING, NOT_SERVING)
        server.set_ready(True)
        assert health(connection, "test.Service") == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            health(connection, "test.Unknown")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(RequestInvalid, match="cannot listen"):
        Server([]).listen(address)
    server.stop(0)


def test_a_unix_socket_is_private(short_path: Path) -> None:
    server = Server(["test.Service"])
    server.listen(f"unix:{short_path}/s")
    assert (short_path / "s").stat().st_mode & 0o777 == 0o600
    server.start()
    server.stop(0)


def test_missing_pem_files(tmp_path: Path) -> None:
    with pytest.raises(RequestInvalid, match="cannot listen"):
        Server([]).listen("0.0.0.0:0", Tls(tmp_path / "no.pem", tmp_path / "no.key"))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command makes the certificate")
def test_tls(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    server = Server(["test.Service"])
    address = server.listen("0.0.0.0:0", Tls(certificate, key))
    server.start()
    port = address.rpartition(":")[2]
    with channel(f"localhost:{port}", ca=certificate) as trusted:
        assert health(trusted) == SERVING
    with channel(f"localhost:{port}") as plain, pytest.raises(grpc.RpcError):
        health_pb2_grpc.HealthStub(plain).Check(health_pb2.HealthCheckRequest(), timeout=2)
    server.stop(0)


# Run-time directories.


def test_a_directory_is_private_and_goes(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAID_RUNTIME_DIR", str(short_path / "base"))
    assert base_directory() == short_path / "base"
    made = RuntimeDirectory.create()
    assert made.path.parent == short_path / "base"
    assert made.path.stat().st_mode & 0o777 == 0o700 == made.path.parent.stat().st_mode & 0o777
    (made.path / "socket").touch()
    made.close()
    assert not made.path.exists()


def test_a_killed_owner_is_swept(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAID_RUNTIME_DIR", str(short_path))
    script = (
        "import sys, time\n"
        "from braid_wire.runtime_dir import RuntimeDirectory\n"
        "print(RuntimeDirectory.create().path, flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    theirs = Path(process.stdout.readline().strip())
    (theirs / "full").touch()
    (short_path / "stranger").mkdir()  # not ours: it has no lock
    ours = RuntimeDirectory.create()
    assert theirs.exists()  # its owner lives
    process.kill()
    process.wait(60)
    process.stdout.close()
    sweep(short_path)
    assert not theirs.exists() and ours.path.exists() and (short_path / "stranger").exists()
    ours.close()


def test_a_directory_that_cannot_be(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAID_RUNTIME_DIR", str(short_path / ("x" * 120)))
    with pytest.raises(RequestInvalid, match="too long"):
        RuntimeDirectory.create()
    (short_path / "file").touch()
    monkeypatch.setenv("BRAID_RUNTIME_DIR", str(short_path / "file"))
    with pytest.raises(RequestInvalid, match="cannot be made"):
        RuntimeDirectory.create()
