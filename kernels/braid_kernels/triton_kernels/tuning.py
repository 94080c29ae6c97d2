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


def power_of_two(value: int, least: int = MIN_BLOCK) -> int:
    """The smallest power of two that is >= value and `least`, by default a product's smallest side."""
    return max(least, 1 << (value - 1).bit_length())


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
    scan_channels: int = 64
    scan_warps: int = 4

    def __post_init__(self) -> None:
        if self.chunk not in (2 * SUB_BLOCK, 4 * SUB_BLOCK):
            raise UnsupportedError("chunk", self.chunk, f"must be {2 * SUB_BLOCK} or {4 * SUB_BLOCK}")


@dataclass(frozen=True)
class FullTuning:
    """Launch shapes of full attention.

    long_rows: rows of a tile of a span that has more than one. least_rows, most_rows: of a tile, rows times
    query heads. programs: that fill the device. part_keys: fewest keys of a part; most_parts: of one row.
    """

    long_rows: int = 16
    least_rows: int = MIN_BLOCK
    most_rows: int = 64
    programs: int = 264
    part_keys: int = 256
    most_parts: int = 32
    append_columns: int = 1024
    stages: int = 2

    def keys(self, width: int, half: bool) -> int:
        """Keys of a block: what of them fits beside the queries and the output."""
        if not half:
            return 16 if width >= 256 else 32
        if width >= 512:
            return 32
        return 64 if width <= 128 else 32

    def rows(self, width: int, half: bool) -> int:
        """Most rows of a tile, whose output lies in registers: 128 of a thread at most."""
        if width >= 512:
            return min(self.most_rows, 32 if half else 16)
        return self.most_rows if half or width < 256 else min(self.most_rows, 32)

    def depth(self, half: bool) -> int:
        """Blocks of keys that are on their way at a time."""
        return self.stages if half else 1

    def warps(self, rows: int, width: int) -> int:
        """Of a program; the output of a tile lies in registers."""
        return 8 if rows * width >= 64 * 128 else 4
