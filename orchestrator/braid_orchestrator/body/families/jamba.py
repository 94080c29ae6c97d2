"""Adapters of jamba: Mamba-1 layers, and attention without rotary once per period."""

from __future__ import annotations

from typing import Any

import torch
from braid_wire.layers import Kind, LayerSpec, Mamba1
from torch import nn
from transformers.models.jamba import modeling_jamba as jamba

from braid_orchestrator.body.base import DispatchPoint
from braid_orchestrator.body.families.gqa import GroupedQuery, usual_heads
from braid_orchestrator.body.families.submodules import geometry, must_agree, must_be_silu, submodule
from braid_orchestrator.body.family import Family, Params
from braid_orchestrator.body.loading import load_pretrained, usual_parts


class Mamba1Mixer(nn.Module):
    """The mixer's input projection; then the service (conv, projections of its output, scan, skip);
    then gate and output projection.

    Raises:
        ConfigInvalid: the plan has another mechanism for this layer.
    """

    def __init__(self, original: Any, spec: LayerSpec, point: DispatchPoint) -> None:
        super().__init__()
        self.in_proj, self.out_proj = original.in_proj, original.out_proj
        self._layer_id, self._point = spec.layer_id, point
        geometry(spec, Kind.LINEAR, Mamba1)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        """[1, T, hidden] → [1, T, hidden]."""
        x, gate = self.in_proj(hidden_states[0]).chunk(2, dim=-1)
        out = self._point.attend(self._layer_id, {"x": x}, side=Kind.LINEAR)
        return self.out_proj(out * nn.functional.silu(gate))[None]


def _mamba1_params(original: Any, spec: LayerSpec) -> dict[str, torch.Tensor]:
    g = geometry(spec, Kind.LINEAR, Mamba1)
    must_be_silu(original.activation, spec)
    for norm in (original.dt_layernorm, original.b_layernorm, original.c_layernorm):
        must_agree(spec, "the eps of the norms of dt, B and C", norm.variance_epsilon, g.norm_eps)
    params = {
        "conv_weight": original.conv1d.weight.squeeze(1),
        "x_proj": original.x_proj.weight,
        "dt_norm": original.dt_layernorm.weight,
        "B_norm": original.b_layernorm.weight,
        "C_norm": original.c_layernorm.weight,
        "dt_proj": original.dt_proj.weight,
        "dt_bias": original.dt_proj.bias,
        "A_log": original.A_log,
        "D": original.D,
    }
    if original.conv1d.bias is not None:
        params["conv_bias"] = original.conv1d.bias
    return {name: tensor.detach() for name, tensor in params.items()}


def _adapt(layer: Any, spec: LayerSpec, point: DispatchPoint) -> Params:
    if spec.kind is Kind.FULL:
        attention = submodule(layer, "self_attn", jamba.JambaAttention, spec)
        layer.self_attn = GroupedQuery(usual_heads(attention), spec, point)
        return {}
    mixer = submodule(layer, "mamba", jamba.JambaMambaMixer, spec)
    layer.mamba = Mamba1Mixer(mixer, spec, point)
    return _mamba1_params(mixer, spec)


JAMBA = Family(load_pretrained, usual_parts, _adapt)
