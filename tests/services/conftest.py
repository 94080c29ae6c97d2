"""Real services on Unix sockets, and cells that drive them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from braid_wire.arena import ArenaOwner
from braid_wire.layers import Kind
from service_harness import ENVIRONMENT, MODULES, Cell, MakeCell, Service, start_service


@pytest.fixture(scope="session")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short directory for sockets; also $BRAID_RUNTIME_DIR of every process."""
    path = tmp_path_factory.mktemp("r")
    ENVIRONMENT["BRAID_RUNTIME_DIR"] = str(path)
    return path


@pytest.fixture(scope="session")
def services(runtime: Path) -> Iterator[dict[Kind, Service]]:
    """Both services, shared by all tests: each test that misuses them also shows that they live on."""
    running = {kind: start_service(kind, f"unix:{runtime}/{kind.value}") for kind in MODULES}
    yield running
    for service in running.values():
        assert service.stop() == 0


@pytest.fixture
def make_cell(services: dict[Kind, Service], tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeCell]:
    """Makes cells that are not configured yet."""
    made: list[Cell] = []

    def make(**how: object) -> Cell:
        owner = ArenaOwner(tmp_path_factory.mktemp("a") / "arenas")
        made.append(Cell(how.pop("services", services), owner, **how))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for cell in made:
        cell.owner.close()


@pytest.fixture
def cell(make_cell: MakeCell) -> Iterator[Cell]:
    """A configured cell; when the test is over, both services must still run a correct step."""
    cell = make_cell()
    cell.configure()
    yield cell
    cell.next_epoch()
    for service in cell.services.values():
        assert service.process.poll() is None
    cell.shadow = {
        key: {name: t.clone() for name, t in memory.items()} for key, memory in cell.memory.items()
    }
    cell.generations["page"].fill_(1)
    cell.generations["slot"].fill_(1)
    cell.step((cell.sequence(3), 5))
