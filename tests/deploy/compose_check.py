"""What is wrong with a compose file that `docker compose config` does not see."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]
_REFERENCE = "service:"
LOOPBACK = "127.0.0.1"
COMPILED = ("TRITON_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE", "CUDA_CACHE_PATH")


def problems(compose: Json) -> list[str]:
    """Each as a line that begins with the service's name."""
    found = []
    for name, service in compose["services"].items():
        for check in CHECKS:
            found += [f"{name}: {line}" for line in check(name, service, compose)]
    return [*found, *_clashes(compose)]


def _profiles(service: Json) -> set[str]:
    return set(service.get("profiles", []))


def _references(service: Json, keys: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for key in keys:
        value = str(service.get(key, ""))
        if value.startswith(_REFERENCE):
            yield key, value.removeprefix(_REFERENCE)


def _namespaces(name: str, service: Json, compose: Json) -> Iterator[str]:
    """Services whose namespaces are joined exist beside those that join them, and share what is asked."""
    for key, other in _references(service, ("ipc", "pid", "network_mode")):
        target = compose["services"].get(other)
        if target is None:
            yield f"{key} names {other}, which is no service"
            continue
        if key == "ipc" and target.get("ipc") != "shareable":
            yield f"ipc of {other} is not shareable"
        if key != "ipc" and str(target.get(key, "")).startswith(_REFERENCE):
            yield f"{key} of {other} is itself another's"
        if other not in service.get("depends_on", {}):
            yield f"{key} is {other}'s, but it does not depend on {other}"
    joined = dict(_references(service, ("ipc", "pid")))
    if joined and (set(joined) != {"ipc", "pid"} or len(set(joined.values())) != 1):
        yield f"CUDA IPC needs ipc and pid of one service, not {joined}"


def _networks(name: str, service: Json, compose: Json) -> Iterator[str]:
    """A container in another's network, or in none, has neither ports nor networks of its own."""
    if "network_mode" in service:
        for key in ("ports", "networks", "hostname"):
            if key in service:
                yield f"{key} do not go with network_mode {service['network_mode']}"


def _ports(name: str, service: Json, compose: Json) -> Iterator[str]:
    """What is published is published to this machine alone."""
    for port in service.get("ports", []):
        parts = str(port).split(":")
        if len(parts) != 3 or parts[0] != LOOPBACK:
            yield f"port {port} is published beyond loopback"


def _devices(name: str, service: Json, compose: Json) -> Iterator[str]:
    """The containers of the GPU's profiles have the same devices, pinned by id; others have none."""
    found = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
    if "cpu" in _profiles(service) and found:
        yield "has a device in the profile cpu"
    for device in found:
        if "count" in device or not device.get("device_ids"):
            yield "its device is not pinned by device_ids"
        elif device["device_ids"] != _first_ids(compose):
            yield f"device_ids {device['device_ids']} differ from {_first_ids(compose)}"
    if not found and any(key == "ipc" for key, _ in _references(service, ("ipc",))):
        yield "shares CUDA memory but has no device"


def _first_ids(compose: Json) -> Any:
    for service in compose["services"].values():
        reserved = service.get("deploy", {}).get("resources", {}).get("reservations", {})
        for device in reserved.get("devices", []):
            if device.get("device_ids"):
                return device["device_ids"]
    return None


def _hardening(name: str, service: Json, compose: Json) -> Iterator[str]:
    if service.get("restart") not in ("always", "unless-stopped"):
        yield "is not restarted"
    if "healthcheck" not in service:
        yield "has no health check"
    if str(service.get("user", "0")).split(":")[0] in ("0", "root"):
        yield "runs as root"
    if not service.get("read_only"):
        yield "its root can be written"
    if service.get("cap_drop") != ["ALL"] or service.get("privileged") or service.get("cap_add"):
        yield "keeps capabilities"
    limits = service.get("deploy", {}).get("resources", {}).get("limits", {})
    if not {"cpus", "memory"} <= limits.keys():
        yield "has no limits of cpus and memory"
    if "docker.sock" in str(service.get("volumes", "")):
        yield "mounts the engine's socket"


def _volumes(name: str, service: Json, compose: Json) -> Iterator[str]:
    for volume in service.get("volumes", []):
        source = str(volume).split(":")[0]
        if source[0] not in "./<~" and source not in compose.get("volumes", {}):
            yield f"volume {source} is not declared"


def _compiled(name: str, service: Json, compose: Json) -> Iterator[str]:
    """What is compiled for a GPU lies on a volume: a tmpfs may not be executed and does not last."""
    volumes = [str(volume).split(":") for volume in service.get("volumes", [])]
    reserved = service.get("deploy", {}).get("resources", {}).get("reservations", {})
    if not reserved or "cache" not in [source for source, *_ in volumes]:
        return
    for key in COMPILED:
        path = str(service.get("environment", {}).get(key, ""))
        if not any(path == volume[1] or path.startswith(f"{volume[1]}/") for volume in volumes):
            yield f"{key} is on no volume"


def _stops(name: str, service: Json, compose: Json) -> Iterator[str]:
    """An orchestrator that drains still needs its services, so it is stopped before them."""
    words = [str(word) for word in service.get("command", [])]
    called = {words[words.index(option) + 1] for option in ("--full", "--linear") if option in words}
    for other, target in compose["services"].items():
        theirs = [str(word) for word in target.get("command", [])]
        if (
            "--address" in theirs
            and theirs[theirs.index("--address") + 1] in called
            and _profiles(service) == _profiles(target)
            and other not in service.get("depends_on", {})
        ):
            yield f"is not stopped before {other}"


def _depends(name: str, service: Json, compose: Json) -> Iterator[str]:
    for other in service.get("depends_on", {}):
        target = compose["services"].get(other)
        if target is None:
            yield f"depends on {other}, which is no service"
        elif "mps" not in _profiles(service) and not _profiles(service) <= _profiles(target):
            yield f"depends on {other}, which its profiles leave out"


CHECKS = (_namespaces, _networks, _ports, _devices, _hardening, _volumes, _compiled, _stops, _depends)


def _clashes(compose: Json) -> Iterator[str]:
    """In one network namespace, and on this machine, no two listen at the same port."""
    for profile in ("cpu", "gpu"):
        listens: dict[tuple[str, str], str] = {}
        for name, service in compose["services"].items():
            if profile not in _profiles(service):
                continue
            place = str(service.get("network_mode", name)).removeprefix(_REFERENCE)
            words = [str(word) for word in service.get("command", [])]
            for option in ("--metrics-port", "--page-port", "--port"):
                if option in words:
                    key = place, words[words.index(option) + 1]
                    if key in listens:
                        yield f"{name}: port {key[1]} of {place}'s network is {listens[key]}'s in {profile}"
                    listens[key] = name
            for port in service.get("ports", []):
                key = "host", str(port).split(":")[-2]
                if key in listens:
                    yield f"{name}: port {key[1]} of the host is {listens[key]}'s in {profile}"
                listens[key] = name
