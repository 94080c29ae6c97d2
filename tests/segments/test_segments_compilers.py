"""Compilers: buckets and their tails, captures and what they refuse, and which compiler is chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from braid_kernels.graphs import keep_outputs
from braid_orchestrator.body import Body
from braid_orchestrator.body.base import DispatchPoint
from braid_orchestrator.segments.base import (
    Cut,
    SegmentsUnavailable,
)
from braid_orchestrator.segments.buckets import Buckets
from braid_orchestrator.segments.capture import capturing
from braid_orchestrator.segments.cudagraph import Compute, CudaGraphCompiler, Recorder, Recording
from braid_orchestrator.segments.lifted import lift
from braid_wire.errors import BatchInvalid, CaptureViolation
from braid_wire.layers import Kind, Role
from checkpoints import QWEN
from drafts import save_with_mtp
from hypothesis import given
from hypothesis import strategies as st
from walks import MAX_TOKENS, PoisonedBuffers, Step, as_it_is, cut_of, in_segments, layer, load

LARGEST = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small hybrid with mrope and a draft."""
    return save_with_mtp(QWEN[2], tmp_path_factory.mktemp("model"), ("full",))


@pytest.fixture(scope="module")
def body(model: Path) -> Body:
    return load(model)


@pytest.fixture(scope="module")
def whole(body: Body) -> Cut:
    """The target, cut."""
    return cut_of(body.roles[Role.TARGET])


