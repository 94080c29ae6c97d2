"""What sequences hold of pages and slots, and how a step's references to them are made and settled.

A step reads the state version that a sequence holds and writes another one; `commit` makes the new
one current, `abort` forgets it. Nothing that a step wrote counts before its commit, so a step can
be thrown away or replayed at any moment. What several sequences hold is read and never written: a
sequence that begins behind a shared prefix writes its states and its further pages elsewhere.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

import numpy as np
from braid_wire.batch import MODE_CODES, NO_PAGE, NO_SLOT, Batch, IntArray
from braid_wire.errors import PoolExhausted, ReferenceStale, StepOrder
from braid_wire.layers import Mode, Role

from braid_orchestrator.pool import Pool

VERSIONS = 2
"""Slots that a sequence holds: the committed state, and the one that a step writes."""


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
    """Slots held for the states that steps write, in the order of their tokens."""
    kept: dict[int, int] = field(default_factory=dict)
    """Position → slot of the committed state there, of those that spans asked to keep."""
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
    follows: int = 0
    """Tokens of the same sequence in the span right before, which runs first: a prompt in both lanes."""
    keep: tuple[int, ...] = ()
    """Numbers of its first tokens behind which the state is kept when the step is committed."""

    @property
    def states(self) -> Seq[int]:
        """Numbers of its first tokens behind which a step writes the state, in order."""
        count = len(self.tokens)
        return range(1, count + 1) if self.mode is Mode.VERIFY else sorted({*self.keep, count})

    def cut(self, at: int) -> tuple[Span, Span]:
        """The span as two of the same step, the first with `at` tokens.

        Raises:
            StepOrder: it is not a prompt's, was cut before, or is too short.
        """
        if self.mode is not Mode.EXTEND or self.follows or not 0 < at < len(self.tokens):
            raise StepOrder(f"a {self.mode.value} span of {len(self.tokens)} tokens is not cut at {at}")
        mrope = (None, None) if self.mrope is None else (self.mrope[:, :at], self.mrope[:, at:])
        keep = tuple(n for n in self.keep if n <= at), tuple(n - at for n in self.keep if n > at)
        return (
            replace(self, tokens=self.tokens[:at], mrope=mrope[0], keep=keep[0]),
            replace(self, tokens=self.tokens[at:], mrope=mrope[1], keep=keep[1], follows=at),
        )


@dataclass(frozen=True)
class Staged:
    """The spans of a step, and the batch that names what they read and write."""

    batch: Batch
    spans: tuple[Span, ...]
    written: tuple[Mapping[int, int], ...] = ()
    """Of each span: number of its first tokens → slot of the state behind them."""


@dataclass
class VersionCounts:
    """Versions of recurrent states that steps wrote, by what became of them."""

    committed: int = 0
    """Became a sequence's state, or one that the prefix cache keeps."""
    dropped: int = 0
    """Were not taken: of drafted tokens that were rejected, or between two that were accepted."""
    aborted: int = 0
    """Were forgotten with their step."""


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
        self.versions = VersionCounts()
        # Engines that own their bodies take part from threads of their own.
        self.lock = threading.RLock()

    def pages_for(self, tokens: int) -> int:
        """Pages that a sequence of so many tokens needs."""
        return -(-tokens // self.page_size) if self.pages is not None else 0

    def acquire(self, memory: SequenceMemory, tokens: int, versions: int = VERSIONS, margin: int = 0) -> None:
        """Hold all that a sequence needs to reach `tokens` tokens; what it holds already counts.

        Args:
            versions: slots, the committed state's included.
            margin: pages that must be left for others.

        Raises:
            PoolExhausted: nothing was taken.
            ReferenceStale: the sequence was released.
        """
        with self.lock:
            if memory.released:
                raise ReferenceStale(
                    f"sequence {memory.sequence_id} was released", sequence_id=memory.sequence_id
                )
            held = len(memory.spares) + (memory.slot != NO_SLOT)
            slots = max(versions - held, 0) if self.slots is not None else 0
            pages = max(self.pages_for(tokens) - len(memory.pages), 0)
            # Both are looked at before either is taken: room in one is no use without the other.
            for pool, count, left in ((self.slots, slots, 0), (self.pages, pages, margin)):
                if pool is not None and count + left > pool.available:
                    raise PoolExhausted(
                        f"{count} {pool.name} wanted beside {left} for others, "
                        f"{pool.available} of {pool.total} are available",
                        pool=pool.name,
                    )
            if self.slots is not None:
                memory.spares.extend(self.slots.take(slots))
            if self.pages is not None:
                memory.pages.extend(self.pages.take(pages))

    def reserve(self, span: Span) -> None:
        """Hold all that a step with a span needs.

        Raises:
            PoolExhausted: nothing was taken.
            ReferenceStale: the sequence was released.
        """
        end = span.memory.length + span.follows + len(span.tokens)
        self.acquire(span.memory, end, VERSIONS + _extra(span))

    def has_room(self, spans: Seq[Span]) -> bool:
        """Whether slots for all states that a step with these spans writes are available."""
        with self.lock:
            if self.slots is None:
                return True
            wanted: dict[int, int] = {}
            for span in spans:
                held = len(span.memory.spares) + (span.memory.slot != NO_SLOT)
                wanted.setdefault(id(span.memory), VERSIONS - held)
                wanted[id(span.memory)] += _extra(span)
            return sum(max(slots, 0) for slots in wanted.values()) <= self.slots.available

    def adopt(self, memory: SequenceMemory, length: int, pages: Seq[int], slot: int) -> None:
        """A sequence goes on from a prefix that others hold or that is kept.

        Its own first pages and its state, for fewer tokens of the same prefix, go back.

        Args:
            length: tokens of the prefix.
            pages: all of the prefix, none of them partly filled; empty without full layers.
            slot: the state behind it; NO_SLOT without linear layers.

        Raises:
            StepOrder: it is in a step, is as long already, or the prefix ends inside a page.
        """
        with self.lock:
            if memory.staged or memory.released or memory.length >= length:
                raise StepOrder(
                    f"sequence {memory.sequence_id} cannot go on at {length}: it is at {memory.length}",
                    sequence_id=memory.sequence_id,
                )
            if self.pages is not None:
                if len(pages) * self.page_size != length:
                    raise StepOrder(
                        f"{len(pages)} pages of {self.page_size} positions do not end at {length}"
                    )
                self.pages.hold(pages)
                self.pages.give(memory.pages[: len(pages)])
                memory.pages[: len(pages)] = pages
            if self.slots is not None:
                self.slots.hold([slot])
                if memory.slot != NO_SLOT:
                    self.slots.give([memory.slot])
                memory.slot = slot
            memory.length = length

    def fork(
        self, memory: SequenceMemory, sequence_id: int, copy_page: Callable[[int, int], None]
    ) -> SequenceMemory:
        """Another sequence that begins with all that this one has.

        Full pages and the state are shared, for nobody writes to them again; the page that is partly
        filled is copied.

        Args:
            sequence_id: of the new one.
            copy_page: (from, to): copies the content of a page in every layer.

        Raises:
            PoolExhausted: there is no page for the copy; nothing was taken.
            StepOrder: the sequence is in a step.
            ReferenceStale: it was released.
        """
        with self.lock:
            if memory.staged:
                raise StepOrder(f"sequence {memory.sequence_id} is in a step", sequence_id=memory.sequence_id)
            if memory.released:
                raise ReferenceStale(
                    f"sequence {memory.sequence_id} was released", sequence_id=memory.sequence_id
                )
            found = SequenceMemory(sequence_id, memory.length)
            if self.pages is not None:
                whole = memory.length // self.page_size
                if memory.length % self.page_size:
                    (page,) = self.pages.take(1)
                    copy_page(memory.pages[whole], page)
                    found.pages.append(page)
                self.pages.hold(memory.pages[:whole])
                found.pages[:0] = memory.pages[:whole]
            if self.slots is not None and memory.slot != NO_SLOT:
                self.slots.hold([memory.slot])
                found.slot = memory.slot
            return found

    def exchange(self, memory: SequenceMemory, index: int, page: int) -> None:
        """A sequence holds another page with the same content in the place of one that it filled."""
        with self.lock:
            if self.pages is not None:
                self.pages.hold([page])
                self.pages.give([memory.pages[index]])
                memory.pages[index] = page

    def stage(self, spans: Seq[Span], epoch: int, step: int, lane: int = 0) -> Staged:
        """Name what a step reads and writes.

        Raises:
            PoolExhausted: a sequence grows beyond what is available; no sequence is staged.
            StepOrder: a sequence is in another step that is not settled.
            ReferenceStale: a sequence was released.
        """
        with self.lock:
            extra: dict[int, int] = {}
            for span in spans:
                if span.memory.staged:
                    raise StepOrder(
                        f"sequence {span.memory.sequence_id} is already in a step",
                        sequence_id=span.memory.sequence_id,
                    )
                extra[id(span.memory)] = extra.get(id(span.memory), 0) + _extra(span)
                end = span.memory.length + span.follows + len(span.tokens)
                self.acquire(span.memory, end, VERSIONS + extra[id(span.memory)])
            for span in spans:
                span.memory.staged = True
            written = self._written(spans)
            return Staged(self._batch(spans, written, epoch, step, lane), tuple(spans), written)

    def commit(self, staged: Staged, kept: Seq[int] | None = None) -> None:
        """What the step wrote becomes current; the states it read are void, but for those that are shared.

        Args:
            kept: of each span, how many of its first tokens count: of VERIFY spans at least 1, of others
                all. None: all of every span. The state is the one after the last token kept.

        Raises:
            StepOrder: a span cannot keep so many; nothing is committed.
        """
        counts = [len(span.tokens) for span in staged.spans] if kept is None else list(kept)
        for span, count in zip(staged.spans, counts, strict=True):
            least = 1 if span.mode is Mode.VERIFY else len(span.tokens)
            if not least <= count <= len(span.tokens):
                raise StepOrder(f"a {span.mode.value} span of {len(span.tokens)} tokens cannot keep {count}")
        with self.lock:
            current: dict[int, int] = {}
            written_slots = {slot for written in staged.written for slot in written.values()}
            for span, count, written in zip(staged.spans, counts, staged.written, strict=True):
                for number in span.keep:
                    if number <= count and written:
                        span.memory.kept[span.memory.length + number] = written[number]
                span.memory.length += count
                current[id(span.memory)] = written.get(count, NO_SLOT)
            taken = set(current.values())
            for memory in _memories(staged.spans):
                taken.update(memory.kept.values())
                self._make_current(memory, current[id(memory)])
                self._settle(memory)
            committed = len(written_slots & taken)
            self.versions.committed += committed
            self.versions.dropped += len(written_slots) - committed

    def abort(self, staged: Staged) -> None:
        """Forget the step: the states it may have written are void, all else is as before."""
        with self.lock:
            self.versions.aborted += sum(len(set(written.values())) for written in staged.written)
            for memory in _memories(staged.spans):
                if self.slots is not None:
                    for slot in memory.spares:
                        self.slots.void(slot)
                self._settle(memory)

    def release(self, memory: SequenceMemory) -> None:
        """Free all that a sequence holds: now, or when the step that it is in is settled."""
        with self.lock:
            if memory.released:
                return
            memory.released = True
            if not memory.staged:
                self._free(memory)

    def restart(self, memory: SequenceMemory) -> None:
        """Free all that a sequence holds; it begins again with nothing.

        Raises:
            StepOrder: it is in a step.
        """
        with self.lock:
            if memory.staged:
                raise StepOrder(f"sequence {memory.sequence_id} is in a step", sequence_id=memory.sequence_id)
            self._free(memory)
            memory.length = 0

    def _make_current(self, memory: SequenceMemory, slot: int) -> None:
        """A state that a step wrote is the committed one; the other spare slots are void."""
        if self.slots is None:
            return
        old, memory.slot = memory.slot, slot
        kept = set(memory.kept.values())
        if slot in kept:
            self.slots.hold([slot])
        memory.spares = [spare for spare in memory.spares if spare != slot and spare not in kept]
        for spare in memory.spares:
            self.slots.void(spare)
        if old == NO_SLOT:
            return
        if self.slots.writable(old):
            self.slots.void(old)
            memory.spares.append(old)
        else:
            self.slots.give([old])

    def _settle(self, memory: SequenceMemory) -> None:
        memory.staged = False
        if memory.released:
            self._free(memory)
        else:
            surplus = len(memory.spares) + (memory.slot != NO_SLOT) - VERSIONS
            self._return_spares(memory, max(surplus, 0))

    def _free(self, memory: SequenceMemory) -> None:
        if self.pages is not None:
            self.pages.give(memory.pages)
            memory.pages = []
        if self.slots is not None:
            if memory.slot != NO_SLOT:
                self.slots.give([memory.slot])
                memory.slot = NO_SLOT
            self._return_spares(memory, len(memory.spares))
            self.slots.give(memory.kept.values())
            memory.kept = {}

    def _return_spares(self, memory: SequenceMemory, count: int) -> None:
        if self.slots is not None and count:
            self.slots.give(memory.spares[-count:])
            del memory.spares[-count:]

    def _written(self, spans: Seq[Span]) -> tuple[Mapping[int, int], ...]:
        """The slots that each span writes, taken in turn from its sequence's spare ones."""
        if self.slots is None:
            return ({},) * len(spans)
        spares = {id(span.memory): iter(span.memory.spares) for span in spans}
        return tuple({number: next(spares[id(span.memory)]) for number in span.states} for span in spans)

    def _batch(
        self, spans: Seq[Span], written: Seq[Mapping[int, int]], epoch: int, step: int, lane: int
    ) -> Batch:
        lengths = [len(span.tokens) for span in spans]
        context = np.array([span.memory.length + span.follows for span in spans], dtype=np.int32)
        cu_seqlens = np.zeros(len(spans) + 1, dtype=np.int32)
        np.cumsum(lengths, out=cu_seqlens[1:])
        # Small batches make many steps, and every call of numpy costs as much as a layer's hand-over.
        positions = context.astype(np.int64)
        if max(lengths) > 1 or min(lengths) < 1:
            starts = np.repeat(positions - cu_seqlens[:-1], lengths)
            positions = np.arange(int(cu_seqlens[-1])) + starts
        tokens = [span.tokens for span in spans]
        return Batch(
            role=self.role,
            epoch=epoch,
            step=step,
            lane=lane,
            input_ids=np.concatenate(tokens, dtype=np.int64),
            positions=positions,
            mrope_positions=_mrope(spans, positions, cu_seqlens),
            cu_seqlens=cu_seqlens,
            context_lens=context,
            modes=np.array([MODE_CODES[span.mode] for span in spans], dtype=np.uint8),
            sequence_ids=np.array([span.memory.sequence_id for span in spans], dtype=np.int64),
            **self._page_fields(spans, context.tolist()),
            **self._state_fields(spans, written, cu_seqlens),
        )

    def _page_fields(self, spans: Seq[Span], context: Seq[int]) -> dict[str, IntArray]:
        if self.pages is None:
            return {}
        # Pages that are held but not reached yet stay out of the table.
        counts = [
            self.pages_for(length + len(span.tokens)) for length, span in zip(context, spans, strict=True)
        ]
        most = max(counts)
        table = np.array(
            [
                span.memory.pages[:count] + [NO_PAGE] * (most - count)
                for span, count in zip(spans, counts, strict=True)
            ],
            dtype=np.int32,
        )
        return {"page_table": table, "page_generations": self.pages.generations(table)}

    def _state_fields(
        self, spans: Seq[Span], written: Seq[Mapping[int, int]], cu_seqlens: IntArray
    ) -> dict[str, IntArray]:
        if self.slots is None:
            return {}
        # A sequence in both lanes hands its state over in the slot that the first piece writes last.
        handed = [NO_SLOT, *(slots[len(span.tokens)] for span, slots in zip(spans, written, strict=True))]
        state_in = np.array(
            [before if s.follows else s.memory.slot for s, before in zip(spans, handed[:-1], strict=True)],
            dtype=np.int32,
        )
        begins = cu_seqlens.tolist()
        places = [NO_SLOT] * begins[-1]
        for begin, slots in zip(begins, written, strict=False):
            for number, slot in slots.items():
                places[begin + number - 1] = slot
        state_out = np.array(places, dtype=np.int32)
        return {
            "state_in": state_in,
            "state_in_generations": self.slots.generations(state_in),
            "state_out": state_out,
            "state_out_generations": self.slots.generations(state_out),
        }


def _mrope(spans: Seq[Span], positions: IntArray, cu_seqlens: IntArray) -> IntArray | None:
    """int64 [3, T] where a span has such positions; text among it has its own in all three rows."""
    if all(span.mrope is None for span in spans):
        return None
    return np.concatenate(
        [
            np.broadcast_to(text, (3, len(text))) if span.mrope is None else span.mrope
            for span, text in zip(spans, np.split(positions, cu_seqlens[1:-1]), strict=True)
        ],
        axis=1,
    )


def _extra(span: Span) -> int:
    """Slots that a span writes beyond the usual one."""
    return len(span.states) - (0 if span.follows else 1)


def _memories(spans: Seq[Span]) -> list[SequenceMemory]:
    """Each sequence of a step once."""
    return list({id(span.memory): span.memory for span in spans}.values())
