"""Adapters of lfm2 and lfm2_moe: gated short convolutions, and attention with normed queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from braid_wire.layers import Gqa, Kind, LayerSpec, ShortConv
from torch import nn
from transformers.models.lfm2 import modeling_lfm2 as lfm2
from transformers.models.lfm2_moe import modeling_lfm2_moe as lfm2_moe

from braid_orchestrator.body.base import DispatchPoint
from braid_orchestrator.body.families.gqa import GroupedQuery, Heads
from braid_orchestrator.body.families.submodules import geometry, submodule
from braid_orchestrator.body.family import Family, Params
from braid_orchestrator.body.loading import load_pretrained, usual_parts

_ATTENTION = (lfm2.Lfm2Attention, lfm2_moe.Lfm2MoeAttention)
_CONV = (lfm2.Lfm2ShortConv, lfm2_moe.Lfm2MoeShortConv)


class GatedShortConv(nn.Module):
    """The input projection B | C | x and the gate B; then the service (conv); then the gate C and the
    output projection.

    Raises:
        ConfigInvalid: the plan has another mechanism for this layer.
    """

    def __init__(self, original: Any, spec: LayerSpec, point: DispatchPoint) -> None:
        super().__init__()
        self.in_proj, self.out_proj = original.in_proj, original.out_proj
        self._layer_id, self._point = spec.layer_id, point
        geometry(spec, Kind.LINEAR, ShortConv)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        """[1, T, hidden] → [1, T, hidden]."""
        before, after, x = self.in_proj(hidden_states[0]).chunk(3, dim=-1)
        out = self._point.attend(self._layer_id, {"x": before * x}, side=Kind.LINEAR)
        return self.out_proj(after * out)[None]


def _heads(attention: Any, spec: LayerSpec) -> Heads:
    per_head = nn.Unflatten(-1, (-1, geometry(spec, Kind.FULL, Gqa).head_dim))
    return Heads(
        nn.Sequential(attention.q_proj, per_head, attention.q_layernorm),
        nn.Sequential(attention.k_proj, per_head, attention.k_layernorm),
        attention.v_proj,
        attention.out_proj,
        attention.scaling,
        lfm2.apply_rotary_pos_emb,
    )


def _adapt(layer: Any, spec: LayerSpec, point: DispatchPoint) -> Params:
    if spec.kind is Kind.FULL:
        attention = submodule(layer, "self_attn", _ATTENTION, spec)
        layer.self_attn = GroupedQuery(_heads(attention, spec), spec, point)
        return {}
    original = submodule(layer, "conv", _CONV, spec)
    layer.conv = GatedShortConv(original, spec, point)
    params = {"conv_weight": original.conv.weight.detach().squeeze(1)}
    if original.conv.bias is not None:
        params["conv_bias"] = original.conv.bias.detach()
    return params


LFM2 = Family(load_pretrained, usual_parts, _adapt)
