"""`braid status` and `braid drain`."""

from __future__ import annotations

import json
from pathlib import Path

import click
from braid.v1 import attention_pb2, common_pb2
from braid.v1 import orchestrator_pb2 as pb
from braid_wire import convert
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table

from braid_orchestrator import console as consoles
from braid_orchestrator.cli.options import connect_options
from braid_orchestrator.client import Client
from braid_orchestrator.discovery import CellInfo, find, known
from braid_orchestrator.plan_view import human_bytes


@click.command()
@connect_options
@click.option("--json", "json_out", is_flag=True, help="Print JSON.")
def status(connect: str | None, ca: Path | None, json_out: bool) -> None:
    """Show what a running cell does: services, pools, and where every layer went.

    Finds the cell by itself where only one runs on this machine.
    """
    address = find(connect)
    with Client(address, ca) as client:
        said = client.status()
        plan = client.plan()
    if json_out:
        print(json.dumps(status_json(said), ensure_ascii=False, indent=2))
        return
    console = consoles.stdout()
    _print_head(console, said, known(address))
    console.print(_services(said))
    console.print()
    console.print(_pools(said))
    console.print()
    console.print(_layers(said, plan))


@click.command()
@connect_options
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="Longest wait for accepted requests, seconds.",
)
@click.option("--json", "json_out", is_flag=True, help="Print JSON.")
def drain(connect: str | None, ca: Path | None, timeout: float, json_out: bool) -> int:
    """Have a cell take nothing new, and wait for what it has accepted.

    Exits with 1 where requests are left after the time.
    """
    with Client(find(connect), ca) as client:
        left = client.drain(timeout)
    if json_out:
        print(json.dumps({"remaining": left}))
    elif left:
        consoles.stderr().print(f"{left} requests did not finish within {timeout:g} s")
    else:
        consoles.stdout().print("drained")
    return 1 if left else 0


def status_json(said: pb.StatusResponse) -> dict[str, object]:
    """The message with its own field names; numbers stay numbers."""
    found: dict[str, object] = MessageToDict(
        said, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    # JSON has no 64-bit integers, so protobuf writes them as strings; these stay far below 2**53.
    for name in ("epoch", "steps", "replays"):
        found[name] = getattr(said, name)
    found["pools"] = [
        {
            "role": convert.role_from_pb(pool.role).value,
            "name": pool.name,
            "used": pool.used,
            "total": pool.total,
            "unit_bytes": pool.unit_bytes,
        }
        for pool in said.pools
    ]
    found["layers"] = [
        {
            "role": convert.role_from_pb(layer.role).value,
            "layer_id": layer.layer_id,
            "service": _side(layer.side),
            "mechanism": layer.mechanism,
            "dispatches": dict(layer.dispatches),
            "compute_seconds": layer.compute_seconds,
            "overhead_seconds": layer.overhead_seconds,
        }
        for layer in _ordered(said)
    ]
    return found


def _print_head(console: Console, said: pb.StatusResponse, info: CellInfo | None) -> None:
    style = "green" if said.state == "serving" else "yellow"
    console.print(f"[bold]{Path(said.model).name}[/]  {said.family}, [{style}]{said.state}[/]")
    console.print(
        f"up {consoles.duration(said.uptime_seconds)}, dispatch {said.dispatch}, epoch {said.epoch}, "
        f"{said.steps:,} steps, {said.replays:,} replays, {said.running} running, {said.waiting} waiting",
        style="dim",
    )
    if info is not None and info.page:
        console.print(f"live page {info.page}", style="dim")
    console.print()


def _services(said: pb.StatusResponse) -> Table:
    table = consoles.table(
        ("service", "left"),
        ("state", "left"),
        ("pid", "right"),
        ("backend", "left"),
        ("device", "left"),
        ("address", "left"),
    )
    for service in said.services:
        state = "[green]ready[/]" if service.ready else "[red]not ready[/]"
        pid = str(service.description.pid or "-")
        backend = service.description.backend or "-"
        table.add_row(service.name, state, pid, backend, _device(service.description), service.address)
    return table


def _device(description: attention_pb2.DescribeResponse) -> str:
    """Where a service runs, how its layers are handed over there, and how it shares the device."""
    words = [", ".join(description.devices) or "-"]
    ways = description.device_handovers
    if ways:
        words.append(attention_pb2.DeviceHandover.Name(ways[0]).removeprefix("DEVICE_HANDOVER_").lower())
    if description.device_sharing:
        sharing = attention_pb2.DeviceSharing.Name(description.device_sharing)
        words.append(sharing.removeprefix("DEVICE_SHARING_").lower())
    return " ".join(words).replace("_", " ")


def _pools(said: pb.StatusResponse) -> Table:
    table = consoles.table(("pool", "left"), ("used", "right"), ("total", "right"), ("of each", "right"))
    for pool in said.pools:
        name = f"{convert.role_from_pb(pool.role).value} {pool.name}"
        table.add_row(name, f"{pool.used:,}", f"{pool.total:,}", human_bytes(pool.unit_bytes))
    return table


def _layers(said: pb.StatusResponse, plan: pb.GetLayerPlanResponse) -> Table:
    kinds = {
        (layers.role, spec.layer_id): spec.kind.value
        for layers in plan.plans
        for spec in convert.plan_from_pb(layers)
    }
    drafts = any(layer.role == common_pb2.ROLE_DRAFT for layer in said.layers)
    table = consoles.table(
        ("layer", "right"),
        ("kind", "left"),
        ("mechanism", "left"),
        ("service", "left"),
        ("dispatches", "left"),
        ("compute µs", "right"),
        ("overhead µs", "right"),
    )
    for layer in _ordered(said):
        role = f"{convert.role_from_pb(layer.role).value} " if drafts else ""
        kind = kinds.get((layer.role, layer.layer_id), "-")
        table.add_row(
            f"{role}{layer.layer_id}",
            f"[{'magenta' if kind == 'full' else 'cyan'}]{kind}[/]",
            layer.mechanism,
            _side(layer.side),
            consoles.by_mode(sorted(layer.dispatches.items())),
            consoles.microseconds(layer.compute_seconds),
            consoles.microseconds(layer.overhead_seconds),
        )
    return table


def _ordered(said: pb.StatusResponse) -> list[pb.LayerStatus]:
    return sorted(said.layers, key=lambda layer: (layer.role, layer.layer_id, layer.side))


def _side(side: int) -> str:
    return "full" if side == common_pb2.KIND_FULL else "linear"
