"""Paged full attention against the float64 reference, over poisoned pages."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from braid_kernels import (
    FullBackend,
    FullGeometry,
    FullLayer,
    FullPlan,
    Gqa,
    LayerError,
    MetadataError,
    Mla,
    PagedMeta,
    PlanError,
    full_backend,
    signature,
)
from braid_kernels.native import num_threads, set_num_threads
from braid_kernels.reference import paged_attention
from braid_kernels.reference.attention import softmax_rows
from braid_kernels.testing import FullCase, cumulative, difference, full_case, int32, same_bits, select_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

# See test_kernels_linear: fp32 rounding over ~1000 positively weighted terms; measured below 6e-7.
FP32 = 5e-6
BF16 = 2.0**-8

LENGTHS, CONTEXTS = (1, 65, 0, 3, 1, 130, 2), (70, 0, 9, 40, 0, 17, 30)

GEOMETRIES: dict[str, FullGeometry] = {
    "gqa": Gqa(8, 2, 64, 64, 0.125),
    "gqa_odd": Gqa(6, 2, 33, 47, 0.17),
    "mha_window": Gqa(4, 4, 32, 32, 0.2, sliding_window=20),
    "mqa": Gqa(16, 1, 128, 128, 0.1),
    "mqa_tiny_window": Gqa(5, 1, 40, 72, 0.1, sliding_window=3),
    "window_one": Gqa(2, 2, 16, 16, 0.1, sliding_window=1),
    "mla": Mla(4, 32, 16, 24, 48, 48**-0.5),
    "mla_nope_odd": Mla(3, 17, 0, 24, 33, 17**-0.5),
}


@pytest.fixture(scope="module")
def cpp() -> FullBackend:
    return full_backend("cpp")


@pytest.fixture(scope="module")
def reference() -> FullBackend:
    return full_backend("reference")


def assert_close(actual: FullCase, expected: FullCase) -> None:
    assert difference(actual.out, expected.out) < (BF16 if expected.out.dtype == torch.bfloat16 else FP32)
    for name, cache in expected.caches.items():
        assert same_bits(actual.caches[name], cache)  # appended rows are copied; all else is untouched


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "bf16_cache"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_mixed_batch_matches_the_reference(
    cpp: FullBackend, reference: FullBackend, name: str, dtypes: str
) -> None:
    case = full_case(
        GEOMETRIES[name],
        LENGTHS,
        CONTEXTS,
        dtype=torch.bfloat16 if dtypes == "bf16" else torch.float32,
        cache_dtype=torch.float32 if dtypes == "fp32" else torch.bfloat16,
        pad=5,
        gap=7,
    )
    actual, expected = case.run(cpp, planned=True), case.run(reference, planned=True)
    assert not expected.out.isnan().any()
    assert_close(actual, expected)


@pytest.mark.parametrize("length", [1, 2, 4, 63, 64, 65])
@pytest.mark.parametrize("page_size", [1, 7, 64])
def test_lengths_and_page_sizes(
    cpp: FullBackend, reference: FullBackend, length: int, page_size: int
) -> None:
    for context in (0, 1, 63, 64, 65):
        case = full_case(Gqa(4, 2, 32, 32, 0.2), [length], [context], page_size=page_size, seed=context)
        assert_close(case.run(cpp), case.run(reference))


@pytest.mark.parametrize(
    "geometry", [GEOMETRIES["gqa"], Gqa(4, 2, 24, 24, 0.2, sliding_window=1500)], ids=str
)
@pytest.mark.parametrize("length", [1, 4])
def test_long_context_is_split_and_merged(
    cpp: FullBackend, reference: FullBackend, geometry: Gqa, length: int
) -> None:
    """More keys than one unit takes (1024): partial softmaxes merge, also where a row has none in a part."""
    case = full_case(geometry, [length, 1], [2046, 1024])
    assert_close(case.run(cpp), case.run(reference))


@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from(sorted(GEOMETRIES)),
    st.lists(st.tuples(st.sampled_from([0, 1, 1, 2, 5, 9, 70]), st.integers(0, 90)), min_size=1, max_size=5),
    st.sampled_from([1, 5, 16]),
    st.integers(0, 2**31 - 1),
)
def test_any_batch_matches_the_reference(
    cpp: FullBackend,
    reference: FullBackend,
    name: str,
    spans: list[tuple[int, int]],
    page_size: int,
    seed: int,
) -> None:
    lengths, contexts = zip(*spans, strict=True)
    case = full_case(GEOMETRIES[name], lengths, contexts, page_size=page_size, seed=seed, pad=seed % 3)
    assert_close(case.run(cpp), case.run(reference))


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_sequence_alone_equals_the_same_in_a_crowd(cpp: FullBackend, name: str, threads: int) -> None:
    crowd = full_case(GEOMETRIES[name], (*LENGTHS, 1), (*CONTEXTS, 1100))
    before = num_threads()
    set_num_threads(threads)
    try:
        together = crowd.run(cpp)
    finally:
        set_num_threads(before)
    for b, (begin, end) in enumerate(itertools.pairwise(crowd.meta.cu_seqlens.tolist())):
        meta = PagedMeta(
            cumulative([end - begin]),
            crowd.meta.context_lens[b : b + 1].clone(),
            crowd.meta.page_table[b : b + 1].clone(),
        )
        alone = dataclasses.replace(crowd, inputs=select_inputs(crowd.inputs, begin, end), meta=meta).run(cpp)
        assert same_bits(alone.out, together.out[begin:end])


@pytest.mark.parametrize("name", GEOMETRIES)
def test_chunked_prefill_equals_one_shot(cpp: FullBackend, name: str) -> None:
    total, cuts = 150, (1, 2, 64, 129, 150)
    whole = full_case(GEOMETRIES[name], [total], [0])
    one_shot = whole.run(cpp)
    case, outs = whole, []
    for begin, end in itertools.pairwise((0, *cuts)):
        meta = PagedMeta(cumulative([end - begin]), int32([begin]), whole.meta.page_table)
        case = dataclasses.replace(case, inputs=select_inputs(whole.inputs, begin, end), meta=meta).run(cpp)
        outs.append(case.out)
    assert difference(torch.cat(outs), one_shot.out) < FP32
    for cache_name, cache in one_shot.caches.items():
        assert same_bits(case.caches[cache_name], cache)


def test_two_sequences_may_share_prefix_pages(cpp: FullBackend) -> None:
    case = full_case(Gqa(2, 1, 16, 16, 0.25), [1, 1], [16, 16], page_size=16)
    shared = case.meta.page_table.clone()
    shared[1, 0] = shared[0, 0]
    inputs = {name: rows[:1].expand(2, *rows.shape[1:]).contiguous() for name, rows in case.inputs.items()}
    meta = PagedMeta(case.meta.cu_seqlens, case.meta.context_lens, shared)
    result = dataclasses.replace(case, inputs=inputs, meta=meta).run(cpp)
    assert same_bits(result.out[0], result.out[1])


def test_pages_wholly_before_the_window_are_not_read(cpp: FullBackend, reference: FullBackend) -> None:
    case = full_case(Gqa(2, 1, 16, 16, 0.25, sliding_window=8), [1, 3], [40, 50], page_size=8)
    for b, context in enumerate((40, 50)):
        first = (context - 8 + 1) // 8
        for page in case.meta.page_table[b, :first].tolist():
            case.caches["k"][page] = case.caches["v"][page] = float("nan")
        case.meta.page_table[b, :first] = -1
    actual = case.run(cpp)
    assert not actual.out.isnan().any()
    assert_close(actual, case.run(reference))


def test_large_scores_do_not_overflow(cpp: FullBackend, reference: FullBackend) -> None:
    """Scores reach about 400, so fp32 knows them to 2e-5, and their exponentials no better."""
    case = full_case(Gqa(4, 2, 32, 32, 20.0), [1, 40], [100, 3])
    assert difference(case.run(cpp).out, case.run(reference).out) < 1e-4


def test_reference_lse_is_natural_and_merges() -> None:
    """LSE is the natural log of the sum of exponentials; two halves merge to the whole with it."""
    case = full_case(Gqa(4, 2, 16, 16, 0.25), [1], [19], page_size=4)
    q, k, v = (case.inputs[n] for n in "qkv")
    k_cache, v_cache = case.caches["k"].clone(), case.caches["v"].clone()
    page = int(case.meta.page_table[0, 4])
    k_cache[page, 3], v_cache[page, 3] = k[0], v[0]
    table = case.meta.page_table.tolist()
    out, lse = paged_attention(q, k_cache, v_cache, [0, 1], [19], table, 0.25)
    keys = torch.stack([k_cache[table[0][p // 4], p % 4] for p in range(20)]).double().repeat_interleave(2, 1)
    values = (
        torch.stack([v_cache[table[0][p // 4], p % 4] for p in range(20)]).double().repeat_interleave(2, 1)
    )
    scores = 0.25 * torch.einsum("hd,nhd->hn", q[0].double(), keys)
    torch.testing.assert_close(lse[0], scores.exp().sum(1).log())
    parts = [softmax_rows(scores[:, s], values[s]) for s in (slice(0, 7), slice(7, 7), slice(7, 20))]
    merged = sum(part * (part_lse - lse[0]).exp()[:, None] for part, part_lse in parts)
    torch.testing.assert_close(merged, out[0])


def test_no_keys_gives_zero_and_minus_infinity() -> None:
    out, lse = softmax_rows(torch.zeros(3, 0).double(), torch.zeros(0, 3, 5))
    assert (out == 0).all() and (lse == float("-inf")).all()
    out, lse = softmax_rows(torch.full((3, 2), float("-inf")).double(), torch.ones(2, 3, 5))
    assert (out == 0).all() and (lse == float("-inf")).all()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("field", "cu", "contexts", "table"),
    [
        ("cu_seqlens", [0, 2, 1], [0, 0], [[0], [1]]),
        ("context_lens", [0, 1, 2], [-1, 0], [[0], [1]]),
        ("context_lens", [0, 1, 2], [4, 0], [[0], [1]]),
        ("page_table", [0, 1, 2], [0, 0], [[0], [9]]),
        ("page_table", [0, 1, 2], [0, 0], [[-1], [1]]),
    ],
)
def test_bad_metadata_is_refused_before_anything_is_written(
    backend: str, field: str, cu: list[int], contexts: list[int], table: list[list[int]]
) -> None:
    case = full_case(Gqa(2, 1, 8, 8, 0.3), [1, 1], [0, 0], page_size=4)
    before = {name: cache.clone() for name, cache in case.caches.items()}
    kernel = full_backend(backend).layer(FullLayer(case.geometry, {}, case.caches))
    meta = PagedMeta(int32(cu), int32(contexts), torch.tensor(table, dtype=torch.int32), num_tokens=2)
    with pytest.raises(MetadataError, match=field):
        kernel(case.inputs, meta, None, torch.empty(2, 2, 8))
    for name, cache in case.caches.items():
        assert same_bits(cache, before[name])


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_plan_summary_and_foreign_plans(backend: str) -> None:
    chosen = full_backend(backend)
    case = full_case(Gqa(2, 1, 8, 8, 0.3), [3, 0, 1], [5, 7, 0], page_size=4)
    plan = chosen.plan(case.meta, 4, {"fixed_split_size": "4"}, (case.geometry,))
    assert (plan.qo_indptr_last, plan.kv_tokens, plan.ignored_options) == (4, 16, ("fixed_split_size",))
    kernel = chosen.layer(FullLayer(case.geometry, {}, case.caches))
    out = torch.empty(4, *signature(case.geometry).output)
    kernel(case.inputs, case.meta, plan, out)
    with pytest.raises(PlanError, match="qo_indptr_last"):
        kernel(case.inputs, case.meta, FullPlan(qo_indptr_last=800, kv_tokens=800), out)
    with pytest.raises(MetadataError, match="outgrow"):
        chosen.plan(case.meta, 2, {}, (case.geometry,))


def test_bad_caches_are_refused_by_name() -> None:
    geometry = Gqa(2, 1, 8, 8, 0.3)
    k = torch.zeros(2, 4, 1, 8)
    with pytest.raises(LayerError, match="caches"):
        FullLayer(geometry, {}, {"k": k})
    with pytest.raises(LayerError, match="agree"):
        FullLayer(geometry, {}, {"k": k, "v": torch.zeros(2, 8, 1, 8)})
    with pytest.raises(LayerError, match=r"caches\[v\]"):
        FullLayer(geometry, {}, {"k": k, "v": torch.zeros(2, 4, 1, 9)})
