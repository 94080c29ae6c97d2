"""Linear kernels against the float64 reference, and the promises about slots, chunks and company."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from braid_kernels import (
    GatedDelta,
    InputError,
    KimiDelta,
    LayerError,
    Lightning,
    LinearBackend,
    LinearGeometry,
    LinearLayer,
    LinearMeta,
    Mamba2,
    MetadataError,
    linear_backend,
    signature,
)
from braid_kernels.native import num_threads, set_num_threads
from braid_kernels.testing import (
    LinearCase,
    Span,
    difference,
    int32,
    linear_case,
    linear_meta,
    same_bits,
    select_inputs,
    small_linear_geometries,
)
from hypothesis import given, settings
from hypothesis import strategies as st

# fp32 against float64: rounding errors of 2^-24 add up like a random walk over the ~100 terms of a dot
# product and over the tokens; measured at most 6e-7 of the largest value, so 5e-6 leaves room and still
# catches any wrong term.
FP32 = 5e-6
# bf16 results: the fp32 and the float64 value may lie on either side of a rounding boundary, one bf16
# step (2^-8 of the value) apart.
BF16 = 2.0**-8

GEOMETRIES = small_linear_geometries()
MIXED = (
    Span.final(65, 0, 1),
    Span(0),
    Span.final(1, 2, 3),
    Span(4, 0, (4, 5, 6, 7)),
    Span(1),
    Span.final(33, -1, 8),
    Span(1, 0, (9,)),
    Span(2),
)


@pytest.fixture(scope="module")
def cpp() -> LinearBackend:
    return linear_backend("cpp")


@pytest.fixture(scope="module")
def reference() -> LinearBackend:
    return linear_backend("reference")


def assert_close(actual: LinearCase, expected: LinearCase) -> None:
    bf16_out, bf16_state = (t.dtype == torch.bfloat16 for t in (expected.out, expected.state_pool))
    assert difference(actual.out, expected.out) < (BF16 if bf16_out else FP32)
    assert difference(actual.state_pool, expected.state_pool) < (BF16 if bf16_state else FP32)
    if actual.conv_pool is not None and expected.conv_pool is not None:
        assert same_bits(actual.conv_pool, expected.conv_pool)  # inputs are copied, not computed


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "bf16_state"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_mixed_batch_matches_the_reference(
    cpp: LinearBackend, reference: LinearBackend, name: str, dtypes: str
) -> None:
    """Prefill, decode, verify, empty and shared-state spans at once, strided, over poisoned memory."""
    case = linear_case(
        GEOMETRIES[name],
        MIXED,
        slots=12,
        dtype=torch.float32 if dtypes == "fp32" else torch.bfloat16,
        state_dtype=torch.bfloat16 if dtypes == "bf16_state" else torch.float32,
        pad=3,
        gap=5,
        bias=True,
    )
    actual, expected = case.run(cpp), case.run(reference)
    assert not expected.out.isnan().any()
    assert_close(actual, expected)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 63, 64, 65])
@pytest.mark.parametrize("name", ["gated_delta", "kimi_delta", "lightning", "mamba2"])
def test_lengths_around_the_chunk(
    cpp: LinearBackend, reference: LinearBackend, name: str, length: int
) -> None:
    case = linear_case(GEOMETRIES[name], [Span.final(length, 0, 1)], slots=2, seed=length)
    assert_close(case.run(cpp), case.run(reference))


@pytest.mark.parametrize(
    "geometry",
    [
        GatedDelta(1, 1, 128, 128, 4, 0.1),
        GatedDelta(2, 2, 64, 96, 2, 0.1),
        GatedDelta(1, 9, 48, 32, 5, 0.1),  # more value heads per key head than a task takes
        GatedDelta(16, 32, 16, 16, 4, 0.25),
        KimiDelta(3, 128, 4, 0.1),
        KimiDelta(1, 65, 3, 0.1, gate_lower_bound=-5.0),
        Lightning(2, 128, 0.1),
        Lightning(1, 1, 1.0),
        Mamba2(3, 64, 128, 1, 4),
        Mamba2(8, 80, 16, 4, 4),
    ],
    ids=str,
)
def test_head_dims_and_ratios(cpp: LinearBackend, reference: LinearBackend, geometry: LinearGeometry) -> None:
    spans = [Span.final(37, 0, 1), Span(1, 0, (2,)), Span(3, -1, (3, -1, 4))]
    case = linear_case(geometry, spans, slots=5)
    assert_close(case.run(cpp), case.run(reference))


@st.composite
def batches(draw: st.DrawFn) -> tuple[str, list[Span], int]:
    name = draw(st.sampled_from(sorted(GEOMETRIES)))
    lengths = draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 5, 33]), min_size=1, max_size=6))
    free = iter(range(3, 3 + sum(lengths)))
    spans = []
    for length in lengths:
        outs = tuple(next(free) if draw(st.booleans()) else -1 for _ in range(length))
        spans.append(Span(length, draw(st.integers(-1, 2)), outs))
    return name, spans, 3 + sum(lengths)


@settings(deadline=None, max_examples=15)
@given(batches(), st.integers(0, 2**31 - 1))
def test_any_batch_matches_the_reference(
    cpp: LinearBackend, reference: LinearBackend, batch: tuple[str, list[Span], int], seed: int
) -> None:
    name, spans, slots = batch
    case = linear_case(GEOMETRIES[name], spans, slots=slots, seed=seed, pad=seed % 3)
    assert_close(case.run(cpp), case.run(reference))


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_sequence_alone_equals_the_same_in_a_crowd(cpp: LinearBackend, name: str, threads: int) -> None:
    before = num_threads()
    set_num_threads(threads)
    try:
        crowd = linear_case(GEOMETRIES[name], MIXED, slots=12, pad=1)
        together = crowd.run(cpp)
    finally:
        set_num_threads(before)
    row = 0
    for span in MIXED:
        end = row + span.length
        alone = dataclasses.replace(
            crowd, inputs=select_inputs(crowd.inputs, row, end), meta=linear_meta([span])
        ).run(cpp)
        assert same_bits(alone.out, together.out[row:end])
        for slot in span.state_out:
            if slot >= 0:
                assert same_bits(alone.state_pool[slot], together.state_pool[slot])
        row = end


@pytest.mark.parametrize("name", GEOMETRIES)
def test_slots_that_are_not_written_keep_their_bits(cpp: LinearBackend, name: str) -> None:
    case = linear_case(GEOMETRIES[name], MIXED, slots=12)
    after = case.run(cpp)
    written = {slot for span in MIXED for slot in span.state_out if slot >= 0}
    for slot in set(range(12)) - written:
        assert same_bits(after.state_pool[slot], case.state_pool[slot])
        if after.conv_pool is not None and case.conv_pool is not None:
            assert same_bits(after.conv_pool[slot], case.conv_pool[slot])


@pytest.mark.parametrize("cuts", [(40,), (1, 2, 3), (32, 64), (63, 64, 65), (10, 11, 50)])
@pytest.mark.parametrize("name", ["gated_delta", "gated_delta_odd", "kimi_delta", "lightning", "mamba2"])
def test_chunked_equals_one_shot_bitwise(cpp: LinearBackend, name: str, cuts: tuple[int, ...]) -> None:
    """A state carried over any chunk boundary, single tokens included, loses nothing."""
    total = 70
    whole = linear_case(GEOMETRIES[name], [Span.final(total, 0, 1)], slots=8)
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
    if case.conv_pool is not None and one_shot.conv_pool is not None:
        assert same_bits(case.conv_pool[slot], one_shot.conv_pool[1])


@pytest.mark.parametrize("name", ["gated_delta", "kimi_delta_bounded", "lightning_silu", "mamba2_one_group"])
def test_verify_writes_the_state_of_every_prefix(cpp: LinearBackend, name: str) -> None:
    """Speculation: version i is bitwise the state after the first i + 1 tokens alone."""
    length = 6
    case = linear_case(GEOMETRIES[name], [Span(length, 0, tuple(range(1, 1 + length)))], slots=8)
    verify = case.run(cpp)
    for n in range(1, length + 1):
        prefix = dataclasses.replace(
            case, inputs=select_inputs(case.inputs, 0, n), meta=linear_meta([Span.final(n, 0, 7)])
        ).run(cpp)
        assert same_bits(prefix.state_pool[7], verify.state_pool[n])
        if prefix.conv_pool is not None and verify.conv_pool is not None:
            assert same_bits(prefix.conv_pool[7], verify.conv_pool[n])


def test_strong_decay_underflows_to_zero_and_not_to_nan(cpp: LinearBackend, reference: LinearBackend) -> None:
    case = linear_case(GEOMETRIES["kimi_delta"], [Span.final(40, 0, 1)], slots=2)
    case.params["A_log"].fill_(5.0)
    case.inputs["a"].fill_(30.0)
    assert_close(case.run(cpp), case.run(reference))


def test_weak_decay_keeps_its_relative_accuracy(cpp: LinearBackend, reference: LinearBackend) -> None:
    """softplus of a very negative gate is e^x, not 0: the state must forget slowly, not never."""
    case = linear_case(GEOMETRIES["gated_delta"], [Span.final(64, 0, 1)], slots=2)
    case.params["A_log"].fill_(10.0)
    case.params["dt_bias"].zero_()
    case.inputs["a"].fill_(-14.0)
    assert_close(case.run(cpp), case.run(reference))


def test_nan_input_stays_in_its_sequence(cpp: LinearBackend) -> None:
    case = linear_case(GEOMETRIES["gated_delta"], [Span.final(3, 0, 1), Span.final(3, 0, 2)], slots=3)
    clean = case.run(cpp)
    case.inputs["mixed_qkv"][0] = float("nan")
    dirty = case.run(cpp)
    assert dirty.out[:3].isnan().all()
    assert same_bits(dirty.out[3:], clean.out[3:])
    assert same_bits(dirty.state_pool[2], clean.state_pool[2])


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("field", "cu", "state_in", "state_out"),
    [
        ("cu_seqlens", [0, 3, 2], [0, 0], [-1, -1]),
        ("cu_seqlens", [0, 1, 1], [0, 0], [-1, -1]),
        ("cu_seqlens", [1, 1, 2], [0, 0], [-1, -1]),
        ("state_in", [0, 1, 2], [0, 4], [-1, -1]),
        ("state_in", [0, 1, 2], [-2, 0], [-1, -1]),
        ("state_out", [0, 1, 2], [0, 0], [-1, 4]),
        ("state_out", [0, 1, 2], [0, 0], [-5, 1]),
        ("state_out", [0, 1, 2], [0, 0], [1, 1]),
        ("state_out", [0, 1, 2], [0, 1], [2, 0]),
    ],
)
def test_bad_metadata_is_refused_before_anything_is_written(
    backend: str, field: str, cu: list[int], state_in: list[int], state_out: list[int]
) -> None:
    case = linear_case(GEOMETRIES["lightning"], [Span(1, 0), Span(1, 1)], slots=4)
    before = case.state_pool.clone()
    out = torch.full((2, *signature(case.geometry).output), 7.0)
    kernel = linear_backend(backend).layer(LinearLayer(case.geometry, case.params, case.state_pool))
    with pytest.raises(MetadataError, match=field):
        kernel(case.inputs, LinearMeta(int32(cu), int32(state_in), int32(state_out)), out)
    assert same_bits(case.state_pool, before)
    assert (out == 7.0).all()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_bad_tensors_are_refused_by_name(backend: str) -> None:
    case = linear_case(GEOMETRIES["gated_delta"], [Span(2, 0)], slots=2)
    kernel = linear_backend(backend).layer(
        LinearLayer(case.geometry, case.params, case.state_pool, case.conv_pool)
    )
    out = torch.empty(2, *signature(case.geometry).output)
    mixed = case.inputs["mixed_qkv"]
    with pytest.raises(InputError, match="mixed_qkv"):
        kernel({**case.inputs, "mixed_qkv": mixed[:1]}, case.meta, out)
    with pytest.raises(InputError, match="mixed_qkv"):
        kernel({**case.inputs, "mixed_qkv": mixed.T.contiguous().T}, case.meta, out)
    with pytest.raises(InputError, match="is missing"):
        kernel({"mixed_qkv": mixed}, case.meta, out)
    with pytest.raises(InputError, match="no input"):
        kernel({**case.inputs, "z": mixed}, case.meta, out)
    with pytest.raises(InputError, match="out"):
        kernel(case.inputs, case.meta, out[:, :1])


def test_bad_layers_are_refused_by_name() -> None:
    case = linear_case(GEOMETRIES["gated_delta"], [Span(1, 0)], slots=2)
    params, state, conv = case.params, case.state_pool, case.conv_pool
    with pytest.raises(LayerError, match="conv_pool"):
        LinearLayer(case.geometry, params, state)
    with pytest.raises(LayerError, match="state_pool"):
        LinearLayer(case.geometry, params, state.transpose(2, 3), conv)
    with pytest.raises(LayerError, match="state_pool"):
        LinearLayer(case.geometry, params, state.half(), conv)
    with pytest.raises(LayerError, match="A_log"):
        LinearLayer(case.geometry, {k: v for k, v in params.items() if k != "A_log"}, state, conv)
    with pytest.raises(LayerError, match="alog"):
        LinearLayer(case.geometry, {**params, "alog": params["A_log"]}, state, conv)
    with pytest.raises(MetadataError, match="state_in"):
        LinearMeta(int32([0, 1]), int32([0]).long(), int32([1]))


def test_an_empty_step_is_fine(cpp: LinearBackend, reference: LinearBackend) -> None:
    for spans in ([], [Span(0), Span(0, 0)]):
        case = linear_case(GEOMETRIES["mamba2"], spans, slots=2)
        assert case.run(cpp).out.shape[0] == case.run(reference).out.shape[0] == 0
