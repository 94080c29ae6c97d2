"""Segments run by the C++ kernels: one call for each, its values written where they are wanted."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from braid_kernels.errors import BuildError, InputError
from braid_kernels.native.library import num_threads
from braid_kernels.native.program import Program
from braid_wire.errors import BatchInvalid, StepOrder
from torch import nn

from braid_orchestrator.segments.base import (
    HIDDEN,
    IDS,
    POSITIONS,
    RESULT,
    BuffersOf,
    Cut,
    Segment,
    SegmentCompiler,
    SegmentedRole,
    SegmentsUnavailable,
)
from braid_orchestrator.segments.lowering_expressions import Place, Storage
from braid_orchestrator.segments.lowering_role import (
    LOGITS,
    ROWS,
    LoweredGraph,
    LoweredRole,
    PackedProduct,
    Run,
    is_own,
    lower,
)
from braid_orchestrator.segments.lowering_steps import Lookup, Tensor
from braid_orchestrator.segments.lowering_torch import Argument, Tokens, TorchCall
from braid_orchestrator.segments.lowering_weights import Packer
from braid_orchestrator.segments.native_programs import build

# Rows that go through a program together, for each thread: few enough that what lies between two steps
# stays in cache, enough that a weight's panel is used often.
_CHUNK = 128
_LINE = 64
_GRID = 3  # positions of a token where they are of time, height and width


class NativeCompiler(SegmentCompiler):
    """Lowers segments to programs of the C++ kernels, for models in float32 and bfloat16 on the CPU."""

    name: ClassVar[str] = "native"

    def __init__(self) -> None:
        self._packer = Packer()
        self._lowered: list[tuple[Cut, LoweredRole]] = []

    def compile(self, cut: Cut, buffers: BuffersOf, max_tokens: int) -> NativeRole:
        try:
            return NativeRole(cut, self._lower(cut), buffers, max_tokens)
        except BuildError as error:
            raise SegmentsUnavailable(f"the kernels cannot be built: {error.reason}") from error

    def release_originals(self, *modules: nn.Module) -> int:
        """Let go of weights that are packed and that nothing compiled here uses as they were.

        They are replaced by empty tensors in the modules given and in the graphs that were compiled,
        which then cannot run by themselves any more; cuts that were compiled here can still be compiled.

        Returns:
            The bytes of these weights, which are free once nothing else holds them.
        """
        kept = {_address(tensor) for _, lowered in self._lowered for tensor in _held(lowered)}
        packed = {_address(weight): weight for weight in self._packer.sources}
        gone = packed.keys() - kept
        graphs = [part for cut, _ in self._lowered for part in (*(s.module for s in cut.segments), cut.head)]
        for module in [part for root in (*modules, *graphs) for part in root.modules()]:
            _empty(module, gone)
        freed = sum(packed[address].untyped_storage().nbytes() for address in gone)
        self._packer.forget()
        return freed

    def _lower(self, cut: Cut) -> LoweredRole:
        for known, lowered in self._lowered:
            if known is cut:
                return lowered
        if cut.device.type != "cpu":
            raise SegmentsUnavailable(f"native segments run on the CPU; the weights lie on {cut.device}")
        lowered = lower(cut, self._packer)
        self._lowered.append((cut, lowered))
        return lowered


class NativeRole(SegmentedRole):
    """One role on one lane."""

    def __init__(self, cut: Cut, lowered: LoweredRole, buffers: BuffersOf, max_tokens: int) -> None:
        self.segments = cut.segments
        self._cut, self.lowered = cut, lowered
        self._max_tokens = max_tokens
        self._memory = _Memory(lowered, _outside(cut.segments, lowered.names, buffers), max_tokens)
        self._torchs: dict[str, torch.Tensor] = {}
        """What torch computed in this step, by name."""
        self._pieces = [_pieces(graph, self._memory, self._torchs) for graph in lowered.segments]
        self._head = _pieces(lowered.head, self._memory, self._torchs)
        self._result = self._memory.tensor(lowered.names[RESULT])
        self._first = self._result[:0]
        """Of the last step's tokens; made anew where a step has another number of them."""
        graphs = (*lowered.segments, lowered.head)
        self.batch_invariant = not any(graph.left_to_torch for graph in graphs)
        self._tokens = 0
        self._next = len(self.segments)

    def start(self, ids: torch.Tensor, positions: torch.Tensor, hidden: torch.Tensor | None = None) -> None:
        tokens = len(ids)
        if not 1 <= tokens <= self._max_tokens:
            raise BatchInvalid(
                f"the step has {tokens} tokens; it must have 1 to {self._max_tokens}", field="num_tokens"
            )
        shapes = ((tokens,), (_GRID, tokens)) if self._cut.mrope else ((tokens,),)
        if positions.shape not in shapes or ids.ndim != 1:
            raise BatchInvalid(
                f"positions are {list(positions.shape)} for {tokens} tokens", field="positions"
            )
        self._next = len(self.segments)
        self._torchs.clear()
        self._memory.give(IDS, ids)
        self._memory.give_columns(POSITIONS, positions)
        if self._cut.draft:
            if hidden is None or len(hidden) != tokens:
                raise BatchInvalid(
                    f"a draft takes one hidden state for each of {tokens} tokens", field="hidden"
                )
            self._memory.give(HIDDEN, hidden)
        self._tokens, self._next = tokens, 0

    def run(self, index: int) -> None:
        if index != self._next or index >= len(self._pieces):
            raise StepOrder(f"segment {index} is not the next one of the step")
        try:
            for piece in self._pieces[index]:
                piece.run(self._tokens)
        except InputError as error:
            raise BatchInvalid(f"a token is not one of the model's: {error}", field="input_ids") from error
        self._next = index + 1

    def result(self) -> torch.Tensor:
        if self._next != len(self.segments) or not self._tokens:
            raise StepOrder("the step's segments have not all run")
        if len(self._first) != self._tokens:
            self._first = self._result[: self._tokens]
        return self._first

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        if self._next != len(self.segments) or not self._tokens:
            raise StepOrder("the step's segments have not all run")
        count = len(rows)
        if rows.dtype != torch.int64 or rows.ndim != 1 or count > self._max_tokens:
            raise BatchInvalid(
                f"rows are {rows.dtype} {list(rows.shape)}; they must be int64, at most {self._max_tokens}",
                field="rows",
            )
        found = torch.empty(count, self.lowered.vocabulary)
        with self._memory.lent({ROWS: rows.contiguous(), LOGITS: found}):
            try:
                for piece in self._head if count else ():
                    piece.run(count, self._tokens)
            except InputError as error:
                raise BatchInvalid(f"there is no such row: {error}", field="rows") from error
        return found

    def measure(self, on: bool) -> None:
        """Whether the time of matrix products is taken."""
        for program in self._programs():
            program.measure(on)

    def matmul_ns(self) -> int:
        """Nanoseconds in matrix products of all steps that were measured."""
        return sum(program.matmul()[0] for program in self._programs())

    def matmuls(self) -> int:
        """Matrix products of all steps that were measured; one for each chunk of rows."""
        return sum(program.matmul()[1] for program in self._programs())

    def _programs(self) -> Iterator[Program]:
        for piece in [piece for pieces in (*self._pieces, self._head) for piece in pieces]:
            if isinstance(piece, _ProgramPiece):
                yield piece.program


