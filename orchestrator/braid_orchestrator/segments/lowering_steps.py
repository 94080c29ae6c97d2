"""What a segment is lowered to: steps over storages, in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from braid_kernels.native.program import ChoiceKind
from torch.fx import Node

from braid_orchestrator.segments.lowering_expressions import Expr, Place, Read, Storage
from braid_orchestrator.segments.lowering_values import Dims


@dataclass(frozen=True)
class Matrix:
    """Rows in a storage: `per_token` of each token, the first at `offset`, `stride` elements apart."""

    storage: Storage
    offset: int
    stride: int
    per_token: int = 1


@dataclass(frozen=True)
class Part:
    """Columns of a product that go to one storage, [T · per_token, n] dense.

    `weights` are [n, k]: one, or the gate's and the other of a gated unit.
    """

    weights: tuple[torch.Tensor, ...]
    out: Storage
    bias: torch.Tensor | None = None
    addend: Matrix | None = None

    @property
    def columns(self) -> int:
        """n."""
        return self.weights[0].shape[0]


@dataclass(eq=False)
class Product:
    """Linear maps of the same rows."""

    x: Matrix
    parts: tuple[Part, ...]

    @property
    def gated(self) -> bool:
        """Whether it is silu(gate) times another map."""
        return len(self.parts[0].weights) == 2


@dataclass(eq=False)
class Lookup:
    """Rows of a table by ids int64, one a token; `table` may be memory of the step."""

    ids: Read
    table: torch.Tensor | Storage
    out: Storage


@dataclass(eq=False)
class Choice:
    """Elements of rows by index: the largest, those with given ids, or a number in their place."""

    kind: ChoiceKind
    ids: Matrix
    values: Matrix
    count: int
    """Elements of a row that there are to choose from."""
    chosen: int
    x: Matrix | None = None
    value: float = 0.0


@dataclass(eq=False)
class Mixture:
    """Rows through the experts that were chosen for them; see `braid_experts.run` for the weights."""

    x: Matrix
    ids: Matrix
    scores: Matrix
    out: Storage
    chosen: int
    up: torch.Tensor
    down: torch.Tensor
    activation: str
    gated: bool


@dataclass(eq=False)
class Store:
    """An expression's values, written to memory; `target` is a read of the same space."""

    expr: Expr
    target: Read


@dataclass(frozen=True)
class Tensor:
    """A value in memory as a tensor of these dimensions."""

    read: Read
    dims: Dims
    dtype: torch.dtype
    pairs: bool = False
    """Whether the last dimension has the real and the imaginary part of complex numbers."""


@dataclass(eq=False)
class Fallback:
    """Nodes of the traced graph that torch runs, in order."""

    nodes: list[Node] = field(default_factory=list)
    inputs: dict[Node, Tensor | torch.Tensor] = field(default_factory=dict)
    """Lowered values and weights that the nodes take."""
    outputs: dict[Node, Storage] = field(default_factory=dict)
    """Values that lowered steps take; their storages lie where torch puts them."""


Step = Product | Lookup | Choice | Mixture | Store | Fallback


def read_by(step: Step) -> Iterator[Storage]:
    """Storages that a step reads, weights left out."""
    match step:
        case Product():
            yield step.x.storage
            yield from (part.addend.storage for part in step.parts if part.addend is not None)
        case Lookup():
            yield step.ids.storage
            if isinstance(step.table, Storage):
                yield step.table
        case Choice():
            if step.kind is not ChoiceKind.TOP:
                yield step.ids.storage
            yield (step.x or step.values).storage
        case Mixture():
            yield from (rows.storage for rows in (step.x, step.ids, step.scores))
        case Store():
            yield from (read.storage for read in step.expr.reads if read.storage.place is not Place.CONSTANT)
        case Fallback():
            yield from (one.read.storage for one in step.inputs.values() if isinstance(one, Tensor))


def written_by(step: Step) -> Iterator[Storage]:
    """Storages that a step writes."""
    match step:
        case Product():
            yield from (part.out for part in step.parts)
        case Lookup() | Mixture():
            yield step.out
        case Choice():
            yield step.values.storage
            if step.kind is ChoiceKind.TOP:
                yield step.ids.storage
        case Store():
            yield step.target.storage
        case Fallback():
            yield from step.outputs.values()
