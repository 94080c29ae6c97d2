"""Segments: what a body computes between two dispatch points, and the interface of their compilers.

Values that pass between segments, services and the walker have names:

| name | value |
|---|---|
| `ids` | int64 [T], the step's tokens |
| `positions` | int64 [T]; [3, T] where the model takes mrope positions |
| `hidden` | [T, hidden], what a draft starts from |
| `in.{layer}.{side}.{name}` | [T, …], an input of a call, as the layer's geometry names it |
| `out.{layer}.{side}` | [T, …], a call's output |
| `result` | [T, hidden], after the final norm |
| `carried.{…}` | what one segment hands to a later one, T at any of its dimensions |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import grpc
import torch
from braid_wire.errors import BraidError
from braid_wire.layers import Kind, LayerSpec

from braid_orchestrator.segments.graph import weights_of
from braid_orchestrator.store import Buffers

IDS, POSITIONS, HIDDEN, RESULT = "ids", "positions", "hidden", "result"


class SegmentsUnavailable(BraidError):
    """A body cannot be traced, or a compiler cannot run what was traced; the message says why."""

    code, reason = grpc.StatusCode.UNIMPLEMENTED, "SEGMENTS_UNAVAILABLE"


def input_name(layer_id: int, side: Kind, name: str) -> str:
    """The name of one input of a call."""
    return f"in.{layer_id}.{side.value}.{name}"


def output_name(layer_id: int, side: Kind) -> str:
    """The name of a call's output."""
    return f"out.{layer_id}.{side.value}"


def called_side(spec: LayerSpec, side: Kind | None) -> Kind:
    """Which side of a layer a dispatch runs; adapters may name one where there is no other."""
    return side if side is not None and spec.kind is Kind.PARALLEL else spec.kind


def carried_name(value: str) -> str:
    """The name of a value that one segment hands to a later one."""
    return f"carried.{value}"


def is_carried(name: str) -> bool:
    """Whether a name is of such a value."""
    return name.startswith("carried.")


@dataclass(frozen=True)
class Call:
    """One dispatch: a layer, the side of it that runs, and its inputs' names as the geometry has them."""

    layer_id: int
    side: Kind
    inputs: tuple[str, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        """Full names of its inputs."""
        return tuple(input_name(self.layer_id, self.side, name) for name in self.inputs)

    @property
    def output(self) -> str:
        """Full name of its output."""
        return output_name(self.layer_id, self.side)


@dataclass(frozen=True)
class Segment:
    """What runs without a break, up to the calls that need what it wrote.

    The module's graph holds aten operators at the level that the model calls them. Weights are
    `get_attr` nodes that refer to the model's own tensors. Every node has its fake value in
    `meta["val"]`; shapes are made of integers and of one symbol T, which the graph takes from its
    placeholders by `aten.sym_size.int`. The module takes its placeholders in the order of `reads`
    and gives a tuple in the order of `writes`.
    """

    index: int
    module: torch.fx.GraphModule
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    calls: tuple[Call, ...]
    """Dispatched after it, all at once; empty for the last segment alone."""


@dataclass(frozen=True)
class Cut:
    """One role's body as segments, and its head: [n, hidden] → ([n, V],)."""

    segments: tuple[Segment, ...]
    head: torch.fx.GraphModule
    mrope: bool
    draft: bool

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        for module in (self.head, *(segment.module for segment in self.segments)):
            for weight in weights_of(module).values():
                return weight.device
        return torch.device("cpu")


class SegmentedRole(ABC):
    """The body of one role on one lane, for steps of up to a fixed number of tokens.

    A step is `start`, then for each segment in order `run(index)` and, before the next, all of its
    calls; then `result` and `logits`.
    """

    segments: tuple[Segment, ...]
    batch_invariant: bool = False
    """Whether a row's result is the same bits whatever other rows there are."""

    @abstractmethod
    def start(self, ids: torch.Tensor, positions: torch.Tensor, hidden: torch.Tensor | None = None) -> None:
        """Begin a step of T = len(ids) tokens.

        Args:
            ids: int64 [T].
            positions: int64 [T] or [3, T]; a model with mrope takes three equal rows where it gets one.
            hidden: [T, hidden], for drafts.

        Raises:
            BatchInvalid: more tokens than the role was compiled for, none, or tensors that do not match.
        """

    @abstractmethod
    def run(self, index: int) -> None:
        """Run one segment.

        Reads the outputs of earlier calls from the first T rows of their buffers and writes the inputs
        of its own calls into the first T rows of theirs; later rows stay as they are.

        Raises:
            StepOrder: no step was started, or it is not the segment's turn.
        """

    @abstractmethod
    def result(self) -> torch.Tensor:
        """[T, hidden] after the last segment; valid until the next start.

        Raises:
            StepOrder: the last segment has not run.
        """

    @abstractmethod
    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 [n, V] of rows int64 [n] of the result.

        Raises:
            StepOrder: the last segment has not run.
        """


BuffersOf = Callable[[int, Kind], Buffers]
"""(layer id, side) → its whole buffers [max_tokens, …], of one role and lane."""


class SegmentCompiler(ABC):
    """Makes segments run."""

    name: ClassVar[str]

    @abstractmethod
    def compile(self, cut: Cut, buffers: BuffersOf, max_tokens: int) -> SegmentedRole:
        """The role on one lane. Compiling the same cut again, for another lane, shares its weights.

        Raises:
            SegmentsUnavailable: this compiler cannot run it here; the message says why.
        """
