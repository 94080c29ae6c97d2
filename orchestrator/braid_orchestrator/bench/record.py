"""The JSON object of one run: its rows, and what they were measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from braid_wire.metrics import versions

from braid_orchestrator.bench.options import Row

_DISTRIBUTIONS = ("braid-attention", "torch", "transformers", "grpcio", "numpy")
# Those that decide which kernels run.
_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def record(bench: str, command: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Rows, with machine, versions, date (UTC) and command line.

    Args:
        bench: its name.
        command: what was typed.
        rows: what was measured.
    """
    return {
        "bench": bench,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **versions(_DISTRIBUTIONS)},
        "rows": list(rows),
    }


def machine() -> dict[str, Any]:
    """Model of the CPU, cores that this process may use, and vector extensions that matter here."""
    fields = _cpu_fields()
    flags = set(fields.get("flags", "").split())
    return {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "features": [name for name in _FEATURES if name in flags],
        "kernel": platform.release(),
    }


def _cpu_fields() -> dict[str, str]:
    """Of the first core; some architectures name fewer fields."""
    first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
