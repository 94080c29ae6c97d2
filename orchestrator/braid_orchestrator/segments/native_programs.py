"""Lowered steps as programs of the C++ kernels."""

from __future__ import annotations

from braid_kernels.native.program import Destination, Program, ProgramBuilder, Rows

from braid_orchestrator.segments.lowering_expressions import Place, Storage
from braid_orchestrator.segments.lowering_groups import Canonical, GroupMaker
from braid_orchestrator.segments.lowering_role import PackedMixture, PackedPart, PackedProduct, Run
from braid_orchestrator.segments.lowering_steps import Choice, Lookup, Matrix


def build(run: Run, chunk: int) -> tuple[Program, list[int]]:
    """The program of a run, and the slots of its storages, in their order, to be bound."""
    builder = ProgramBuilder(chunk)
    slots = [builder.slot(chunked=storage.place is Place.CHUNK) for storage in run.storages]
    by_id = {id(storage): slot for storage, slot in zip(run.storages, slots, strict=True)}
    groups = GroupMaker(builder, by_id)
    for step in run.steps:
        match step:
            case PackedProduct():
                _product(builder, step, by_id)
            case Lookup():
                _lookup(builder, step, by_id)
            case Choice():
                _choice(builder, step, by_id)
            case PackedMixture():
                _mixture(builder, step, by_id)
            case Canonical():
                groups.add(step)
    return builder.build(), slots


def _product(builder: ProgramBuilder, step: PackedProduct, slots: dict[int, int]) -> None:
    destinations = [_destination(part, slots) for part in step.parts]
    builder.product(_rows(step.x, slots), step.weight, destinations, step.x.per_token)


def _destination(part: PackedPart, slots: dict[int, int]) -> Destination:
    out = Rows(slots[id(part.out)], 0, part.out.width, part.columns)
    addend = None if part.addend is None else _rows(part.addend, slots)
    return Destination(out, part.first, part.columns, part.bias, addend)


def _lookup(builder: ProgramBuilder, step: Lookup, slots: dict[int, int]) -> None:
    ids, out = step.ids, step.out
    rows = Rows(slots[id(ids.storage)], ids.offset, ids.storage.width, 0)
    table = slots[id(step.table)] if isinstance(step.table, Storage) else step.table
    to = Rows(slots[id(out)], 0, out.width, out.width)
    builder.lookup(rows, table, out.width, to, out.dtype)


def _choice(builder: ProgramBuilder, step: Choice, slots: dict[int, int]) -> None:
    builder.choice(
        step.kind,
        _rows(step.ids, slots),
        _rows(step.values, slots),
        step.values.storage.dtype,
        count=step.count,
        chosen=step.chosen,
        per_row=step.ids.per_token,
        x=None if step.x is None else _rows(step.x, slots),
        value=step.value,
    )


def _mixture(builder: ProgramBuilder, step: PackedMixture, slots: dict[int, int]) -> None:
    x, ids, scores = (_rows(matrix, slots) for matrix in (step.x, step.ids, step.scores))
    out = Rows(slots[id(step.out)], 0, step.out.width, step.out.width)
    builder.mixture(x, ids, scores, out, step.experts, step.chosen, step.scores.storage.dtype)


def _rows(matrix: Matrix, slots: dict[int, int]) -> Rows:
    return Rows(slots[id(matrix.storage)], matrix.offset, matrix.storage.width, matrix.stride)
