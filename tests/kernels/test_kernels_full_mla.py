"""MLA prompts over a cached prefix in planned chunks, against one attention over everything."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from braid_kernels import FullLayer, FullPlan, Gqa, Mla, OptionError, PlanError, PrefixChunk, full_backend
from braid_kernels.native.full import CppPlan
from braid_kernels.planning import chunk_prefixes, expands
from braid_kernels.reference import attend, expand_latent, merge_lse
from braid_kernels.testing import FullCase, difference, full_case, int32, poisoned_rows
from hypothesis import given, settings
from hypothesis import strategies as st

TOLERANCE = 2e-5  # fp32; measured below 1e-6

PAGE, CHUNK = 8, 16
PREFIXES = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK - 1)
# ranks that make an expansion pay early, and ones in which nothing is a whole vector
GEOMETRIES = {
    "mla": Mla(2, 16, 8, 24, 64, 24**-0.5),
    "nope_odd": Mla(3, 17, 0, 21, 33, 17**-0.5),
}
# backend → the options that make it expand the spans of prompts
CHUNKED: dict[str, dict[str, str]] = {"reference": {}, "cpp": {"mla_prefill": "expand"}, "gather": {}}


def budget(chunk: int, sequences: int) -> dict[str, str]:
    return {"prefix_chunk_tokens": str(chunk * sequences)}


def prompts(case: FullCase, extend: list[bool]) -> FullCase:
    return dataclasses.replace(case, meta=dataclasses.replace(case.meta, extend=torch.tensor(extend)))


def one_shot(case: FullCase) -> torch.Tensor:
    """Absorbed, float64, without a plan."""
    return case.run(full_backend("reference")).out


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("backend", CHUNKED)
def test_a_prefix_in_chunks_is_the_same_as_in_one(backend: str, name: str, prefix: int) -> None:
    for length in (1, 5, 70):
        case = full_case(GEOMETRIES[name], [length], [prefix], page_size=PAGE, pad=3, gap=5)
        options = {**CHUNKED[backend], **budget(CHUNK, 1)}
        actual = case.run(full_backend(backend), options=options)
        assert difference(actual.out, one_shot(case)) <= TOLERANCE


@pytest.mark.parametrize("backend", CHUNKED)
@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16])
def test_a_batch_mixes_prefixes_decodes_and_empty_spans(backend: str, cache: torch.dtype) -> None:
    lengths = (9, 9, 1, 9, 0, 9, 40, 4, 1)
    contexts = (0, 1, 33, CHUNK - 1, 20, CHUNK, CHUNK + 1, 50, CHUNK)
    extend = [True, True, False, True, True, True, True, False, True]
    geometry = GEOMETRIES["mla"]
    case = prompts(
        full_case(geometry, lengths, contexts, page_size=PAGE, cache_dtype=cache, pad=3, gap=5), extend
    )
    chosen = full_backend(backend)
    options = {**CHUNKED[backend], **budget(CHUNK, 5)}
    plan = chosen.plan(case.meta, PAGE, options, (geometry,))
    covered = [sum(chunk.lengths[b] for chunk in plan.prefix_chunks) for b in range(len(lengths))]
    assert covered == [0, 1, 0, CHUNK - 1, 0, CHUNK, CHUNK + 1, 0, CHUNK]
    assert plan.payload is not None and plan.ignored_options == ()
    width = 16 + 8 + 24
    assert plan.workspace_bytes >= CHUNK * width * 4
    # Both read the same latents back, rounded or not.
    assert difference(case.run(chosen, options=options).out, one_shot(case)) <= TOLERANCE


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(sorted(CHUNKED)),
    st.sampled_from(sorted(GEOMETRIES)),
    st.lists(
        st.tuples(st.sampled_from([0, 1, 2, 9, 33]), st.integers(0, 60), st.booleans()),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 200),
    st.sampled_from([1, 5, 16]),
    st.integers(0, 2**31 - 1),
)
def test_any_batch_and_budget(
    backend: str, name: str, spans: list[tuple[int, int, bool]], budget: int, page_size: int, seed: int
) -> None:
    lengths, contexts, extend = (list(part) for part in zip(*spans, strict=True))
    case = full_case(GEOMETRIES[name], lengths, contexts, page_size=page_size, seed=seed, pad=seed % 3)
    case = prompts(case, extend)
    options = {**CHUNKED[backend], "prefix_chunk_tokens": str(budget)}
    result = case.run(full_backend(backend), options=options)
    assert difference(result.out, one_shot(case)) <= TOLERANCE
    chunks = chunk_prefixes(case.meta, page_size, budget)
    prefixed = [c for n, c, e in spans if n and c and e]
    step = max(budget // max(len(prefixed), 1) // page_size, 1) * page_size
    assert all(length <= step for chunk in chunks for length in chunk.lengths)
    assert sum(sum(chunk.lengths) for chunk in chunks) == sum(prefixed)
    assert len(chunks) == math.ceil(max(prefixed, default=0) / step)


@pytest.mark.parametrize("prefill", ["cheaper", "expand", "absorb"])
def test_cpp_without_chunks_cuts_its_own_work(prefill: str) -> None:
    """Prefixes longer than what it expands at a time (512), and spans of more than one block of rows."""
    case = full_case(GEOMETRIES["mla"], [150, 1, 17], [600, 40, 0], page_size=16)
    result = case.run(full_backend("cpp"), options={"mla_prefill": prefill})
    assert difference(result.out, one_shot(case)) <= TOLERANCE


def test_a_poisoned_workspace_is_not_read() -> None:
    """Scratch memory keeps what the last call left there: NaN everywhere."""
    cpp, options = full_backend("cpp"), {"mla_prefill": "expand", **budget(32, 1)}
    poison = full_case(GEOMETRIES["mla"], [140], [64], page_size=PAGE)
    for tensor in (*poison.inputs.values(), *poison.caches.values()):
        tensor.fill_(math.nan)
    assert poison.run(cpp, options=options).out.isnan().all()
    for name in GEOMETRIES:
        case = full_case(GEOMETRIES[name], [37], [41], page_size=PAGE)
        assert difference(case.run(cpp, options=options).out, one_shot(case)) <= TOLERANCE


def test_a_chunk_plan_does_not_change_what_alone_or_in_a_crowd_means() -> None:
    cpp = full_backend("cpp")
    case = full_case(GEOMETRIES["mla"], [30, 20], [50, 9], page_size=PAGE)
    options = {"mla_prefill": "expand", **budget(CHUNK, 2)}
    together = case.run(cpp, options=options).out
    meta = dataclasses.replace(
        case.meta,
        cu_seqlens=int32([0, 30]),
        context_lens=case.meta.context_lens[:1],
        page_table=case.meta.page_table[:1],
        num_tokens=30,
    )
    alone = dataclasses.replace(case, meta=meta, inputs={n: x[:30] for n, x in case.inputs.items()})
    assert difference(alone.run(cpp, options=options).out, together[:30]) <= TOLERANCE


def parts(case: FullCase, cut: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """out and lse of a case's only span, over its first `cut` positions and over the others."""
    page = case.meta.page_table[0].long()
    latent = case.caches["latent"][page].flatten(0, 1)[: int(case.meta.context_lens[0])]
    k, v = expand_latent(latent.double(), case.params["w_uk"], case.params["w_uv"])
    q = torch.cat([case.inputs["q_nope"], case.inputs["q_pe"]], dim=-1).double()
    scale = case.geometry.scale
    new = torch.cat([case.inputs["c_kv"], case.inputs["k_pe"]], dim=-1).double()
    k_new, v_new = expand_latent(new, case.params["w_uk"], case.params["w_uv"])
    return [
        attend(q, k[:cut], v[:cut], scale, causal=False),
        attend(q, k[cut:], v[cut:], scale, causal=False),
        attend(q, k_new, v_new, scale, causal=True),
    ]


