"""Where storages lie: those whose lives do not meet share memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from braid_orchestrator.segments.lowering_expressions import Storage

ALIGNMENT = 64


@dataclass(frozen=True)
class Layout:
    """Offsets by storage id, and the size of all: bytes for each row that the memory has."""

    offsets: Mapping[int, int]
    size: int


@dataclass
class Life:
    """First and last of the places, in some order, at which a storage must hold its value."""

    storage: Storage
    first: int
    last: int


class Lives:
    """Collects where storages are used."""

    def __init__(self) -> None:
        self._found: dict[int, Life] = {}

    def use(self, storages: Iterable[Storage], place: int) -> None:
        """Note a use; places may come in any order."""
        for storage in storages:
            life = self._found.setdefault(id(storage), Life(storage, place, place))
            life.first, life.last = min(life.first, place), max(life.last, place)

    def layout(self) -> Layout:
        """First fit, in the order in which lives begin."""
        offsets: dict[int, int] = {}
        alive: list[tuple[Life, int, int]] = []
        size = 0
        for life in sorted(self._found.values(), key=lambda one: one.first):
            alive = [item for item in alive if item[0].last >= life.first]
            length = _bytes(life.storage)
            at = _gap(sorted((begin, end) for _, begin, end in alive), length)
            alive.append((life, at, at + length))
            offsets[id(life.storage)] = at
            size = max(size, at + length)
        return Layout(offsets, size)


def _bytes(storage: Storage) -> int:
    """Of one row, in whole lines, so that every storage of many rows begins at one."""
    return -(-storage.width * storage.dtype.itemsize // ALIGNMENT) * ALIGNMENT


def _gap(taken: Iterable[tuple[int, int]], length: int) -> int:
    """The first place at which so much is free."""
    at = 0
    for begin, end in taken:
        if begin - at >= length:
            return at
        at = max(at, end)
    return at
