"""The Triton kernels of full attention under Triton's interpreter, against the float64 reference.

They run in a process of their own, for the reason given in test_triton_linear.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from braid_kernels import FieldError, FullBackend, FullGeometry, FullLayer, Gqa, Mla, full_backend
from braid_kernels.testing import FullCase, difference, full_case, int32, same_bits

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)

from test_triton_linear import numbers, start_interpreter

if numbers(importlib.metadata.version("triton")) < (3, 7) and numbers(np.__version__) >= (2, 4):
    pytest.skip(
        "Triton 3.6's interpreter cannot loop over loaded bounds under numpy >= 2.4", allow_module_level=True
    )

FP32 = 1e-5  # promised is 1e-4
BF16 = 1e-2

GEOMETRIES: dict[str, FullGeometry] = {
    "gqa": Gqa(8, 2, 32, 32, 32**-0.5),
    "odd_group_other_values": Gqa(6, 2, 33, 47, 0.7),
    "window": Gqa(4, 2, 16, 16, 0.3, sliding_window=11),
    "window_one": Gqa(3, 1, 16, 16, 0.3, sliding_window=1),
    "mla": Mla(2, 16, 8, 24, 64, 24**-0.5),
    "mla_nope": Mla(3, 17, 0, 21, 33, 17**-0.5),
}
# Decode, prefill, verification, an empty span, and prompts around a tile of 16 rows and a block of 64 keys.
LENGTHS, CONTEXTS = (1, 21, 0, 3, 16, 1, 17, 1), (65, 0, 9, 20, 48, 0, 47, 31)
TUNINGS: dict[str, dict[str, int]] = {
    "usual": {},
    "parts": {"part_keys": 8, "programs": 64, "most_parts": 4},
    "narrow": {"long_rows": 4, "most_rows": 16, "append_columns": 16},
}


def run_here(message: bytes) -> bytes:
    case, tuning, planned = pickle.loads(message)
    from braid_kernels.triton_kernels import FullTuning, TritonFullBackend

    return pickle.dumps(case.run(TritonFullBackend(FullTuning(**tuning)), planned=planned))


def refusal(message: bytes) -> str:
    """What a kernel call raises; says so where it has written something before."""
    case = pickle.loads(message)
    before = {name: cache.clone() for name, cache in case.caches.items()}
    try:
        kernel = full_backend("triton").layer(FullLayer(case.geometry, case.params, case.caches))
        kernel(case.inputs, case.meta, None, torch.zeros(case.meta.num_tokens, 8, 32))
    except FieldError as error:
        untouched = all(same_bits(case.caches[name], before[name]) for name in before)
        return f"{type(error).__name__}: {error}" if untouched else "something was written"
    return "nothing was raised"


Run = Callable[..., FullCase]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=start_interpreter) as pool:
        yield pool


@pytest.fixture(scope="module")
def run(interpreter: ProcessPoolExecutor) -> Run:
    def remotely(case: FullCase, tuning: str = "usual", planned: bool = False) -> FullCase:
        message = pickle.dumps((case, TUNINGS[tuning], planned))
        result: FullCase = pickle.loads(interpreter.submit(run_here, message).result())
        return result

    return remotely


@pytest.fixture(scope="module")
def reference() -> FullBackend:
    return full_backend("reference")


def assert_same(actual: FullCase, expected: FullCase, tolerance: float = FP32) -> None:
    """Outputs, and the very bits of every cached row: new ones are copied, old ones untouched."""
    assert not expected.out.isnan().any()
    assert difference(actual.out, expected.out) < tolerance
    for name, cache in expected.caches.items():
        assert same_bits(actual.caches[name], cache)


@pytest.mark.parametrize("tuning", ["usual", "parts"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_mixed_batch(run: Run, reference: FullBackend, name: str, tuning: str) -> None:
    case = full_case(GEOMETRIES[name], LENGTHS, CONTEXTS, page_size=8, pad=3, gap=5)
    assert_same(run(case, tuning, planned=tuning == "parts"), case.run(reference))


@pytest.mark.parametrize("name", ["gqa", "mla"])
def test_small_tiles_give_the_same(run: Run, reference: FullBackend, name: str) -> None:
    case = full_case(GEOMETRIES[name], (5, 1), (3, 20), page_size=4)
    assert_same(run(case, "narrow"), case.run(reference))


@pytest.mark.parametrize("name", ["gqa", "window", "mla"])
def test_bf16(run: Run, reference: FullBackend, name: str) -> None:
    case = full_case(GEOMETRIES[name], LENGTHS, CONTEXTS, page_size=8, pad=2, dtype=torch.bfloat16)
    assert_same(run(case), case.run(reference), BF16)


def test_fp32_rows_over_bf16_pages(run: Run, reference: FullBackend) -> None:
    case = full_case(GEOMETRIES["gqa"], (3, 1), (4, 9), page_size=8, cache_dtype=torch.bfloat16)
    assert_same(run(case), case.run(reference))


def test_pages_behind_a_window_are_not_followed(run: Run, reference: FullBackend) -> None:
    """They may have been recycled: their entries name no page."""
    case = full_case(GEOMETRIES["window"], (1, 5), (40, 33), page_size=4)
    table = case.meta.page_table.clone()
    table[0, :7], table[1, :5] = -1, -1
    case = dataclasses.replace(case, meta=dataclasses.replace(case.meta, page_table=table))
    assert_same(run(case), case.run(reference))


def test_a_step_of_nothing(run: Run) -> None:
    case = full_case(GEOMETRIES["mla"], (0, 0), (3, 0), page_size=4)
    assert run(case).out.shape[0] == 0


def test_a_page_that_does_not_exist_is_refused(interpreter: ProcessPoolExecutor) -> None:
    case = full_case(GEOMETRIES["gqa"], (2, 1), (7, 3), page_size=4)
    table = case.meta.page_table.clone()
    table[0, 1] = 99
    wrong = dataclasses.replace(case, meta=dataclasses.replace(case.meta, page_table=table))
    said = interpreter.submit(refusal, pickle.dumps(wrong)).result()
    assert said.startswith("MetadataError: page_table[0][1] = 99")
    outgrown = dataclasses.replace(case, meta=dataclasses.replace(case.meta, context_lens=int32([7, 400])))
    said = interpreter.submit(refusal, pickle.dumps(outgrown)).result()
    assert said.startswith("MetadataError: context_lens[1]")
