"""A whole role lowered: its segments and head as programs' steps, weights packed, memory laid out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from braid_kernels.native.gemm import PackedWeight
from braid_kernels.native.program import Experts
from torch.fx import GraphModule, Node

from braid_orchestrator.segments.base import (
    HIDDEN,
    IDS,
    POSITIONS,
    RESULT,
    Cut,
    Segment,
    SegmentsUnavailable,
)
from braid_orchestrator.segments.graph import outputs_of, value_of
from braid_orchestrator.segments.lowering import Lowering, Named, size
from braid_orchestrator.segments.lowering_expressions import (
    TOKENS,
    Expressions,
    Place,
    Storage,
    elements,
)
from braid_orchestrator.segments.lowering_groups import Canonical, NotOneGroup, canonical, in_one_pass
from braid_orchestrator.segments.lowering_memory import Layout, Lives
from braid_orchestrator.segments.lowering_sharing import share
from braid_orchestrator.segments.lowering_steps import (
    Choice,
    Fallback,
    Lookup,
    Matrix,
    Mixture,
    Product,
    Step,
    Store,
    read_by,
    written_by,
)
from braid_orchestrator.segments.lowering_torch import TorchCall, calls
from braid_orchestrator.segments.lowering_values import Dims, Unsupported
from braid_orchestrator.segments.lowering_weights import Packer

ROWS, LOGITS = "rows", "logits"
"""Names inside the head: which rows are wanted, int64 [n], and what it gives, float32 [n, V]."""


@dataclass(frozen=True)
class PackedPart:
    """Columns [first, first + columns) of a packed product."""

    out: Storage
    first: int
    columns: int
    bias: torch.Tensor | None
    addend: Matrix | None


@dataclass(frozen=True)
class PackedProduct:
    """A product whose weights are packed."""

    x: Matrix
    weight: PackedWeight
    parts: tuple[PackedPart, ...]


@dataclass(frozen=True)
class PackedMixture:
    """A mixture whose weights are packed."""

    x: Matrix
    ids: Matrix
    scores: Matrix
    out: Storage
    chosen: int
    experts: Experts


NativeStep = PackedProduct | PackedMixture | Lookup | Choice | Canonical


@dataclass(frozen=True)
class Run:
    """Steps of one program."""

    steps: tuple[NativeStep, ...]
    storages: tuple[Storage, ...]
    """All that they use, weights too."""
    chunk: Layout
    """Of its temporaries, for each row of a chunk."""

    @property
    def whole(self) -> bool:
        """Whether all rows of a step go through it together: a mixture's experts then run once each."""
        return any(isinstance(step, PackedMixture) for step in self.steps)


@dataclass(frozen=True)
class LoweredGraph:
    """One segment, or the head: programs, and between them what torch runs."""

    pieces: tuple[Run | TorchCall, ...]
    left_to_torch: tuple[Node, ...]
    """The nodes that torch runs."""


@dataclass(frozen=True)
class LoweredRole:
    """All segments of a role, for any lane."""

    segments: tuple[LoweredGraph, ...]
    head: LoweredGraph
    names: Mapping[str, Storage]
    """Storages of the segments' interface, by their names."""
    memory: Layout
    """Of those that hold all rows of a step and are not given from outside, for each row."""
    vocabulary: int


def lower(cut: Cut, packer: Packer) -> LoweredRole:
    """Lower a role.

    Raises:
        SegmentsUnavailable: a value that leaves a segment is not one that is lowered.
    """
    return _Role(packer).found(cut)


