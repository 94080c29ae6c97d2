"""Weights in the layout of the matrix product, packed once however many lanes and roles use them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from braid_kernels.native.gemm import PackedWeight, pack, pack_gated
from braid_kernels.native.program import Experts

Key = tuple[object, ...]


class Packer:
    """Packs weights [n, k]; equal groups of the same weights are packed once."""

    def __init__(self) -> None:
        self._packed: dict[Key, PackedWeight] = {}
        self._sources: dict[Key, tuple[torch.Tensor, ...]] = {}

    def merged(self, weights: Sequence[torch.Tensor]) -> PackedWeight:
        """Weights of the same k, one behind the other."""
        return self._pack(("merged", *map(_identity, weights)), weights)

    def gated(self, gate: torch.Tensor, other: torch.Tensor) -> PackedWeight:
        """The two of a gated unit."""
        return self._pack(("gated", _identity(gate), _identity(other)), (gate, other))

    def experts(self, up: torch.Tensor, down: torch.Tensor, activation: str, gated: bool) -> Experts:
        """Those of a mixture, [experts, …] each."""
        if gated and activation == "silu":
            inner = down.shape[-1]
            first = tuple(self.gated(one[:inner], one[inner:]) for one in up)
        else:
            first = tuple(self.merged([one]) for one in up)
        return Experts(first, tuple(self.merged([one]) for one in down), activation, gated)

    @property
    def sources(self) -> list[torch.Tensor]:
        """Every weight that was packed and not forgotten."""
        return [weight for group in self._sources.values() for weight in group]

    def forget(self) -> None:
        """Let go of the weights themselves; what was packed is found no more, and stays with its users."""
        self._packed.clear()
        self._sources.clear()

    def _pack(self, key: Key, weights: Sequence[torch.Tensor]) -> PackedWeight:
        if key not in self._packed:
            rows = [weight.detach() for weight in weights]
            rows = [weight if weight.stride(1) == 1 else weight.contiguous() for weight in rows]
            self._packed[key] = pack_gated(*rows) if key[0] == "gated" else pack(*rows)
            # Kept with the key, which would otherwise fit whatever lies at its address later.
            self._sources[key] = tuple(weights)
        return self._packed[key]


def _identity(weight: torch.Tensor) -> Key:
    return weight.data_ptr(), tuple(weight.shape), weight.stride(), weight.dtype
