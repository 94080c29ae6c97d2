"""A prompt in two spans, one behind the other, gives the bits of the prompt in one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from braid_kernels import full_backend, linear_backend
from braid_kernels.geometry import Gqa
from braid_kernels.metadata import NO_SLOT, LinearMeta, PagedMeta
from braid_kernels.native import num_threads, set_num_threads
from braid_kernels.testing import (
    Span,
    full_case,
    int32,
    linear_case,
    same_bits,
    select_inputs,
    small_linear_geometries,
)

CUT = 256
# Second parts that end inside a chunk, a block of queries and a tile of keys, and at their ends.
LENGTHS = (CUT + 128, CUT + 129, CUT + 171, 2 * CUT, 2 * CUT + 37, 3 * CUT + 130)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = num_threads()
    set_num_threads(request.param)
    yield int(request.param)
    set_num_threads(before)


@pytest.mark.parametrize("name", small_linear_geometries())
@pytest.mark.parametrize("given", [False, True], ids=["fresh", "continued"])
def test_linear(name: str, given: bool, threads: int) -> None:
    backend = linear_backend("cpp")
    for length in (*LENGTHS, CUT + 1, CUT + 18):
        start = 0 if given else NO_SLOT
        span = Span(length, start, (NO_SLOT,) * (length - 1) + (1,))
        case = linear_case(small_linear_geometries()[name], [span], slots=3, seed=length)
        whole = case.run(backend)
        parts = []
        state, conv = case.state_pool, case.conv_pool
        for begin, end, read, write in ((0, CUT, start, 2), (CUT, length, 2, 1)):
            out = int32([NO_SLOT] * (end - begin - 1) + [write])
            meta = LinearMeta(int32([0, end - begin]), int32([read]), out)
            part = replace(
                case,
                inputs=select_inputs(case.inputs, begin, end),
                meta=meta,
                state_pool=state,
                conv_pool=conv,
            ).run(backend)
            parts.append(part.out)
            state, conv = part.state_pool, part.conv_pool
        assert same_bits(torch.cat(parts), whole.out), (length, "output")
        assert same_bits(state[1], whole.state_pool[1]), (length, "state")
        if conv is not None and whole.conv_pool is not None:
            assert same_bits(conv[1], whole.conv_pool[1]), (length, "conv")


@pytest.mark.parametrize("heads", [(4, 2, 64, 64), (6, 2, 36, 36), (8, 1, 32, 48)], ids=str)
@pytest.mark.parametrize("context", [0, 5, 1100])
def test_full(heads: tuple[int, int, int, int], context: int, threads: int) -> None:
    backend = full_backend("cpp")
    query, kv, size, value = heads
    for length in LENGTHS:
        case = full_case(Gqa(query, kv, size, value, size**-0.5), [length], [context], seed=length)
        whole = case.run(backend)
        parts, caches = [], case.caches
        for begin, end in ((0, CUT), (CUT, length)):
            meta = PagedMeta(int32([0, end - begin]), int32([context + begin]), case.meta.page_table)
            part = replace(case, inputs=select_inputs(case.inputs, begin, end), meta=meta, caches=caches).run(
                backend
            )
            parts.append(part.out)
            caches = part.caches
        assert same_bits(torch.cat(parts), whole.out), length
