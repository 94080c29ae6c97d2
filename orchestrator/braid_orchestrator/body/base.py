"""The body of a model, and the point where its layers leave it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from braid_wire.batch import Batch, IntArray
from braid_wire.errors import StepOrder
from braid_wire.layers import Kind, LayerPlan, Role
from torch import nn

from braid_orchestrator.store import LayerParams


class Attend(Protocol):
    """Runs one layer: inputs as its geometry names them, [T, …] each; the output likewise."""

    def __call__(
        self, layer_id: int, inputs: Mapping[str, torch.Tensor], side: Kind | None = None
    ) -> torch.Tensor: ...


class DispatchPoint:
    """What the adapters of a model call; it leads to the step that is under way."""

    def __init__(self) -> None:
        self._attend: Attend | None = None

    @contextmanager
    def leads_to(self, attend: Attend) -> Iterator[None]:
        """Send dispatches to `attend` inside the block; blocks do not nest."""
        if self._attend is not None:
            raise StepOrder("a body was entered while it runs another step")
        self._attend = attend
        try:
            yield
        finally:
            self._attend = None

    def attend(
        self, layer_id: int, inputs: Mapping[str, torch.Tensor], side: Kind | None = None
    ) -> torch.Tensor:
        """Run one layer of the step that is under way; `StepOrder` where there is none."""
        if self._attend is None:
            raise StepOrder(f"layer {layer_id} was reached outside a step", layer_id=layer_id)
        return self._attend(layer_id, inputs, side)


Backbone = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(input ids int64 [1, T], positions int64 [1, T] or [3, 1, T]) → hidden states [1, T, hidden]."""


class Body:
    """A model whose attention runs elsewhere.

    Args:
        model: the transformers model, its attention modules replaced by adapters; kept whole so
            that its buffers and configuration stay reachable.
        backbone: runs the model up to and including its final norm.
        head: hidden states [n, hidden] → logits [n, V].
        plan: of the target role.
        params: static parameters of its layers.
        point: what the adapters call.
    """

    def __init__(
        self,
        model: nn.Module,
        backbone: Backbone,
        head: Callable[[torch.Tensor], torch.Tensor],
        plan: LayerPlan,
        params: Mapping[int, Mapping[str, torch.Tensor]],
        point: DispatchPoint,
    ) -> None:
        self.model = model
        self.plan = plan
        self.params: LayerParams = {(Role.TARGET, layer_id): group for layer_id, group in params.items()}
        self._backbone = backbone
        self._head = head
        self._point = point

    @torch.inference_mode()
    def __call__(self, batch: Batch, attend: Attend, rows: IntArray) -> torch.Tensor:
        """Walk the layers.

        Args:
            batch: T packed tokens.
            attend: runs one layer of this step.
            rows: int [n], the tokens whose logits are wanted.

        Returns:
            float32 [n, V]: logits of those tokens.

        Raises:
            BraidError: a layer was refused or its service was lost.
        """
        ids = torch.from_numpy(batch.input_ids)[None]
        with self._point.leads_to(attend):
            hidden = self._backbone(ids, _positions(batch))
        return self._head(hidden[0, torch.from_numpy(rows)]).float()


def _positions(batch: Batch) -> torch.Tensor:
    """int64 [1, T], or [3, 1, T] where the batch has mrope positions."""
    if batch.mrope_positions is not None:
        return torch.from_numpy(batch.mrope_positions)[:, None]
    return torch.from_numpy(batch.positions)[None]
