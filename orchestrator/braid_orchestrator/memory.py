"""Pages and slots: who holds which, and how a step's references to them are made and settled.

A step reads the state version that a sequence holds and writes another one; `commit` makes the new
one current, `abort` forgets it. Nothing that a step wrote counts before its commit, so a step can
be thrown away or replayed at any moment.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
from braid_wire.batch import MODE_CODES, NO_PAGE, NO_SLOT, Batch, IntArray
from braid_wire.errors import PoolExhausted, ReferenceStale, StepOrder
from braid_wire.layers import Mode, Role

VERSIONS = 2
"""Slots that a sequence holds: the committed state, and the one that a step writes."""


class Pool:
    """A fixed number of equal units (pages or slots), each with a generation number.

    Args:
        name: "pages" or "slots", for errors and metrics.
        generation: int64 [total], shared with the services; bumped when a unit's content is void.
        unit_bytes: bytes of one unit over all layers.
    """

    def __init__(self, name: str, generation: IntArray, unit_bytes: int) -> None:
        self.name = name
        self.generation = generation
        self.unit_bytes = unit_bytes
        generation[:] = 1
        self._free = list(range(len(generation) - 1, -1, -1))

    @property
    def total(self) -> int:
        """Units in all."""
        return len(self.generation)

    @property
    def free(self) -> int:
        """Units that nobody holds."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Units that somebody holds."""
        return self.total - self.free

    def take(self, count: int) -> list[int]:
        """Hand out units.

        Raises:
            PoolExhausted: fewer are free.
        """
        if count > self.free:
            raise PoolExhausted(
                f"{count} {self.name} wanted, {self.free} of {self.total} are free", pool=self.name
            )
        return [self._free.pop() for _ in range(count)]

    def give(self, units: Seq[int]) -> None:
        """Take units back; every reference to them is stale from now on."""
        for unit in units:
            self.void(unit)
            self._free.append(unit)

    def void(self, unit: int) -> None:
        """Make every reference to a unit stale; its holder keeps it."""
        self.generation[unit] += 1

    def generations(self, units: IntArray) -> IntArray:
        """int64, shaped as `units`: the generation of each named unit, 0 where none is named."""
        return np.where(units >= 0, self.generation[units], 0)


@dataclass
class SequenceMemory:
    """What one sequence holds in one role."""

    sequence_id: int
    length: int = 0
    """Tokens whose state and pages are committed."""
    pages: list[int] = field(default_factory=list)
    slot: int = NO_SLOT
    """The committed state; NO_SLOT before the first token."""
    spares: list[int] = field(default_factory=list)
    """Slots held for the states that steps write."""
    staged: bool = False
    """Part of a step that is neither committed nor aborted."""
    released: bool = False


@dataclass(frozen=True)
class Span:
    """One sequence's part of a step: `tokens` follow what it holds."""

    memory: SequenceMemory
    tokens: IntArray  # int64 [n]
    mode: Mode
    mrope: IntArray | None = None  # int64 [3, n], for models that take such positions


@dataclass(frozen=True)
class Staged:
    """The spans of a step, and the batch that names what they read and write."""

    batch: Batch
    spans: tuple[Span, ...]


