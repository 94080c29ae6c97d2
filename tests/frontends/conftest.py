"""One cell in this process that the tests of this folder share; each leaves it idle."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
from front_harness import Front, eventually


@pytest.fixture(scope="session")
def shared_front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """The cell itself."""
    front = Front(tmp_path_factory.mktemp("cell"))
    yield front
    front.close()


@pytest.fixture
def front(shared_front: Front) -> Iterator[Front]:
    """The shared cell; a test that leaves something behind fails."""
    yield shared_front
    assert eventually(lambda: shared_front.idle)


@pytest.fixture
def own_front(tmp_path: Path) -> Iterator[Front]:
    """A cell that a test may leave in any state."""
    front = Front(tmp_path)
    yield front
    front.close()
