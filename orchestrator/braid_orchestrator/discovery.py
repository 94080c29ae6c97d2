"""Which cells run on this machine: each says so in its run-time directory."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from braid_wire.errors import RequestInvalid, ServiceLost
from braid_wire.runtime_dir import base_directory

_FILE = "cell.json"
_LOCK = "lock"


@dataclass(frozen=True)
class CellInfo:
    """A cell that runs."""

    address: str
    """Where its orchestrator serves, on a Unix socket."""
    grpc: tuple[str, ...]
    """Where it serves beside that."""
    metrics: Mapping[str, int]
    """Process → port of its `/metrics`."""
    model: str
    pid: int
    """Of the process that keeps it running."""
    directory: str
    page: str = ""
    """URL of its live page; empty: it has none."""

    def to_json(self) -> dict[str, Any]:
        """For `--json` and for the file."""
        return asdict(self)

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> CellInfo:
        """What `to_json` gave."""
        return cls(
            address=said["address"],
            grpc=tuple(said["grpc"]),
            metrics=dict(said["metrics"]),
            model=said["model"],
            pid=said["pid"],
            directory=said["directory"],
            page=said.get("page", ""),
        )


def publish(info: CellInfo) -> None:
    """Let others find a cell; its directory is locked by the caller."""
    directory = Path(info.directory)
    draft = directory / f"{_FILE}.new"
    draft.write_text(json.dumps(info.to_json()))
    draft.replace(directory / _FILE)


def running_cells() -> list[CellInfo]:
    """The cells of this user that serve, oldest first."""
    base = base_directory()
    if not base.is_dir():
        return []
    found = []
    for path in base.iterdir():
        file = path / _FILE
        try:
            if file.is_file() and _locked(path / _LOCK):
                found.append((file.stat().st_mtime, CellInfo.from_json(json.loads(file.read_text()))))
        except OSError:
            continue  # it stopped while we looked
    return [info for _, info in sorted(found, key=lambda item: item[0])]


def find(address: str | None) -> str:
    """The address of the cell to ask: the given one, or that of the only one.

    Raises:
        ServiceLost: none runs.
        RequestInvalid: several do.
    """
    if address is not None:
        return address
    cells = running_cells()
    if not cells:
        raise ServiceLost(
            f"no cell runs under {base_directory()}; start one with `braid serve MODEL`, "
            "or name one with --connect"
        )
    if len(cells) > 1:
        lines = "".join(f"\n  {cell.address}  {cell.model}" for cell in cells)
        raise RequestInvalid(f"{len(cells)} cells run; name one with --connect:{lines}", field="connect")
    return cells[0].address


def known(address: str) -> CellInfo | None:
    """What a cell on this machine says of itself."""
    return next((cell for cell in running_cells() if address in (cell.address, *cell.grpc)), None)


def _locked(path: Path) -> bool:
    """Whether a living process holds a cell's directory."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
