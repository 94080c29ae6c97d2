"""Rows of a benchmark as a table for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from braid_orchestrator.bench.options import Row
from braid_orchestrator.plan_view import human_bytes


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _rounded(value: Any) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _milliseconds(value: Any) -> str:
    return f"{value * 1e-3:.2f}"


def _percent(value: Any) -> str:
    return f"{value:.0%}"


def _times(value: Any) -> str:
    return f"{value:.2f}"


# Key → (heading, how a value is written); a key that ends in "_" stands for one column a peer, with the
# peer's name between the braces.
_COLUMNS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "phase": ("phase", _plain),
    "sweep": ("varies", _plain),
    "transport": ("transport", _plain),
    "load": ("machine", _plain),
    "layers": ("layers", str),
    "batch": ("batch", str),
    "context": ("context", str),
    "tokens_per_s": ("tokens/s", _plain),
    "tokens_per_s_one_lane": ("one lane", _plain),
    "waiting_one_lane": ("waiting", _percent),
    "tokens_per_s_two_lanes": ("two lanes", _plain),
    "waiting_two_lanes": ("waiting", _percent),
    "ratio_two_lanes": ("two ×", _times),
    "tokens_per_s_auto": ("auto", _plain),
    "lanes_auto": ("lanes", str),
    "ratio_auto": ("auto ×", _times),
    "tokens_per_s_": ("{}", _plain),
    "ratio_": ("× {}", _times),
    "step_us": ("step ms", _milliseconds),
    "step_us_embedded": ("embedded", _milliseconds),
    "hop_us_p50": ("hop µs", _rounded),
    "hop_us_p90": ("p90", _rounded),
    "hop_us_p99": ("p99", _rounded),
    "kernel_us_p50_full": ("full µs", _rounded),
    "kernel_us_p50_linear": ("linear µs", _rounded),
    "matmul_fraction": ("matmul", _percent),
    "memory_bytes": ("a sequence", human_bytes),
    "memory_bytes_planned": ("plan", human_bytes),
    "spread": ("spread", _percent),
}
_HIDDEN = {
    "decode": ("hop_us_p99",),
    "prefill": ("hop_us_p99",),
    "scale": ("tokens_per_s", "ratio_embedded", "hop_us_p99"),
    "hop": ("context",),
}
_NOTES = {
    "overlap": ("Tokens per second; waiting: of the orchestrator, for layers, as a part of the step.",),
    "scale": (
        "A sequence holds whole pages and two versions of its state; the plan counts tokens and one version.",
        "Contexts above 4,096 tokens are strung together from prompts of 2,048: a step reads as much.",
    ),
}


def show(rows: Sequence[Row], console: Console) -> None:
    """Print rows; dtype and threads are the same for all and stand above."""
    first = rows[0]
    about = [first["dtype"], f"{first['threads']} thread(s) a process"]
    if "dispatch" in first:
        about.append(f"dispatch {first['dispatch']}, overlap {first['overlap']}")
    console.print(f"{', '.join(about)}, median of {first['repeats']} turns of each peer")
    columns = _columns(rows)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for _, heading, _ in columns:
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*("-" if row.get(key) is None else write(row[key]) for key, _, write in columns))
    console.print(table)
    for note in _NOTES.get(first["bench"], ()):
        console.print(note, style="dim")


def _columns(rows: Sequence[Row]) -> list[tuple[str, str, Callable[[Any], str]]]:
    """(key, heading, how a value is written) of what some row has."""
    hidden = _HIDDEN.get(rows[0]["bench"], ())
    present = [key for row in rows for key, value in row.items() if value is not None and key not in hidden]
    present = list(dict.fromkeys(present))
    found = []
    for pattern, (heading, write) in _COLUMNS.items():
        if pattern in present:
            found.append((pattern, heading, write))
        if pattern.endswith("_"):
            names = [key.removeprefix(pattern) for key in present if key.startswith(pattern)]
            found += [
                (pattern + name, heading.format(name.removeprefix("grpc_")), write)
                for name in names
                if pattern + name not in _COLUMNS
            ]
    return found
