"""Work that steps have in common is done once: expressions that several need, products of the same rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from braid_orchestrator.segments.lowering_expressions import (
    Affine,
    Expr,
    Expressions,
    Place,
    Pointwise,
    Read,
    Reduce,
    Storage,
    dense,
    elements,
    walk,
)
from braid_orchestrator.segments.lowering_steps import Product, Step, Store, written_by

# Expressions cheaper than this are computed wherever they are needed, as reading them costs as much.
_WORTH_KEEPING = 4


def share(steps: Sequence[Step], make: Expressions) -> list[Step]:
    """The steps with common work done once."""
    found = list(steps)
    while _share_one(found, make):
        pass
    return _merge_products(found)


def projected(expr: Expr, make: Expressions) -> Expr:
    """An expression over nothing but the axes that it depends on: one object wherever it is used."""
    axes = sorted(expr.axes)
    place = {axis: i for i, axis in enumerate(axes)}
    terms = tuple((0, ((place[axis], 1),) if axis in place else ()) for axis in range(len(expr.space)))
    return make.mapped(expr, Affine(tuple(expr.space[axis] for axis in axes), terms))


def _share_one(steps: list[Step], make: Expressions) -> bool:
    """Keep the costliest expression that several stores compute; False where there is none."""
    users: dict[int, set[int]] = {}
    kept: dict[int, Expr] = {}
    for index, step in enumerate(steps):
        if isinstance(step, Store):
            for part in walk(step.expr):
                if isinstance(part, Pointwise | Reduce) and part.cost >= _WORTH_KEEPING:
                    one = projected(part, make)
                    kept[id(one)] = one
                    users.setdefault(id(one), set()).add(index)
    shared = [kept[key] for key, found in users.items() if len(found) > 1]
    if not shared:
        return False
    best = max(shared, key=lambda expr: expr.cost)
    _keep(steps, best, min(users[id(best)]), make)
    return True


def _keep(steps: list[Step], expr: Expr, first: int, make: Expressions) -> None:
    """Compute an expression before step `first`, and read it from memory everywhere.

    The memory is float32: nothing is rounded that torch would not round.
    """
    written = Counter(id(storage) for step in steps for storage in written_by(step))
    stores = [step for step in steps if isinstance(step, Store) and _is_whole(step, expr, make)]
    # What others write to as well must be written when it was.
    made = next((store for store in stores if written[id(store.target.storage)] == 1), None)
    if made is None:
        storage = Storage(elements(expr.space), torch.float32, Place.CHUNK)
        made = Store(expr, make.read(storage, 0, dense(expr.space), expr.space))
    else:
        steps.remove(made)
    source = projected_read(made, make)
    for index, step in enumerate(steps):
        if isinstance(step, Store):
            steps[index] = replace(step, expr=_replaced(step.expr, expr, source, make))
    steps.insert(first, made)


def _is_whole(store: Store, expr: Expr, make: Expressions) -> bool:
    """Whether a store writes this very expression, unrounded."""
    same_axes = store.expr.axes == store.target.axes
    return same_axes and store.target.storage.dtype == torch.float32 and projected(store.expr, make) is expr


def projected_read(store: Store, make: Expressions) -> Read:
    """What a store wrote, over the axes that its target has."""
    found = projected(store.target, make)
    if not isinstance(found, Read):
        raise TypeError(f"a store's target is a {type(found).__name__}")
    return found


def _replaced(expr: Expr, old: Expr, by: Read, make: Expressions) -> Expr:
    """An expression that reads `by` wherever it computes `old`."""
    places = {
        id(part): _spread(by, part, make)
        for part in walk(expr)
        if isinstance(part, Pointwise | Reduce) and projected(part, make) is old
    }
    return make.replaced(expr, places) if places else expr


def _spread(source: Read, part: Expr, make: Expressions) -> Expr:
    """A read over a projected space, over the space of a part again."""
    axes = sorted(part.axes)
    return make.mapped(source, Affine(part.space, tuple((0, ((axis, 1),)) for axis in axes)))


def _merge_products(steps: list[Step]) -> list[Step]:
    """Products of the same rows as one, at the place of the first."""
    found: list[Step] = []
    for step in steps:
        place = _place_of_like(found, step) if isinstance(step, Product) else None
        if place is None or not isinstance(step, Product):
            found.append(step)
            continue
        first = found[place]
        if isinstance(first, Product):
            found[place] = Product(first.x, first.parts + step.parts)
    return found


def _place_of_like(steps: Sequence[Step], product: Product) -> int | None:
    """Where a product of the same rows is that this one can join."""
    if product.gated:
        return None
    for index, step in enumerate(steps):
        if isinstance(step, Product) and not step.gated and step.x == product.x:
            later = {id(storage) for one in steps[index:] for storage in written_by(one)}
            addends = (part.addend for part in product.parts)
            same = step.parts[0].weights[0].dtype == product.parts[0].weights[0].dtype
            if same and not any(a is not None and id(a.storage) in later for a in addends):
                return index
    return None