class _Memory:
    """Where the storages of one lane lie."""

    def __init__(self, lowered: LoweredRole, outside: Mapping[str, torch.Tensor], max_tokens: int) -> None:
        self.chunk = min(max_tokens, _CHUNK * num_threads())
        self.rows = max_tokens
        self._layout = lowered.memory
        self._steps = _lines(lowered.memory.size * max_tokens)
        runs = [p for graph in (*lowered.segments, lowered.head) for p in graph.pieces if isinstance(p, Run)]
        self._chunks = _lines(max((run.chunk.size for run in runs), default=0) * self.chunk)
        self._names = lowered.names
        self._outside = dict(outside)
        self._lent: dict[int, torch.Tensor] = {}
        """Memory that changes from step to step, by storage id."""
        self._bound: dict[int, list[tuple[Program, int]]] = {}
        """Of such storages, the programs and slots that use them."""
        for name in (IDS, POSITIONS, HIDDEN):
            if name in self._names:
                storage = self._names[name]
                self._outside[name] = torch.zeros(max_tokens, storage.width, dtype=storage.dtype)

    def give(self, name: str, rows: torch.Tensor) -> None:
        """Copy an input of a step to its place; BatchInvalid where it does not fit."""
        if name not in self._names:
            return
        place, count = self._outside[name], len(rows)
        if rows.dtype != place.dtype or rows.numel() != count * place.shape[1] or not rows.is_cpu:
            raise BatchInvalid(
                f"{name} is {rows.dtype} {list(rows.shape)} on {rows.device}; it must be {place.dtype}, "
                f"{place.shape[1]} a token, on the CPU",
                field=name,
            )
        if rows.is_contiguous():
            ctypes.memmove(place.data_ptr(), rows.data_ptr(), rows.numel() * place.itemsize)
        else:
            place[:count].copy_(rows.reshape(count, -1))

    def give_columns(self, name: str, columns: torch.Tensor) -> None:
        """Copy an input [n], or [width, n], to its place, where each token has a row of it.

        By numpy, which is done before torch has made its views. BatchInvalid where the dtype does not fit.
        """
        if name not in self._names:
            return
        place = self._outside[name]
        if columns.dtype != place.dtype or not columns.is_cpu:
            raise BatchInvalid(
                f"{name} is {columns.dtype} on {columns.device}; it must be {place.dtype} on the CPU",
                field=name,
            )
        array = columns.numpy()
        place.numpy()[: array.shape[-1]] = array.T if array.ndim > 1 else array[:, None]

    @contextmanager
    def lent(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Let values of the interface lie in these tensors inside the block."""
        for name, tensor in tensors.items():
            self.put(self._names[name], tensor)
        try:
            yield
        finally:
            for name in tensors:
                del self._lent[id(self._names[name])]

    def put(self, storage: Storage, tensor: torch.Tensor) -> None:
        """Let a storage lie in a contiguous tensor."""
        self._lent[id(storage)] = tensor
        for program, slot in self._bound.get(id(storage), ()):
            program.bind(slot, tensor.data_ptr())

    def bind(self, program: Program, slot: int, storage: Storage, run: Run) -> None:
        """Tell a program where a storage lies, now or whenever it is known."""
        if storage.place is Place.CHUNK:
            offset = run.chunk.offsets[id(storage)] * self.chunk
            program.bind(slot, self._chunks.data_ptr() + offset)
        elif storage.place is Place.CONSTANT and storage.tensor is not None:
            program.bind(slot, storage.tensor.data_ptr())
        elif storage.place is Place.TORCH or storage.name in (ROWS, LOGITS):
            self._bound.setdefault(id(storage), []).append((program, slot))
        else:
            program.bind(slot, self.tensor(storage).data_ptr())

    def tensor(self, storage: Storage) -> torch.Tensor:
        """A storage that holds all rows, [max_tokens, width] or whatever it lies in."""
        if id(storage) in self._lent:
            return self._lent[id(storage)]
        if storage.place is Place.NAMED and not is_own(storage.name):
            return self._outside[storage.name]
        begin = self._layout.offsets[id(storage)] * self.rows
        size = self.rows * storage.width * storage.dtype.itemsize
        return self._steps[begin : begin + size].view(storage.dtype).view(self.rows, storage.width)


class _ProgramPiece:
    """Steps of a program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.run = program.run


class _TorchPiece:
    """Operators that torch runs."""

    def __init__(self, call: TorchCall, memory: _Memory, results: dict[str, torch.Tensor]) -> None:
        self._call, self._memory, self._results = call, memory, results

    @torch.inference_mode()
    def run(self, tokens: int, _table_rows: int = 0) -> None:
        """Run them."""
        found = self._call.module(*(self._argument(one, tokens) for one in self._call.arguments))
        for (name, storage), result in zip(self._call.results, found, strict=True):
            self._results[name] = result
            if storage is not None:
                self._results[name] = result.contiguous()
                self._memory.put(storage, self._results[name])

    def _argument(self, argument: Argument, tokens: int) -> object:
        match argument:
            case Tokens():
                return argument.of(tokens)
            case str():
                return self._results[argument]
            case Tensor():
                return _strided(self._memory.tensor(argument.read.storage), argument, tokens)
            case _:
                return argument


def _strided(memory: torch.Tensor, tensor: Tensor, tokens: int) -> torch.Tensor:
    """A value in memory, as a tensor of its own dimensions."""
    read = tensor.read
    sizes = [tokens if length < 0 else length for length in read.space]
    strides = [
        stride * read.storage.width if length < 0 else stride
        for stride, length in zip(read.strides, read.space, strict=True)
    ]
    found = memory.as_strided(sizes, strides, memory.storage_offset() + read.offset)
    shape, at = list[int](), 0
    for dim in tensor.dims:
        length = 1
        for size in sizes[at : at + len(dim)]:
            length *= size
        shape.append(length)
        at += len(dim)
    found = found.reshape(shape)
    return torch.view_as_complex(found.contiguous()) if tensor.pairs else found.to(tensor.dtype)


def _pieces(
    graph: LoweredGraph, memory: _Memory, results: dict[str, torch.Tensor]
) -> list[_ProgramPiece | _TorchPiece]:
    """A segment's pieces on one lane."""
    found = list[_ProgramPiece | _TorchPiece]()
    for piece in graph.pieces:
        if isinstance(piece, TorchCall):
            found.append(_TorchPiece(piece, memory, results))
            continue
        program, slots = build(piece, memory.rows if piece.whole else memory.chunk)
        for storage, slot in zip(piece.storages, slots, strict=True):
            memory.bind(program, slot, storage, piece)
        found.append(_ProgramPiece(program))
    return found


def _outside(
    segments: Sequence[Segment], names: Mapping[str, Storage], buffers: BuffersOf
) -> dict[str, torch.Tensor]:
    """Whole buffers of all calls' inputs and outputs, by name.

    Raises:
        SegmentsUnavailable: one has another shape or dtype than its value.
    """
    found: dict[str, torch.Tensor] = {}
    for call in [call for segment in segments for call in segment.calls]:
        given = buffers(call.layer_id, call.side)
        found.update((full, given.inputs[name]) for full, name in zip(call.reads, call.inputs, strict=True))
        found[call.output] = given.output
    for name, buffer in found.items():
        storage = names.get(name)
        if storage is None:
            continue
        width = buffer[:1].numel()
        if storage.dtype != buffer.dtype or storage.width != width or not buffer.is_contiguous():
            raise SegmentsUnavailable(
                f"{name} is {storage.dtype}, {storage.width} a token; its buffer is {buffer.dtype}, {width}"
            )
    return found


def _lines(size: int) -> torch.Tensor:
    """Bytes that begin at a cache line; the memory is taken as it is used."""
    whole = torch.empty(size + _LINE, dtype=torch.uint8)
    begin = -whole.data_ptr() % _LINE
    return whole[begin : begin + size]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _held(lowered: LoweredRole) -> Iterator[torch.Tensor]:
    """Weights that a lowered role reads as they are."""
    for piece in [piece for graph in (*lowered.segments, lowered.head) for piece in graph.pieces]:
        if isinstance(piece, TorchCall):
            yield from (one for one in piece.arguments if isinstance(one, torch.Tensor))
            continue
        yield from (one.tensor for one in piece.storages if one.tensor is not None)
        for step in piece.steps:
            if isinstance(step, Lookup) and isinstance(step.table, torch.Tensor):
                yield step.table
            elif isinstance(step, PackedProduct):
                yield from (part.bias for part in step.parts if part.bias is not None)


def _empty(module: nn.Module, gone: set[int]) -> None:
    """Replace a module's own tensors that lie at these addresses by empty ones, which fit no operator."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if _address(parameter) in gone:
            setattr(module, name, nn.Parameter(parameter.new_empty(0), requires_grad=False))
    for name, tensor in [*module.named_buffers(recurse=False), *vars(module).items()]:
        if isinstance(tensor, torch.Tensor) and _address(tensor) in gone:
            setattr(module, name, tensor.new_empty(0))
