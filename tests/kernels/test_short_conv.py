"""The short convolution: its only state is its last inputs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from braid_kernels import (
    GeometryError,
    InputError,
    LayerError,
    LinearBackend,
    LinearLayer,
    LinearMeta,
    MetadataError,
    ShortConv,
    linear_backend,
)
from braid_kernels.testing import (
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

FP32 = 5e-6
BF16 = 2.0**-8
GEOMETRY = ShortConv(channels=53, conv_width=3)


@pytest.fixture(scope="module")
def cpp() -> LinearBackend:
    return linear_backend("cpp")


@pytest.fixture(scope="module")
def reference() -> LinearBackend:
    return linear_backend("reference")


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_it_is_a_padded_convolution(backend: str) -> None:
    case = linear_case(GEOMETRY, [Span.final(11, -1, 0)], slots=1, bias=True)
    weight, x = case.params["conv_weight"], case.inputs["x"]
    padded = torch.nn.functional.pad(x.T, (GEOMETRY.conv_width - 1, 0))[None]
    wanted = torch.nn.functional.conv1d(
        padded, weight[:, None], case.params["conv_bias"], groups=GEOMETRY.channels
    )
    found = case.run(linear_backend(backend))
    torch.testing.assert_close(found.out, wanted[0].T)
    assert found.conv_pool is not None
    assert same_bits(found.conv_pool[0], x[-2:].T)


@settings(deadline=None, max_examples=25)
@given(
    channels=st.integers(1, 70),
    width=st.integers(2, 16),
    lengths=st.lists(st.sampled_from([0, 1, 1, 2, 7, 40]), min_size=1, max_size=5),
    bias=st.booleans(),
    bf16=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_matches_the_reference(
    cpp: LinearBackend,
    reference: LinearBackend,
    channels: int,
    width: int,
    lengths: list[int],
    bias: bool,
    bf16: bool,
    seed: int,
) -> None:
    lengths = [40, *lengths]  # errors are told by the largest output, and one alone may vanish
    spans = [Span.final(length, i - 1, len(lengths) + i) for i, length in enumerate(lengths)]
    case = linear_case(
        ShortConv(channels, width), spans, slots=2 * len(lengths), seed=seed, pad=seed % 3, gap=seed % 2,
        bias=bias, dtype=torch.bfloat16 if bf16 else torch.float32,
    )  # fmt: skip
    actual, expected = case.run(cpp), case.run(reference)
    assert not expected.out.isnan().any()
    assert difference(actual.out, expected.out) < (BF16 if bf16 else FP32)
    assert actual.conv_pool is not None and expected.conv_pool is not None
    assert same_bits(actual.conv_pool, expected.conv_pool)


def test_single_tokens_equal_one_shot_bitwise(cpp: LinearBackend) -> None:
    whole = linear_case(GEOMETRY, [Span.final(9, 0, 1)], slots=12)
    one_shot, case, outs = whole.run(cpp), whole, []
    for t in range(9):
        meta = linear_meta([Span.final(1, 0 if t == 0 else 1 + t, 2 + t)])
        case = dataclasses.replace(case, inputs=select_inputs(whole.inputs, t, t + 1), meta=meta).run(cpp)
        outs.append(case.out)
    assert same_bits(torch.cat(outs), one_shot.out.contiguous())
    assert case.conv_pool is not None and one_shot.conv_pool is not None
    assert same_bits(case.conv_pool[10], one_shot.conv_pool[1])


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("field", "cu", "state_in", "state_out"),
    [
        ("cu_seqlens", [0, 1, 1], [0, 0], [-1, -1]),
        ("state_in", [0, 1, 2], [0, 4], [-1, -1]),
        ("state_out", [0, 1, 2], [0, 1], [2, 0]),
    ],
)
def test_bad_metadata_is_refused_before_anything_is_written(
    backend: str, field: str, cu: list[int], state_in: list[int], state_out: list[int]
) -> None:
    case = linear_case(GEOMETRY, [Span(1, 0), Span(1, 1)], slots=4)
    assert case.conv_pool is not None
    before, out = case.conv_pool.clone(), torch.full((2, GEOMETRY.channels), 7.0)
    kernel = linear_backend(backend).layer(LinearLayer(GEOMETRY, case.params, None, case.conv_pool))
    with pytest.raises(MetadataError, match=field):
        kernel(case.inputs, LinearMeta(int32(cu), int32(state_in), int32(state_out)), out)
    with pytest.raises(InputError, match="x"):
        kernel({}, case.meta, out)
    assert same_bits(case.conv_pool, before)
    assert (out == 7.0).all()


def test_bad_layers_are_refused_by_name() -> None:
    case = linear_case(GEOMETRY, [Span(1, 0)], slots=2)
    assert case.conv_pool is not None
    with pytest.raises(LayerError, match="state_pool"):
        LinearLayer(GEOMETRY, case.params, torch.zeros(2, 4, 4, 4), case.conv_pool)
    with pytest.raises(LayerError, match="conv_pool"):
        LinearLayer(GEOMETRY, case.params, None)
    with pytest.raises(LayerError, match="conv_weight"):
        LinearLayer(GEOMETRY, {}, None, case.conv_pool)
    with pytest.raises(GeometryError, match="conv_width"):
        ShortConv(8, 1)


def test_verify_writes_the_state_of_every_prefix(cpp: LinearBackend) -> None:
    """Fewer tokens than the convolution looks back, as many, and more."""
    length = 6
    case = linear_case(ShortConv(5, 4), [Span(length, 0, tuple(range(1, 1 + length)))], slots=8)
    verify = case.run(cpp)
    assert verify.conv_pool is not None
    for n in range(1, length + 1):
        inputs = select_inputs(case.inputs, 0, n)
        prefix = dataclasses.replace(case, inputs=inputs, meta=linear_meta([Span.final(n, 0, 7)])).run(cpp)
        assert prefix.conv_pool is not None
        assert same_bits(prefix.conv_pool[7], verify.conv_pool[n])
