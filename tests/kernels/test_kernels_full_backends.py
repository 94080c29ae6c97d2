"""Full backends of differing capability: what each declares is so, and all compute the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from braid_kernels import (
    FullGeometry,
    FullLayer,
    Gqa,
    MetadataError,
    Mla,
    PagedMeta,
    PlanError,
    Planning,
    Ragged,
    UnsupportedError,
    full_backend,
)
from braid_kernels.registry import FULL
from braid_kernels.testing import FullCase, difference, full_case, int32

BACKENDS = ("reference", "cpp", "gather", "direct")
TOLERANCE = 2e-5  # fp32 against float64; measured below 1e-6
BF16 = 2.0**-7

DECLARED = {
    "reference": (Planning.OPTIONAL, True, Ragged.FORCED_OFF),
    "cpp": (Planning.OPTIONAL, True, Ragged.SUPPORTED),
    "gather": (Planning.REQUIRED, True, Ragged.FORCED_OFF),
    "direct": (Planning.NONE, False, Ragged.FORCED_OFF),
}
OPTIONS = {
    "reference": {"prefix_chunk_tokens": "24"},
    "cpp": {"prefix_chunk_tokens": "24", "mla_prefill": "expand"},
    "gather": {"prefix_chunk_tokens": "24"},
    "direct": {},
}
FOREIGN = {"fixed_split_size": "4", "disable_split_kv": "yes"}

GEOMETRIES: dict[str, FullGeometry] = {
    "gqa": Gqa(8, 2, 32, 32, 32**-0.5),
    "odd_group_other_values": Gqa(6, 2, 33, 47, 0.7),
    "mqa": Gqa(5, 1, 16, 24, 1.0),
    "window": Gqa(4, 4, 16, 16, 0.3, sliding_window=11),
    "window_one": Gqa(3, 1, 16, 16, 0.3, sliding_window=1),
    "mla": Mla(2, 16, 8, 24, 64, 24**-0.5),
    "mla_nope": Mla(3, 17, 0, 21, 33, 17**-0.5),
}
LENGTHS, CONTEXTS = (1, 21, 0, 3, 40, 1, 2), (40, 0, 9, 20, 17, 0, 30)
EXTEND = (False, True, True, False, True, True, True)


def mixed(geometry: FullGeometry, **how: object) -> FullCase:
    case = full_case(geometry, LENGTHS, CONTEXTS, page_size=8, pad=3, gap=5, **how)  # type: ignore[arg-type]
    return dataclasses.replace(case, meta=dataclasses.replace(case.meta, extend=torch.tensor(EXTEND)))


def test_the_table_is_what_the_backends_declare() -> None:
    assert set(BACKENDS) <= set(FULL.names())
    for name, declared in DECLARED.items():
        can = full_backend(name).capabilities
        assert (can.planning, can.chunked_prefix, can.ragged) == declared
        assert {"gqa", "mla"} == can.mechanisms
        assert {torch.float32, torch.bfloat16} <= can.dtypes
    assert {planning for planning, *_ in DECLARED.values()} == set(Planning)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_all_give_the_same_whatever_they_plan(name: str, dtype: torch.dtype) -> None:
    """Ragged batches go to each of them: a backend that runs span by span takes them too."""
    case = mixed(GEOMETRIES[name], dtype=dtype)
    expected = case.run(full_backend("reference")).out
    limit = BF16 if dtype is torch.bfloat16 else TOLERANCE
    for backend in BACKENDS:
        chosen = full_backend(backend)
        results = [case.run(chosen, options={**OPTIONS[backend], **FOREIGN}), case.run(chosen, planned=True)]
        if chosen.capabilities.planning is not Planning.REQUIRED:
            results.append(case.run(chosen))
        for result in results:
            assert difference(result.out, expected) <= limit, backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_options_that_a_backend_lacks_come_back(backend: str) -> None:
    case = mixed(GEOMETRIES["mla"])
    every = {"prefix_chunk_tokens": "24", "mla_prefill": "expand", **FOREIGN}
    chosen = full_backend(backend)
    plan = chosen.plan(case.meta, 8, every, (case.geometry,))
    assert plan.ignored_options == tuple(sorted(set(every) - set(OPTIONS[backend])))
    assert (plan.payload is not None) == (chosen.capabilities.planning is not Planning.NONE)
    assert bool(plan.prefix_chunks) == chosen.capabilities.chunked_prefix
    assert bool(plan.workspace_bytes) == chosen.capabilities.chunked_prefix
    assert (plan.qo_indptr_last, plan.kv_tokens) == (sum(LENGTHS), sum(LENGTHS) + sum(CONTEXTS))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["gqa", "mla"])
def test_only_a_backend_that_requires_a_plan_refuses_to_run_without(backend: str, name: str) -> None:
    case = mixed(GEOMETRIES[name])
    chosen = full_backend(backend)
    kernel = chosen.layer(FullLayer(case.geometry, case.params, case.caches))
    before = {key: cache.clone() for key, cache in case.caches.items()}
    out = torch.full_like(case.run(full_backend("reference")).out, float("nan"))
    if chosen.capabilities.planning is Planning.REQUIRED:
        with pytest.raises(PlanError, match="requires a plan"):
            kernel(case.inputs, case.meta, None, out)
        assert out.isnan().all()
        for key, cache in case.caches.items():
            torch.testing.assert_close(cache, before[key], equal_nan=True)
    else:
        kernel(case.inputs, case.meta, None, out)
        assert not out.isnan().any()


@pytest.mark.parametrize("backend", ["reference", "cpp", "gather"])
def test_the_plan_of_another_batch_is_refused(backend: str) -> None:
    case = mixed(GEOMETRIES["mla"])
    chosen = full_backend(backend)
    kernel = chosen.layer(FullLayer(case.geometry, case.params, case.caches))
    out = torch.empty(sum(LENGTHS), 2, 24)
    # As many rows, in other spans, over other prefixes.
    other = PagedMeta(
        int32([0, 30, 60, sum(LENGTHS)]),
        int32([9, 0, 12]),
        torch.arange(24, dtype=torch.int32).view(3, 8) % len(case.caches["latent"]),
    )
    plan = chosen.plan(other, 8, OPTIONS[backend], (case.geometry,))
    with pytest.raises(PlanError):
        kernel(case.inputs, case.meta, plan, out)


@pytest.mark.parametrize(("planner", "runner"), [("gather", "cpp"), ("cpp", "gather"), ("direct", "gather")])
def test_the_plan_of_another_backend_is_refused(planner: str, runner: str) -> None:
    case = mixed(GEOMETRIES["mla"])
    plan = full_backend(planner).plan(case.meta, 8, OPTIONS[planner], (case.geometry,))
    kernel = full_backend(runner).layer(FullLayer(case.geometry, case.params, case.caches))
    with pytest.raises(PlanError):
        kernel(case.inputs, case.meta, plan, torch.empty(sum(LENGTHS), 2, 24))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_spans_are_refused_by_every_planner(backend: str) -> None:
    case = mixed(GEOMETRIES["mla"])
    for cu, contexts in (([1, 2], [0]), ([0, -1], [0]), ([0, 1], [-1]), ([0, 9], [0])):
        meta = PagedMeta(
            int32(cu),
            int32(contexts),
            torch.zeros(1, 1, dtype=torch.int32),
            num_tokens=cu[-1] if cu[-1] > 0 else 1,
        )
        with pytest.raises(MetadataError):
            full_backend(backend).plan(meta, 8, {"prefix_chunk_tokens": "8"}, (case.geometry,))
    with pytest.raises(MetadataError, match="extend"):
        dataclasses.replace(case.meta, extend=torch.ones(2, dtype=torch.bool))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mechanism_that_is_not_declared_is_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, case = full_backend(backend), mixed(GEOMETRIES["mla"])
    can = dataclasses.replace(chosen.capabilities, mechanisms=frozenset({"gqa"}))
    monkeypatch.setattr(chosen, "capabilities", can)
    with pytest.raises(UnsupportedError, match="mla"):
        chosen.layer(FullLayer(case.geometry, case.params, case.caches))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [7, 8, 9, 16, 17])
def test_windows_are_exact_at_page_and_window_borders(backend: str, window: int) -> None:
    """Every key but the visible ones is NaN, one row at a time, with borders on, before and behind pages."""
    for context in (window - 2, window - 1, window, 15, 16, 17):
        case = full_case(Gqa(2, 1, 8, 12, 0.9, sliding_window=window), [1], [context], page_size=8)
        hidden = range(max(0, context - window + 1))
        for p in hidden:
            page = int(case.meta.page_table[0, p // 8])
            for cache in case.caches.values():
                cache[page, p % 8] = float("nan")
        actual = case.run(full_backend(backend), planned=True).out
        assert not actual.isnan().any()
        seen = [*range(len(hidden), context)]
        keys, values = (
            torch.stack(
                [
                    *(case.caches[n][int(case.meta.page_table[0, p // 8]), p % 8, 0] for p in seen),
                    case.inputs[n][0, 0],
                ]
            )
            for n in ("k", "v")
        )
        weights = torch.softmax(0.9 * case.inputs["q"][0].double() @ keys.double().T, dim=-1)
        assert difference(actual[0], weights @ values.double()) <= TOLERANCE
