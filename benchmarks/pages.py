"""How much faster packed weights are read on large pages than on small ones.

    python benchmarks/pages.py [--megabytes N] [--rows 1 8 16 64]

The same products by the same kernel on one thread, their weights once in memory of each kind; the two take
turns. Together the weights are larger than caches, as those of a model are.
"""

from __future__ import annotations

import argparse
import mmap
import time
from statistics import median

import torch
from braid_kernels.native import set_num_threads
from braid_kernels.native.gemm import Gemm, PackedWeight, Part, pack
from braid_kernels.native.pages import LargePages

REPEATS = 50
SIZE = 1024, 512  # of a weight, [n, k]


def main() -> None:
    """Print a line for each number of rows, medians of neighbouring turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=40)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 64])
    options = parser.parse_args()
    torch.set_num_threads(1)
    set_num_threads(1)
    count = max(options.megabytes * 10**6 // (SIZE[0] * SIZE[1] * 4), 1)
    kinds = [LargePages(advice) for advice in (mmap.MADV_NOHUGEPAGE, mmap.MADV_HUGEPAGE)]
    small, large = ([pack(torch.randn(SIZE), memory=kind) for _ in range(count)] for kind in kinds)
    print(f"{count} weights of {SIZE[0]} x {SIZE[1]}, float32, one thread")
    for rows in options.rows:
        turns = [(seconds(small, rows), seconds(large, rows)) for _ in range(REPEATS)]
        rate = count * small[0].data.numel() / median(took for _, took in turns)
        ratio = median(before / after for before, after in turns)
        print(f"{rows:4} rows: {rate / 1e9:.1f} GB/s of weights on large pages, {ratio:.2f} x small ones")


def seconds(weights: list[PackedWeight], rows: int) -> float:
    """Of a product with each."""
    x, out = torch.ones(rows, SIZE[1]), torch.empty(rows, SIZE[0])
    products = [Gemm(x, weight, [Part(out, 0)]) for weight in weights]
    began = time.perf_counter()
    for product in products:
        product()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
