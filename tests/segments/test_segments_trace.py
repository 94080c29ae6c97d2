"""What a trace keeps, where it is cut, and which bodies it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from braid_orchestrator.body.base import RoleBody
from braid_orchestrator.segments.base import Call, Cut, SegmentsUnavailable
from braid_orchestrator.segments.check import check
from braid_orchestrator.segments.eager import EagerCompiler
from braid_orchestrator.segments.graph import is_pure, value_of, weights_of
from braid_wire.errors import BatchInvalid, CaptureViolation, StepOrder
from braid_wire.layers import Kind, Role
from checkpoints import CASES
from mamba_checkpoints import save
from toys import WIDTH, Toy, toy
from walks import MAX_TOKENS, PoisonedBuffers, Step, as_it_is, cut_of, in_segments, load

CASE = {str(case): case for case in CASES}


def same_bits(role: RoleBody, whole: Cut, *counts: int) -> None:
    buffers = PoisonedBuffers(role)
    body = EagerCompiler().compile(whole, buffers, MAX_TOKENS)
    for tokens in counts:
        step = Step.random(role, tokens)
        for found, wanted in zip(in_segments(role, body, buffers, step), as_it_is(role, step), strict=True):
            assert torch.equal(found, wanted)


def operators(whole: Cut, *at: int) -> list[str]:
    chosen = [whole.segments[index] for index in at] or whole.segments
    return [str(node.target) for segment in chosen for node in segment.module.graph.nodes]


def test_weights_are_the_models_own_memory(tmp_path: Path) -> None:
    """All but what is folded, which is no larger than a vector of the model."""
    role = load(CASE["gemma-plain"].save(tmp_path)).roles[Role.TARGET]
    own = {t.untyped_storage().data_ptr() for t in (*role.model.parameters(), *role.model.buffers())}
    whole = cut_of(role)
    seen = 0
    for module in (whole.head, *(segment.module for segment in whole.segments)):
        for weight in weights_of(module).values():
            shared = weight.untyped_storage().data_ptr() in own
            seen += shared
            assert shared or weight.numel() <= role.hidden_size
    assert seen > 20


def test_what_depends_on_weights_alone_is_computed_once() -> None:
    def walk(model: Toy, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        rows = model.embedding(ids) * (1 + model.scale.float().exp())
        return model.call(0, rows) * 1.0 + model.projection(rows)

    role = toy(walk, Kind.FULL)
    whole = cut_of(role)
    assert not any("exp" in name or "_to_copy" in name or "aten.t." in name for name in operators(whole))
    same_bits(role, whole, 1, 5)


def test_values_have_their_names(tmp_path: Path) -> None:
    role = load(save("falcon_h1", tmp_path)).roles[Role.TARGET]
    whole = cut_of(role)
    first, *_, last = whole.segments
    assert [segment.index for segment in whole.segments] == list(range(len(role.plan) + 1))
    assert set(first.reads) == {"ids", "positions"}
    assert first.calls == (
        Call(0, Kind.LINEAR, ("xBC", "dt")),
        Call(0, Kind.FULL, ("q", "k", "v")),
    )
    assert {"in.0.full.q", "in.0.full.k", "in.0.full.v", "in.0.linear.xBC", "in.0.linear.dt"} <= set(
        first.writes
    )
    assert {"out.0.full", "out.0.linear"} <= set(whole.segments[1].reads)
    assert last.calls == () and last.writes == ("result",)
    for segment in whole.segments:
        for name in (*segment.reads, *segment.writes):
            assert name.split(".")[0] in {"ids", "positions", "in", "out", "carried", "result"}


def test_calls_that_need_one_another_lie_in_different_segments() -> None:
    def walk(model: Toy, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        rows = model.embedding(ids)
        first = model.call(0, rows, Kind.LINEAR)
        return first + model.call(0, rows + first, Kind.FULL)

    role = toy(walk, Kind.PARALLEL)
    whole = cut_of(role)
    assert [[call.side for call in segment.calls] for segment in whole.segments] == [
        [Kind.LINEAR],
        [Kind.FULL],
        [],
    ]
    same_bits(role, whole, 1, 3)


def test_an_output_that_is_used_later_is_copied_before_its_memory_is_written_again() -> None:
    def walk(model: Toy, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        first = model.call(0, model.embedding(ids))
        second = model.call(1, first)
        third = model.call(2, second + first)
        return first + second + third

    role = toy(walk, Kind.FULL, Kind.FULL, Kind.FULL)
    whole = cut_of(role)
    assert [sum("clone" in name for name in operators(whole, at)) for at in range(4)] == [0, 1, 0, 0]
    same_bits(role, whole, 1, 2, 9)


def test_a_result_has_memory_of_its_own() -> None:
    """Another role's layers may write over that of the last call while the result is still read."""

    def walk(model: Toy, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return model.call(0, model.embedding(ids))

    role = toy(walk, Kind.FULL)
    buffers = PoisonedBuffers(role)
    body = EagerCompiler().compile(cut_of(role), buffers, MAX_TOKENS)
    step = Step.random(role, 4)
    hidden, _ = in_segments(role, body, buffers, step)
    buffers.poison()
    assert torch.equal(hidden, as_it_is(role, step)[0])


def test_operators_in_place_become_plain_ones() -> None:
    def walk(model: Toy, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        rows = model.projection(model.embedding(ids))
        rows /= rows.sum(-1, keepdim=True)  # nobody else sees it
        tables = torch.outer(positions[0].float(), model.scale)
        part = tables[:, ::3]
        part.copy_(tables[:, 1::3])  # seen through `tables` too
        tables += 1
        return model.call(0, rows + tables) + rows

    role = toy(walk, Kind.FULL)
    whole = cut_of(role)
    for segment in whole.segments:
        nodes = segment.module.graph.find_nodes(op="call_function", target=torch.ops.aten.div.Tensor)
        assert all(is_pure(node) for node in nodes)
    assert not any("_." in name.split("aten.")[-1] for name in operators(whole) if "_to_copy" not in name)
    same_bits(role, whole, 1, 2, 13, 20)


def test_sizes_that_depend_on_the_number_of_tokens() -> None:
    def walk(model: Toy, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        rows = model.embedding(ids).repeat(1, 2, 1)  # [1, 2 T, WIDTH]
        found = model.call(0, rows[:, : ids.shape[1]])
        return found + rows.view(1, 2, -1, WIDTH).sum(1) / (3 * ids.shape[1])

    role = toy(walk, Kind.LINEAR)
    same_bits(role, cut_of(role), 1, 2, 7, 26)


def test_every_node_has_its_value(tmp_path: Path) -> None:
    whole = cut_of(load(CASE["qwen3_5-text"].save(tmp_path)).roles[Role.TARGET])
    for segment in whole.segments:
        for node in segment.module.graph.nodes:
            assert node.op == "output" or value_of(node) is not None


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_body_that_decides_by_the_number_of_tokens_is_refused(tokens: int) -> None:
    def walk(model: Toy, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        rows = model.embedding(ids)
        if ids.shape[1] > 15:
            rows = rows * 2
        return model.call(0, rows)

    with pytest.raises(SegmentsUnavailable, match="another path at 16 tokens"):
        cut_of(toy(walk, Kind.FULL))


def test_a_body_that_runs_for_one_token_otherwise_is_refused() -> None:
    """T = 1 is no example of a trace, so it is tried."""

    def walk(model: Toy, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        rows = model.embedding(ids)
        return model.call(0, rows if ids.shape[1] > 1 else rows * 2)

    role = toy(walk, Kind.FULL)
    with pytest.raises(SegmentsUnavailable, match=r"another in\.0\.full\.[qkv] for 1 token"):
        check(role, cut_of(role))


def test_a_body_that_only_takes_one_number_of_tokens_is_refused() -> None:
    def walk(model: Toy, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return model.call(0, model.embedding(ids) * len(positions[0]))

    with pytest.raises(SegmentsUnavailable, match="13 tokens and no other number"):
        cut_of(toy(walk, Kind.FULL))


def test_a_body_that_decides_by_values_is_refused() -> None:
    def walk(model: Toy, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        rows = model.embedding(ids)
        return model.call(0, rows * 2 if ids.sum().item() > 7 else rows)

    with pytest.raises(SegmentsUnavailable, match="cannot be traced"):
        cut_of(toy(walk, Kind.FULL))


def test_a_body_that_changes_is_refused() -> None:
    """What it was when it was traced is a constant of the trace."""
    calls = [0.0]

    def walk(model: Toy, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        calls[0] += 0.5
        return model.call(0, model.embedding(ids)) * calls[0]

    role = toy(walk, Kind.FULL)
    whole = cut_of(role)
    with pytest.raises(SegmentsUnavailable, match="another result for 1 token"):
        check(role, whole)


@pytest.mark.parametrize("order", [(0,), (0, 2), (1, 0, 2), (0, 1, 1, 2)])
def test_dispatches_must_be_those_of_the_plan_in_its_order(order: tuple[int, ...]) -> None:
    def walk(model: Toy, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        rows = model.embedding(ids)
        for layer_id in order:
            rows = rows + model.call(layer_id, rows)
        return rows

    with pytest.raises(SegmentsUnavailable, match=r"its plan has \[0, 1, 2\]"):
        cut_of(toy(walk, Kind.FULL, Kind.FULL, Kind.FULL))


def test_a_layer_must_get_what_its_geometry_takes() -> None:
    def walk(model: Toy, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return model.point.attend(0, {"q": model.embedding(ids)[0]})

    with pytest.raises(SegmentsUnavailable, match="its geometry takes"):
        cut_of(toy(walk, Kind.FULL))


def test_the_order_of_a_step_is_checked(tmp_path: Path) -> None:
    role = load(CASE["llama-plain"].save(tmp_path)).roles[Role.TARGET]
    buffers = PoisonedBuffers(role)
    body = EagerCompiler().compile(cut_of(role), buffers, MAX_TOKENS)
    with pytest.raises(StepOrder):
        body.run(0)
    with pytest.raises(StepOrder):
        body.result()
    ids = torch.arange(3)
    body.start(ids, ids)
    body.run(0)
    for index in (0, 2):
        with pytest.raises(StepOrder):
            body.run(index)
    with pytest.raises(StepOrder):
        body.logits(torch.arange(3))
    body.start(ids, ids)
    body.run(0)  # a step that was given up counts no more
    with pytest.raises(BatchInvalid, match="1 to 40"):
        body.start(torch.arange(0), torch.arange(0))
    with pytest.raises(BatchInvalid, match="1 to 40"):
        body.start(torch.arange(41), torch.arange(41))
    with pytest.raises(BatchInvalid, match="positions"):
        body.start(ids, torch.arange(4))


def test_logits_of_no_rows_and_of_some(tmp_path: Path) -> None:
    role = load(CASE["granite-scaled"].save(tmp_path)).roles[Role.TARGET]
    buffers = PoisonedBuffers(role)
    body = EagerCompiler().compile(cut_of(role), buffers, MAX_TOKENS)
    _, logits = in_segments(role, body, buffers, Step.random(role, 8))
    assert body.logits(torch.arange(0)).shape == (0, logits.shape[1])
    rows = torch.tensor([6, 0, 6])
    torch.testing.assert_close(body.logits(rows), logits[rows])


def test_a_buffer_of_another_kind_is_refused(tmp_path: Path) -> None:
    role = load(CASE["llama-plain"].save(tmp_path)).roles[Role.TARGET]
    whole = cut_of(role)
    half = load(CASE["llama-plain"].save(tmp_path), torch.bfloat16).roles[Role.TARGET]
    with pytest.raises(SegmentsUnavailable, match=r"its buffer takes torch\.bfloat16"):
        EagerCompiler().compile(whole, PoisonedBuffers(half), MAX_TOKENS)


def test_a_dispatch_that_was_left_in_a_graph_does_not_run() -> None:
    rows = torch.zeros(2, 3)
    with pytest.raises(CaptureViolation, match="layer 5"):
        torch.ops.braid.dispatch(5, "full", [rows], [2, 3])
