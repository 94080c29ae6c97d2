"""What FlashInfer is told to plan and run, against a stand-in that computes from those arguments alone."""

from __future__ import annotations

import ast
import dataclasses
import gc
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from braid_kernels import BuildError, FullLayer, Gqa, InputError, MetadataError, Mla, PlanError, full_backend
from braid_kernels import flashinfer_backend as module
from braid_kernels.flashinfer_backend import FlashInferFullBackend
from braid_kernels.testing import FullCase, difference, full_case
from flashinfer_fake import RELEASED, FakeFlashInfer

BF16 = 2.0**-6
GQA = Gqa(8, 2, 64, 64, 64**-0.5)
TC = Gqa(8, 1, 64, 64, 0.2)
WINDOW = Gqa(4, 2, 64, 64, 0.3, sliding_window=11)
MLA = Mla(2, 64, 64, 128, 512, 0.1)  # qk 128, v 128
WIDE_MLA = Mla(2, 48, 64, 32, 512, 0.1)  # no ragged kernel: always over latents
PAGED, DECODE = "BatchPrefillWithPagedKVCacheWrapper", "BatchDecodeWithPagedKVCacheWrapper"
RAGGED, LATENT = "BatchPrefillWithRaggedKVCacheWrapper", "mla.BatchMLAPagedAttentionWrapper"
LENGTHS, CONTEXTS = (1, 21, 0, 3, 20, 1, 2), (40, 0, 9, 20, 17, 0, 30)
EXTEND = (False, True, True, False, True, True, True)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeFlashInfer:
    return FakeFlashInfer()


@pytest.fixture
def backend(api: FakeFlashInfer) -> FlashInferFullBackend:
    return FlashInferFullBackend(api, full_backend("reference"))


def mixed(
    geometry: Any, lengths: tuple[int, ...] = LENGTHS, contexts: tuple[int, ...] = CONTEXTS
) -> FullCase:
    case = full_case(geometry, lengths, contexts, page_size=8, dtype=torch.bfloat16)
    extend = torch.tensor(EXTEND[: len(lengths)])
    return dataclasses.replace(case, meta=dataclasses.replace(case.meta, extend=extend))


def run(case: FullCase, backend: FlashInferFullBackend, **options: str) -> FullCase:
    """As `FullCase.run`, which plans before it resolves the layer."""
    caches = {name: cache.clone() for name, cache in case.caches.items()}
    kernel = backend.layer(FullLayer(case.geometry, case.params, caches))
    plan = backend.plan(case.meta, 8, options, (case.geometry,))
    expected = case.run(full_backend("reference"))
    out = torch.full_like(expected.out, float("nan"))
    kernel(case.inputs, case.meta, plan, out)
    return dataclasses.replace(case, caches=caches, out=out)


