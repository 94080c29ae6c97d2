"""Output for people: consoles, tables, progress. Colours only on a terminal; NO_COLOR is heeded."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

_PLAIN_WIDTH = 120  # where there is no terminal whose width counts


def stdout() -> Console:
    """For what a command was asked for."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)


def stderr() -> Console:
    """For progress and errors."""
    return Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else _PLAIN_WIDTH)


def table(*columns: tuple[str, str]) -> Table:
    """A table without lines; each column is (heading, "left" or "right")."""
    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for heading, justify in columns:
        made.add_column(heading, justify="right" if justify == "right" else "left", no_wrap=True)
    return made


def microseconds(seconds: float) -> str:
    """Microseconds with three significant digits: "3.42", "41.7", "1,234"."""
    value = seconds * 1e6
    if value == 0:
        return "-"
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f}"


def by_mode(dispatches: Iterable[tuple[str, int]]) -> str:
    """ "extend 2 · decode 40"; "-" where nothing ran."""
    return " · ".join(f"{mode} {count:,}" for mode, count in dispatches if count) or "-"


def duration(seconds: float) -> str:
    """ "42 s", "3 min 5 s", "2 h 7 min"."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