class RoleMemory:
    """The pages and slots of one role.

    Args:
        role: whose.
        pages: None where the role has no full layer.
        slots: None where the role has no linear layer.
        page_size: positions in a page.
    """

    def __init__(self, role: Role, pages: Pool | None, slots: Pool | None, page_size: int) -> None:
        self.role = role
        self.pages = pages
        self.slots = slots
        self.page_size = page_size

    def pages_for(self, tokens: int) -> int:
        """Pages that a sequence of so many tokens needs."""
        return -(-tokens // self.page_size) if self.pages is not None else 0

    def acquire(self, memory: SequenceMemory, tokens: int) -> None:
        """Hold all that a sequence needs to reach `tokens` tokens; what it holds already counts.

        Raises:
            PoolExhausted: nothing was taken.
            ReferenceStale: the sequence was released.
        """
        if memory.released:
            raise ReferenceStale(
                f"sequence {memory.sequence_id} was released", sequence_id=memory.sequence_id
            )
        pages = max(self.pages_for(tokens) - len(memory.pages), 0)
        held = len(memory.spares) + (memory.slot != NO_SLOT)
        slots = VERSIONS - held if self.slots is not None else 0
        if self.slots is not None:
            memory.spares.extend(self.slots.take(slots))
        if self.pages is not None:
            try:
                memory.pages.extend(self.pages.take(pages))
            except PoolExhausted:
                self._return_spares(memory, slots)
                raise

    def stage(self, spans: Seq[Span], epoch: int, step: int, lane: int = 0) -> Staged:
        """Name what a step reads and writes.

        Raises:
            PoolExhausted: a sequence grows beyond what is free; no sequence is staged.
            StepOrder: a sequence is in another step that is not settled.
            ReferenceStale: a sequence was released.
        """
        for span in spans:
            if span.memory.staged:
                raise StepOrder(
                    f"sequence {span.memory.sequence_id} is already in a step",
                    sequence_id=span.memory.sequence_id,
                )
            self.acquire(span.memory, span.memory.length + len(span.tokens))
        for span in spans:
            span.memory.staged = True
        return Staged(self._batch(spans, epoch, step, lane), tuple(spans))

    def commit(self, staged: Staged) -> None:
        """What the step wrote becomes current; the states it read are void."""
        for span in staged.spans:
            memory = span.memory
            memory.length += len(span.tokens)
            if self.slots is not None:
                old, memory.slot = memory.slot, memory.spares.pop(0)
                if old != NO_SLOT:
                    self.slots.void(old)
                    memory.spares.append(old)
            self._settle(memory)

    def abort(self, staged: Staged) -> None:
        """Forget the step: the states it may have written are void, all else is as before."""
        for span in staged.spans:
            if self.slots is not None:
                self.slots.void(span.memory.spares[0])
            self._settle(span.memory)

    def release(self, memory: SequenceMemory) -> None:
        """Free all that a sequence holds: now, or when the step that it is in is settled."""
        if memory.released:
            return
        memory.released = True
        if not memory.staged:
            self._free(memory)

    def _settle(self, memory: SequenceMemory) -> None:
        memory.staged = False
        if memory.released:
            self._free(memory)

    def _free(self, memory: SequenceMemory) -> None:
        if self.pages is not None:
            self.pages.give(memory.pages)
            memory.pages = []
        if self.slots is not None:
            if memory.slot != NO_SLOT:
                self.slots.give([memory.slot])
                memory.slot = NO_SLOT
            self._return_spares(memory, len(memory.spares))

    def _return_spares(self, memory: SequenceMemory, count: int) -> None:
        if self.slots is not None and count:
            self.slots.give(memory.spares[-count:])
            del memory.spares[-count:]

    def _batch(self, spans: Seq[Span], epoch: int, step: int, lane: int) -> Batch:
        lengths = np.array([len(span.tokens) for span in spans], dtype=np.int32)
        context = np.array([span.memory.length for span in spans], dtype=np.int32)
        cu_seqlens = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        starts = np.repeat(context - cu_seqlens[:-1], lengths)
        positions = (np.arange(cu_seqlens[-1]) + starts).astype(np.int64)
        return Batch(
            role=self.role,
            epoch=epoch,
            step=step,
            lane=lane,
            input_ids=np.concatenate([span.tokens for span in spans]).astype(np.int64),
            positions=positions,
            mrope_positions=_mrope(spans, np.split(positions, cu_seqlens[1:-1])),
            cu_seqlens=cu_seqlens,
            context_lens=context,
            modes=np.array([MODE_CODES[span.mode] for span in spans], dtype=np.uint8),
            sequence_ids=np.array([span.memory.sequence_id for span in spans], dtype=np.int64),
            **self._page_fields(spans),
            **self._state_fields(spans, cu_seqlens),
        )

    def _page_fields(self, spans: Seq[Span]) -> dict[str, IntArray]:
        if self.pages is None:
            return {}
        # Pages that are held but not reached yet stay out of the table.
        counts = [self.pages_for(span.memory.length + len(span.tokens)) for span in spans]
        table = np.full((len(spans), max(counts)), NO_PAGE, dtype=np.int32)
        for row, span, count in zip(table, spans, counts, strict=True):
            row[:count] = span.memory.pages[:count]
        return {"page_table": table, "page_generations": self.pages.generations(table)}

    def _state_fields(self, spans: Seq[Span], cu_seqlens: IntArray) -> dict[str, IntArray]:
        if self.slots is None:
            return {}
        state_in = np.array([span.memory.slot for span in spans], dtype=np.int32)
        state_out = np.full(int(cu_seqlens[-1]), NO_SLOT, dtype=np.int32)
        state_out[cu_seqlens[1:] - 1] = [span.memory.spares[0] for span in spans]
        return {
            "state_in": state_in,
            "state_in_generations": self.slots.generations(state_in),
            "state_out": state_out,
            "state_out_generations": self.slots.generations(state_out),
        }


def _mrope(spans: Seq[Span], positions: Seq[IntArray]) -> IntArray | None:
    """int64 [3, T] where a span has such positions; text among it has its own in all three rows."""
    if all(span.mrope is None for span in spans):
        return None
    return np.concatenate(
        [
            np.broadcast_to(text, (3, len(text))) if span.mrope is None else span.mrope
            for span, text in zip(spans, positions, strict=True)
        ],
        axis=1,
    )
