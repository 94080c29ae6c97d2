"""The Triton kernels on a CUDA device, against the CPU kernels, which are tested against float64.

One command runs all: python -m pytest tests/gpu/test_gpu_linear.py
"""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch
from braid_kernels import (
    GatedDelta,
    KimiDelta,
    LayerError,
    Lightning,
    LinearGeometry,
    LinearLayer,
    LinearMeta,
    Mamba1,
    Mamba2,
    ShortConv,
    default_linear_backend,
    signature,
)
from braid_kernels.testing import (
    LinearCase,
    Span,
    difference,
    linear_case,
    linear_meta,
    same_bits,
    select_inputs,
    small_linear_geometries,
)
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)

from braid_kernels.triton_kernels import (
    INTERPRETED,
    HostSpans,
    LaunchedKernel,
    TritonLinearBackend,
    Tuning,
)

if INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: nothing would run on the device", allow_module_level=True)

DEVICE = torch.device("cuda", torch.cuda.current_device())

# fp32 products are three tf32 ones, as exact as fp32 up to the order of sums.
FP32 = 1e-4
# bf16: q, k, v, the chunks' states and the operands of products are rounded to bf16 (2^-8), and errors of
# some such steps do not cancel.
BF16 = 2e-2

MECHANISMS = ("gated_delta", "kimi_delta", "lightning", "mamba2", "mamba1", "short_conv")
SMALL = {name: g for name, g in small_linear_geometries().items() if g.mechanism in MECHANISMS}
# The shapes of models that are in use, one layer each.
LARGE: dict[str, LinearGeometry] = {
    "qwen3_next": GatedDelta(16, 32, 128, 128, 4, 128**-0.5),
    "olmo_hybrid": GatedDelta(8, 8, 96, 192, 4, 96**-0.5, beta_scale=2.0),
    "wide": GatedDelta(2, 2, 256, 256, 4, 256**-0.5),
    "kimi_linear": KimiDelta(32, 128, 4, 128**-0.5),
    "ling_3": KimiDelta(16, 128, 4, 128**-0.5, gate_lower_bound=-5.0),
    "ling_2_5": Lightning(32, 128, 128**-0.5),
    "minimax": Lightning(16, 96, 1.0, activation="silu"),
    "nemotron_h": Mamba2(64, 64, 128, 8, 4),
    "falcon_h1": Mamba2(24, 64, 256, 1, 4),
    "jamba": Mamba1(8192, 16, 256, 4),
    "lfm2": ShortConv(2048, 3),
}
FORMS = {"recurrent": Tuning(short_span=10**9), "chunk": Tuning(short_span=0), "auto": Tuning()}
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.float32),
    "bf16_state": (torch.bfloat16, torch.bfloat16),
}
MIXED = (
    Span.final(65, 0, 1),
    Span(0),
    Span.final(1, 2, 3),
    Span(4, 0, (4, 5, 6, 7)),
    Span(1),
    Span.final(33, -1, 8),
    Span(1, 0, (9,)),
    Span(2),
    Span(200, 2, (-1,) * 99 + (10,) + (-1,) * 99 + (11,)),
)


