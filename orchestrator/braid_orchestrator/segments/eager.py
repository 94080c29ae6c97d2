"""Segments run operator by operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from braid_orchestrator.segments.base import BuffersOf, Cut, Segment, SegmentCompiler, SegmentedRole
from braid_orchestrator.segments.step import BufferedRole


class EagerCompiler(SegmentCompiler):
    """Runs the graphs as they are: the same operators as the model's own code, without that code."""

    name = "eager"

    def compile(self, cut: Cut, buffers: BuffersOf, max_tokens: int) -> SegmentedRole:
        return EagerRole(cut, buffers, max_tokens)


class EagerRole(BufferedRole):
    """One role on one lane."""

    def _compute(self, segment: Segment, values: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        found: Sequence[torch.Tensor] = segment.module(*values)
        return found

    def _head(self, rows: torch.Tensor) -> torch.Tensor:
        (logits,) = self._cut.head(rows)
        return logits
