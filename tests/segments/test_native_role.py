"""Whole bodies on the C++ kernels: families, lanes, memory full of NaN, weights that are let go of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from braid_kernels import set_num_threads
from braid_orchestrator.body import Body
from braid_orchestrator.body.base import RoleBody
from braid_orchestrator.segments.base import Cut, SegmentsUnavailable
from braid_orchestrator.segments.native import NativeCompiler, NativeRole
from braid_orchestrator.store import Buffers
from braid_wire.errors import BatchInvalid, StepOrder
from braid_wire.layers import Kind, Role
from checkpoints import QWEN
from drafts import save_with_mtp
from functions import cut_of_function, no_buffers, run
from functions import role_of as role_of_function
from test_segments_families import FAMILIES
from toys import WIDTH, Toy, toy
from walks import COUNTS, MAX_TOKENS, PoisonedBuffers, Step, as_it_is, cut_of, in_segments, load

OF_RANGE = 2e-5


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that is not initialised is full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def compare(role: RoleBody, body: NativeRole, buffers: PoisonedBuffers, step: Step, bound: float) -> None:
    """Hidden states and logits against the body as it is; nothing is written behind the tokens."""
    buffers.poison()
    found, wanted = in_segments(role, body, buffers, step), as_it_is(role, step)
    for one, other in zip(found, wanted, strict=True):
        span = float(other.float().max() - other.float().min())
        assert one.dtype == other.dtype and one.shape == other.shape
        assert float((one.float() - other.float()).abs().max()) <= bound * span
    assert not buffers.written_from(len(step.ids))


class Answers:
    """Layers that answer noise of their own for each token of a step."""

    def __init__(self, role: RoleBody, tokens: int) -> None:
        self._random = torch.Generator().manual_seed(7)
        self._specs = {spec.layer_id: spec for spec in role.plan}
        self._role, self._tokens = role, tokens
        self._made: dict[tuple[int, Kind], torch.Tensor] = {}

    def __call__(self, layer_id: int, side: Kind) -> torch.Tensor:
        """[tokens, …]."""
        if (layer_id, side) not in self._made:
            shape = (self._tokens, *self._specs[layer_id].geometry(side).output())
            self._made[layer_id, side] = torch.randn(shape, generator=self._random).to(self._role.dtype)
        return self._made[layer_id, side]


def walked(
    body: NativeRole, buffers: PoisonedBuffers, step: Step, answers: Answers, rows: slice
) -> list[torch.Tensor]:
    """Every input of every call, the result and the logits, for some tokens of a step."""
    found, tokens = list[torch.Tensor](), len(step.ids[rows])
    body.start(step.ids[rows], step.positions[..., rows], None if step.hidden is None else step.hidden[rows])
    for segment in body.segments:
        body.run(segment.index)
        for call in segment.calls:
            memory = buffers(call.layer_id, call.side)
            found += [memory.inputs[name][:tokens].clone() for name in call.inputs]
            memory.output[:tokens] = answers(call.layer_id, call.side)[rows]
    return [*found, body.result().clone(), body.logits(torch.arange(tokens))]


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_next", "deepseek_v2", "falcon_h1", "gemma", "nemotron_h"])
def test_a_family_is_lowered_whole(name: str, tmp_path: Path, poisoned: None) -> None:
    role = load(FAMILIES[name](tmp_path)).roles[Role.TARGET]
    buffers = PoisonedBuffers(role)
    body = NativeCompiler().compile(cut_of(role), buffers, MAX_TOKENS)
    assert body.batch_invariant
    assert not any(graph.left_to_torch for graph in (*body.lowered.segments, body.lowered.head))
    for tokens in COUNTS:
        compare(role, body, buffers, Step.random(role, tokens, seed=tokens), OF_RANGE)
    step, answers = Step.random(role, 33), Answers(role, 33)
    together = walked(body, buffers, step, answers, slice(None))
    for token in (0, 17, 32):
        alone = walked(body, buffers, step, answers, slice(token, token + 1))
        assert all(torch.equal(a[0], b[token]) for a, b in zip(alone, together, strict=True))


def test_a_family_in_bfloat16(tmp_path: Path) -> None:
    role = load(FAMILIES["kimi_linear"](tmp_path), torch.bfloat16).roles[Role.TARGET]
    buffers = PoisonedBuffers(role)
    body = NativeCompiler().compile(cut_of(role), buffers, MAX_TOKENS)
    assert body.batch_invariant
    compare(role, body, buffers, Step.random(role, 33), 3e-2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small hybrid with mrope and a draft."""
    return save_with_mtp(QWEN[2], tmp_path_factory.mktemp("model"), ("full", "linear"))


