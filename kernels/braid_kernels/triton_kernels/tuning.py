"""Block sizes and launch shapes.

They are fixed by the layer's shape, never measured at run time: two processes must give the same bits,
and a service must not stop to time its kernels. The values are for Hopper; `Tuning` is the place where
a measuring run tries others.
"""

from __future__ import annotations

from dataclasses import dataclass

from braid_kernels.errors import UnsupportedError

MIN_BLOCK = 16  # the smallest side of a matrix product
SUB_BLOCK = 16  # rows of a chunk that share a local reference, and of a block that is solved by hand


def power_of_two(value: int) -> int:
    """The smallest power of two that is >= value, and at least a product's smallest side."""
    return max(MIN_BLOCK, 1 << (value - 1).bit_length())


@dataclass(frozen=True)
class Tuning:
    """chunk: rows of a chunk, 32 or 64. short_span: spans up to this length run token by token.

    The others: upper limits of a block's columns, and warps per program, of each kernel.
    """

    chunk: int = 64
    short_span: int = 16
    conv_tokens: int = 16
    conv_warps: int = 4
    recurrent_columns: int = 32
    recurrent_warps: int = 4
    key_columns: int = 64
    solve_columns: int = 64
    solve_warps: int = 4
    state_columns: int = 32
    state_warps: int = 4
    state_stages: int = 2
    output_columns: int = 64
    output_warps: int = 4

    def __post_init__(self) -> None:
        if self.chunk not in (2 * SUB_BLOCK, 4 * SUB_BLOCK):
            raise UnsupportedError("chunk", self.chunk, f"must be {2 * SUB_BLOCK} or {4 * SUB_BLOCK}")
