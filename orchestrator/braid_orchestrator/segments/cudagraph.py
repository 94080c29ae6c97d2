"""Segments replayed as CUDA graphs, one for each segment and bucket of numbers of tokens.

A graph reads and writes the same memory in every replay, so what comes from outside (tokens, positions,
outputs of calls) is copied into tensors of the bucket's size; rows beyond the step's tokens are zeros
there, and what is computed from them is never copied out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
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

# Steps of more tokens keep a GPU busy by themselves; a graph would only hold memory.
LARGEST_BUCKET = 256
_WARM_UPS = 3
_ROWS = "rows"

Compute = Callable[[], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Recording:
    """Something recorded: `replay` computes `outputs` again, in place, from what its inputs hold then."""

    replay: Callable[[], None]
    outputs: Sequence[torch.Tensor]


class Recorder(ABC):
    """Records what is computed."""

    @abstractmethod
    def record(self, compute: Compute) -> Recording:
        """Run it, and record it; the outputs hold what that run gave."""


class GraphRecorder(Recorder):
    """CUDA graphs that share one memory pool.

    They are replayed on one stream, one after the other, and their outputs are kept, so that the pool
    gives away only memory that no other graph reads.
    """

    @cached_property
    def _pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def record(self, compute: Compute) -> Recording:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Libraries set themselves up in their first calls, which a graph must not record.
            for _ in range(_WARM_UPS):
                compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = compute()
        graph.replay()
        return Recording(graph.replay, outputs)


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
                recording = self._recorder.record(lambda: module(*places))
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
