"""A body's segments and its layers, in turn: one lane alone, or two that hide each other's waiting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from braid_wire.batch import Batch, IntArray
from braid_wire.devices import upload

from braid_orchestrator.body.base import Output
from braid_orchestrator.segments.base import SegmentedRole
from braid_orchestrator.step import Step


@dataclass(frozen=True)
class Lane:
    """The body of one lane, and the step that runs its layers."""

    body: SegmentedRole
    step: Step

    def start(self, hidden: torch.Tensor | None) -> None:
        """Give the body its tokens, and a draft the hidden states [T, hidden] that it starts from."""
        batch = self.step.batch
        self.body.start(torch.from_numpy(batch.input_ids), _positions(batch), hidden)

    def run(self, index: int, alone: bool) -> None:
        """Wait for the layers before a segment, run it, and hand over the layers behind it."""
        segments = self.body.segments
        if index:
            for call in segments[index - 1].calls:
                self.step.take(call.layer_id, call.side)
        calls = segments[index].calls
        if alone:
            for call in calls:
                self.step.announce(call.layer_id, call.side)
        self.body.run(index)
        for call in calls:
            self.step.post(call.layer_id, call.side)


@torch.inference_mode()
def forward(lanes: Sequence[Lane], rows: IntArray, hidden: torch.Tensor | None) -> Output:
    """Run all segments and layers of a step: while one lane is in a service, the other is in the body.

    Args:
        lanes: one, or two that together are the step, in its order.
        rows: int [n], the tokens of the whole step whose logits are wanted.
        hidden: [T, hidden], what a draft starts from.

    Raises:
        BraidError: a layer was refused, or a service was lost.
    """
    sizes = [lane.step.batch.num_tokens for lane in lanes]
    given = [None] * len(lanes) if hidden is None else hidden.split(sizes)
    for lane, part in zip(lanes, given, strict=True):
        lane.start(part)
    for index in range(len(lanes[0].body.segments)):
        for lane in lanes:
            lane.run(index, alone=len(lanes) == 1)
    if len(lanes) == 1:
        body = lanes[0].body
        output = Output(body.result(), body.logits(torch.from_numpy(np.asarray(rows))))
    else:
        output = _joined(lanes, sizes, rows)
    for lane in lanes:
        lane.step.arrive()
    lanes[0].step.announce_next()
    return output


def _joined(lanes: Sequence[Lane], sizes: Sequence[int], rows: IntArray) -> Output:
    """The output of two lanes in the order of the whole step."""
    begins = np.cumsum([0, *sizes])
    lane_of = np.searchsorted(begins, rows, side="right") - 1
    logits: list[torch.Tensor] = []
    for index, lane in enumerate(lanes):
        logits.append(lane.body.logits(torch.from_numpy(rows[lane_of == index] - begins[index])))
    order = torch.from_numpy(np.argsort(np.argsort(lane_of, kind="stable"), kind="stable"))
    hidden, joined = torch.cat([lane.body.result() for lane in lanes]), torch.cat(logits)
    return Output(hidden, joined[upload(order, joined.device)])


def _positions(batch: Batch) -> torch.Tensor:
    """int64 [T], or [3, T] where the batch has mrope positions."""
    grid = batch.mrope_positions
    return torch.from_numpy(batch.positions if grid is None else grid)
