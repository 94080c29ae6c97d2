"""Interleaved mrope: three positions per token reach the rotary tables of the right tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import transformers
from braid_orchestrator.request import Failed, Request, Token
from braid_wire.batch import Batch
from braid_wire.errors import RequestInvalid
from checkpoints import DENSE, QWEN, Case
from grids import with_image
from harness import FLOAT32_ABSOLUTE, SCHEDULES, cell, load_reference, reference, score, sequences, worst

WRAPPED = [case for case in QWEN if case.name == "wrapped"]


@pytest.fixture(scope="module", params=WRAPPED, ids=str)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    case: Case = request.param
    return case, case.save(tmp_path_factory.mktemp("m"))


def oracle(case: Case, model: Path) -> object:
    """The whole wrapped model, vision tower and all."""
    return load_reference(model, getattr(transformers, f"{case.prefix}ForConditionalGeneration"))


def test_text_and_image_grids_match_the_reference(checkpoint: tuple[Case, Path]) -> None:
    case, model = checkpoint
    grids = [with_image(4, 3, 5, 9), None, with_image(0, 5, 4, 1), with_image(30, 2, 7, 26)]
    with cell(model) as running:
        prompts = sequences(running.plans.vocab_size, [28, 33, 21, 70])
        wanted = reference(oracle(case, model), prompts, grids)
        for schedule in SCHEDULES:
            found = score(running, prompts, schedule, grids)
            assert worst(found, wanted) <= FLOAT32_ABSOLUTE, schedule
        # The grids matter: without them the logits are others.
        assert worst(score(running, prompts), wanted) > 100 * FLOAT32_ABSOLUTE


def test_made_tokens_count_on_from_the_largest_position(checkpoint: tuple[Case, Path]) -> None:
    case, model = checkpoint
    grid = with_image(4, 3, 5, 2)
    with cell(model) as running:
        (prompt,) = sequences(running.plans.vocab_size, [grid.shape[1]])
        request = Request("made", prompt, max_tokens=6, mrope_positions=grid)
        running.engine.submit(request)
        made = [event.token_id for event in request.stream() if isinstance(event, Token)]
    whole = np.concatenate([prompt, np.array(made[:-1], dtype=np.int64)])
    following = grid.max() + 1 + np.arange(len(made) - 1)
    places = np.concatenate([grid, np.broadcast_to(following, (3, len(following)))], axis=1)
    (logits,) = reference(oracle(case, model), [whole], [places])
    assert made == logits[len(prompt) - 1 :].argmax(-1).tolist()


def test_a_batch_with_grids_is_split_on_the_token_axis(checkpoint: tuple[Case, Path]) -> None:
    _, model = checkpoint
    with cell(model, segments="off") as running:
        seen: list[Batch] = []
        walk = running.body.target

        def watch(batch: Batch, *rest: object) -> object:
            seen.append(batch)
            return walk(batch, *rest)  # type: ignore[arg-type]

        running.body.target = watch  # type: ignore[method-assign, assignment]
        grids = [with_image(2, 2, 3, 1), with_image(1, 1, 2, 0)]
        score(running, sequences(running.plans.vocab_size, [9, 3]), mrope=grids)
    whole = next(batch for batch in seen if batch.num_sequences == 2)
    first, second = whole.split(1)
    assert first.mrope_positions is not None and second.mrope_positions is not None
    np.testing.assert_array_equal(first.mrope_positions, grids[0])
    np.testing.assert_array_equal(second.mrope_positions, grids[1])


def test_grids_of_another_shape_are_refused() -> None:
    for wrong in (np.zeros((3, 4), np.int64), np.zeros((5, 3), np.int64), np.zeros((3, 5), np.int32)):
        with pytest.raises(RequestInvalid, match="mrope_positions"):
            Request("r", np.arange(5), mrope_positions=wrong)
    with pytest.raises(RequestInvalid, match="not negative"):
        Request("r", np.arange(5), mrope_positions=np.full((3, 5), -1))


def test_a_model_without_mrope_refuses_grids(tmp_path: Path) -> None:
    with cell(DENSE[0].save(tmp_path)) as running:
        request = Request("r", np.arange(5), mrope_positions=np.zeros((3, 5), np.int64))
        with pytest.raises(RequestInvalid, match="takes no mrope"):
            running.engine.submit(request)
        assert not [event for event in _events(request) if isinstance(event, Failed)]


def _events(request: Request) -> list[object]:
    return [] if request.events.empty() else list(request.stream())


def test_the_vision_tower_is_not_loaded(checkpoint: tuple[Case, Path]) -> None:
    _, model = checkpoint
    with cell(model) as running:
        names = [name for name, _ in running.body.model.named_parameters()]
    assert names and not [name for name in names if "visual" in name]
