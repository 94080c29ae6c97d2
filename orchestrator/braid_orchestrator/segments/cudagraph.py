"""Segments replayed as CUDA graphs, one for each segment and bucket of numbers of tokens.

A graph reads and writes the same memory in every replay, so what comes from outside (tokens, positions,
outputs of calls) is copied into tensors of the bucket's size; rows beyond the step's tokens are zeros
there, and what is computed from them is never copied out. What a graph gives lies in memory of its own:
the rest of what it uses is written over by the next graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from braid_kernels.graphs import Compute, GraphRecorder, Recorder, Recording, keep_outputs
from torch.fx import GraphModule

from braid_orchestrator.segments.base import (
    POSITIONS,
    BuffersOf,
    Cut,
    Segment,
    SegmentCompiler,
    SegmentedRole,
    SegmentsUnavailable,
    is_carried,
)
from braid_orchestrator.segments.buckets import Buckets
from braid_orchestrator.segments.capture import capturing
from braid_orchestrator.segments.step import BufferedRole

__all__ = ["Compute", "CudaGraphCompiler", "CudaGraphRole", "GraphRecorder", "Recorder", "Recording"]

# Steps of more tokens keep a GPU busy by themselves; a graph would only hold memory.
LARGEST_BUCKET = 256
_ROWS = "rows"


class CudaGraphCompiler(SegmentCompiler):
    """Records a segment when a bucket is first met; larger steps run operator by operator.

    Args:
        recorder: records; None: CUDA graphs, which need weights on a GPU.
        largest: bucket.
    """

    name = "cudagraph"

    def __init__(self, recorder: Recorder | None = None, largest: int = LARGEST_BUCKET) -> None:
        self._recorder = recorder
        self._largest = largest

    def compile(self, cut: Cut, buffers: BuffersOf, max_tokens: int) -> SegmentedRole:
        if self._recorder is None:
            device = cut.device
            if device.type != "cuda":
                raise SegmentsUnavailable(f"CUDA graphs need weights on a GPU; these lie on {device}")
            self._recorder = GraphRecorder()
        buckets = Buckets(min(max_tokens, self._largest))
        return CudaGraphRole(cut, buffers, max_tokens, buckets, self._recorder)


class CudaGraphRole(BufferedRole):
    """One role on one lane."""

    def __init__(
        self, cut: Cut, buffers: BuffersOf, max_tokens: int, buckets: Buckets, recorder: Recorder
    ) -> None:
        super().__init__(cut, buffers, max_tokens)
        self._buckets = buckets
        self._recorder = recorder
        self._recordings: dict[tuple[GraphModule, int], Recording] = {}
        self._places: dict[tuple[str, int], torch.Tensor] = {}
        """(name, bucket) → where recordings read what comes from outside."""

    def _compute(self, segment: Segment, values: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        tokens, bucket = self.tokens, self._buckets.of(self.tokens)
        if bucket is None:
            found: Sequence[torch.Tensor] = segment.module(*values)
            return found
        places = [
            value if is_carried(name) else self._placed(name, value, tokens, bucket)
            for name, value in zip(segment.reads, values, strict=True)
        ]
        outputs = self._replayed(segment.module, places, bucket)
        # What is carried goes on to recordings of the same bucket; the rest leaves without its tail.
        return [
            value if is_carried(name) else value[:tokens]
            for name, value in zip(segment.writes, outputs, strict=True)
        ]

    def _head(self, rows: torch.Tensor) -> torch.Tensor:
        bucket = self._buckets.of(len(rows))
        if bucket is None:
            (logits,) = self._cut.head(rows)
            return logits
        place = self._placed(_ROWS, rows, len(rows), bucket)
        (logits,) = self._replayed(self._cut.head, [place], bucket)
        return logits[: len(rows)].clone()

    def _replayed(
        self, module: GraphModule, places: Sequence[torch.Tensor], bucket: int
    ) -> Sequence[torch.Tensor]:
        """What a graph gives for what lies in its places; it is recorded where it was not yet."""
        recording = self._recordings.get((module, bucket))
        if recording is None:
            with capturing("a segment"):
                recording = self._recorder.record(keep_outputs(lambda: module(*places)))
            self._recordings[module, bucket] = recording
        else:
            recording.replay()
        return recording.outputs

    def _placed(self, name: str, value: torch.Tensor, tokens: int, bucket: int) -> torch.Tensor:
        """A value of `tokens` tokens in memory of `bucket` tokens, the rest of it zeros."""
        dim = value.ndim - 1 if name == POSITIONS else 0
        place = self._places.get((name, bucket))
        if place is None:
            shape = [*value.shape]
            shape[dim] = bucket
            place = self._places[name, bucket] = value.new_zeros(shape)
        place.narrow(dim, 0, tokens).copy_(value)
        place.narrow(dim, tokens, bucket - tokens).zero_()
        return place