def check(case: FullCase, backend: FlashInferFullBackend, **options: str) -> None:
    expected = case.run(full_backend("reference"))
    actual = run(case, backend, **options)
    assert not expected.out.isnan().any()
    assert difference(actual.out, expected.out) < BF16
    for name, cache in expected.caches.items():
        torch.testing.assert_close(actual.caches[name], cache, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("geometry", [GQA, TC, WINDOW, MLA, WIDE_MLA])
@pytest.mark.parametrize("options", [{}, {"prefix_chunk_tokens": "24"}], ids=["whole", "chunks"])
def test_a_mixed_batch(backend: FlashInferFullBackend, geometry: Any, options: dict[str, str]) -> None:
    check(mixed(geometry), backend, **options)


@pytest.mark.parametrize("geometry", [GQA, TC, WINDOW, MLA])
def test_decode(backend: FlashInferFullBackend, api: FakeFlashInfer, geometry: Any) -> None:
    case = mixed(geometry, (1, 1, 1), (40, 8, 0))
    case = dataclasses.replace(case, meta=dataclasses.replace(case.meta, extend=torch.tensor([False] * 3)))
    check(case, backend)
    (name, planned) = api.plans[0]
    assert name == (LATENT if geometry is MLA else DECODE)
    if geometry is not MLA:
        assert api.made[0].made["use_tensor_cores"] == (geometry is not WINDOW)
        assert planned["q_data_type"] is planned["kv_data_type"] is torch.bfloat16
        assert planned["window_left"] == (10 if geometry is WINDOW else -1)


def test_planned_arguments_of_paged_prefill(backend: FlashInferFullBackend, api: FakeFlashInfer) -> None:
    case = mixed(GQA, (3, 0, 9), (7, 5, 8))
    run(case, backend)
    ((name, planned),) = api.plans
    table = case.meta.page_table
    assert name == PAGED and api.runs == [PAGED]
    assert planned["qo_indptr"].tolist() == [0, 3, 12]  # the empty span is left out
    assert planned["paged_kv_indptr"].tolist() == [0, 2, 5]
    assert planned["paged_kv_indices"].tolist() == [*table[0, :2].tolist(), *table[2, :3].tolist()]
    assert planned["paged_kv_last_page_len"].tolist() == [2, 1]
    assert (planned["num_qo_heads"], planned["num_kv_heads"], planned["head_dim_qk"]) == (8, 2, 64)
    assert planned["page_size"] == 8 and planned["causal"] is True and planned["sm_scale"] == GQA.scale


def test_pages_behind_a_window_are_left_out(backend: FlashInferFullBackend, api: FakeFlashInfer) -> None:
    """Their entries may name pages of others, or none."""
    case = mixed(WINDOW, (1, 5), (40, 33))
    table = case.meta.page_table.clone()
    table[0, :3], table[1, :2] = -1, -1
    case = dataclasses.replace(case, meta=dataclasses.replace(case.meta, page_table=table))
    check(case, backend)
    (_, planned) = api.plans[0]
    assert planned["paged_kv_indptr"].tolist() == [0, 3, 6]


def test_mla_prompts_run_over_chunks_and_are_merged(
    backend: FlashInferFullBackend, api: FakeFlashInfer
) -> None:
    case = mixed(MLA)
    check(case, backend, prefix_chunk_tokens="24")
    names = [name for name, _ in api.plans]
    ragged = [planned for name, planned in api.plans if name == RAGGED]
    assert names[-1] == LATENT and names.count(LATENT) == 1
    own, *chunks = ragged
    assert own["causal"] is True and own["qo_indptr"].tolist() == [0, 21, 41, 42, 44]
    assert len(chunks) == 4 and all(chunk["causal"] is False for chunk in chunks)
    # 24 // 2 sequences with a prefix, in whole pages of 8; the one of 17 positions leaves after three chunks.
    assert [chunk["kv_indptr"].tolist() for chunk in chunks] == [[0, 8, 16], [0, 8, 16], [0, 1, 9], [0, 6]]
    assert api.runs.count("merge_state") == 4
    (latent,) = [planned for name, planned in api.plans if name == LATENT]
    assert latent["qo_indptr"].tolist() == [0, 1, 4] and latent["kv_len_arr"].tolist() == [41, 23]


def test_merging_is_exact_whatever_the_base_would_do(backend: FlashInferFullBackend) -> None:
    """Scores far from zero, where a natural log-sum-exp taken for a base-2 one shows."""
    case = mixed(dataclasses.replace(MLA, scale=0.4), (20,), (32,))
    check(case, backend, prefix_chunk_tokens="8")


def test_wrappers_go_back_when_a_plan_is_gone(backend: FlashInferFullBackend, api: FakeFlashInfer) -> None:
    """Two lanes need one each; the next step needs no new ones, and all share one workspace."""
    case = mixed(GQA, (3, 2), (1, 9))
    kernel = backend.layer(FullLayer(GQA, {}, {name: x.clone() for name, x in case.caches.items()}))
    plans = [backend.plan(case.meta, 8, {}, (GQA,)) for _ in range(2)]
    assert len(api.made) == 2
    out = torch.empty(case.meta.num_tokens, 8, 64, dtype=torch.bfloat16)
    for plan in plans:
        kernel(case.inputs, case.meta, plan, out)
    del plan, plans
    gc.collect()
    kernel(case.inputs, case.meta, backend.plan(case.meta, 8, {}, (GQA,)), out)
    assert len(api.made) == 2
    workspaces = {wrapper.made["float_workspace_buffer"].data_ptr() for wrapper in api.made}
    assert len(workspaces) == 1


def test_what_flashinfer_has_no_kernels_for_goes_elsewhere(
    backend: FlashInferFullBackend, api: FakeFlashInfer
) -> None:
    odd = Gqa(4, 2, 48, 48, 0.1)
    fp32 = full_case(GQA, (2, 1), (3, 4), page_size=8)
    for case in (mixed(odd, (2, 1), (3, 4)), fp32, mixed(Mla(2, 16, 8, 24, 64, 0.2), (2, 1), (3, 4))):
        expected = case.run(full_backend("reference"))
        assert difference(run(case, backend).out, expected.out) < BF16
    assert not api.plans


def test_misuse_is_refused(backend: FlashInferFullBackend) -> None:
    case = mixed(GQA, (3, 1), (5, 9))
    kernel = backend.layer(FullLayer(GQA, {}, case.caches))
    plan = backend.plan(case.meta, 8, {"fixed_split_size": "3"}, (GQA,))
    assert plan.ignored_options == ("fixed_split_size",) and plan.qo_indptr_last == 4
    out = torch.empty(4, 8, 64, dtype=torch.bfloat16)
    other = mixed(GQA, (3, 1), (5, 9))
    with pytest.raises(PlanError, match="requires a plan"):
        kernel(case.inputs, case.meta, None, out)
    with pytest.raises(PlanError, match="another batch"):
        kernel(other.inputs, other.meta, plan, out)
    with pytest.raises(PlanError, match="geometry"):
        kernel(case.inputs, case.meta, backend.plan(case.meta, 8, {}, (TC,)), out)
    with pytest.raises(PlanError, match="another backend"):
        kernel(case.inputs, case.meta, full_backend("gather").plan(case.meta, 8, {}, (GQA,)), out)
    with pytest.raises(InputError, match="bfloat16"):
        kernel({name: x.float() for name, x in case.inputs.items()}, case.meta, plan, out)
    table = case.meta.page_table.clone()
    table[0, 0] = 10_000
    with pytest.raises(MetadataError, match="page_table"):
        backend.plan(dataclasses.replace(case.meta, page_table=table), 8, {}, (GQA,))


def test_a_missing_package_is_one_error() -> None:
    if importlib.util.find_spec("flashinfer") is not None:
        pytest.skip("FlashInfer is installed")
    with pytest.raises(BuildError, match="FlashInfer"):
        module.load_api()
    with pytest.raises(BuildError):
        full_backend("flashinfer")


def test_the_released_names_are_those_of_the_installed_package() -> None:
    """Read from its source, so that no GPU is needed."""
    found = importlib.util.find_spec("flashinfer")
    if found is None or found.origin is None:
        pytest.skip("FlashInfer is not installed")
    folder = Path(found.origin).parent
    sources = [folder / name for name in ("prefill.py", "decode.py", "cascade.py", "mla/_core.py", "mla.py")]
    trees = [ast.parse(path.read_text()) for path in sources if path.exists()]
    classes = {n.name: n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    for name, methods in RELEASED.items():
        if not isinstance(methods, dict):
            continue
        known: dict[str, set[str]] = {}
        for item in classes[name.rpartition(".")[2]].body:
            if isinstance(item, ast.FunctionDef):
                given = {a.arg for a in (*item.args.args, *item.args.kwonlyargs)}
                known.setdefault(item.name.replace("_plan_impl", "plan"), set()).update(given)
        for method, parameters in methods.items():
            assert {p for p, kind in parameters if kind != "varargs"} - known[method] <= {"kwargs"}
