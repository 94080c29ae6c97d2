"""What an audit of a linear-attention layer copies, and how the reference computes it again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from braid_kernels.backend import LinearLayer
from braid_kernels.geometry import LinearGeometry, signature
from braid_kernels.metadata import NO_SLOT, LinearMeta
from braid_kernels.reference import ReferenceLinearBackend
from braid_wire.audit import MOST_BYTES, MOST_TOKENS, OUTPUT, Sample, copied


def sample(
    geometry: LinearGeometry,
    params: Mapping[str, torch.Tensor],
    pools: Mapping[str, torch.Tensor],
    inputs: Mapping[str, torch.Tensor],
    meta: LinearMeta,
) -> Sample | None:
    """Copies of a step's rows and of the slots that it reads or writes; None where they are too many.

    Args:
        geometry: the layer's, as the kernels have it.
        params: name → tensor.
        pools: "state" and "conv", as far as the mechanism has them, → [num_slots, …].
        inputs: name → [T, …].
        meta: spans and slots of the step.
    """
    if not 0 < meta.num_tokens <= MOST_TOKENS:
        return None
    named = torch.cat([meta.state_in.cpu(), meta.state_out.cpu()]).long()
    slots, places = torch.unique(named[named != NO_SLOT], return_inverse=True)
    if not len(slots) or sum(pool[0].nbytes for pool in pools.values()) * len(slots) > MOST_BYTES:
        return None
    renamed = torch.full(named.shape, NO_SLOT, dtype=torch.int32)
    renamed[named != NO_SLOT] = places.to(torch.int32)
    split = meta.num_sequences
    before = _slots(pools, slots)
    rows = {name: copied(tensor) for name, tensor in inputs.items()}
    local = LinearMeta(copied(meta.cu_seqlens), renamed[:split].clone(), renamed[split:].clone())

    def recompute() -> Mapping[str, torch.Tensor]:
        own = {name: copied(tensor) for name, tensor in params.items()}
        layer = LinearLayer(geometry, own, before.get("state"), before.get("conv"))
        output = torch.empty((local.num_tokens, *signature(geometry).output), dtype=torch.float64)
        ReferenceLinearBackend().layer(layer)(rows, local, output)
        return {OUTPUT: output, **before}

    return Sample(lambda: _slots(pools, slots), recompute)


def _slots(pools: Mapping[str, torch.Tensor], slots: torch.Tensor) -> dict[str, torch.Tensor]:
    """Private copies of some slots, name → [len(slots), …]."""
    return {name: pool[slots.to(pool.device)].cpu() for name, pool in pools.items()}
