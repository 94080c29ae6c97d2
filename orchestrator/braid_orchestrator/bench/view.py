"""Rows of a benchmark as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from braid_orchestrator.bench.runs import Row

_COLUMNS = (
    ("bench", "bench"),
    ("batch", "batch"),
    ("context", "context"),
    ("tokens_per_s", "braid tok/s"),
    ("tokens_per_s_transformers", "transformers tok/s"),
    ("ratio_transformers", "× transformers"),
    ("tokens_per_s_embedded", "embedded tok/s"),
    ("ratio_embedded", "× embedded"),
    ("hop_us_p50", "hop p50, µs"),
    ("spread", "spread"),
)


def show(rows: Sequence[Row], console: Console) -> None:
    """Print rows; dtype, dispatch and threads are the same for all and stand above."""
    first = rows[0]
    console.print(
        f"{first['dtype']}, dispatch {first['dispatch']}, {first['threads']} thread(s) a process, "
        f"median of {first['repeats']} runs of each peer in turn"
    )
    table = Table(box=None, pad_edge=False)
    for _, title in _COLUMNS:
        table.add_column(title, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*("-" if row[key] is None else f"{row[key]}" for key, _ in _COLUMNS))
    console.print(table)
