"""The body of a model, and the point where its layers leave it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from braid_wire.batch import Batch, IntArray
from braid_wire.devices import upload
from braid_wire.errors import ConfigInvalid, StepOrder
from braid_wire.layers import Kind, LayerPlan, Role
from torch import nn

from braid_orchestrator.segments.capture import refuse_dispatch
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
        """Run one layer of the step that is under way.

        Raises:
            StepOrder: there is none.
            CaptureViolation: a segment is being captured.
        """
        refuse_dispatch(layer_id)
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
class RoleBody(ABC):
    """One role's layers taken apart: the target's, or the draft's."""

    model: nn.Module
    """Kept whole, so that its buffers and configuration stay reachable."""
    plan: LayerPlan
    point: DispatchPoint
    head: Head
    hidden_size: int
    mrope: bool
    """Whether it takes a time, a height and a width position for every token."""

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights and hidden states."""
        return next(self.model.parameters()).dtype

    def packed(
        self,
        attend: Attend,
        ids: torch.Tensor,
        positions: torch.Tensor,
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The backbone on packed tokens.

        Args:
            attend: runs one layer.
            ids: int64 [T].
            positions: int64 [T] or [3, T].
            hidden: [T, hidden], for drafts.

        Returns:
            [T, hidden] after the final norm.
        """
        places = positions[:, None] if positions.ndim == 2 else positions[None]
        given = () if hidden is None else (hidden[None],)
        with self.point.leads_to(attend):
            return self.walk(ids[None], places, *given)[0]

    @property
    @abstractmethod
    def draft(self) -> bool:
        """Whether it starts from hidden states."""

    @abstractmethod
    def walk(self, ids: torch.Tensor, positions: torch.Tensor, *hidden: torch.Tensor) -> torch.Tensor:
        """The backbone of either role: ids [1, T], positions [1, T] or [3, 1, T] and, for drafts, hidden
        states [1, T, hidden] → [1, T, hidden]."""


@dataclass(frozen=True)
class Target(RoleBody):
    """The model itself."""

    backbone: Backbone

    @property
    def draft(self) -> bool:
        return False

    def walk(self, ids: torch.Tensor, positions: torch.Tensor, *hidden: torch.Tensor) -> torch.Tensor:
        return self.backbone(ids, positions)


@dataclass(frozen=True)
class Draft(RoleBody):
    """Its multi-token-prediction layers, run on the target's hidden states."""

    backbone: DraftBackbone

    @property
    def draft(self) -> bool:
        return True

    def walk(self, ids: torch.Tensor, positions: torch.Tensor, *hidden: torch.Tensor) -> torch.Tensor:
        return self.backbone(ids, hidden[0], positions)


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

    @property
    def roles(self) -> dict[Role, RoleBody]:
        """The pieces of each role."""
        return {role.plan.role: role for role in self._roles}

    def to(self, device: torch.device) -> None:
        """Move the weights of all roles to a device; static parameters follow when they are taken."""
        for role in self._roles:
            role.model.to(device)

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
        hidden = role.packed(attend, *_tokens(batch, role.device))
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
        found = role.packed(attend, *_tokens(batch, role.device), hidden)
        return _output(role.head, found, rows)

    @property
    def _roles(self) -> tuple[RoleBody, ...]:
        return (self._target,) if self._draft is None else (self._target, self._draft)


def _output(head: Head, hidden: torch.Tensor, rows: IntArray) -> Output:
    return Output(hidden, head(hidden[upload(torch.from_numpy(rows), hidden.device)]).float())


def _tokens(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids int64 [T], and positions int64 [T], or [3, T] where the batch has mrope positions."""
    grid = batch.mrope_positions
    positions = torch.from_numpy(batch.positions if grid is None else grid)
    return upload(torch.from_numpy(batch.input_ids), device), upload(positions, device)
