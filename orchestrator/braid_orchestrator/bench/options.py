"""What to measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from braid_orchestrator.cell import CellOptions
from braid_orchestrator.overlap import OverlapMode
from braid_orchestrator.store import Limits

Row = dict[str, Any]
"""One line of a benchmark's report; every value is JSON."""


def _silent(text: str) -> None:
    return


@dataclass(frozen=True)
class BenchOptions:
    """What all benchmarks have in common."""

    model: Path | None = None
    """None: a 10 M-parameter hybrid with random weights."""
    dtype: torch.dtype = torch.float32
    dispatch: str = "walk"
    overlap: str = "auto"
    """Whether ours runs steps in two lanes: "off", "on" or "auto"."""
    segments: str = "auto"
    """What runs the body between its layers, as `segments.choice` names it; of every cell."""
    threads: int = 1
    """Of every process, peers included."""
    batches: tuple[int, ...] = (1, 8)
    contexts: tuple[int, ...] = (512,)
    """Tokens of each sequence when the measurement begins."""
    steps: int = 32
    """Decode steps timed in one repeat."""
    repeats: int = 5
    """Times that each peer takes its turn; one more, the first, only warms up."""
    peers: tuple[str, ...] = ("embedded",)
    """Beside transformers: "embedded", or a transport of `cells`."""
    progress: Callable[[str], None] = field(default=_silent)

    def setup(self, room: Limits, lanes: OverlapMode = OverlapMode.OFF) -> CellOptions:
        """How a cell is made.

        Args:
            room: what it holds.
            lanes: whether its steps run in two.
        """
        return CellOptions(self.dtype, limits=room, segments=self.segments, overlap=lanes)

    @property
    def dtype_name(self) -> str:
        """ "float32" or "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")
