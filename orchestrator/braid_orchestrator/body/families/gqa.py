"""The adapter of grouped-query attention that most families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from braid_wire.layers import Gqa, Kind, LayerSpec
from torch import nn

from braid_orchestrator.body.base import DispatchPoint
from braid_orchestrator.body.families.submodules import geometry, must_agree

Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""A family's (q [1, T, Hq, D], k [1, T, Hkv, D], cos, sin, unsqueeze_dim) → q, k rotated."""


@dataclass(frozen=True)
class Heads:
    """What of an attention module stays with the body."""

    q: nn.Module
    """[1, T, in] → [1, T, Hq·D] or [1, T, Hq, D]; with whatever comes before rotary."""
    k: nn.Module
    v: nn.Module
    out: nn.Module
    """[1, T, Hq·D] → [1, T, hidden]."""
    scale: float
    """The module's softmax scale; the plan must have the same."""
    rotate: Rotate | None = None


def usual_heads(original: Any, rotate: Rotate | None = None) -> Heads:
    """Those of a module laid out as most are."""
    return Heads(original.q_proj, original.k_proj, original.v_proj, original.o_proj, original.scaling, rotate)


class GroupedQuery(nn.Module):
    """The module's projections and rotary; then the service; then the output projection.

    Raises:
        ConfigInvalid: the plan has another mechanism or scale for this layer.
    """

    def __init__(self, heads: Heads, spec: LayerSpec, point: DispatchPoint) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = heads.q, heads.k, heads.v, heads.out
        self._rotate = heads.rotate
        self._layer_id, self._point = spec.layer_id, point
        self._geometry = geometry(spec, Kind.FULL, Gqa)
        must_agree(spec, "the softmax scale", heads.scale, self._geometry.scale)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """[1, T, in] → [1, T, hidden], and no attention weights."""
        g, rows = self._geometry, hidden_states.shape[1]
        query = self.q(hidden_states).view(1, rows, g.num_q_heads, g.head_dim)
        key = self.k(hidden_states).view(1, rows, g.num_kv_heads, g.head_dim)
        value = self.v(hidden_states).view(rows, g.num_kv_heads, g.v_head_dim)
        # A config may switch rotary off; the model then gives no embeddings.
        if self._rotate is not None and position_embeddings is not None:
            query, key = self._rotate(query, key, *position_embeddings, unsqueeze_dim=2)
        inputs = {"q": query[0], "k": key[0], "v": value}
        out = self._point.attend(self._layer_id, inputs, side=Kind.FULL)
        return self.out(out.reshape(1, rows, -1)), None


class Scaled(nn.Module):
    """A map's output times a constant."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self._factor = inner, factor

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[…, in] → […, out]."""
        return self.inner(hidden) * self._factor


class Sum(nn.Module):
    """Two maps of the same input, added."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[…, in] → […, out]."""
        return self.first(hidden) + self.second(hidden)
