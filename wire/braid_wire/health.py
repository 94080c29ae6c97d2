"""`python -m braid_wire.health ADDRESS`: whether a gRPC server serves; for health checks.

Imports neither torch nor the contract, so that asking costs a fraction of a second.
"""

from __future__ import annotations

import sys

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING


def check(address: str, service: str = "", timeout_s: float = 3.0) -> str:
    """Ask for the health of one service of a server.

    Args:
        address: `unix:PATH` or `HOST:PORT`, without TLS.
        service: full name; empty: whether the server lives.
        timeout_s: longest wait for the answer, seconds.

    Returns:
        "SERVING", "NOT_SERVING", …; else why there is no answer, as "UNAVAILABLE: …".
    """
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=timeout_s
            )
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    name: str = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return name


@click.command("braid-health")
@click.argument("address")
@click.option("--service", default="", help="Full name of a service; without it: whether the server lives.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=3.0,
    show_default=True,
    help="Longest wait, seconds.",
)
def main(address: str, service: str, timeout: float) -> None:
    """Exit with 0 where the server at ADDRESS (unix:PATH or HOST:PORT) serves, else with 1."""
    said = check(address, service, timeout)
    print(said)
    sys.exit(said != health_pb2.HealthCheckResponse.ServingStatus.Name(SERVING))


if __name__ == "__main__":
    main(prog_name="braid-health")
