"""One cell in this process with its page, and one browser, that the tests of this folder share."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator

import pytest
from page_harness import CHROMIUM, Watched


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """The cell."""
    cell = Watched(tmp_path_factory.mktemp("cell"))
    yield cell
    cell.close()


@pytest.fixture
def watched(shared: Watched) -> Watched:
    """The same, with nobody following its page."""
    assert shared.unwatched()
    return shared


# Of a module: while it lives, Playwright has an event loop in this thread, and others need theirs.
@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """A headless Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed (Debian's package chromium)")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield running
        running.close()
