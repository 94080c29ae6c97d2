"""What a package of kernels implements to become an attention service.

The host checks everything that crosses the boundary; a core only says what it can run, resolves a
layer once, plans a batch, and computes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from braid.v1 import attention_pb2

from braid_wire.audit import Sample
from braid_wire.devices import CPU
from braid_wire.errors import BraidError
from braid_wire.layers import Geometry, Kind, LayerPlan, LayerSpec


@dataclass(slots=True)
class CheckedBatch:
    """A batch that obeys the rules of the contract.

    Args:
        arrays: its metadata, private copies with dtypes of `SHARED_DTYPES`; page fields for a full core,
            state fields for a linear one.
        num_tokens: T.
        mode: of all sequences, or "mixed".
        keys: contexts and tokens of all sequences.
        like: what the core planned before of the very same arrays, which had other values then.
    """

    arrays: Mapping[str, torch.Tensor]
    num_tokens: int
    mode: str
    keys: int
    like: PlannedBatch | None = None


@dataclass(frozen=True)
class PlannedBatch:
    """A checked and planned batch.

    Args:
        summary: what the caller is told.
        payload: what the core's own runners need; nobody else looks into it.
    """

    summary: attention_pb2.PlanSummary
    payload: object


LayerRunner = Callable[[Mapping[str, torch.Tensor], PlannedBatch, torch.Tensor], None]
"""Runs one resolved layer: (inputs name → [T, …], the batch, output [T, …] to write)."""


class AttentionCore(ABC):
    """Kernels of one kind of attention, behind the interface that the host drives."""

    kind: Kind
    """`Kind.FULL` or `Kind.LINEAR`."""

    refusals: Mapping[type[Exception], type[BraidError]] = {}
    """Errors by which the kernels refuse a caller's values, and what each is in the error table.
    Any other exception is a fault of the service."""

    device: torch.device = CPU
    """Where pages, states, activations and parameters lie; metadata is always in host memory."""

    @abstractmethod
    def describe(self) -> attention_pb2.DescribeResponse:
        """What this service is and can do, without `pid` and `epoch`."""

    @abstractmethod
    def supports(
        self, geometry: Geometry, activation_dtype: torch.dtype, state_dtype: torch.dtype
    ) -> str | None:
        """None where it runs such a layer, else the reason why not."""

    @abstractmethod
    def runner(
        self,
        spec: LayerSpec,
        geometry: Geometry,
        params: Mapping[str, torch.Tensor],
        memory: Mapping[str, torch.Tensor],
        page_size: int,
    ) -> LayerRunner:
        """Resolve one layer whose tensors have been checked against its geometry.

        Args:
            spec: the layer.
            geometry: this side's geometry of it.
            params: name → tensor, as `geometry.params()`; optional ones may be absent.
            memory: full: cache name → [num_pages, page_size, …]; linear: "state" [num_slots, …] and
                "conv" [num_slots, C, K−1].
            page_size: positions in a page; 0 for a linear core.
        """

    @abstractmethod
    def plan(
        self, plan: LayerPlan, batch: CheckedBatch, page_size: int, options: Mapping[str, str]
    ) -> PlannedBatch:
        """Plan a checked batch.

        Args:
            plan: of the role whose layers will run, those of the other kind included.
            batch: what to plan.
            page_size: positions in a page; 0 for a linear core.
            options: by name; unknown ones are named in the summary's `ignored_options`.
        """

    def sample(
        self,
        geometry: Geometry,
        params: Mapping[str, torch.Tensor],
        memory: Mapping[str, torch.Tensor],
        inputs: Mapping[str, torch.Tensor],
        payload: object,
    ) -> Sample | None:
        """Copies for an audit of a layer that is about to run; None where it is too large, or never audited.

        Args:
            geometry, params, memory: as of `runner`.
            inputs: name → [T, …].
            payload: of the planned batch.
        """
        return None

    def refusal(self, error: Exception) -> BraidError | None:
        """The typed error behind a refusal of the kernels; None for any other exception."""
        for cls, typed in self.refusals.items():
            if isinstance(error, cls):
                return typed(str(error))
        return None
