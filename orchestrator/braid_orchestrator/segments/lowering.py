"""From a traced segment to steps: products, look-ups, fused elementwise expressions, and what torch runs.

Elementwise operators become expressions that are computed where their result is needed in memory: by a
product, a call, a later segment, or an operator that is not lowered. That one runs in torch, on the same
memory.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from braid_orchestrator.segments.base import SegmentsUnavailable, is_carried
from braid_orchestrator.segments.lowering_expressions import (
    TOKENS,
    Constant,
    NeedsMemory,
    Place,
    Read,
    Storage,
    dense,
    elements,
)
from braid_orchestrator.segments.lowering_operators import VIEWS
from braid_orchestrator.segments.lowering_registry import OPERATORS
from braid_orchestrator.segments.lowering_steps import Fallback, Tensor
from braid_orchestrator.segments.lowering_values import (
    Complex,
    Dims,
    Size,
    Unsupported,
    Value,
    value,
)
from braid_orchestrator.segments.lowering_workspace import COMPUTED, KEPT, Workspace, is_dense


@dataclass(frozen=True)
class Opaque:
    """What only torch knows: a value whose layout or dtype is not one that is lowered."""


Lowered = Value | Complex | torch.Tensor | Opaque | list["Lowered"]
"""What a node of the graph became; a tensor is a weight."""


@dataclass(frozen=True)
class Named:
    """A value of the segments' interface: its memory, and how its tensor's dimensions divide."""

    storage: Storage
    dims: Dims
    pairs: bool = False
    """Whether it is complex: the last of its dimensions has the real and the imaginary part."""


class Lowering(Workspace):
    """Lowers one graph.

    Args:
        module: the graph; every node has its fake value in `meta["val"]`.
        reads: its placeholders' values, in order.

    Raises:
        SegmentsUnavailable: its sizes are not made of integers and one number of tokens.
    """

    def __init__(self, module: GraphModule, reads: Sequence[Named]) -> None:
        super().__init__()
        self.opaque = Opaque()
        self._module = module
        self._env: dict[Node, Lowered] = {}
        self.torch_names: dict[Node, str] = {}
        """Nodes that torch runs, or ran in an earlier segment, and what their results are called."""
        self.kept: set[Node] = set()
        """Those of them that torch takes again in later segments."""
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        for node, named in zip(placeholders, reads, strict=True):
            space = tuple(size for dim in named.dims for size in dim)
            read = self.make.read(named.storage, 0, dense(space), space)
            found = value(named.dims, read, named.storage.dtype)
            self._env[node] = self.from_pairs(found) if named.pairs else found
            if named.storage.place is Place.TORCH:
                self._env[node] = self.opaque
                self.torch_names[node] = named.storage.name

    # ---- the graph ----

    def run(self, writes: Sequence[Storage]) -> tuple[Named, ...]:
        """Lower all nodes; the results lie in storages like these, with the same places and names."""
        for node in self._module.graph.nodes:
            if node.op == "get_attr":
                self._env[node] = _attribute(self._module, str(node.target))
            elif node.op == "call_function" and not is_size(node):
                self._env[node] = self._lower(node)
        (output,) = (node for node in self._module.graph.nodes if node.op == "output")
        return tuple(self._write(node, to) for node, to in zip(output.args[0], writes, strict=True))

    def _lower(self, node: Node) -> Lowered:
        """What a node becomes: natively if it can, its operands put into memory first where they must."""
        if self._is_constant(node):
            return self._constant_result(node)
        for prepare in (None, self.in_memory, self.in_dense_memory):
            try:
                if prepare is not None:
                    self._prepare(node, prepare)
                return self._native(node)
            except NeedsMemory:
                continue
            except Unsupported:
                break
        return self._torch(node)

    def _prepare(self, node: Node, prepare: Callable[[Value], Value]) -> None:
        """Put a node's operands into memory."""
        for source in node.all_input_nodes:
            found = self._env.get(source)
            if isinstance(found, Value) and not isinstance(found.pieces[0].expr, Constant):
                self._env[source] = prepare(found)

    def _native(self, node: Node) -> Lowered:
        """A node by the table of operators, if what came out is what the trace says."""
        handler = OPERATORS.get(node.target, OPERATORS.get(str(node.target)))
        if handler is None:
            raise Unsupported(f"{node.target} is not lowered")
        source = self._env.get(node.all_input_nodes[0]) if node.target in VIEWS else None
        if isinstance(source, Complex):
            return self._complex_view(node, source)
        found = handler(self, node)
        if isinstance(found, Value):
            fake = fake_of(node)
            if found.dtype != fake.dtype or found.sizes != self.sizes(node):
                raise Unsupported(f"{node.target} gives {found.sizes} {found.dtype}, not {fake}")
        return found

    def _complex_view(self, node: Node, source: Complex) -> Complex:
        """A view of both parts."""
        (operand, *_), parts = node.all_input_nodes, list[Value]()
        for part in (source.real, source.imaginary):
            self._env[operand] = part
            try:
                found = OPERATORS[node.target](self, node)
            finally:
                self._env[operand] = source
            if not isinstance(found, Value) or found.sizes != self.sizes(node):
                raise Unsupported(f"{node.target} of complex numbers")
            parts.append(found)
        return Complex(*parts)

    def known(self, node: object) -> Lowered | None:
        """What a node became; None for a number."""
        return self.lowered(node) if isinstance(node, Node) else None

    def lowered(self, node: object) -> Lowered:
        """What a node became. Raises Unsupported for what is not a tensor of the step."""
        if isinstance(node, Node) and node in self._env:
            return self._env[node]
        raise Unsupported(f"{node} is not a tensor of the step")

    def value_of(self, node: object) -> Value:
        """A node, a weight or a number as a value of the step."""
        if isinstance(node, int | float) and not isinstance(node, bool):
            return value((), self.make.constant(float(node)), torch.float32)
        found = self.lowered(node)
        if isinstance(found, torch.Tensor):
            return self.weight(found)
        if not isinstance(found, Value):
            raise Unsupported(f"{node} is known to torch only")
        return found

    def weight_of(self, node: object) -> torch.Tensor:
        """A node that is a weight."""
        found = self.lowered(node)
        if not isinstance(found, torch.Tensor):
            raise Unsupported(f"{node} is not a weight")
        return found

    def sizes(self, node: Node) -> tuple[Size, ...]:
        """The dimensions of a node's tensor."""
        return self.sizes_of(fake_of(node))

    def sizes_of(self, fake: torch.Tensor) -> tuple[Size, ...]:
        """The dimensions of a fake tensor."""
        return tuple(size(length) for length in fake.shape)

    def consumers(self, node: Node) -> set[Node]:
        """Nodes that use a value, looking through views of it."""
        found: set[Node] = set()
        for user in node.users:
            found |= self.consumers(user) if user.target in VIEWS else {user}
        return found

    def origin(self, node: object) -> Node | None:
        """The node that a chain of views begins at."""
        while isinstance(node, Node) and node.target in VIEWS:
            node = node.args[0]
        return node if isinstance(node, Node) else None

    def _write(self, node: Node, storage: Storage) -> Named:
        """Let a result lie in a storage of the segments' interface."""
        result = self._env[node]
        unknown = isinstance(result, Opaque) or storage.dtype not in COMPUTED
        if node in self.torch_names and is_carried(storage.name) and unknown:
            # Only torch reads it again, under this name.
            self.torch_names[node] = storage.name
            self.kept.add(node)
            return Named(Storage(0, storage.dtype, Place.TORCH, storage.name), ())
        try:
            pairs = isinstance(result, Complex)
            source = self.as_pairs(result) if isinstance(result, Complex) else self.value_of(node)
            if source.dtype != storage.dtype or elements(source.space) != storage.width:
                raise Unsupported(f"it is {source.dtype} {source.sizes}, its memory {storage}")
            found = source.whole if source.axis < 0 else None
            if (
                isinstance(found, Read)
                and is_dense(found)
                and found.storage.place is Place.CHUNK
                and found.storage.dtype == storage.dtype
            ):
                # The value is made where it is wanted.
                found.storage.place, found.storage.name = storage.place, storage.name
                return Named(found.storage, source.dims, pairs)
            self.store(source, storage)
        except Unsupported as error:
            raise SegmentsUnavailable(f"{node} cannot leave a segment: {error}") from error
        return Named(storage, source.dims, pairs)

    # ---- what is not lowered ----

    def _is_constant(self, node: Node) -> bool:
        """Whether a node is made of weights alone."""
        if not all(isinstance(self._env.get(source), torch.Tensor | list) for source in node.all_input_nodes):
            return False
        return all(_is_static(fake) for fake in _fakes(node)) and all(
            not isinstance(self._env[source], list) or self._lists_weights(source)
            for source in node.all_input_nodes
        )

    def _lists_weights(self, node: Node) -> bool:
        found = self._env[node]
        return isinstance(found, list) and all(isinstance(item, torch.Tensor) for item in found)

    def _constant_result(self, node: Node) -> Lowered:
        target: Any = node.target
        env: Any = self._env
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), env.__getitem__)
        with torch.no_grad():
            found = target(*args, **kwargs)
        if isinstance(found, tuple):
            return list(found)
        return found if isinstance(found, torch.Tensor | list) else self.opaque

    def _torch(self, node: Node) -> Lowered:
        """Let torch run a node."""
        given: dict[Node, Tensor | torch.Tensor] = {}
        for source in node.all_input_nodes:
            if not is_size(source) and source not in self.torch_names:
                given[source] = self._given(source, node)
        step = self.steps[-1] if self.steps else None
        reads = {id(one.read.storage) for one in given.values() if isinstance(one, Tensor)}
        # What torch is given is looked up before the first of its operators runs.
        if not isinstance(step, Fallback) or reads & set(map(id, step.outputs.values())):
            step = Fallback()
            self.steps.append(step)
        step.nodes.append(node)
        step.inputs.update(given)
        self.torch_names[node] = node.name
        return self._torchs_result(node, step)

    def _given(self, source: Node, node: Node) -> Tensor | torch.Tensor:
        """A weight, or a lowered value in memory, for torch."""
        found = self._env[source]
        if isinstance(found, torch.Tensor):
            return found
        try:
            pairs = isinstance(found, Complex)
            lowered = self.as_pairs(found) if isinstance(found, Complex) else found
            if isinstance(lowered, Value):
                if lowered.dtype is torch.bool:
                    lowered = replace(lowered, dtype=torch.float32)
                held = self.in_memory(lowered)
                if isinstance(held.whole, Read):
                    return Tensor(held.whole, held.dims, fake_of(source).dtype, pairs)
            raise Unsupported(f"it is a {type(found).__name__}")
        except Unsupported as error:
            raise SegmentsUnavailable(f"{node.target} cannot be given {source}: {error}") from error

    def _torchs_result(self, node: Node, step: Fallback) -> Lowered:
        """What torch gives, as a value where it is rows of tokens."""
        fake = node.meta.get("val")
        if not isinstance(fake, torch.Tensor) or fake.dtype not in KEPT:
            return self.opaque
        dims = _rows_of_tokens(fake)
        if dims is None:
            return self.opaque
        space = tuple(length for dim in dims for length in dim)
        storage = Storage(elements(space), fake.dtype, Place.TORCH)
        step.outputs[node] = storage
        return value(dims, self.make.read(storage, 0, dense(space), space), fake.dtype)


