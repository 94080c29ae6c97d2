"""What the tests of the wire share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from braid_wire.arena import ArenaOwner


@pytest.fixture
def short_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose path leaves room for a socket's name."""
    return tmp_path_factory.mktemp("s")


@pytest.fixture
def owner(short_path: Path) -> Iterator[ArenaOwner]:
    """The owner of some arenas, in this process."""
    owner = ArenaOwner(short_path / "arenas")
    yield owner
    owner.close()
