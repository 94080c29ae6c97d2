"""Which compiler runs a body: the one that was asked for, or the best that works here."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib import import_module

from braid_wire.errors import ConfigInvalid
from braid_wire.layers import Role

from braid_orchestrator.body.base import Body
from braid_orchestrator.segments.base import (
    BuffersOf,
    Cut,
    SegmentCompiler,
    SegmentedRole,
    SegmentsUnavailable,
)
from braid_orchestrator.segments.check import check
from braid_orchestrator.segments.cut import cut
from braid_orchestrator.segments.trace import trace
from braid_orchestrator.store import Store

log = logging.getLogger(__name__)

AUTO, OFF = "auto", "off"

_HERE = "braid_orchestrator.segments"
# Compiler → where its class is; imported when it is chosen, since some bring much with them.
_COMPILERS: Mapping[str, tuple[str, str]] = {
    "native": (f"{_HERE}.native", "NativeCompiler"),
    "inductor": (f"{_HERE}.inductor", "InductorCompiler"),
    "cudagraph": (f"{_HERE}.cudagraph", "CudaGraphCompiler"),
    "eager": (f"{_HERE}.eager", "EagerCompiler"),
}
# What "auto" tries, by the device that the weights lie on.
_BEST: Mapping[str, tuple[str, ...]] = {"cpu": ("native", "eager"), "cuda": ("cudagraph", "eager")}

NAMES = (AUTO, *_COMPILERS, OFF)
"""What can be asked for."""


def segmented(name: str, body: Body, store: Store) -> dict[tuple[Role, int], SegmentedRole]:
    """(role, lane) → the body in segments; roles that run as they are, are left out.

    Args:
        name: one of `NAMES`. With "auto" a compiler that cannot be used is passed over, and a body that
            cannot be traced runs as it is; the log says why.
        store: has the buffers of every lane.

    Raises:
        ConfigInvalid: there is no such name.
        SegmentsUnavailable: what was asked for by name cannot be used; the message says why.
    """
    compilers = _compilers(name, body)
    found: dict[tuple[Role, int], SegmentedRole] = {}
    for role, part in body.roles.items() if compilers else ():
        try:
            whole = cut(trace(part))
            check(part, whole)
            found.update(_compiled(role, whole, compilers, store))
        except SegmentsUnavailable as error:
            if name != AUTO:
                raise
            log.warning("the %s body runs as it is, without segments: %s", role.value, error.message)
    return found


def _compilers(name: str, body: Body) -> list[SegmentCompiler]:
    """New ones, in the order in which they are tried."""
    if name not in NAMES:
        raise ConfigInvalid(
            f"segments is {name!r}; it must be one of {', '.join(NAMES)}", field="segments", value=name
        )
    if name == AUTO:
        (target, *_) = body.roles.values()
        names = _BEST.get(target.device.type, ("eager",))
    else:
        names = () if name == OFF else (name,)
    return [_compiler(one) for one in names]


def _compiler(name: str) -> SegmentCompiler:
    module, attribute = _COMPILERS[name]
    found: SegmentCompiler = getattr(import_module(module), attribute)()
    return found


def _compiled(
    role: Role, whole: Cut, compilers: Sequence[SegmentCompiler], store: Store
) -> dict[tuple[Role, int], SegmentedRole]:
    """All lanes of one role, by the first compiler that can run it.

    Raises:
        SegmentsUnavailable: none can; the last one's reason.
    """
    *better, last = compilers
    for compiler in better:
        try:
            return _lanes(role, whole, compiler, store)
        except SegmentsUnavailable as error:
            log.warning("the %s body is not run by %s: %s", role.value, compiler.name, error.message)
    return _lanes(role, whole, last, store)


def _lanes(
    role: Role, whole: Cut, compiler: SegmentCompiler, store: Store
) -> dict[tuple[Role, int], SegmentedRole]:
    rows = store.limits.max_tokens
    return {
        (role, lane): compiler.compile(whole, _buffers(store, role, lane), rows)
        for lane in range(store.lanes)
    }


def _buffers(store: Store, role: Role, lane: int) -> BuffersOf:
    specs = {spec.layer_id: spec for spec in store.plans[role]}
    return lambda layer_id, side: store.buffers(specs[layer_id], side, store.limits.max_tokens, lane)
