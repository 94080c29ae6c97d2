"""Pictures of the live page, taken by a headless Chromium of a real cell under load: `make screenshots`.

Needs Debian's `chromium` and `pip install playwright`. Writes docs/images/page-*.png.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from braid_orchestrator.client import Client
from braid_orchestrator.launcher import Endpoints, Launched, launch
from braid_orchestrator.sampling import Sampling
from braid_orchestrator.settings import Settings
from braid_orchestrator.watching import Watching
from braid_wire.errors import BraidError
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
CHROMIUM = "/usr/bin/chromium"
WARM_S = 25.0
CLIENTS = 3
PROMPTS = (
    "def read_lines(path):",
    "class Stack:\n    def __init__(self):",
    "import os\nimport sys\n\ndef main(argv):",
    "def add(left, right):\n    return",
    "for name, value in sorted(items):",
)


@dataclass(frozen=True)
class Shot:
    """One picture."""

    name: str
    width: int
    height: int
    scheme: str
    scale: float = 1.0


SHOTS = (
    Shot("page-light", 1280, 1000, "light"),
    Shot("page-dark", 1280, 1000, "dark"),
    Shot("page-phone", 390, 844, "dark", scale=2.0),
)


def main() -> None:
    """Start a cell, keep it busy, take the pictures."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    settings = Settings(ROOT / "models" / "tiny", threads=1, speculative=2, max_sequences=16)
    endpoints = Endpoints(watching=Watching(page_port=0))
    with launch(settings, endpoints) as cell, busy(cell), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        pages = [opened(browser, shot, cell.info.page) for shot in SHOTS]
        time.sleep(WARM_S)
        for shot, page in zip(SHOTS, pages, strict=True):
            path = IMAGES / f"{shot.name}.png"
            page.screenshot(path=path)
            print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1024:.0f} KiB")
        browser.close()


def opened(browser: Browser, shot: Shot, url: str) -> Page:
    """The page, followed until its picture is taken."""
    page = browser.new_page(
        viewport={"width": shot.width, "height": shot.height},
        color_scheme="light" if shot.scheme == "light" else "dark",
        device_scale_factor=shot.scale,
    )
    page.goto(url)
    return page


@contextmanager
def busy(cell: Launched) -> Iterator[None]:
    """Requests of all sorts for as long as the block lasts, some of which are refused."""
    over = threading.Event()
    workers = [threading.Thread(target=work, args=(cell, seed, over)) for seed in range(CLIENTS)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        over.set()
        for worker in workers:
            worker.join()


def work(cell: Launched, seed: int, over: threading.Event) -> None:
    """One client's requests, one after the other."""
    dice = random.Random(seed)
    with Client(cell.address) as client:
        for turn in range(1 << 20):
            if over.is_set():
                return
            with suppress(BraidError):
                ask(client, dice, turn, over)


def ask(client: Client, dice: random.Random, turn: int, over: threading.Event) -> None:
    """A completion; now and then one that asks too much."""
    if turn % 12 == 5:
        client.complete("def ", max_tokens=100_000)
    prompt = " ".join(dice.choices(PROMPTS, k=dice.randint(1, 12)))
    sampling = Sampling(temperature=dice.choice((0.0, 0.7)), seed=turn)
    for _ in client.generate(prompt, dice.randint(40, 160), sampling, ignore_eos=True):
        if over.is_set():
            return


if __name__ == "__main__":
    main()
