"""Cells with both services in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import braid_full_attn.core
import braid_linear_attn.core
from braid_orchestrator.cell import Cell
from braid_orchestrator.link import EmbeddedLink, Link
from braid_orchestrator.store import Limits
from braid_wire.attention_host import AttentionHost
from braid_wire.layers import Kind
from braid_wire.metrics import ProcessMetrics

LIMITS = Limits(max_tokens=64, max_sequences=6, max_context=256, page_size=8)

CellMaker = Callable[..., Cell]


def embedded_links(backend: str = "auto") -> Mapping[Kind, Link]:
    """Both services in this process."""
    full = AttentionHost(braid_full_attn.core.load(backend, 1), ProcessMetrics("full", "test"))
    linear = AttentionHost(braid_linear_attn.core.load(backend, 1), ProcessMetrics("linear", "test"))
    return {Kind.FULL: EmbeddedLink(Kind.FULL, full), Kind.LINEAR: EmbeddedLink(Kind.LINEAR, linear)}
