"""Memory on large pages: whole, apart, at the beginning of a line, and given back."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import torch
from braid_kernels.native.pages import LARGE_PAGE, LargePages
from hypothesis import given, settings
from hypothesis import strategies as st

SIZES = st.lists(st.one_of(st.integers(0, 300), st.integers(0, 40 << 20)), min_size=1, max_size=12)


def mapped(address: int) -> bool:
    """Whether memory lies there."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, _, last = line.split()[0].partition("-")
        if int(first, 16) <= address < int(last, 16):
            return True
    return False


@settings(max_examples=30, deadline=None)
@given(SIZES)
def test_what_is_taken_is_whole_and_nobody_elses(sizes: list[int]) -> None:
    pages = LargePages()
    taken = [pages.take(size) for size in sizes]
    assert [len(one) for one in taken] == sizes
    spans = sorted((one.data_ptr(), one.data_ptr() + len(one)) for one in taken if len(one))
    assert all(begin % 64 == 0 for begin, _ in spans)
    for (_, end), (begin, _) in itertools.pairwise(spans):
        assert end <= begin
    for number, one in enumerate(taken):
        one[:1].fill_(number + 1)
        one[-1:].fill_(number + 1)
    for number, one in enumerate(taken):
        assert {*one[:1].tolist(), *one[-1:].tolist()} <= {number + 1}


def test_a_block_goes_with_the_last_that_was_given_of_it() -> None:
    pages = LargePages()
    first, second = pages.take(20 << 20), pages.take(30 << 20)
    address = first.data_ptr()
    assert address % LARGE_PAGE == 0
    del first, pages
    gc.collect()
    assert not mapped(address)
    second.fill_(1)
    assert int(second[-1]) == 1


def test_a_system_without_large_pages_gives_small_ones() -> None:
    given_up = LargePages(advice=12345).take(100)  # no such advice: madvise refuses
    assert torch.equal(given_up, torch.zeros(100, dtype=torch.uint8))