def merge_base_2(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a kernel does that takes natural-log lse for base-2 ones."""
    lse = torch.logaddexp2(lse_a, lse_b)
    return out_a * torch.exp2(lse_a - lse)[..., None] + out_b * torch.exp2(lse_b - lse)[..., None], lse


def test_lse_is_natural_and_a_base_2_merge_would_be_noticed() -> None:
    case = full_case(GEOMETRIES["mla"], [12], [3 * CHUNK], page_size=PAGE)
    expected = one_shot(case)
    errors = []
    for merge in (merge_lse, merge_base_2):
        (out, lse), *others = parts(case, CHUNK)
        for part in others:
            out, lse = merge(out, lse, *part)
        errors.append(difference(out, expected))
    assert errors[0] <= TOLERANCE
    assert errors[1] > 1e-2


def test_parts_without_keys_merge_without_nan() -> None:
    out, lse = torch.randn(3, 2, 4), torch.randn(3, 2)
    nothing, minus = torch.zeros(3, 2, 4), torch.full((3, 2), -math.inf)
    for a, b in (((out, lse), (nothing, minus)), ((nothing, minus), (out, lse))):
        merged, merged_lse = merge_lse(*a, *b)
        torch.testing.assert_close(merged, out)
        torch.testing.assert_close(merged_lse, lse)
    merged, merged_lse = merge_lse(nothing, minus, nothing, minus)
    assert (merged == 0).all() and (merged_lse == -math.inf).all()
    poison = poisoned_rows(3, (2, 4), torch.float32, 0)  # beside lse -inf, out may hold anything
    torch.testing.assert_close(merge_lse(poison, minus, out, lse)[0], out)
    assert merge_lse(poison, lse, out, lse)[0].isnan().all()  # but a real NaN is kept
    empty = attend(torch.randn(5, 2, 8), torch.zeros(0, 2, 8), torch.zeros(0, 2, 4), 1.0, causal=False)
    assert (empty[0] == 0).all() and (empty[1] == -math.inf).all()


BAD_CHUNKS = {
    "gap": [(0, 8), (16, 4)],
    "overlap": [(0, 16), (8, 12)],
    "out of order": [(8, 12), (0, 8)],
    "too short": [(0, 16)],
    "too long": [(0, 16), (16, 8)],
    "none": [],
}


@pytest.mark.parametrize("name", BAD_CHUNKS)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_kernels_refuse_chunks_that_do_not_cover_the_prefix(backend: str, name: str) -> None:
    chunks = [PrefixChunk((start,), (length,)) for start, length in BAD_CHUNKS[name]] or [
        PrefixChunk((0,), (0,))
    ]
    geometry = GEOMETRIES["mla"]
    case = full_case(geometry, [4], [20], page_size=PAGE)
    payload = CppPlan.of(case.meta, tuple(chunks), "expand") if backend == "cpp" else tuple(chunks)
    plan = FullPlan(4, 24, prefix_chunks=tuple(chunks), payload=payload)
    kernel = full_backend(backend).layer(FullLayer(geometry, case.params, case.caches))
    before = case.caches["latent"].clone()
    with pytest.raises(PlanError, match="prefix_chunks"):
        kernel(case.inputs, case.meta, plan, torch.empty(4, 2, 24))
    torch.testing.assert_close(case.caches["latent"], before, equal_nan=True)


@pytest.mark.parametrize("backend", CHUNKED)
@pytest.mark.parametrize("value", ["0", "-1", "x", "", "1.5", "²"])
def test_a_value_that_is_no_budget_is_refused(backend: str, value: str) -> None:
    case = full_case(GEOMETRIES["mla"], [4], [20], page_size=PAGE)
    with pytest.raises(OptionError, match="prefix_chunk_tokens"):
        full_backend(backend).plan(case.meta, PAGE, {"prefix_chunk_tokens": value}, (case.geometry,))
    with pytest.raises(OptionError, match="mla_prefill"):
        full_backend("cpp").plan(case.meta, PAGE, {"mla_prefill": "fast"}, (case.geometry,))


def test_layers_without_mla_have_no_chunks() -> None:
    case = full_case(Gqa(2, 1, 8, 8, 0.3), [4], [20], page_size=PAGE)
    for backend in ("reference", "cpp", "gather"):
        plan = full_backend(backend).plan(case.meta, PAGE, budget(CHUNK, 1), (case.geometry,))
        assert (plan.prefix_chunks, plan.workspace_bytes, plan.ignored_options) == ((), 0, ())


def test_expansion_pays_where_it_costs_fewer_multiplications() -> None:
    large = Mla(32, 128, 64, 128, 512, 192**-0.5)
    assert not expands(large, 1, 0) and not expands(large, 64, 8192)
    assert expands(large, 16, 0) and expands(large, 256, 8192)
    assert not expands(Mla(2, 64, 16, 64, 16, 0.1), 500, 500)  # a rank below the heads' own width
