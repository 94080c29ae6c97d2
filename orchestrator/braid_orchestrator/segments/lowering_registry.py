"""The table of operators that are lowered, and how their handlers read a node's arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from braid_orchestrator.segments.lowering_values import Unsupported

if TYPE_CHECKING:
    from braid_orchestrator.segments.lowering import Lowered, Lowering

Handler = Callable[["Lowering", Node], "Lowered"]
"""Makes a node's result. Raises Unsupported for arguments that it does not know; the node then runs in
torch. Raises NeedsMemory before it has changed anything, and is called again with operands in memory."""

OPERATORS: dict[object, Handler] = {}
"""Operator, or its name where it is registered by a module that need not be loaded → its handler."""


def lowers(*targets: object) -> Callable[[Handler], Handler]:
    """Registers a handler."""

    def register(handler: Handler) -> Handler:
        OPERATORS.update(dict.fromkeys(targets, handler))
        return handler

    return register


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """An argument by its place or name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def number(node: Node, index: int, name: str, default: float | None = None) -> float:
    """An argument that is a number."""
    found = argument(node, index, name, default)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise Unsupported(f"{name} of {node.target} is {found!r}")
    return found


def integer(node: Node, index: int, name: str, default: int | None = None) -> int:
    """An argument that is an integer."""
    found = number(node, index, name, default)
    if not isinstance(found, int):
        raise Unsupported(f"{name} of {node.target} is {found!r}")
    return found


def dim_of(index: int, count: int) -> int:
    """A dimension, or an index, that may be counted from the end."""
    return index + count if index < 0 else index


def dtype_of(node: Node) -> torch.dtype:
    """The dtype of a node's tensor."""
    found: torch.dtype = node.meta["val"].dtype
    return found


def no_more(node: Node, *known: str) -> None:
    """Refuse keyword arguments that a handler does not look at."""
    if unknown := {name for name, given in node.kwargs.items() if given is not None} - set(known):
        raise Unsupported(f"{node.target} with {sorted(unknown)}")
