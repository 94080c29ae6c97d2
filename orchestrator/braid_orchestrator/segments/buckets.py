"""Numbers of tokens that graphs are recorded for; a step takes the next one that is large enough."""

from __future__ import annotations

from bisect import bisect_left

from braid_wire.errors import BatchInvalid


class Buckets:
    """Powers of two from 1 on, up to and with a largest number that need not be one.

    Args:
        largest: at least 1.

    Raises:
        BatchInvalid: it is not.
    """

    def __init__(self, largest: int) -> None:
        if largest < 1:
            raise BatchInvalid(f"the largest bucket is {largest}; it must be at least 1", field="largest")
        powers = (1 << exponent for exponent in range(largest.bit_length()))
        self.sizes = (*(size for size in powers if size < largest), largest)

    def of(self, tokens: int) -> int | None:
        """The smallest bucket that holds so many tokens; None where none does.

        Raises:
            BatchInvalid: there are no tokens.
        """
        if tokens < 1:
            raise BatchInvalid(f"a step of {tokens} tokens has no bucket", field="num_tokens")
        place = bisect_left(self.sizes, tokens)
        return self.sizes[place] if place < len(self.sizes) else None
