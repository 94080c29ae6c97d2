"""A pool of equal units of memory: who holds each, and which the prefix cache keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from braid_wire.batch import IntArray
from braid_wire.errors import PoolExhausted


class Pool:
    """A fixed number of equal units (pages or slots), each with a generation number.

    A unit is free, held by one sequence or several, kept by the prefix cache, or both. It becomes free,
    and every reference to it stale, when nobody holds it and it is not kept.

    Args:
        name: "pages" or "slots", for errors and metrics.
        generation: int64 [total], shared with the services; bumped when a unit's content is void.
        unit_bytes: bytes of one unit over all layers.
    """

    def __init__(self, name: str, generation: IntArray, unit_bytes: int) -> None:
        self.name = name
        self.generation = generation
        self.unit_bytes = unit_bytes
        self.make_room: Callable[[int], None] | None = None
        """Frees so many units that are only kept; set by what keeps them."""
        generation[:] = 1
        self._free = list(range(len(generation) - 1, -1, -1))
        self._holders = [0] * len(generation)
        self._kept = [False] * len(generation)
        self._cached = 0

    @property
    def total(self) -> int:
        """Units in all."""
        return len(self.generation)

    @property
    def free(self) -> int:
        """Units that nobody holds and that are not kept."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Units that are kept and that nobody holds: they are free when they are needed."""
        return self._cached

    @property
    def used(self) -> int:
        """Units that somebody holds."""
        return self.total - self.free - self.cached

    @property
    def available(self) -> int:
        """Units that can be taken."""
        return self.free + self.cached

    def take(self, count: int) -> list[int]:
        """Hand out units, each with one holder.

        Raises:
            PoolExhausted: fewer are available.
        """
        if self.free < count <= self.available and self.make_room is not None:
            self.make_room(count - self.free)
        if count > self.free:
            raise PoolExhausted(
                f"{count} {self.name} wanted, {self.available} of {self.total} are available", pool=self.name
            )
        units = [self._free.pop() for _ in range(count)]
        for unit in units:
            self._holders[unit] = 1
        return units

    def hold(self, units: Iterable[int]) -> None:
        """Units that are held or kept have one holder more; nobody may write to them from now on."""
        for unit in units:
            if self._holders[unit] == 0:
                self._cached -= 1
            self._holders[unit] += 1

    def give(self, units: Iterable[int]) -> None:
        """Units have one holder less."""
        for unit in units:
            self._holders[unit] -= 1
            if self._holders[unit] == 0:
                if self._kept[unit]:
                    self._cached += 1
                else:
                    self._release(unit)

    def keep(self, unit: int) -> None:
        """What is in a unit that somebody holds stays there when its holders go."""
        self._kept[unit] = True

    def drop(self, unit: int) -> None:
        """The opposite of `keep`."""
        self._kept[unit] = False
        if self._holders[unit] == 0:
            self._cached -= 1
            self._release(unit)

    def idle(self, unit: int) -> bool:
        """Whether nobody holds a unit."""
        return self._holders[unit] == 0

    def writable(self, unit: int) -> bool:
        """Whether a unit is one holder's own."""
        return self._holders[unit] == 1 and not self._kept[unit]

    def void(self, unit: int) -> None:
        """Make every reference to a unit stale; its holder keeps it."""
        self.generation[unit] += 1

    def generations(self, units: IntArray) -> IntArray:
        """int64, shaped as `units`: the generation of each named unit, 0 where none is named."""
        found = self.generation[units]
        found[units < 0] = 0
        return found

    def _release(self, unit: int) -> None:
        self.void(unit)
        self._free.append(unit)
