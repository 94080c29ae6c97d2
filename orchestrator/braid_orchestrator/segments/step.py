"""What every compiler's role does alike: the values of a step, the order of its segments, its buffers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from braid_wire.devices import upload
from braid_wire.errors import BatchInvalid, StepOrder
from torch.fx import GraphModule

from braid_orchestrator.segments.base import (
    HIDDEN,
    IDS,
    POSITIONS,
    RESULT,
    BuffersOf,
    Call,
    Cut,
    Segment,
    SegmentedRole,
    SegmentsUnavailable,
)
from braid_orchestrator.segments.graph import outputs_of, value_of
from braid_orchestrator.store import Buffers


class BufferedRole(SegmentedRole):
    """A role whose segments take tensors and give tensors; what calls take is copied into their buffers.

    Args:
        cut: the role.
        buffers: of this lane.
        max_tokens: of one step.

    Raises:
        SegmentsUnavailable: a buffer has another shape or dtype than the value that it is for.
    """

    def __init__(self, cut: Cut, buffers: BuffersOf, max_tokens: int) -> None:
        self.segments = cut.segments
        self._cut = cut
        self._device = cut.device
        self._max_tokens = max_tokens
        self._inputs: dict[str, torch.Tensor] = {}
        """Name of a call's input or output → its whole buffer."""
        self._outputs: dict[str, torch.Tensor] = {}
        for segment in cut.segments:
            for call in segment.calls:
                self._take(segment, call, buffers(call.layer_id, call.side))
        self._dead = _last_uses(cut.segments)
        self._no_logits = torch.empty(0, _width(cut.head), device=self._device)
        self._values: dict[str, torch.Tensor] = {}
        self.tokens = 0
        self._next = len(cut.segments)

    def start(self, ids: torch.Tensor, positions: torch.Tensor, hidden: torch.Tensor | None = None) -> None:
        tokens = len(ids)
        if not 1 <= tokens <= self._max_tokens:
            raise BatchInvalid(
                f"the step has {tokens} tokens; it must have 1 to {self._max_tokens}", field="num_tokens"
            )
        if self._cut.mrope and positions.ndim == 1:
            positions = positions.expand(3, -1)
        if positions.shape != ((3, tokens) if self._cut.mrope else (tokens,)):
            raise BatchInvalid(
                f"positions are {list(positions.shape)} for {tokens} tokens", field="positions"
            )
        values = {IDS: upload(ids, self._device), POSITIONS: upload(positions, self._device)}
        if self._cut.draft:
            if hidden is None or len(hidden) != tokens:
                raise BatchInvalid(
                    f"a draft takes one hidden state for each of {tokens} tokens", field="hidden"
                )
            values[HIDDEN] = hidden.to(self._device)
        self._values, self.tokens, self._next = values, tokens, 0

    @torch.inference_mode()
    def run(self, index: int) -> None:
        if index != self._next or index >= len(self.segments):
            raise StepOrder(f"segment {index} is not the next one of the step")
        segment, tokens = self.segments[index], self.tokens
        values = [
            self._values[name] if name in self._values else self._outputs[name][:tokens].to(self._device)
            for name in segment.reads
        ]
        for name, value in zip(segment.writes, self._compute(segment, values), strict=True):
            buffer = self._inputs.get(name)
            if buffer is None:
                self._values[name] = value
            else:
                buffer[:tokens].copy_(value)
        for name in self._dead[index]:
            self._values.pop(name, None)
        self._next = index + 1

    def result(self) -> torch.Tensor:
        if self._next != len(self.segments) or RESULT not in self._values:
            raise StepOrder("the step's segments have not all run")
        return self._values[RESULT]

    @torch.inference_mode()
    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        chosen = self.result()[upload(rows, self._device)]
        return self._head(chosen) if len(rows) else self._no_logits

    @abstractmethod
    def _compute(self, segment: Segment, values: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The segment's writes from its reads, [T, …] each; none may lie in a buffer of a call."""

    @abstractmethod
    def _head(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, hidden] → float32 [n, V]."""

    def _take(self, segment: Segment, call: Call, buffers: Buffers) -> None:
        """Note where one call's tensors lie."""
        made = dict(zip(segment.writes, outputs_of(segment.module), strict=True))
        for name, full_name in zip(call.inputs, call.reads, strict=True):
            buffer, value = buffers.inputs[name], value_of(made[full_name])
            if buffer.dtype is not value.dtype or tuple(buffer.shape[1:]) != tuple(value.shape[1:]):
                raise SegmentsUnavailable(
                    f"layer {call.layer_id} gives {name} {value.dtype} {list(value.shape[1:])} per token; "
                    f"its buffer takes {buffer.dtype} {list(buffer.shape[1:])}"
                )
            self._inputs[full_name] = buffer
        self._outputs[call.output] = buffers.output


def _last_uses(segments: Sequence[Segment]) -> tuple[tuple[str, ...], ...]:
    """Of each segment, the names that no later one reads."""
    last = {name: segment.index for segment in segments for name in segment.reads}
    return tuple(tuple(name for name, at in last.items() if at == segment.index) for segment in segments)


def _width(head: GraphModule) -> int:
    """How many logits a head gives for each row."""
    (logits,) = outputs_of(head)
    return int(value_of(logits).shape[-1])
