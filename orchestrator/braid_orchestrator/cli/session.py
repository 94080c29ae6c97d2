"""A cell to work with: one that runs already, or one that is started for the purpose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from braid_orchestrator.client import Client
from braid_orchestrator.discovery import CellInfo, known
from braid_orchestrator.launcher import PROCESSES, launch
from braid_orchestrator.settings import Settings


@dataclass(frozen=True)
class Session:
    """A cell and a client of it; `info` where the cell is on this machine."""

    client: Client
    info: CellInfo | None


@contextmanager
def session(
    settings: Settings, connect: str | None, ca: Path | None, placement: str, console: Console
) -> Iterator[Session]:
    """Join the cell at `connect`, or start one and end it behind the block."""
    if connect is not None:
        with Client(connect, ca) as client:
            yield Session(client, known(connect))
        return
    with (
        loading(settings.model, console) as watch,
        launch(settings, placement=placement, watch=watch) as cell,
    ):
        watch.done()
        with cell.client() as client:
            yield Session(client, cell.info)


class Loading:
    """A line on a terminal that says what a start waits for."""

    def __init__(self, model: Path, console: Console) -> None:
        self._model = model
        self._waiting = dict.fromkeys(PROCESSES)
        self._status = console.status(self._text())

    def __call__(self, name: str, what: str) -> None:
        """As `supervisor.Watch`."""
        if what == "ready":
            self._waiting.pop(name, None)
        else:
            self._waiting[name] = None
        self._status.update(self._text())

    def start(self) -> None:
        """Show it."""
        self._status.start()

    def done(self) -> None:
        """Take it away; showing nothing any more is allowed."""
        self._status.stop()

    def _text(self) -> str:
        return (
            f"loading {self._model.name or self._model}: waiting for {', '.join(self._waiting) or 'nothing'}"
        )


@contextmanager
def loading(model: Path, console: Console) -> Iterator[Loading]:
    """Say on a terminal what a start waits for, until `done` or the end of the block."""
    line = Loading(model, console)
    if console.is_terminal:
        line.start()
    try:
        yield line
    finally:
        line.done()
