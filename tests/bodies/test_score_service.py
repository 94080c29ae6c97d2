"""Score hands over the draft's logits and takes mrope positions, as the contract says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from braid.v1 import orchestrator_pb2 as pb
from braid_orchestrator.cell import Cell
from braid_orchestrator.servicer import OrchestratorServicer
from braid_wire.errors import RequestInvalid
from braid_wire.rpc import Server
from braid_wire.views import ArenaMap
from checkpoints import QWEN
from drafts import load_head, save_with_mtp
from grids import with_image
from harness import FLOAT32_ABSOLUTE, cell, load_reference, reference, sequences, worst


class Context:
    """What the servicer uses of a call."""

    def add_callback(self, _: Callable[[], None]) -> bool:
        return True


def ask(running: Cell, request: pb.ScoreRequest) -> pb.ScoreResponse:
    servicer = OrchestratorServicer(running, Server.__new__(Server))
    return servicer.Score(request, Context())  # type: ignore[arg-type]


def ids(prompts: list[np.ndarray]) -> list[pb.TokenIds]:
    return [pb.TokenIds(ids=prompt.tolist()) for prompt in prompts]


def fetched(response: pb.ScoreResponse, field: str) -> list[torch.Tensor]:
    arenas = ArenaMap()
    arenas.map(response.logits_arena)
    return [
        arenas.resolve(getattr(score, field), field).clone()
        for score in response.scores
        if score.HasField(field)  # type: ignore[arg-type]
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_mtp(QWEN[3], tmp_path_factory.mktemp("m"))


def test_mtp_logits_come_with_the_others(model: Path) -> None:
    with cell(model) as running:
        prompts = sequences(running.plans.vocab_size, [1, 9, 30])
        response = ask(running, pb.ScoreRequest(sequences=ids(prompts), chunk=7, want_logits=True, mtp=True))
        assert [score.HasField("mtp_logits") for score in response.scores] == [False, True, True]
        target, head = load_reference(model), load_head(model)
        found = fetched(response, "mtp_logits")
        assert worst(found, [head.logits(target, prompt) for prompt in prompts[1:]]) <= FLOAT32_ABSOLUTE


def test_grids_reach_the_model(model: Path) -> None:
    grid = with_image(3, 2, 4, 2)
    with cell(model) as running:
        prompts = sequences(running.plans.vocab_size, [grid.shape[1], 6])
        grids = [pb.PositionGrid(positions=grid.reshape(-1).tolist()), pb.PositionGrid()]
        request = pb.ScoreRequest(sequences=ids(prompts), want_logits=True, mrope_positions=grids)
        found = fetched(ask(running, request), "logits")
        wanted = reference(load_reference(model), prompts, [grid, None])
        assert worst(found, wanted) <= FLOAT32_ABSOLUTE


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"mtp": True}, "want_logits is not"),
        ({"mrope_positions": [pb.PositionGrid()] * 2}, "2 grids for 1"),
        ({"mrope_positions": [pb.PositionGrid(positions=[0] * 4)]}, "three times"),
        ({"mrope_positions": [pb.PositionGrid(positions=[0] * 6)]}, "mrope_positions is"),
    ],
)
def test_what_is_wrong_is_refused(model: Path, more: dict[str, object], message: str) -> None:
    with cell(model) as running:
        request = pb.ScoreRequest(sequences=[pb.TokenIds(ids=[1, 2, 3])], **more)  # type: ignore[arg-type]
        with pytest.raises(RequestInvalid, match=message):
            ask(running, request)
