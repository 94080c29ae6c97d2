"""Mamba-2 mixers, and the families made of them and plain attention: Bamba and Granite 4 hybrid."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from braid_wire.layers import Kind, LayerSpec, Mamba2
from torch import nn
from transformers.models.bamba import modeling_bamba as bamba
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite

from braid_orchestrator.body.base import DispatchPoint
from braid_orchestrator.body.families.gqa import GroupedQuery, usual_heads
from braid_orchestrator.body.families.submodules import geometry, must_agree, must_be_silu, submodule
from braid_orchestrator.body.family import Family, Params, Parts
from braid_orchestrator.body.loading import load_pretrained, usual_parts

GatedNorm = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(y [1, T, I], gate [1, T, I]) → [1, T, I]; the mixer's own order of gate, norm and groups."""


class Mamba2Mixer(nn.Module):
    """The mixer's input projection; then the service (conv, step size, recurrence, skip); then gate,
    norm and output projection.

    Args:
        in_proj: [1, T, hidden] → [1, T, I + C + H]: gate | xBC | dt.
        norm: applies gate and norm.

    Raises:
        ConfigInvalid: the plan has another mechanism for this layer.
    """

    def __init__(
        self, in_proj: nn.Module, norm: GatedNorm, out_proj: nn.Module, spec: LayerSpec, point: DispatchPoint
    ) -> None:
        super().__init__()
        self.in_proj, self.norm, self.out_proj = in_proj, norm, out_proj
        self._layer_id, self._point = spec.layer_id, point
        self._geometry = geometry(spec, Kind.LINEAR, Mamba2)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        """[1, T, hidden] → [1, T, hidden]."""
        g, rows, dtype = self._geometry, hidden_states.shape[1], hidden_states.dtype
        widths = [g.num_heads * g.head_dim, g.channels, g.num_heads]
        gate, mixed, step = self.in_proj(hidden_states).split(widths, dim=-1)
        out = self._point.attend(self._layer_id, {"xBC": mixed[0], "dt": step[0]}, side=Kind.LINEAR)
        return self.out_proj(self.norm(out.reshape(1, rows, -1), gate).to(dtype))


def usual_mixer(original: Any, spec: LayerSpec, point: DispatchPoint) -> Mamba2Mixer:
    """The adapter of a mixer laid out as most are."""
    return Mamba2Mixer(original.in_proj, original.norm, original.out_proj, spec, point)


def mamba2_params(original: Any, spec: LayerSpec) -> dict[str, torch.Tensor]:
    """The static parameters that the layer's service needs.

    Raises:
        ConfigInvalid: the mixer's activation is not SiLU, or the plan has other bounds of dt.
    """
    g = geometry(spec, Kind.LINEAR, Mamba2)
    must_be_silu(original.activation, spec)
    bounds = tuple(original.time_step_limit or (0.0, math.inf))
    must_agree(spec, "the bounds of dt", bounds, (g.dt_min, g.dt_max))
    params = {
        "conv_weight": original.conv1d.weight.detach().squeeze(1),
        "A_log": original.A_log.detach(),
        "D": original.D.detach(),
        "dt_bias": original.dt_bias.detach(),
    }
    if original.conv1d.bias is not None:
        params["conv_bias"] = original.conv1d.bias.detach()
    return params


def _adapt_bamba(layer: Any, spec: LayerSpec, point: DispatchPoint) -> Params:
    if spec.kind is Kind.FULL:
        attention = submodule(layer, "self_attn", bamba.BambaAttention, spec)
        layer.self_attn = GroupedQuery(usual_heads(attention, bamba.apply_rotary_pos_emb), spec, point)
        return {}
    mixer = submodule(layer, "mamba", bamba.BambaMixer, spec)
    layer.mamba = usual_mixer(mixer, spec, point)
    return mamba2_params(mixer, spec)


def _adapt_granite(layer: Any, spec: LayerSpec, point: DispatchPoint) -> Params:
    if spec.kind is Kind.FULL:
        attention = submodule(layer, "self_attn", granite.GraniteMoeHybridAttention, spec)
        layer.self_attn = GroupedQuery(usual_heads(attention, granite.apply_rotary_pos_emb), spec, point)
        return {}
    mixer = submodule(layer, "mamba", granite.GraniteMoeHybridMambaLayer, spec)
    layer.mamba = usual_mixer(mixer, spec, point)
    return mamba2_params(mixer, spec)


def _granite_parts(model: Any) -> Parts:
    scaling = model.config.logits_scaling
    return usual_parts(model, head=lambda hidden: model.lm_head(hidden) / scaling)


BAMBA = Family(load_pretrained, usual_parts, _adapt_bamba)
GRANITE = Family(load_pretrained, _granite_parts, _adapt_granite)