def is_size(node: Node) -> bool:
    """Whether a node gives a number and not a tensor."""
    if "val" not in node.meta:
        # Arithmetic of sizes may have no fake value.
        return node.op == "call_function" and all(map(is_size, node.all_input_nodes))
    return isinstance(node.meta["val"], torch.SymInt | torch.SymFloat | torch.SymBool | int | float)


def fake_of(node: Node) -> torch.Tensor:
    """The fake tensor of a node. Raises Unsupported for one that gives something else."""
    fake = node.meta.get("val")
    if not isinstance(fake, torch.Tensor):
        raise Unsupported(f"{node.target} does not give one tensor")
    return fake


def size(length: int | torch.SymInt) -> Size:
    """A size of a fake tensor. Raises Unsupported for one that is not a multiple of the tokens' number."""
    if isinstance(length, int):
        return length, False
    factor, symbol = length.node.expr.as_coeff_Mul()
    if not symbol.is_Symbol or not factor.is_Integer:
        raise Unsupported(f"a size of {length}")
    return int(factor), True


def _rows_of_tokens(fake: torch.Tensor) -> Dims | None:
    """How the dimensions of a tensor divide that holds a row for each token; None for other tensors."""
    try:
        sizes = [size(length) for length in fake.shape]
    except Unsupported:
        return None
    if sum(tokens for _, tokens in sizes) != 1:
        return None
    first = next(i for i, (_, tokens) in enumerate(sizes) if tokens)
    # With a factor, whether tokens or the others run faster is not known.
    if sizes[first] != (1, True) or any(count != 1 for count, _ in sizes[:first]):
        return None
    return tuple((TOKENS,) if tokens else (count,) if count > 1 else () for count, tokens in sizes)


def _fakes(node: Node) -> Iterator[object]:
    found = node.meta.get("val")
    if isinstance(found, list | tuple):
        yield from found
    else:
        yield found


def _is_static(fake: object) -> bool:
    return isinstance(fake, torch.Tensor) and all(isinstance(length, int) for length in fake.shape)


def _attribute(module: GraphModule, path: str) -> torch.Tensor:
    found = operator.attrgetter(path)(module)
    if not isinstance(found, torch.Tensor):
        raise SegmentsUnavailable(f"{path} of a traced graph is a {type(found).__name__}, not a tensor")
    return found
