"""The body of a model, and the point where its layers leave it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from braid_wire.batch import Batch, IntArray
from braid_wire.errors import ConfigInvalid, StepOrder
from braid_wire.layers import Kind, LayerPlan, Role
from torch import nn

from braid_orchestrator.store import LayerParams


class Attend(Protocol):
    """Runs one layer: inputs as its geometry names them, [T, …] each; the output likewise."""

    def __call__(
        self, layer_id: int, inputs: Mapping[str, torch.Tensor], side: Kind | None = None
    ) -> torch.Tensor: ...


class DispatchPoint:
    """What the adapters of one role call; it leads to the step that is under way."""

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

DraftBackbone = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(input ids int64 [1, T], hidden states [1, T, hidden], positions) → hidden states [1, T, hidden]."""

Head = Callable[[torch.Tensor], torch.Tensor]
"""Final-normed hidden states [n, hidden] → logits [n, V]."""


@dataclass(frozen=True)
class Output:
    """What a walk through the layers of a role gave."""

    hidden: torch.Tensor
    """[T, hidden]: every token's hidden state after the final norm."""
    logits: torch.Tensor
    """float32 [n, V]: of the tokens that were asked for."""


@dataclass(frozen=True)
class RoleBody:
    """One role's layers taken apart: the target's, or the draft's."""

    model: nn.Module
    """Kept whole, so that its buffers and configuration stay reachable."""
    plan: LayerPlan
    point: DispatchPoint
    head: Head


@dataclass(frozen=True)
class Target(RoleBody):
    """The model itself."""

    backbone: Backbone
    mrope: bool = False
    """Whether it takes a time, a height and a width position for every token."""


@dataclass(frozen=True)
class Draft(RoleBody):
    """Its multi-token-prediction layers, run on the target's hidden states."""

    backbone: DraftBackbone


class Body:
    """A model whose attention runs elsewhere, and its draft where the checkpoint has one.

    Args:
        target: the model itself.
        draft: its MTP layers.
        params: static parameters of the layers of both.
    """

    def __init__(self, target: Target, draft: Draft | None, params: LayerParams) -> None:
        self._target = target
        self._draft = draft
        self._params = params

    @property
    def model(self) -> nn.Module:
        """The target's transformers model, its attention modules replaced by adapters."""
        return self._target.model

    @property
    def plans(self) -> dict[Role, LayerPlan]:
        """The layers of each role that this body runs."""
        return {role.plan.role: role.plan for role in self._roles}

    def take_params(self) -> LayerParams:
        """Static parameters of the layers of all roles, which the body then lets go of.

        Once they lie in shared memory, a second copy would be kept for nothing.
        """
        params, self._params = self._params, {}
        return params

    @property
    def mrope(self) -> bool:
        """Whether batches may carry mrope positions."""
        return self._target.mrope

    @property
    def has_draft(self) -> bool:
        """Whether `draft` can be called."""
        return self._draft is not None

    def __call__(self, batch: Batch, attend: Attend, rows: IntArray) -> torch.Tensor:
        """As `target`, for its logits alone."""
        return self.target(batch, attend, rows).logits

    @torch.inference_mode()
    def target(self, batch: Batch, attend: Attend, rows: IntArray) -> Output:
        """Walk the target's layers.

        Args:
            batch: T packed tokens of the target role.
            attend: runs one layer of this step.
            rows: int [n], the tokens whose logits are wanted.

        Raises:
            BraidError: a layer was refused or its service was lost.
        """
        role = self._target
        with role.point.leads_to(attend):
            hidden = role.backbone(torch.from_numpy(batch.input_ids)[None], _positions(batch))[0]
        return _output(role.head, hidden, rows)

    @torch.inference_mode()
    def draft(self, batch: Batch, hidden: torch.Tensor, attend: Attend, rows: IntArray) -> Output:
        """Walk the draft's layers.

        Args:
            batch: T packed tokens of the draft role: row t holds the token that follows row t's
                hidden state, and the position of that state.
            hidden: [T, hidden], the target's (or, drafting on, the draft's own) output hidden states.
            attend: runs one layer of this step.
            rows: int [n], the rows whose logits are wanted: those of the token after the row's.

        Raises:
            ConfigInvalid: the model has no draft.
            BraidError: a layer was refused or its service was lost.
        """
        role = self._draft
        if role is None:
            raise ConfigInvalid("the model has no draft layers", field="role")
        ids = torch.from_numpy(batch.input_ids)[None]
        with role.point.leads_to(attend):
            found = role.backbone(ids, hidden[None], _positions(batch))[0]
        return _output(role.head, found, rows)

    @property
    def _roles(self) -> tuple[RoleBody, ...]:
        return (self._target,) if self._draft is None else (self._target, self._draft)


def _output(head: Head, hidden: torch.Tensor, rows: IntArray) -> Output:
    return Output(hidden, head(hidden[torch.from_numpy(rows)]).float())


def _positions(batch: Batch) -> torch.Tensor:
    """int64 [1, T], or [3, 1, T] where the batch has mrope positions."""
    if batch.mrope_positions is not None:
        return torch.from_numpy(batch.mrope_positions)[:, None]
    return torch.from_numpy(batch.positions)[None]
