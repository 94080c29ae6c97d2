"""The adapter of Kimi Delta Attention layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from braid_wire.layers import KimiDelta, Kind, LayerSpec
from torch import nn

from braid_orchestrator.body.base import DispatchPoint
from braid_orchestrator.body.families.submodules import geometry, must_be_silu


@dataclass(frozen=True)
class DeltaParts:
    """What of a KDA module stays with the body."""

    q: nn.Module
    k: nn.Module
    v: nn.Module
    """[T, hidden] → [T, H·d] each."""
    decay: nn.Module
    """[T, hidden] → [T, H·d]: what the service makes the decay of."""
    beta: nn.Module
    """[T, hidden] → [T, H]."""
    gate: nn.Module
    """[T, hidden] → [T, H·d]."""
    norm: nn.Module
    """(o [T, H, d], gate [T, H, d]) → [T, H, d]."""
    out: nn.Module
    """[1, T, H·d] → [1, T, hidden]."""


class KimiDeltaAttention(nn.Module):
    """The module's projections; then the service (conv, gates, recurrence); then gated norm and output.

    Raises:
        ConfigInvalid: the plan has another mechanism for this layer.
    """

    def __init__(self, parts: DeltaParts, spec: LayerSpec, point: DispatchPoint) -> None:
        super().__init__()
        self.q, self.k, self.v = parts.q, parts.k, parts.v
        self.decay, self.beta, self.gate = parts.decay, parts.beta, parts.gate
        self.norm, self.out = parts.norm, parts.out
        self._layer_id, self._point = spec.layer_id, point
        self._geometry = geometry(spec, Kind.LINEAR, KimiDelta)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        """[1, T, hidden] → [1, T, hidden]."""
        g, hidden, rows = self._geometry, hidden_states[0], hidden_states.shape[1]
        inputs = {
            "mixed_qkv": torch.cat([self.q(hidden), self.k(hidden), self.v(hidden)], dim=-1),
            "a": self.decay(hidden),
            "b": self.beta(hidden),
        }
        out = self._point.attend(self._layer_id, inputs)
        normed = self.norm(out, self.gate(hidden).view(-1, g.num_heads, g.head_dim))
        return self.out(normed.reshape(1, rows, -1))


def kimi_delta_params(original: Any, spec: LayerSpec) -> dict[str, torch.Tensor]:
    """The static parameters that a KDA layer's service needs.

    Raises:
        ConfigInvalid: the conv has another activation than SiLU.
    """
    must_be_silu(original.activation, spec)
    params = {
        "conv_weight": original.conv1d.weight.detach().squeeze(1),
        # kimi_linear keeps one value per head as [1, 1, H, 1].
        "A_log": original.forget_gate.A_log.detach().reshape(-1),
        "dt_bias": original.forget_gate.dt_bias.detach(),
    }
    if original.conv1d.bias is not None:
        params["conv_bias"] = original.conv1d.bias.detach()
    return params
