"""Recording what a GPU computes, to replay it with one launch.

What is recorded reads and writes the same memory in every replay. Graphs of one recorder share a pool for
what lies between their inputs and outputs: they are replayed one after the other on one stream, so that one
graph may write over what another left there. Outputs must not lie in it, since they are read later, when
other graphs may have run; `keep_outputs` sees to that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

_WARM_UPS = 3

Compute = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Recording:
    """Something recorded: `replay` computes `outputs` again, in place, from what its inputs hold then."""

    replay: Callable[[], None]
    outputs: Sequence[Tensor]


class Recorder(ABC):
    """Records what is computed."""

    @abstractmethod
    def record(self, compute: Compute) -> Recording:
        """Run it at least once as it is, and record it; the outputs hold what a run gave."""


class GraphRecorder(Recorder):
    """CUDA graphs that share one memory pool, recorded and replayed on the current stream's device."""

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
        # Other threads of the process use the device too; what they do is no part of this.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = compute()
        graph.replay()
        return Recording(graph.replay, outputs)


def keep_outputs(compute: Compute) -> Compute:
    """`compute`, whose outputs are then copied to memory of their own, allocated in its first run.

    That run is no recording, so the memory is not the graphs' pool.
    """
    kept: list[Tensor] = []

    def run() -> Sequence[Tensor]:
        found = compute()
        if not kept:
            kept.extend(torch.empty_like(value) for value in found)
        for place, value in zip(kept, found, strict=True):
            place.copy_(value)
        return kept

    return run