@pytest.fixture(scope="module")
def body(model: Path) -> Body:
    return load(model)


@pytest.fixture(scope="module")
def role(body: Body) -> RoleBody:
    return body.roles[Role.TARGET]


@pytest.fixture(scope="module")
def whole(role: RoleBody) -> Cut:
    return cut_of(role)


def test_a_draft(body: Body) -> None:
    role = body.roles[Role.DRAFT]
    buffers = PoisonedBuffers(role)
    native = NativeCompiler().compile(cut_of(role), buffers, MAX_TOKENS)
    for tokens in COUNTS:
        compare(role, native, buffers, Step.random(role, tokens, seed=tokens), OF_RANGE)
    ids = torch.arange(3)
    for hidden in (
        None,
        torch.zeros(2, role.hidden_size),
        torch.zeros(3, 5),
        torch.zeros(3, role.hidden_size).half(),
    ):
        with pytest.raises(BatchInvalid, match="hidden"):
            native.start(ids, ids, hidden)


def test_text_positions_are_three_equal_rows(role: RoleBody, whole: Cut) -> None:
    buffers = PoisonedBuffers(role)
    native = NativeCompiler().compile(whole, buffers, MAX_TOKENS)
    ids, row = torch.arange(9), torch.arange(100, 109)
    once = in_segments(role, native, buffers, Step(ids, row, None))
    thrice = in_segments(role, native, buffers, Step(ids, row.expand(3, -1), None))
    assert torch.equal(once[1], thrice[1])


def test_lanes_share_weights_and_nothing_else(role: RoleBody, whole: Cut) -> None:
    compiler = NativeCompiler()
    both = [PoisonedBuffers(role), PoisonedBuffers(role)]
    lanes = [compiler.compile(whole, buffers, MAX_TOKENS) for buffers in both]
    assert lanes[0].lowered is lanes[1].lowered
    steps, counts = [Step.random(role, 6, seed=1), Step.random(role, 4, seed=2)], (6, 4)
    answers = [Answers(role, tokens) for tokens in counts]
    wanted = [
        walked(lane, buffers, step, answer, slice(None))
        for lane, buffers, step, answer in zip(lanes, both, steps, answers, strict=True)
    ]
    for lane, step in zip(lanes, steps, strict=True):
        lane.start(step.ids, step.positions)
    for segment in whole.segments:
        for lane, buffers, answer, tokens in zip(lanes, both, answers, counts, strict=True):
            lane.run(segment.index)
            for call in segment.calls:
                buffers(call.layer_id, call.side).output[:tokens] = answer(call.layer_id, call.side)
    for lane, one in zip(lanes, wanted, strict=True):
        assert torch.equal(lane.result(), one[-2])


def test_threads_and_chunks_do_not_change_a_bit(role: RoleBody, whole: Cut) -> None:
    """Threads decide how many rows go through a program together, too."""
    step, answers, found = Step.random(role, 300), Answers(role, 300), list[list[torch.Tensor]]()
    for threads, most in ((1, 300), (2, 300), (3, 1000)):
        set_num_threads(threads)
        try:
            buffers = PoisonedBuffers(role, most)
            native = NativeCompiler().compile(whole, buffers, most)
            found.append(walked(native, buffers, step, answers, slice(None)))
        finally:
            set_num_threads(1)
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, found[0], strict=True))


