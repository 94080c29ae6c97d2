"""Bodies of a few lines, for what no real model does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from braid_orchestrator.body.base import DispatchPoint, Target
from braid_wire.layers import Gqa, Kind, LayerPlan, LayerSpec, Lightning, Role
from torch import nn

WIDTH, HEADS, SIZE = 12, 3, 4
FULL = Gqa(HEADS, HEADS, SIZE, SIZE, scale=0.5)
LINEAR = Lightning(HEADS, SIZE, scale=0.5)

Walk = Callable[["Toy", torch.Tensor, torch.Tensor], torch.Tensor]
"""(toy, ids [1, T], positions [1, T]) → [1, T, WIDTH]."""


class Toy(nn.Module):
    """An embedding, a projection, a norm weight, and calls of layers."""

    def __init__(self, walk: Walk) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(100, WIDTH)
        self.projection = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.point = DispatchPoint()
        self._walk = walk
        self.eval().requires_grad_(False)

    def call(self, layer_id: int, rows: torch.Tensor, side: Kind | None = None) -> torch.Tensor:
        """A layer on [1, T, WIDTH]; all of its inputs are the same."""
        heads = rows.view(-1, HEADS, SIZE)
        found = self.point.attend(layer_id, {"q": heads, "k": heads + 1, "v": 2 * heads}, side)
        return found.reshape(1, -1, WIDTH)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[1, T] twice → [1, T, WIDTH]."""
        return self._walk(self, ids, positions)


def toy(walk: Walk, *kinds: Kind) -> Target:
    """A role with a layer of each kind, its ids from 0 on."""
    model = Toy(walk)
    specs = [
        LayerSpec(
            index,
            kind,
            FULL if kind in (Kind.FULL, Kind.PARALLEL) else None,
            LINEAR if kind in (Kind.LINEAR, Kind.PARALLEL) else None,
        )
        for index, kind in enumerate(kinds)
    ]
    return Target(
        model=model,
        plan=LayerPlan(Role.TARGET, tuple(specs)),
        point=model.point,
        head=lambda rows: rows @ model.embedding.weight.T,
        hidden_size=WIDTH,
        mrope=False,
        backbone=model,
    )
