"""Segments on a CUDA device: CUDA graphs against the body as it is, and what a capture refuses.

One command runs all: python -m pytest tests/gpu/test_gpu_segments.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

sys.path.append(str(Path(__file__).resolve().parents[1] / "segments"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "bodies"))

from braid_orchestrator.body.base import RoleBody
from braid_orchestrator.segments.base import SegmentCompiler
from braid_orchestrator.segments.check import check
from braid_orchestrator.segments.cudagraph import CudaGraphCompiler
from braid_orchestrator.segments.eager import EagerCompiler
from braid_orchestrator.segments.inductor import InductorCompiler
from braid_wire.errors import CaptureViolation
from braid_wire.layers import Kind, Role
from checkpoints import CASES
from mamba_checkpoints import save
from walks import MAX_TOKENS, PoisonedBuffers, Step, as_it_is, cut_of, in_segments, load

DEVICE = torch.device("cuda", torch.cuda.current_device())
LARGEST = 16
# Products of a GPU add in another order for another number of rows.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
CASE = {case.family: case for case in CASES}


class PoisonedDeviceBuffers(PoisonedBuffers):
    """Buffers in the device's memory."""

    def _nan(self, shape: tuple[int, ...]) -> torch.Tensor:
        return super()._nan(shape).to(DEVICE)


def role_of(name: str, directory: Path, dtype: torch.dtype) -> RoleBody:
    """A small model's target with its weights on the device."""
    model = save(name, directory) if name == "falcon_h1" else CASE[name].save(directory)
    role = load(model, dtype).roles[Role.TARGET]
    role.model.to(DEVICE)
    return role


def on_device(role: RoleBody, tokens: int, seed: int) -> Step:
    step = Step.random(role, tokens, seed)
    return Step(step.ids.to(DEVICE), step.positions.to(DEVICE), None)


def compare(role: RoleBody, compiler: SegmentCompiler, buffers: PoisonedBuffers) -> None:
    """Steps of several sizes, most of them replays."""
    captured = compiler.compile(cut_of(role), buffers, MAX_TOKENS)
    for seed, tokens in enumerate((5, 8, 1, 7, 33, 5, 16, 6, 1, 17, 5)):
        buffers.poison()
        found = in_segments(role, captured, buffers, Step.random(role, tokens, seed))
        for ours, theirs in zip(found, as_it_is(role, on_device(role, tokens, seed)), strict=True):
            difference = (ours.float() - theirs.float()).abs().max()
            assert difference <= TOLERANCE[role.dtype] * theirs.float().abs().max()
        assert not buffers.written_from(tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", [PoisonedBuffers, PoisonedDeviceBuffers], ids=["shared", "device"])
@pytest.mark.parametrize("name", ["llama", "qwen3_5", "falcon_h1"])
def test_graphs_give_what_the_body_gives(
    name: str, kind: type[PoisonedBuffers], dtype: torch.dtype, tmp_path: Path
) -> None:
    role = role_of(name, tmp_path, dtype)
    compare(role, CudaGraphCompiler(largest=LARGEST), kind(role))


def test_graphs_of_experts(tmp_path: Path) -> None:
    role = role_of("qwen3_moe", tmp_path, torch.bfloat16)
    compare(role, CudaGraphCompiler(largest=LARGEST), PoisonedBuffers(role))


@pytest.mark.parametrize("compiler", [EagerCompiler, InductorCompiler])
def test_other_compilers(compiler: type[SegmentCompiler], tmp_path: Path) -> None:
    role = role_of("qwen3_5", tmp_path, torch.float32)
    compare(role, compiler(), PoisonedBuffers(role))


def test_a_trace_is_checked_on_the_device(tmp_path: Path) -> None:
    role = role_of("qwen3_5", tmp_path, torch.float32)
    check(role, cut_of(role))


def test_inputs_are_there_behind_a_segment_on_its_stream(tmp_path: Path) -> None:
    """Nobody waits for a segment: what hands a layer over is enqueued behind it, on the same stream."""
    role = role_of("llama", tmp_path, torch.float32)
    buffers = PoisonedDeviceBuffers(role)
    captured = CudaGraphCompiler(largest=LARGEST).compile(cut_of(role), buffers, MAX_TOKENS)
    ids, other, handed = torch.arange(8), torch.cuda.Stream(), torch.cuda.Event()
    for _ in range(5):
        buffers.poison()
        torch.cuda.synchronize()
        captured.start(ids, ids)
        captured.run(0)
        handed.record()
        with torch.cuda.stream(other):
            other.wait_event(handed)
            rows = buffers(0, Kind.FULL).inputs["q"][:8].cpu()
        assert rows.isfinite().all()


def test_what_a_graph_gave_outlives_the_replays_of_others(tmp_path: Path) -> None:
    """The head's graph is replayed behind the last segment's, whose result a draft starts from."""
    role = role_of("llama", tmp_path, torch.float32)
    buffers = PoisonedDeviceBuffers(role)
    captured = CudaGraphCompiler(largest=LARGEST).compile(cut_of(role), buffers, MAX_TOKENS)
    for seed, tokens in enumerate((2, 9, 16, 2, 16)):
        step = Step.random(role, tokens, seed)
        in_segments(role, captured, buffers, step)
        before = captured.result().clone()
        captured.logits(torch.arange(tokens))
        captured.logits(torch.zeros(1, dtype=torch.int64))
        assert torch.equal(captured.result(), before)


def test_a_dispatch_inside_a_capture_is_refused(tmp_path: Path) -> None:
    """Without being told: the stream itself says that it is captured."""
    role = role_of("llama", tmp_path, torch.float32)
    step = on_device(role, 4, 0)
    as_it_is(role, step)  # libraries set themselves up
    torch.cuda.synchronize()
    with pytest.raises(CaptureViolation, match="layer 0"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        as_it_is(role, step)
    torch.cuda.synchronize()
    assert as_it_is(role, step)[0].isfinite().all()
