"""How much memory one sequence takes: pages grow with its length, slots do not."""

from __future__ import annotations

from dataclasses import dataclass

from braid_wire.errors import RequestInvalid
from braid_wire.layers import LayerPlan, LayerSpec

from braid_orchestrator.layer_plan.plans import ModelPlans

STATE_ITEMSIZE = 4
"""Recurrent states are float32 unless configured otherwise."""


@dataclass(frozen=True)
class Memory:
    """Bytes that one sequence takes at `context` tokens."""

    context: int
    kv_bytes: int
    state_bytes: int

    @property
    def total_bytes(self) -> int:
        """Pages and state together."""
        return self.kv_bytes + self.state_bytes


def kv_bytes_per_token(spec: LayerSpec, itemsize: int) -> int:
    """Bytes of one position in one layer's pages; 0 for a layer without a full side."""
    return spec.full.kv_bytes_per_token(itemsize) if spec.full is not None else 0


def state_bytes(spec: LayerSpec, itemsize: int, state_itemsize: int = STATE_ITEMSIZE) -> int:
    """Bytes of one version of one layer's state; 0 for a layer without a linear side."""
    return spec.linear.state_bytes(itemsize, state_itemsize) if spec.linear is not None else 0


def plan_memory(
    plan: LayerPlan, context: int, dtype_itemsize: int, state_itemsize: int = STATE_ITEMSIZE
) -> Memory:
    """What one sequence takes in one role.

    Pages are append-only, so a layer with a sliding window keeps every position and is counted in
    full. The state is one version; while a step runs, a sequence holds a second one.

    Args:
        context: length of the sequence in tokens.
        dtype_itemsize: bytes per element of pages and conv states.
        state_itemsize: bytes per element of recurrent states.

    Raises:
        RequestInvalid: `context` is negative.
    """
    if context < 0:
        raise RequestInvalid(f"context is {context}; it must not be negative", field="context", value=context)
    return Memory(
        context=context,
        kv_bytes=context * sum(kv_bytes_per_token(spec, dtype_itemsize) for spec in plan),
        state_bytes=sum(state_bytes(spec, dtype_itemsize, state_itemsize) for spec in plan),
    )


def memory_per_sequence(
    plans: ModelPlans, context: int, dtype_itemsize: int, state_itemsize: int = STATE_ITEMSIZE
) -> Memory:
    """What one sequence takes in target and draft together; see `plan_memory`."""
    parts = [
        plan_memory(plan, context, dtype_itemsize, state_itemsize)
        for plan in (plans.target, plans.draft)
        if plan is not None
    ]
    return Memory(
        context=context,
        kv_bytes=sum(part.kv_bytes for part in parts),
        state_bytes=sum(part.state_bytes for part in parts),
    )