class PretendRecorder(Recorder):
    """Replays by computing again, into the memory of the recording's outputs, as a graph does."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0
        self.outputs: list[torch.Tensor] = []

    def record(self, compute: Compute) -> Recording:
        self.recorded += 1
        outputs = [value.clone() for value in compute()]
        self.outputs += outputs

        def replay() -> None:
            self.replayed += 1
            for place, value in zip(outputs, compute(), strict=True):
                place.copy_(value)

        return Recording(replay, outputs)


def test_outputs_outlive_the_replays_of_other_graphs() -> None:
    """Graphs share the memory of what they compute: what is read later must not lie there."""
    pool, source = torch.zeros(3), torch.ones(3)
    compute = keep_outputs(lambda: (pool.copy_(source),))
    (first,) = compute()
    pool.fill_(float("nan"))  # another graph
    assert torch.equal(first, torch.ones(3))
    source.fill_(2)
    (again,) = compute()
    assert again is first and torch.equal(first, source)


@given(st.integers(1, 5000), st.integers(1, 6000))
def test_a_bucket_is_the_next_power_of_two_or_the_largest(largest: int, tokens: int) -> None:
    buckets = Buckets(largest)
    assert buckets.sizes[-1] == largest and list(buckets.sizes) == sorted(set(buckets.sizes))
    found = buckets.of(tokens)
    if tokens > largest:
        assert found is None
        return
    assert found is not None and tokens <= found <= largest
    assert found == min(1 << (tokens - 1).bit_length(), largest)


@pytest.mark.parametrize("number", [0, -3])
def test_no_bucket_for_no_tokens(number: int) -> None:
    with pytest.raises(BatchInvalid):
        Buckets(number)
    with pytest.raises(BatchInvalid):
        Buckets(8).of(number)


@pytest.mark.parametrize("name", [Role.TARGET, Role.DRAFT])
def test_recordings_give_what_the_body_gives_and_write_no_tail(body: Body, name: Role) -> None:
    role, recorder = body.roles[name], PretendRecorder()
    buffers = PoisonedBuffers(role)
    captured = CudaGraphCompiler(recorder, LARGEST).compile(cut_of(role), buffers, MAX_TOKENS)
    for seed, tokens in enumerate((5, 8, 1, 7, 33, 5, 16, 6, 1, 17)):
        buffers.poison()
        step = Step.random(role, tokens, seed)
        hidden, logits = in_segments(role, captured, buffers, step)
        wanted_hidden, wanted_logits = as_it_is(role, step)
        # Sums of a product are ordered by its number of rows.
        torch.testing.assert_close(hidden, wanted_hidden, atol=1e-5, rtol=0)
        torch.testing.assert_close(logits, wanted_logits, atol=1e-5, rtol=0)
        assert not buffers.written_from(tokens)
    # Buckets 8, 1 and 16, each with every segment and the head; 33 and 17 tokens have none.
    assert recorder.recorded == 3 * (len(captured.segments) + 1)
    assert recorder.replayed == 5 * (len(captured.segments) + 1)


def test_rows_behind_a_step_are_zeros_for_a_recording(body: Body, whole: Cut) -> None:
    """What an earlier step left there is gone, so that nothing is computed from it."""
    role, recorder = body.roles[Role.TARGET], PretendRecorder()
    buffers = PoisonedBuffers(role)
    captured = CudaGraphCompiler(recorder, LARGEST).compile(whole, buffers, MAX_TOKENS)
    captured.start(torch.arange(8), torch.arange(8))
    for segment in captured.segments:  # the layers answer NaN
        captured.run(segment.index)
    captured.logits(torch.arange(8))
    assert any(value.isnan().any() for value in recorder.outputs)
    in_segments(role, captured, buffers, Step.random(role, 5))
    assert recorder.replayed == recorder.recorded
    for value in recorder.outputs:
        assert value.isfinite().all()


def test_two_lanes_share_weights_and_nothing_else(body: Body, whole: Cut) -> None:
    role, recorder = body.roles[Role.TARGET], PretendRecorder()
    compiler = CudaGraphCompiler(recorder, LARGEST)
    both = [PoisonedBuffers(role), PoisonedBuffers(role)]
    lanes = [compiler.compile(whole, buffers, MAX_TOKENS) for buffers in both]
    steps = [Step.random(role, 6, seed=1), Step.random(role, 4, seed=2)]
    wanted = [as_it_is(role, step) for step in steps]
    for lane, step in zip(lanes, steps, strict=True):
        lane.start(step.ids, step.positions)
    specs = {spec.layer_id: spec for spec in role.plan}
    for index in range(len(whole.segments)):
        for lane, step, buffers in zip(lanes, steps, both, strict=True):
            lane.run(index)
            for call in whole.segments[index].calls:
                found, tokens = buffers(call.layer_id, call.side), len(step.ids)
                inputs = {name: found.inputs[name][:tokens] for name in call.inputs}
                found.output[:tokens] = layer(specs[call.layer_id], call.side, inputs)
    for lane, (hidden, _) in zip(lanes, wanted, strict=True):
        torch.testing.assert_close(lane.result(), hidden, atol=1e-5, rtol=0)


def test_cuda_graphs_need_weights_on_a_gpu(body: Body, whole: Cut) -> None:
    role = body.roles[Role.TARGET]
    with pytest.raises(SegmentsUnavailable, match="these lie on cpu"):
        CudaGraphCompiler().compile(whole, PoisonedBuffers(role), MAX_TOKENS)


def test_a_dispatch_while_a_segment_is_captured_is_refused() -> None:
    point = DispatchPoint()
    reached: list[int] = []

    def attend(layer_id: int, inputs: object, side: Kind | None = None) -> torch.Tensor:
        reached.append(layer_id)
        return torch.zeros(1)

    message = "layer 4 was dispatched while a segment is captured"
    with point.leads_to(attend):
        with capturing("a segment"), pytest.raises(CaptureViolation, match=message):
            point.attend(4, {})
        assert reached == []
        point.attend(4, {})
    assert reached == [4]


def test_a_segment_with_a_dispatch_inside_is_refused_when_it_is_captured(body: Body) -> None:
    """As when a compiler is given the whole body: the dispatch would be recorded and never run again."""
    role = body.roles[Role.TARGET]
    step = Step.random(role, 3)
    with capturing("a whole body"), pytest.raises(CaptureViolation, match="layer 0"):
        as_it_is(role, step)
    assert as_it_is(role, step)[0].isfinite().all()


def test_recorders_and_compilers_run_in_a_capture(body: Body, whole: Cut) -> None:
    role = body.roles[Role.TARGET]

    class Reaching(PretendRecorder):
        def record(self, compute: Compute) -> Recording:
            role.point.attend(2, {})
            raise AssertionError("the dispatch was not refused")

    buffers = PoisonedBuffers(role)
    captured = CudaGraphCompiler(Reaching(), LARGEST).compile(whole, buffers, MAX_TOKENS)
    with pytest.raises(CaptureViolation, match="layer 2"):
        in_segments(role, captured, buffers, Step.random(role, 3))


def test_equal_layers_are_lifted_to_equal_graphs(whole: Cut) -> None:
    """Linear, linear, linear, full: the second and third segment differ in weights alone."""
    lifted = [lift(segment.module) for segment in whole.segments]
    keys = [one.key for one in lifted]
    assert len(keys) == 5 and keys[1] == keys[2] and len(set(keys)) == 4
    assert not any(a is b for a, b in zip(lifted[1].weights, lifted[2].weights, strict=True))
    for one, segment in zip(lifted, whole.segments, strict=True):
        assert len(one.module.graph.find_nodes(op="placeholder")) == len(segment.reads) + len(one.weights)
        assert not one.module.graph.find_nodes(op="get_attr")
