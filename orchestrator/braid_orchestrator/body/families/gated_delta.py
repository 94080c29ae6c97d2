"""The adapter of Gated DeltaNet layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from braid_wire.layers import GatedDelta, Kind, LayerSpec
from torch import nn

from braid_orchestrator.body.base import DispatchPoint
from braid_orchestrator.body.families.submodules import geometry, must_be_silu

Projection = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
"""[T, hidden] → mixed_qkv [T, C], z [T, Hv·dv], b [T, Hv], a [T, Hv]."""


class GatedDeltaNet(nn.Module):
    """The module's projections; then the service (conv, gates, recurrence); then norm and output.

    Args:
        project: the input projections; a module, so that its weights are found.
        norm: (o [T·Hv, dv], z [T·Hv, dv]) → [T·Hv, dv].
        out: [1, T, Hv·dv] → [1, T, hidden].

    Raises:
        ConfigInvalid: the plan has another mechanism for this layer.
    """

    def __init__(
        self, project: nn.Module, norm: nn.Module, out: nn.Module, spec: LayerSpec, point: DispatchPoint
    ) -> None:
        super().__init__()
        self.project, self.norm, self.out = project, norm, out
        self._layer_id, self._point = spec.layer_id, point
        self._geometry = geometry(spec, Kind.LINEAR, GatedDelta)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        """[1, T, hidden] → [1, T, hidden]."""
        size, rows = self._geometry.v_head_dim, hidden_states.shape[1]
        mixed_qkv, z, b, a = self.project(hidden_states[0])
        out = self._point.attend(self._layer_id, {"mixed_qkv": mixed_qkv, "a": a, "b": b})
        normed = self.norm(out.reshape(-1, size), z.reshape(-1, size))
        return self.out(normed.view(1, rows, -1))


def delta_params(original: Any, spec: LayerSpec) -> dict[str, torch.Tensor]:
    """The static parameters that a Gated DeltaNet layer's service needs.

    Raises:
        ConfigInvalid: the conv has another activation than SiLU.
    """
    must_be_silu(original.activation, spec)
    params = {
        "conv_weight": original.conv1d.weight.detach().squeeze(1),
        "A_log": original.A_log.detach(),
        "dt_bias": original.dt_bias.detach(),
    }
    if original.conv1d.bias is not None:
        params["conv_bias"] = original.conv1d.bias.detach()
    return params
