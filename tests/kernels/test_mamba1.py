"""Mamba-1: the reference against transformers, the C++ kernel against the reference, and its panels."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from braid_kernels import (
    GeometryError,
    LayerError,
    LinearBackend,
    LinearLayer,
    LinearMeta,
    Mamba1,
    MetadataError,
    linear_backend,
    signature,
)
from braid_kernels.native import num_threads, set_num_threads
from braid_kernels.reference.mamba1 import rms_norm, selective_scan
from braid_kernels.testing import (
    LinearCase,
    Span,
    difference,
    int32,
    linear_case,
    linear_meta,
    same_bits,
    select_inputs,
)
from hypothesis import given, settings
from hypothesis import strategies as st

# As in test_kernels_linear.py: measured at most 6e-7 of the largest value.
FP32 = 5e-6
BF16 = 2.0**-8
PANEL = 128  # rows that go through the kernel's phases together (cpp/mamba1.cpp)
ODD = Mamba1(inner_dim=37, state_dim=11, dt_rank=5, conv_width=3)
EVEN = Mamba1(inner_dim=64, state_dim=16, dt_rank=16, conv_width=4)


@pytest.fixture(scope="module")
def cpp() -> LinearBackend:
    return linear_backend("cpp")


@pytest.fixture(scope="module")
def reference() -> LinearBackend:
    return linear_backend("reference")


def assert_close(actual: LinearCase, expected: LinearCase, bound: float = FP32) -> None:
    assert not expected.out.isnan().any()
    assert difference(actual.out, expected.out) < bound
    assert difference(actual.state_pool, expected.state_pool) < bound
    assert actual.conv_pool is not None and expected.conv_pool is not None
    assert same_bits(actual.conv_pool, expected.conv_pool)  # inputs are copied, not computed


def test_the_scan_is_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.jamba.modeling_jamba")
    g = torch.Generator().manual_seed(0)
    rows, inner, columns = 9, 6, 5
    u, raw = (torch.randn(rows, inner, generator=g, dtype=torch.float64) for _ in range(2))
    B, C = (torch.randn(rows, columns, generator=g, dtype=torch.float64) for _ in range(2))
    A_log = torch.randn(inner, columns, generator=g, dtype=torch.float64)
    D, bias = (torch.randn(inner, generator=g, dtype=torch.float64) for _ in range(2))
    wanted, last = modeling.mamba_selective_scan(
        u.T[None], raw.T[None], -A_log.exp(), B.T[None], C.T[None], D=D, delta_bias=bias, delta_softplus=True,
        return_last_state=True,
    )  # fmt: skip
    pool = torch.full((1, inner, columns), float("nan"), dtype=torch.float64)
    dt = torch.nn.functional.softplus(raw + bias)
    found = selective_scan(u, dt, A_log, B, C, D, [0, rows], [-1], [-1] * (rows - 1) + [0], pool)
    # transformers takes B and u in float32 on the way.
    torch.testing.assert_close(found, wanted[0].T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pool[0], last[0], atol=1e-5, rtol=1e-5)


def test_the_norm_is_jambas() -> None:
    modeling = pytest.importorskip("transformers.models.jamba.modeling_jamba")
    torch.manual_seed(0)
    x = torch.randn(4, 7)
    norm = modeling.JambaRMSNorm(7, eps=0.3)
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(rms_norm(x, norm.weight, 0.3).float(), norm(x))
    assert same_bits(rms_norm(x, None, 0.3).float(), x)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "bf16_state", "bf16_weights"])
@pytest.mark.parametrize("geometry", [ODD, EVEN], ids=["odd", "even"])
def test_spans_across_panels(
    cpp: LinearBackend, reference: LinearBackend, geometry: Mamba1, dtypes: str
) -> None:
    """Prefill over panel edges, decode, verify and empty spans at once, over poisoned memory."""
    spans = [Span.final(PANEL - 2, 0, 1), Span(0), Span(5, 0, (2, 3, -1, 4, 5)), Span(1, 6, (7,)), Span(1)]
    case = linear_case(
        geometry,
        [*spans, Span.final(2 * PANEL + 1, -1, 8), Span.final(1, 6, 9)],
        slots=11,
        dtype=torch.bfloat16 if dtypes == "bf16" else torch.float32,
        state_dtype=torch.bfloat16 if dtypes == "bf16_state" else torch.float32,
        pad=3,
        gap=5,
        bias=True,
    )
    if dtypes == "bf16_weights":
        case.params.update({name: case.params[name].bfloat16() for name in ("x_proj", "dt_proj", "A_log")})
    # dt near zero forgets little: what lies before a panel must still be seen after it.
    case.params["dt_bias"].sub_(3.0)
    assert_close(case.run(cpp), case.run(reference), BF16 if dtypes in ("bf16", "bf16_state") else FP32)


@pytest.mark.parametrize("length", [1, PANEL - 1, PANEL, PANEL + 1])
def test_lengths_around_the_panel(cpp: LinearBackend, reference: LinearBackend, length: int) -> None:
    case = linear_case(ODD, [Span.final(length, 0, 1)], slots=2, seed=length)
    assert_close(case.run(cpp), case.run(reference))


@settings(deadline=None, max_examples=20)
@given(
    inner=st.integers(1, 70),
    state=st.integers(1, 20),
    rank=st.integers(1, 40),
    width=st.integers(2, 16),
    lengths=st.lists(st.sampled_from([0, 1, 1, 2, 7, 40]), min_size=1, max_size=5),
    absent=st.sets(st.sampled_from(["conv_bias", "dt_norm", "B_norm", "C_norm"])),
    seed=st.integers(0, 1000),
)
def test_any_shape_matches_the_reference(
    cpp: LinearBackend,
    reference: LinearBackend,
    inner: int,
    state: int,
    rank: int,
    width: int,
    lengths: list[int],
    absent: set[str],
    seed: int,
) -> None:
    # The norm of one value, or of few, has a slope of norm_eps ** -0.5 at 0: at the usual 1e-6 rounding would
    # be a thousand times as large there. And errors are told by the largest output: one is enough to vanish,
    # which the first span's many do not.
    geometry, lengths = Mamba1(inner, state, rank, width, norm_eps=0.1), [40, *lengths]
    spans = [Span.final(length, i - 1, len(lengths) + i) for i, length in enumerate(lengths)]
    case = linear_case(geometry, spans, slots=2 * len(lengths), seed=seed, pad=seed % 3, bias=True)
    for name in absent:
        del case.params[name]
    assert_close(case.run(cpp), case.run(reference))


@pytest.mark.parametrize("cuts", [(40,), (1, 2, 3), (PANEL,), (PANEL - 1, PANEL, PANEL + 1), (10, 150)])
def test_chunked_equals_one_shot_bitwise(cpp: LinearBackend, cuts: tuple[int, ...]) -> None:
    """A state carried over any step or panel boundary loses nothing."""
    total = PANEL + 40
    whole = linear_case(ODD, [Span.final(total, 0, 1)], slots=8)
    one_shot = whole.run(cpp)
    case, slot, outs, begin = whole, 0, [], 0
    for i, end in enumerate([*cuts, total]):
        span = Span.final(end - begin, slot, 2 + i)
        case = dataclasses.replace(
            case, inputs=select_inputs(whole.inputs, begin, end), meta=linear_meta([span])
        ).run(cpp)
        outs.append(case.out)
        slot, begin = 2 + i, end
    assert same_bits(torch.cat(outs), one_shot.out.contiguous())
    assert same_bits(case.state_pool[slot], one_shot.state_pool[1])


def test_threads_change_no_bit(cpp: LinearBackend) -> None:
    case = linear_case(EVEN, [Span.final(PANEL + 7, 0, 1), Span.final(40, 0, 2)], slots=3)
    before, runs = num_threads(), []
    for threads in (1, 3):
        set_num_threads(threads)
        try:
            runs.append(case.run(cpp))
        finally:
            set_num_threads(before)
    assert same_bits(runs[0].out.contiguous(), runs[1].out.contiguous())
    assert same_bits(runs[0].state_pool, runs[1].state_pool)


def test_verify_writes_the_state_of_every_prefix(cpp: LinearBackend) -> None:
    length = 6
    case = linear_case(ODD, [Span(length, 0, tuple(range(1, 1 + length)))], slots=8)
    verify = case.run(cpp)
    for n in range(1, length + 1):
        inputs = select_inputs(case.inputs, 0, n)
        prefix = dataclasses.replace(case, inputs=inputs, meta=linear_meta([Span.final(n, 0, 7)])).run(cpp)
        assert same_bits(prefix.state_pool[7], verify.state_pool[n])


def test_nan_input_stays_in_its_sequence(cpp: LinearBackend) -> None:
    case = linear_case(ODD, [Span.final(3, 0, 1), Span.final(3, 0, 2)], slots=3)
    clean = case.run(cpp)
    case.inputs["x"][0] = float("nan")
    dirty = case.run(cpp)
    assert dirty.out[:3].isnan().all()
    assert same_bits(dirty.out[3:], clean.out[3:])
    assert same_bits(dirty.state_pool[2], clean.state_pool[2])


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("field", "cu", "state_in", "state_out"),
    [
        ("cu_seqlens", [0, 1, 1], [0, 0], [-1, -1]),
        ("state_in", [0, 1, 2], [0, 4], [-1, -1]),
        ("state_out", [0, 1, 2], [0, 0], [1, 1]),
        ("state_out", [0, 1, 2], [0, 1], [2, 0]),
    ],
)
def test_bad_metadata_is_refused_before_anything_is_written(
    backend: str, field: str, cu: list[int], state_in: list[int], state_out: list[int]
) -> None:
    case = linear_case(ODD, [Span(1, 0), Span(1, 1)], slots=4)
    before = case.state_pool.clone()
    out = torch.full((2, *signature(ODD).output), 7.0)
    kernel = linear_backend(backend).layer(LinearLayer(ODD, case.params, case.state_pool, case.conv_pool))
    with pytest.raises(MetadataError, match=field):
        kernel(case.inputs, LinearMeta(int32(cu), int32(state_in), int32(state_out)), out)
    assert same_bits(case.state_pool, before)
    assert (out == 7.0).all()


def test_bad_layers_are_refused_by_name() -> None:
    case = linear_case(ODD, [Span(1, 0)], slots=2)
    with pytest.raises(LayerError, match="state_pool"):
        LinearLayer(ODD, case.params, None, case.conv_pool)
    with pytest.raises(LayerError, match="x_proj"):
        LinearLayer(ODD, {**case.params, "x_proj": torch.zeros(3, 3)}, case.state_pool, case.conv_pool)
    with pytest.raises(GeometryError, match="dt_rank"):
        Mamba1(8, 4, 0, 4)
    with pytest.raises(GeometryError, match="norm_eps"):
        Mamba1(8, 4, 2, 4, norm_eps=-1.0)
