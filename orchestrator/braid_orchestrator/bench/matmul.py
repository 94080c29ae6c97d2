"""How much of a step goes into matrix products, where the body is compiled to tell."""

from __future__ import annotations

import time
from collections.abc import Callable

from braid_orchestrator.cell import Cell
from braid_orchestrator.segments.native import NativeRole


def matmul_fraction(cell: Cell, work: Callable[[], object]) -> float | None:
    """Part of the time of some work that the cell's body spends in matrix products.

    The rest is all else: what lies between products, the services, the hops, the orchestrator. Products
    of services are none of it, and those of several threads would count several times.

    Args:
        cell: whose body it is.
        work: runs steps; what it takes is measured here, apart from any other figure.

    Returns:
        None where the body is not run by the native compiler.
    """
    roles = [role for role in cell.segments.values() if isinstance(role, NativeRole)]
    if not roles:
        return None
    for role in roles:
        role.measure(True)
    before = sum(role.matmul_ns() for role in roles)
    began = time.perf_counter_ns()
    try:
        work()
    finally:
        for role in roles:
            role.measure(False)
    spent = sum(role.matmul_ns() for role in roles) - before
    # Three digits of a part however small: of a step that somebody held up, it is not nothing.
    return float(f"{spent / (time.perf_counter_ns() - began):.3g}")