def on_device(tensor: Tensor) -> Tensor:
    """A copy with the same strides: gaps between slots and rows stay."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE).copy_(tensor)


@dataclasses.dataclass
class Resident:
    """A case whose tensors lie on the device, and its resolved layer."""

    case: LinearCase
    backend: TritonLinearBackend
    kernel: LaunchedKernel
    inputs: dict[str, Tensor]
    meta: LinearMeta
    state: Tensor
    conv: Tensor | None
    out: Tensor

    def run(self) -> None:
        self.kernel(self.inputs, self.meta, self.out)

    def result(self) -> LinearCase:
        conv = None if self.conv is None else self.conv.cpu()
        return dataclasses.replace(self.case, state_pool=self.state.cpu(), conv_pool=conv, out=self.out.cpu())


def resident(case: LinearCase, form: str = "auto") -> Resident:
    backend = TritonLinearBackend(FORMS[form])
    params = {name: tensor.to(DEVICE) for name, tensor in case.params.items()}
    state = on_device(case.state_pool)
    conv = None if case.conv_pool is None else on_device(case.conv_pool)
    meta = LinearMeta(
        *(x.to(DEVICE) for x in (case.meta.cu_seqlens, case.meta.state_in, case.meta.state_out))
    )
    rows = (case.meta.num_tokens, *signature(case.geometry).output)
    out = torch.full(rows, float("nan"), dtype=case.dtype, device=DEVICE)
    given = None if signature(case.geometry).state is None else state
    kernel = backend.layer(LinearLayer(case.geometry, params, given, conv))
    inputs = {name: on_device(tensor) for name, tensor in case.inputs.items()}
    return Resident(case, backend, kernel, inputs, meta, state, conv, out)


def run(case: LinearCase, form: str = "auto") -> LinearCase:
    there = resident(case, form)
    there.run()
    return there.result()


def assert_close(actual: LinearCase, expected: LinearCase) -> None:
    half = expected.dtype == torch.bfloat16
    assert not expected.out.isnan().any()
    assert difference(actual.out, expected.out) < (BF16 if half else FP32)
    assert difference(actual.state_pool, expected.state_pool) < (BF16 if half else FP32)
    for slot in set(range(len(expected.state_pool))) - set(expected.meta.state_out.tolist()):
        assert same_bits(actual.state_pool[slot], expected.state_pool[slot])
    if actual.conv_pool is not None and expected.conv_pool is not None:
        assert same_bits(actual.conv_pool, expected.conv_pool)  # inputs are copied, not computed


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SMALL)
def test_small_layers(name: str, form: str, dtypes: str) -> None:
    dtype, state_dtype = DTYPES[dtypes]
    case = linear_case(
        SMALL[name], MIXED, slots=13, dtype=dtype, state_dtype=state_dtype, pad=3, gap=5, bias=True
    )
    assert_close(run(case, form), case.run(default_linear_backend()))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 127, 129])
@pytest.mark.parametrize("form", ["recurrent", "chunk"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_lengths_around_the_chunk(name: str, form: str, length: int) -> None:
    case = linear_case(
        SMALL[name], [Span.final(length, 0, 1), Span.final(length, -1, 2)], slots=3, seed=length
    )
    assert_close(run(case, form), case.run(default_linear_backend()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", LARGE)
def test_large_layers(name: str, dtype: torch.dtype) -> None:
    """A prefill of thousands of tokens, a chunked one with checkpoints, and decodes, in one step."""
    checkpoints = tuple(1 + i // 256 if i % 256 == 255 else -1 for i in range(1024))
    decodes = [Span.final(1, 0, 8 + b) for b in range(40)]
    spans = [Span.final(2050, -1, 6), Span(1024, 0, checkpoints), *decodes, Span(4, 0, (50, 51, 52, 53))]
    case = linear_case(LARGE[name], spans, slots=54, dtype=dtype, bias=True)
    assert_close(run(case), case.run(default_linear_backend()))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", LARGE)
def test_large_decode(name: str, dtypes: str) -> None:
    dtype, state_dtype = DTYPES[dtypes]
    spans = [Span.final(1, b, 64 + b) for b in range(64)]
    case = linear_case(LARGE[name], spans, slots=128, dtype=dtype, state_dtype=state_dtype)
    assert_close(run(case), case.run(default_linear_backend()))


@pytest.mark.parametrize("form", ["recurrent", "chunk"])
@pytest.mark.parametrize("name", ["gated_delta", "kimi_delta", "mamba2"])
def test_strong_decay_underflows_to_zero_and_not_to_nan(name: str, form: str) -> None:
    case = linear_case(SMALL[name], [Span.final(140, 0, 1)], slots=2)
    gate = "dt" if name == "mamba2" else "a"
    case.params["A_log"].fill_(5.0)
    case.inputs[gate].fill_(-5.0)
    case.inputs[gate][::3] = 30.0
    assert_close(run(case, form), case.run(default_linear_backend()))


@pytest.mark.parametrize("form", ["recurrent", "chunk"])
def test_the_strongest_bounded_decay(form: str) -> None:
    case = linear_case(SMALL["kimi_delta_bounded"], [Span.final(140, 0, 1)], slots=2)
    case.params["dt_bias"].zero_()
    case.inputs["a"].fill_(30.0)
    assert_close(run(case, form), case.run(default_linear_backend()))


@pytest.mark.parametrize("form", ["recurrent", "chunk"])
def test_weak_decay_keeps_its_relative_accuracy(form: str) -> None:
    case = linear_case(SMALL["gated_delta"], [Span.final(192, 0, 1)], slots=2)
    case.params["A_log"].fill_(10.0)
    case.params["dt_bias"].zero_()
    case.inputs["a"].fill_(-14.0)
    assert_close(run(case, form), case.run(default_linear_backend()))


@pytest.mark.parametrize("name", LARGE)
def test_the_same_step_gives_the_same_bits(name: str) -> None:
    case = linear_case(
        LARGE[name], [Span.final(700, -1, 1), Span.final(1, 0, 2)], slots=3, dtype=torch.bfloat16
    )
    first, second = run(case), run(case)
    assert same_bits(first.out, second.out)
    assert same_bits(first.state_pool, second.state_pool)


@pytest.mark.parametrize("name", SMALL)
def test_a_sequence_alone_equals_the_same_in_a_crowd(name: str) -> None:
    crowd = linear_case(SMALL[name], MIXED, slots=13, pad=1)
    together = run(crowd)
    row = 0
    for span in MIXED:
        end = row + span.length
        alone = run(
            dataclasses.replace(crowd, inputs=select_inputs(crowd.inputs, row, end), meta=linear_meta([span]))
        )
        assert same_bits(alone.out, together.out[row:end])
        for slot in span.state_out:
            if slot >= 0:
                assert same_bits(alone.state_pool[slot], together.state_pool[slot])
        row = end


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_planned_step_never_waits_for_the_device(name: str) -> None:
    there = resident(linear_case(SMALL[name], MIXED, slots=13))
    there.run()  # compiles
    fresh = LinearMeta(
        *(x.clone() for x in (there.meta.cu_seqlens, there.meta.state_in, there.meta.state_out))
    )
    host = HostSpans.of(there.case.meta)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        there.backend.plan(fresh, DEVICE, host)
        there.kernel(there.inputs, fresh, there.out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(there.result(), there.case.run(default_linear_backend()))


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_planned_decode_step_can_be_captured_and_replayed_on_other_slots(name: str) -> None:
    """The kernels read slots from the metadata's own tensors, so that a replay sees what they hold then."""
    case = linear_case(SMALL[name], [Span.final(1, b, 4 + b) for b in range(4)], slots=8)
    there = resident(case)
    there.run()
    expected = there.result()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        there.run()
    order = torch.tensor([2, 0, 3, 1])
    there.meta.state_in.copy_(order)
    there.meta.state_out.copy_(4 + order)
    for rows in there.inputs.values():
        rows.copy_(rows[order.to(DEVICE)].clone())
    there.out.fill_(float("nan"))
    there.state[4:] = float("nan")
    graph.replay()
    torch.cuda.synchronize()
    actual = there.result()
    assert same_bits(actual.out, expected.out[order])
    assert same_bits(actual.state_pool, expected.state_pool)


def test_pools_on_the_cpu_are_refused() -> None:
    case = linear_case(SMALL["lightning"], [Span(1, 0)], slots=2)
    with pytest.raises(LayerError, match="CUDA"):
        TritonLinearBackend().layer(LinearLayer(case.geometry, case.params, case.state_pool))