def test_weights_are_let_go_of(model: Path) -> None:
    body = load(model)
    role = body.roles[Role.TARGET]
    whole, compiler, buffers = cut_of(role), NativeCompiler(), PoisonedBuffers(role)
    native = compiler.compile(whole, buffers, MAX_TOKENS)
    step, answers = Step.random(role, 5), Answers(role, 5)
    before = walked(native, buffers, step, answers, slice(None))
    assert native.batch_invariant
    sizes = {name: weight.nbytes for name, weight in body.model.named_parameters()}
    freed = compiler.release_originals(body.model)
    gone = {name for name, weight in body.model.named_parameters() if not weight.numel()}
    kept = sizes.keys() - gone
    assert freed == sum(sizes[name] for name in gone) > 0
    assert any("mlp.gate_proj" in name for name in gone) and any("norm" in name for name in kept)
    assert any("embed_tokens" in name for name in kept)
    again = walked(native, buffers, step, answers, slice(None))
    another = compiler.compile(whole, PoisonedBuffers(role), MAX_TOKENS)
    assert another.lowered is native.lowered
    assert all(torch.equal(a, b) for a, b in zip(again, before, strict=True))
    with pytest.raises(RuntimeError):
        as_it_is(role, step)
    assert compiler.release_originals(body.model) == 0


def test_a_head_that_is_tied_to_the_embedding_keeps_it(tmp_path: Path) -> None:
    body = load(FAMILIES["gemma"](tmp_path))
    role, compiler = body.roles[Role.TARGET], NativeCompiler()
    buffers = PoisonedBuffers(role)
    native = compiler.compile(cut_of(role), buffers, MAX_TOKENS)
    step, answers = Step.random(role, 5), Answers(role, 5)
    before = walked(native, buffers, step, answers, slice(None))
    compiler.release_originals(body.model)
    assert body.model.get_input_embeddings().weight.numel()
    again = walked(native, buffers, step, answers, slice(None))
    assert all(torch.equal(a, b) for a, b in zip(again, before, strict=True))


def test_steps_that_do_not_fit_are_refused(role: RoleBody, whole: Cut) -> None:
    buffers = PoisonedBuffers(role)
    native = NativeCompiler().compile(whole, buffers, MAX_TOKENS)
    ids = torch.arange(3)
    with pytest.raises(StepOrder):
        native.run(0)
    for bad in (torch.arange(0), torch.arange(MAX_TOKENS + 1)):
        with pytest.raises(BatchInvalid, match=f"1 to {MAX_TOKENS}"):
            native.start(bad, bad)
    for positions in (torch.arange(2), torch.zeros(2, 3, dtype=torch.int64)):
        with pytest.raises(BatchInvalid, match="positions"):
            native.start(ids, positions)
    with pytest.raises(BatchInvalid, match=r"ids is torch\.int32"):
        native.start(ids.int(), ids)
    with pytest.raises(BatchInvalid, match=r"positions is torch\.float32"):
        native.start(ids, ids.float())
    with pytest.raises(StepOrder):  # the step that was refused is not under way
        native.run(0)
    native.start(ids, ids)
    with pytest.raises(StepOrder, match="segment 1"):
        native.run(1)
    with pytest.raises(StepOrder):
        native.result()
    with pytest.raises(StepOrder):
        native.logits(ids)


@pytest.mark.parametrize("bad", [-1, 97])
def test_a_token_that_does_not_exist_is_refused(role: RoleBody, whole: Cut, bad: int) -> None:
    buffers = PoisonedBuffers(role)
    native = NativeCompiler().compile(whole, buffers, MAX_TOKENS)
    native.start(torch.tensor([1, bad]), torch.arange(2))
    with pytest.raises(BatchInvalid, match="row 1"):
        native.run(0)
    compare(role, native, buffers, Step.random(role, 5), OF_RANGE)


def test_rows_of_logits(role: RoleBody, whole: Cut) -> None:
    buffers = PoisonedBuffers(role)
    native = NativeCompiler().compile(whole, buffers, MAX_TOKENS)
    _, logits = in_segments(role, native, buffers, Step.random(role, 7))
    rows = torch.tensor([6, 0, 3])
    assert torch.equal(native.logits(rows), logits[rows])
    assert torch.equal(native.logits(torch.arange(7)[::2]), logits[::2])
    assert native.logits(rows[:0]).shape == (0, logits.shape[1])
    for bad in (
        torch.tensor([7]),
        torch.tensor([-1]),
        rows.int(),
        torch.zeros(MAX_TOKENS + 1, dtype=torch.int64),
    ):
        with pytest.raises(BatchInvalid, match="row"):
            native.logits(bad)
    assert torch.equal(native.logits(rows), logits[rows])


