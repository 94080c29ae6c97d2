"""The prefix cache: what sequences computed stays usable for others that begin with the same tokens.

A tree whose edges are whole pages of tokens. A prefix of p tokens can be gone on from where every page
of it is in the tree and, for models with linear layers, the state exactly behind its p-th token: a
recurrent state says nothing about any shorter or longer prefix. Steps are asked to keep states where
others are likely to branch off; those behind made tokens are replaced as their sequence grows.

Units that only the cache keeps count as available: they are dropped, least recently used first, when
a sequence needs them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from braid_wire.batch import NO_SLOT
from braid_wire.layers import Mode

from braid_orchestrator.memory import VERSIONS, RoleMemory, SequenceMemory, Span

NO_PAGE = -1


@dataclass
class CacheStats:
    """What the cache did so far."""

    hits: int = 0
    """Sequences that began behind a prefix of at least one page."""
    misses: int = 0
    """Sequences that asked and began with nothing."""
    hit_tokens: int = 0
    """Tokens that were not computed again."""
    evicted_pages: int = 0
    evicted_states: int = 0


@dataclass(eq=False)
class _Node:
    """A prefix that ends with a page; a root is the empty one, of all sequences in a namespace."""

    parent: _Node | None
    namespace: str = ""
    key: tuple[int, ...] = ()
    """The tokens of its last page."""
    end: int = 0
    """Its tokens: the position that a sequence goes on at."""
    page: int = NO_PAGE
    slot: int = NO_SLOT
    """The state behind its last token, where it was kept."""
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)
    leases: int = 0
    """Sequences whose lease ends here."""
    used: int = 0
    slot_used: int = 0


@dataclass(eq=False)
class Lease:
    """The part of the tree that one sequence holds: everything up to a node cannot be dropped."""

    node: _Node
    prompt: int
    """Tokens that the sequence began with."""
    known: int = 0
    """Tokens of the sequence that the tree had when it was last looked at."""
    tail: _Node | None = None
    """Where the state behind its newest made tokens is kept."""
    barred: bool = False
    """What it holds was forgotten: nothing that follows on it may be kept."""


class PrefixCache:
    """Keeps pages and states of one role.

    Args:
        memory: whose units it keeps; it makes room in their pools.
        spacing: tokens between two states that are kept of every prompt while slots are free; rounded
            up to whole pages.
    """

    def __init__(self, memory: RoleMemory, spacing: int = 256) -> None:
        self.stats = CacheStats()
        self._memory = memory
        self._page_size = memory.page_size
        self._spacing = -(-spacing // memory.page_size) * memory.page_size
        self._roots: dict[str, _Node] = {}
        self._leases: set[Lease] = set()
        self._clock = count(1)
        self._leaves = _Ages(self._leaf_age)
        self._states = _Ages(lambda node: node.slot_used if node.slot != NO_SLOT else 0)
        if memory.pages is not None:
            memory.pages.make_room = self._free_pages
        if memory.slots is not None:
            memory.slots.make_room = self._free_slots

    def open(self, tokens: int, namespace: str = "") -> Lease:
        """A lease of nothing, for a sequence that begins with so many tokens.

        Args:
            namespace: sequences share with others of the same one alone.
        """
        with self._memory.lock:
            root = self._roots.setdefault(namespace, _Node(None, namespace))
            root.leases += 1
            lease = Lease(root, tokens)
            self._leases.add(lease)
            return lease

    def attach(self, lease: Lease, tokens: Sequence[int], memory: SequenceMemory) -> int:
        """Let a sequence go on from the longest prefix that is kept, where that is longer than its own.

        At least its last token is left to be fed, so that there are logits.

        Returns:
            How many of its tokens need not be computed any more.
        """
        with self._memory.lock:
            if lease.barred:
                return 0
            found, lease.known = self._longest(lease.node, tokens)
            if found is None or found.end <= memory.length:
                return 0
            gained = found.end - memory.length
            path = list(_path(found))
            pages = [node.page for node in path] if self._memory.pages is not None else []
            self._memory.adopt(memory, found.end, pages, found.slot)
            now = next(self._clock)
            for node in path:
                node.used = now
            self._use_state(found)
            self._move(lease, found)
            return gained

    def note_start(self, gained: int) -> None:
        """Count a sequence that begins, behind a prefix of so many tokens."""
        if gained:
            self.stats.hits += 1
        else:
            self.stats.misses += 1

    def next_page(self, lease: Lease, tokens: Sequence[int]) -> tuple[object, ...] | None:
        """What a prompt computes next, the same for all prompts that do; None: others cannot use it."""
        slots, end = self._memory.slots, lease.node.end + self._page_size
        if lease.barred or end >= len(tokens) or (slots is not None and slots.available < 2):
            return None
        return id(lease.node), self._key(tokens, lease.node.end)

    def with_states(self, lease: Lease, span: Span, tokens: int, followed: bool = False) -> Span:
        """The span of a sequence's next step, asked to keep states that others may go on from.

        Slots for them are acquired: for states at likely branches like any sequence's, for evenly spaced
        ones while some are free.

        Args:
            tokens: of the sequence, as far as they are known.
            followed: others wait for what the step computes.
        """
        if self._memory.slots is None or lease.barred:
            return span
        begin, size = span.memory.length, self._page_size
        end = begin + len(span.tokens)
        pages = range(begin // size * size + size, end + 1, size)
        if not pages:
            return span
        if span.mode is not Mode.EXTEND:
            return replace(span, keep=tuple(at - begin for at in pages))
        likely = {(tokens - 1) // size * size, tokens // size * size, lease.known} & set(pages)
        if followed:
            likely.add(pages[-1])
        spaced = {at for at in pages if at % self._spacing == 0} - likely
        with self._memory.lock:
            slots = self._memory.slots
            chosen = [*sorted(likely), *sorted(spaced)[: max(slots.free - len(likely), 0)]]
            # One is left for a prompt that is cut in two lanes.
            chosen = chosen[: max(slots.available - 1, 0)]
            keep = tuple(sorted(at - begin for at in chosen))
            asked = replace(span, keep=keep)
            self._memory.acquire(span.memory, 0, VERSIONS + len(asked.states) - 1)
            return asked

    def insert(self, lease: Lease, tokens: Sequence[int], memory: SequenceMemory) -> None:
        """Make what a sequence has committed usable by others, and let go of states it outgrew.

        Args:
            tokens: its tokens, as far as they are known; what it committed behind them is left out.
        """
        with self._memory.lock:
            if not lease.barred:
                self._extend(lease, tokens, memory)
            if self._memory.slots is not None:
                self._memory.slots.give(memory.kept.values())
                memory.kept = {}

    def close(self, lease: Lease) -> None:
        """The sequence holds nothing of the tree any more; what it put there stays."""
        with self._memory.lock:
            if lease in self._leases:
                self._leases.remove(lease)
                self._let_go(lease.node)

    def forget(self, lease: Lease) -> None:
        """Drop what a sequence put into the tree or used of it, and all that was built on that."""
        with self._memory.lock:
            path = [] if lease.barred else list(_path(lease.node))
            if path:
                self._drop_below(path[0])

    def flush(self) -> None:
        """Drop everything. Sequences that run go on with what they hold, and keep nothing new."""
        with self._memory.lock:
            for root in list(self._roots.values()):
                for child in list(root.children.values()):
                    self._drop_below(child)
            for lease in self._leases:
                lease.barred = True

    def _longest(self, node: _Node, tokens: Sequence[int]) -> tuple[_Node | None, int]:
        """The deepest node that a sequence of these tokens can go on from, and how many the tree has."""
        found: _Node | None = None
        while (child := node.children.get(self._key(tokens, node.end))) is not None:
            node = child
            if self._usable(node) and node.end < len(tokens):
                found = node
        return found, node.end

    def _key(self, tokens: Sequence[int], begin: int) -> tuple[int, ...]:
        return tuple(tokens[begin : begin + self._page_size])

    def _usable(self, node: _Node) -> bool:
        return node.slot != NO_SLOT or self._memory.slots is None

    def _extend(self, lease: Lease, tokens: Sequence[int], memory: SequenceMemory) -> None:
        node, now = lease.node, next(self._clock)
        while node.end + self._page_size <= min(memory.length, len(tokens)):
            key = self._key(tokens, node.end)
            child = node.children.get(key)
            if child is None:
                child = self._add(node, key, memory)
            elif self._memory.pages is not None and child.page != memory.pages[node.end // self._page_size]:
                # Another sequence computed the same page meanwhile; one copy of it is enough.
                self._memory.exchange(memory, node.end // self._page_size, child.page)
            node = child
            node.used = now
            self._keep_state(node, memory.kept.pop(node.end, NO_SLOT))
        if node is lease.node:
            return
        lease.known = max(lease.known, node.end)
        self._move(lease, node)
        if node.end >= lease.prompt and node.slot != NO_SLOT:
            self._replace_tail(lease, node)

    def _add(self, parent: _Node, key: tuple[int, ...], memory: SequenceMemory) -> _Node:
        node = _Node(parent, key=key, end=parent.end + self._page_size)
        if self._memory.pages is not None:
            node.page = memory.pages[parent.end // self._page_size]
            self._memory.pages.keep(node.page)
        parent.children[key] = node
        return node

    def _keep_state(self, node: _Node, slot: int) -> None:
        """A node takes over a state that a sequence holds, unless it has one."""
        if slot == NO_SLOT or self._memory.slots is None:
            return
        if node.slot == NO_SLOT:
            node.slot = slot
            self._memory.slots.keep(slot)
            self._use_state(node)
        self._memory.slots.give([slot])

    def _replace_tail(self, lease: Lease, node: _Node) -> None:
        """Of the states behind a sequence's made tokens the newest is kept, and those that others use."""
        old, lease.tail = lease.tail, node
        if old is None or old.slot == NO_SLOT or self._memory.slots is None:
            return
        if old.parent is not None and len(old.children) == 1 and not old.leases:
            self._drop_state(old)

    def _use_state(self, node: _Node) -> None:
        if node.slot != NO_SLOT:
            node.slot_used = next(self._clock)
            self._states.push(node)

    def _move(self, lease: Lease, node: _Node) -> None:
        old, lease.node = lease.node, node
        node.leases += 1
        self._let_go(old)

    def _let_go(self, node: _Node) -> None:
        node.leases -= 1
        self._trim(node)

    def _trim(self, node: _Node) -> None:
        """Drop pages at the end of a branch that nobody can go on from; what is left of it can go later."""
        while self._loose(node) and not self._usable(node) and node.parent is not None:
            parent = node.parent
            self._remove(node)
            node = parent
        if self._loose(node):
            self._leaves.push(node)
        if self._roots.get(node.namespace) is node and not (node.children or node.leases):
            del self._roots[node.namespace]

    def _loose(self, node: _Node) -> bool:
        """Whether a node can be dropped: nothing lies behind it, and no sequence is there."""
        return not (node.children or node.leases) and node.parent is not None

    def _leaf_age(self, node: _Node) -> int:
        return node.used if self._loose(node) else 0

    def _remove(self, node: _Node) -> None:
        """Take a node without children out of the tree."""
        parent = node.parent
        if parent is None:
            return
        if self._memory.pages is not None:
            self._memory.pages.drop(node.page)
        self._drop_state(node)
        del parent.children[node.key]
        parent.used = max(parent.used, node.used)
        node.parent = None

    def _drop_state(self, node: _Node) -> None:
        if node.slot != NO_SLOT and self._memory.slots is not None:
            self._memory.slots.drop(node.slot)
            node.slot = NO_SLOT

    def _drop_below(self, top: _Node) -> None:
        """Take a node and all behind it out of the tree."""
        nodes = [top]
        for node in nodes:
            nodes.extend(node.children.values())
        gone = {id(node) for node in nodes}
        for lease in self._leases:
            lease.barred = lease.barred or id(lease.node) in gone
        for node in reversed(nodes):
            self._remove(node)

    def _free_pages(self, wanted: int) -> None:
        """Drop pages that nobody holds, from the ends of the branches that were not used for longest."""
        pages = self._memory.pages
        if pages is None:
            return
        before = pages.free
        while pages.free < before + wanted and (node := self._leaves.pop()) is not None:
            parent = node.parent
            self._remove(node)
            if parent is not None:
                self._trim(parent)
        self.stats.evicted_pages += pages.free - before

    def _free_slots(self, wanted: int) -> None:
        """Drop states that nobody holds, and pages that are of no use without them."""
        slots = self._memory.slots
        if slots is None:
            return
        before, held = slots.free, []
        while slots.free < before + wanted and (node := self._states.pop()) is not None:
            if slots.idle(node.slot):
                self._drop_state(node)
                self._trim(node)
            else:
                held.append(node)
        for node in held:
            self._states.push(node)
        self.stats.evicted_states += slots.free - before


class _Ages:
    """Nodes by when they were last used.

    An entry counts as long as its node's age is the one that it was pushed with.

    Args:
        age: of a node; 0: it is no candidate.
    """

    def __init__(self, age: Callable[[_Node], int]) -> None:
        self._age = age
        self._heap: list[tuple[int, int, _Node]] = []
        self._order = count()
        self._most = 1024

    def push(self, node: _Node) -> None:
        """Note a candidate's present age."""
        if len(self._heap) >= self._most:
            self._heap = [entry for entry in self._heap if entry[0] == self._age(entry[2])]
            heapq.heapify(self._heap)
            self._most = max(2 * len(self._heap), 1024)
        if (age := self._age(node)) > 0:
            heapq.heappush(self._heap, (age, next(self._order), node))

    def pop(self) -> _Node | None:
        """The candidate that was not used for longest; None where there is none."""
        while self._heap:
            age, _, node = heapq.heappop(self._heap)
            if age == self._age(node):
                return node
        return None


def _path(node: _Node) -> Iterator[_Node]:
    """The nodes from the first page to a node."""
    found = []
    while node.parent is not None:
        found.append(node)
        node = node.parent
    return reversed(found)
