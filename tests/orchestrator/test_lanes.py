"""Two lanes give the bits of one, wherever a step is cut; where they could not, they are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from braid_orchestrator.cell import Cell
from braid_orchestrator.dispatch import Dispatch
from braid_orchestrator.memory import SequenceMemory, Span
from braid_orchestrator.overlap import OverlapMode
from braid_orchestrator.store import Limits
from braid_orchestrator.timings import StepTimes
from braid_wire.errors import ConfigInvalid
from braid_wire.layers import Mode, Role
from cells import CellMaker

LIMITS = Limits(max_tokens=1600, max_sequences=6, max_context=1400, page_size=8)


def walked(cell: Cell) -> tuple[list[torch.Tensor], list[StepTimes]]:
    """Logits of all tokens of steps of every make-up, and what ran."""
    random = np.random.default_rng(3)
    sequences = [SequenceMemory(index) for index in range(5)]
    seen: list[StepTimes] = []
    cell.dispatcher.observer = seen.append

    def step(*parts: tuple[int, int]) -> torch.Tensor:
        spans = []
        for index, count in parts:
            held = sequences[index]
            mode = Mode.DECODE if held.length and count == 1 else Mode.EXTEND
            spans.append(Span(held, random.integers(0, cell.plans.vocab_size, count), mode))
        return cell.walker.run(spans, np.arange(sum(count for _, count in parts)))

    logits = [
        step((0, 7), (1, 3)),
        step((0, 1), (1, 1), (2, 40)),
        step((0, 1), (1, 1), (2, 1)),
        step((3, 1290)),  # alone, so that it lies in both lanes
        step((0, 1), (3, 1), (4, 700), (1, 2)),
        step((0, 1), (1, 1), (2, 1), (3, 1), (4, 1)),
        step((4, 1)),
    ]
    memory = cell.walker.memory(Role.TARGET)
    for sequence in sequences:
        memory.release(sequence)
    for pool in (memory.pages, memory.slots):
        assert pool is None or pool.used == 0
    return logits, seen


def test_two_lanes_give_the_same_bits(make_cell: CellMaker) -> None:
    one, _ = walked(make_cell(limits=LIMITS, overlap=OverlapMode.OFF))
    two, seen = walked(make_cell(limits=LIMITS, overlap=OverlapMode.ON))
    for alone, split in zip(one, two, strict=True):
        assert torch.equal(alone, split)
    lanes: dict[int, list[int]] = {}
    for times in seen:
        lanes.setdefault(times.step, []).append(times.num_tokens)
    # The last step has a single token; every other one was split, a long prompt in its middle.
    assert list(lanes.values()) == [[7, 3], [2, 40], [2, 1], [768, 522], [258, 446], [3, 2], [1]]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dispatch": Dispatch.RPC}, "dispatch is rpc"),
        ({"segments": "off"}, "segments is off"),
        ({"segments": "eager"}, "depend on a batch's size"),
    ],
    ids=["calls", "no segments", "sums that depend on the batch"],
)
def test_overlap_is_refused_with_the_reason(
    make_cell: CellMaker, options: dict[str, object], reason: str
) -> None:
    with pytest.raises(ConfigInvalid, match=reason):
        make_cell(limits=LIMITS, overlap=OverlapMode.ON, **options)


def test_auto_runs_in_one_lane_where_nothing_would_overlap(make_cell: CellMaker) -> None:
    cell = make_cell(limits=LIMITS, overlap=OverlapMode.AUTO)  # both services in this process
    _, seen = walked(cell)
    assert {times.lane for times in seen} == {0}
