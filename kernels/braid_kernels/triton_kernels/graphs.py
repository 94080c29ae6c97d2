"""Decode steps of the linear layers as graphs: one launch for a layer instead of one for each kernel.

A graph reads the same memory in every replay, so the metadata of decode steps of B sequences lies in
tensors that are kept for B and refreshed with each step. Everything else a layer reads or writes is there
already: pools, parameters, and the activation buffers of a cell, which are the same in every step of B rows.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from braid_kernels.backend import LinearKernel
from braid_kernels.graphs import Recorder, Recording
from braid_kernels.metadata import LinearMeta
from braid_kernels.reference.backend import check_slots
from braid_kernels.triton_kernels.plan import HostSpans

MOST_SEQUENCES = 256
"""Larger steps keep a GPU busy by themselves."""

# Of one layer: numbers of sequences come and go.
_MOST_RECORDINGS = 128

# Plans that may be alive at a time: of two lanes.
_SETS = 2


class DecodeMeta(LinearMeta):
    """The metadata of decode steps of B sequences, in memory that stays."""

    def refresh(self, state_in: Tensor, state_out: Tensor) -> None:
        """Take over a step's slots, int32 [B] on the host, in the order of the current stream."""
        for place, value in ((self.state_in, state_in), (self.state_out, state_out)):
            source = value.pin_memory() if place.is_cuda else value
            place.copy_(source, non_blocking=True)


class DecodeSteps:
    """Metadata for each number of sequences, in turn from one of two sets: two lanes are planned at a time.

    Args:
        device: of the pools.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[int, itertools.cycle[DecodeMeta]] = {}
        self._lock = threading.Lock()

    def take(self, meta: LinearMeta) -> DecodeMeta | None:
        """A step's metadata, refreshed; None where the step is no decode step that is worth a graph.

        meta: of the step, on the host; its spans have been checked.
        """
        batch = meta.num_sequences
        if not 0 < batch <= MOST_SEQUENCES or meta.num_tokens != batch:
            return None
        if not torch.equal(meta.cu_seqlens, torch.arange(batch + 1, dtype=torch.int32)):
            return None
        check_slots(meta.state_in.tolist(), meta.state_out.tolist(), 1 << 31)
        with self._lock:
            if batch not in self._known:
                self._known[batch] = itertools.cycle([self._made(batch) for _ in range(_SETS)])
            found = next(self._known[batch])
        found.refresh(meta.state_in, meta.state_out)
        return found

    def _made(self, batch: int) -> DecodeMeta:
        cu = torch.arange(batch + 1, dtype=torch.int32)
        # Slots that exist in any pool: no state before, none written.
        nothing = torch.full((batch,), -1, dtype=torch.int32)
        # Made in whatever mode the caller is in, refreshed in any.
        with torch.inference_mode(False):
            copies = [x.to(self._device, copy=True) for x in (cu, nothing, nothing)]
        reads, writes = copies[1:]
        return DecodeMeta(copies[0], reads, writes)


def host_spans(meta: DecodeMeta) -> HostSpans:
    """Values of which the kernels' plan depends: spans of one row, whatever their slots."""
    batch = meta.num_sequences
    nothing = np.full(batch, -1, dtype=np.int32)
    return HostSpans(np.arange(batch + 1, dtype=np.int32), nothing, nothing)


class GraphedKernel(LinearKernel):
    """One layer whose decode steps are recorded when they are first met, and then replayed.

    Args:
        kernel: the layer.
        recorder: shared by all layers of a service.
    """

    def __init__(self, kernel: LinearKernel, recorder: Recorder) -> None:
        self._kernel = kernel
        self._recorder = recorder
        self._recordings: dict[tuple[object, ...], Recording] = {}

    def __call__(self, inputs: Mapping[str, Tensor], meta: LinearMeta, out: Tensor) -> None:
        if not isinstance(meta, DecodeMeta):
            self._kernel(inputs, meta, out)
            return
        # The metadata is kept for good, so that its identity names it; tensors are named by their memory.
        key = (id(meta), *((t.data_ptr(), t.stride(0)) for t in (*inputs.values(), out)))
        recording = self._recordings.get(key)
        if recording is not None:
            recording.replay()
            return

        def compute() -> tuple[Tensor, ...]:
            self._kernel(inputs, meta, out)
            return ()

        if len(self._recordings) >= _MOST_RECORDINGS:
            self._recordings.pop(next(iter(self._recordings)))
        self._recordings[key] = self._recorder.record(compute)
