"""Adapters of falcon_h1: every layer runs Mamba-2 and attention on the same normed input.

The layer itself weighs and adds the two; its multipliers of inputs and outputs stay where they are.
"""

from __future__ import annotations

from typing import Any

import torch
from braid_wire.layers import LayerSpec
from torch import nn
from transformers.models.falcon_h1 import modeling_falcon_h1 as falcon

from braid_orchestrator.body.base import DispatchPoint
from braid_orchestrator.body.families.gqa import GroupedQuery, Heads, Scaled
from braid_orchestrator.body.families.mamba2 import Mamba2Mixer, mamba2_params
from braid_orchestrator.body.families.submodules import submodule
from braid_orchestrator.body.family import Family, Params, Parts
from braid_orchestrator.body.loading import load_pretrained, usual_parts


class ScaledProjection(nn.Module):
    """The input projection with its muP factors: one before, one for each of z, x, B, C and dt after."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.in_proj = original.in_proj
        self._before = original.ssm_in_multiplier
        self.register_buffer("after", original.mup_vector, persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[1, T, hidden] → [1, T, I + C + H]."""
        projected = self.in_proj(hidden * self._before)
        return (projected * self.after).to(hidden.dtype)


def gate_alone(out: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """What stands for the gated norm where a config switches the norm off."""
    return out * nn.functional.silu(gate)


def _adapt(layer: Any, spec: LayerSpec, point: DispatchPoint) -> Params:
    attention = submodule(layer, "self_attn", falcon.FalconH1Attention, spec)
    mixer = submodule(layer, "mamba", falcon.FalconH1Mixer, spec)
    heads = Heads(
        attention.q_proj,
        Scaled(attention.k_proj, attention.key_multiplier),
        attention.v_proj,
        attention.o_proj,
        attention.scaling,
        falcon.apply_rotary_pos_emb,
    )
    norm = mixer.norm if mixer.mamba_rms_norm else gate_alone
    layer.self_attn = GroupedQuery(heads, spec, point)
    layer.mamba = Mamba2Mixer(ScaledProjection(mixer), norm, mixer.out_proj, spec, point)
    return mamba2_params(mixer, spec)


def _parts(model: Any) -> Parts:
    factor = model.model.lm_head_multiplier
    return usual_parts(model, head=lambda hidden: model.lm_head(hidden) * factor)


FALCON_H1 = Family(load_pretrained, _parts, _adapt)