def test_buffers_of_another_kind_are_refused(role: RoleBody, whole: Cut) -> None:
    buffers = PoisonedBuffers(role)

    def halved(layer_id: int, side: Kind) -> Buffers:
        found = buffers(layer_id, side)
        return Buffers({name: rows.bfloat16() for name, rows in found.inputs.items()}, found.output)

    with pytest.raises(SegmentsUnavailable, match=r"its buffer is torch\.bfloat16"):
        NativeCompiler().compile(whole, halved, MAX_TOKENS)


def test_the_time_of_products_is_taken(role: RoleBody, whole: Cut) -> None:
    buffers = PoisonedBuffers(role)
    native = NativeCompiler().compile(whole, buffers, MAX_TOKENS)
    in_segments(role, native, buffers, Step.random(role, 7))
    assert (native.matmul_ns(), native.matmuls()) == (0, 0)
    native.measure(True)
    in_segments(role, native, buffers, Step.random(role, 7))
    first = native.matmul_ns(), native.matmuls()
    in_segments(role, native, buffers, Step.random(role, 7))
    assert first[0] > 0 and native.matmul_ns() > first[0] and native.matmuls() == 2 * first[1]
    native.measure(False)
    in_segments(role, native, buffers, Step.random(role, 7))
    assert native.matmuls() == 2 * first[1]


def sorted_across_calls(model: Toy, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """An order and complex numbers that only torch knows, and a later segment needs."""
    rows = model.embedding(ids)
    order, spectrum = rows.argsort(dim=-1), torch.fft.rfft(rows)
    first = model.call(0, model.projection(rows.gather(-1, order)))
    turned = torch.fft.irfft(spectrum * torch.fft.rfft(first), n=WIDTH)
    second = model.call(1, turned + first.gather(-1, order) * model.scale)
    return second + turned.gather(-1, order)


def test_what_torch_computes_reaches_later_segments(poisoned: None) -> None:
    role = toy(sorted_across_calls, Kind.FULL, Kind.LINEAR)
    buffers = PoisonedBuffers(role)
    native = NativeCompiler().compile(cut_of(role), buffers, MAX_TOKENS)
    assert not native.batch_invariant
    assert all(graph.left_to_torch for graph in native.lowered.segments[:2])
    for tokens in COUNTS:
        compare(role, native, buffers, Step.random(role, tokens, seed=tokens), OF_RANGE)


def test_calls_that_do_not_need_one_another_follow_one_segment() -> None:
    def walk(model: Toy, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        rows = model.projection(model.embedding(ids))
        both = model.call(0, rows, Kind.FULL) + model.call(0, rows, Kind.LINEAR)
        return model.call(1, both * model.scale) + rows

    role = toy(walk, Kind.PARALLEL, Kind.LINEAR)
    buffers = PoisonedBuffers(role)
    native = NativeCompiler().compile(cut_of(role), buffers, MAX_TOKENS)
    assert [len(segment.calls) for segment in native.segments] == [2, 1, 0]
    for tokens in COUNTS:
        compare(role, native, buffers, Step.random(role, tokens, seed=tokens), OF_RANGE)


def test_a_head_that_torch_must_run() -> None:
    native = role_of_function(
        lambda x, w: x * 2, 12, head=lambda rows, w: (rows.cumsum(-1) @ w("h", 5, 12).T).float()
    )
    rows = torch.randn(9, 12, generator=torch.Generator().manual_seed(0))
    result = run(native, rows)
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(ord("h"))) / math.sqrt(12)
    torch.testing.assert_close(native.logits(torch.tensor([8, 2])), result[[8, 2]].cumsum(-1) @ weight.T)


def test_weights_that_are_not_on_the_cpu_are_refused() -> None:
    whole = cut_of_function(lambda x, w: x * w("a", 12), 12)
    for name, weight in list(whole.head.named_buffers()):
        setattr(whole.head, name, weight.to("meta"))
    for node in whole.head.graph.find_nodes(op="get_attr"):
        setattr(whole.head, str(node.target), torch.empty(1, device="meta"))
    with pytest.raises(SegmentsUnavailable, match="on meta"):
        NativeCompiler().compile(whole, no_buffers, MAX_TOKENS)