class _Role:
    def __init__(self, packer: Packer) -> None:
        self._packer = packer
        self._named: dict[str, Named] = {}
        self._lives = Lives()
        self._place = 0
        """Pieces so far, in the order in which they run."""

    def found(self, cut: Cut) -> LoweredRole:
        segments = tuple(self._segment(segment) for segment in cut.segments)
        head, vocabulary = self._head(cut.head)
        self._lives.use([self._named[RESULT].storage], self._place)
        names = {name: named.storage for name, named in self._named.items()}
        return LoweredRole(segments, head, names, self._lives.layout(), vocabulary)

    def _segment(self, segment: Segment) -> LoweredGraph:
        placeholders = segment.module.graph.find_nodes(op="placeholder")
        reads = [self._read(n, node) for n, node in zip(segment.reads, placeholders, strict=True)]
        lowering = Lowering(segment.module, reads)
        writes = [
            _storage(node, name)
            for name, node in zip(segment.writes, outputs_of(segment.module), strict=True)
        ]
        self._named.update(zip(segment.writes, lowering.run(writes), strict=True))
        return self._graph(lowering)

    def _head(self, module: GraphModule) -> tuple[LoweredGraph, int]:
        (rows,), (logits,) = module.graph.find_nodes(op="placeholder"), outputs_of(module)
        result = self._named[RESULT].storage
        chosen = Storage(result.width, result.dtype, Place.CHUNK)
        lowering = Lowering(module, [Named(chosen, _dims(rows))])
        ids = Storage(1, torch.int64, Place.NAMED, ROWS)
        read = lowering.make.read(ids, 0, (1,), (TOKENS,))
        lowering.steps.append(Lookup(read, result, chosen))
        (found,) = lowering.run([_storage(logits, LOGITS)])
        self._named[ROWS], self._named[LOGITS] = Named(ids, ((TOKENS,),)), found
        return self._graph(lowering), found.storage.width

    def _read(self, name: str, node: Node) -> Named:
        """What a segment reads under a name."""
        if name not in self._named:
            storage = _storage(node, name)
            self._named[name] = Named(storage, _dims(node))
        return self._named[name]

    def _graph(self, lowering: Lowering) -> LoweredGraph:
        """Steps as pieces, their storages placed."""
        make = lowering.make
        steps = [one for step in share(lowering.steps, make) for one in _passes(step, make)]
        pieces = _pieces(steps)
        _place(pieces)
        fallbacks = [piece for piece in pieces if isinstance(piece, Fallback)]
        torch_calls = iter(calls(fallbacks, lowering.torch_names, lowering.kept))
        found: list[Run | TorchCall] = []
        for piece in pieces:
            self._lives.use(_lasting(piece), self._place)
            self._place += 1
            found.append(next(torch_calls) if isinstance(piece, Fallback) else self._run(piece, make))
        nodes = tuple(node for step in steps if isinstance(step, Fallback) for node in step.nodes)
        return LoweredGraph(tuple(found), nodes)

    def _run(self, steps: Sequence[Step], make: Expressions) -> Run:
        lives, storages = Lives(), dict[int, Storage]()
        found = list[NativeStep]()
        for place, step in enumerate(steps):
            used = [*read_by(step), *written_by(step)]
            lives.use((one for one in used if one.place is Place.CHUNK), place)
            if isinstance(step, Store):
                used += (read.storage for read in step.expr.reads)
                found.append(canonical(step, make))
            elif isinstance(step, Product):
                found.append(self._packed(step))
            elif isinstance(step, Mixture):
                found.append(self._packed_mixture(step))
            elif isinstance(step, Lookup | Choice):
                found.append(step)
            storages.update((id(storage), storage) for storage in used)
        return Run(tuple(found), tuple(storages.values()), lives.layout())

    def _packed_mixture(self, step: Mixture) -> PackedMixture:
        experts = self._packer.experts(step.up, step.down, step.activation, step.gated)
        return PackedMixture(step.x, step.ids, step.scores, step.out, step.chosen, experts)

    def _packed(self, product: Product) -> PackedProduct:
        parts, first = list[PackedPart](), 0
        for part in product.parts:
            bias = None if part.bias is None else part.bias.detach().contiguous()
            parts.append(PackedPart(part.out, first, part.columns, bias, part.addend))
            first += part.columns
        if product.gated:
            weight = self._packer.gated(*product.parts[0].weights)
        else:
            weight = self._packer.merged([part.weights[0] for part in product.parts])
        return PackedProduct(product.x, weight, tuple(parts))


def _passes(step: Step, make: Expressions) -> Sequence[Step]:
    if not isinstance(step, Store):
        return [step]
    try:
        return in_one_pass(step, make)
    except NotOneGroup as error:
        raise SegmentsUnavailable(
            f"an elementwise expression over {step.target.space} has too many axes"
        ) from error


def _pieces(steps: Sequence[Step]) -> list[list[Step] | Fallback]:
    """Steps up to what torch runs or what takes all rows at once, that, and so on."""
    found: list[list[Step] | Fallback] = []
    for step in steps:
        last = found[-1] if found else None
        if isinstance(step, Fallback):
            found.append(step)
        elif isinstance(last, list) and not isinstance(step, Mixture) and not isinstance(last[-1], Mixture):
            last.append(step)
        else:
            found.append([step])
    return found


def _takes_all_rows(piece: list[Step] | Fallback) -> bool:
    return isinstance(piece, Fallback) or isinstance(piece[0], Mixture)


def _uses(piece: list[Step] | Fallback) -> Iterator[Storage]:
    for step in [piece] if isinstance(piece, Fallback) else piece:
        yield from read_by(step)
        yield from written_by(step)


def _place(pieces: Sequence[list[Step] | Fallback]) -> None:
    """Temporaries that more than one piece uses hold all rows of a step."""
    users: dict[int, set[int]] = {}
    for index, piece in enumerate(pieces):
        for storage in _uses(piece):
            users.setdefault(id(storage), set()).add(index)
            if storage.place is Place.CHUNK and (_takes_all_rows(piece) or len(users[id(storage)]) > 1):
                storage.place = Place.STEP


def _lasting(piece: list[Step] | Fallback) -> Iterator[Storage]:
    """Storages of a piece that hold all rows of a step and are not given from outside."""
    for storage in _uses(piece):
        if storage.place is Place.STEP or (storage.place is Place.NAMED and is_own(storage.name)):
            yield storage


def is_own(name: str) -> bool:
    """Whether what has a name lies in memory of the role's own."""
    return name not in (IDS, POSITIONS, HIDDEN, ROWS, LOGITS) and not name.startswith(("in.", "out."))


def _storage(node: Node, name: str) -> Storage:
    """Memory for a value of the interface."""
    fake = value_of(node)
    width = elements([length for dim in _dims(node) for length in dim])
    if fake.dtype == torch.complex64:
        return Storage(2 * width, torch.float32, Place.NAMED, name)
    return Storage(width, fake.dtype, Place.NAMED, name)


def _dims(node: Node) -> Dims:
    """How a tensor's dimensions divide, if the trace does not say more: tokens run slowest."""
    try:
        sizes = [size(length) for length in value_of(node).shape]
    except Unsupported as error:
        raise SegmentsUnavailable(f"{node} has a size that is no multiple of the tokens' number") from error
    return tuple(((TOKENS,) if tokens else ()) + ((count,) if count > 1 else ()) for count, tokens in sizes)
