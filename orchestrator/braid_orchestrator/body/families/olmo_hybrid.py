"""olmo_hybrid: Gated DeltaNet with negative eigenvalues, and grouped-query attention without rotary."""

from __future__ import annotations

from typing import Any

import torch
from braid_wire.layers import GatedDelta, Kind, LayerSpec
from torch import nn
from transformers.models.olmo_hybrid import modeling_olmo_hybrid as modelling

from braid_orchestrator.body.base import DispatchPoint
from braid_orchestrator.body.families.dense import normed_rows
from braid_orchestrator.body.families.gated_delta import GatedDeltaNet, delta_params
from braid_orchestrator.body.families.gqa import GroupedQuery
from braid_orchestrator.body.families.submodules import geometry, must_agree, submodule
from braid_orchestrator.body.family import Family, Params
from braid_orchestrator.body.loading import load_pretrained, usual_parts


class SeparateProjection(nn.Module):
    """A matrix for each of q, k, v, z, b and a."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.q, self.k, self.v = original.q_proj, original.k_proj, original.v_proj
        self.z, self.b, self.a = original.g_proj, original.b_proj, original.a_proj

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[T, hidden] → mixed_qkv, z, b, a."""
        mixed_qkv = torch.cat([self.q(hidden), self.k(hidden), self.v(hidden)], dim=-1)
        return mixed_qkv, self.z(hidden), self.b(hidden), self.a(hidden)


def _adapt(layer: Any, spec: LayerSpec, point: DispatchPoint) -> Params:
    if spec.kind is Kind.FULL:
        attention = submodule(layer, "self_attn", modelling.OlmoHybridAttention, spec)
        # The models that were published have no rotary; the layer is then given no embeddings.
        heads = normed_rows(attention, modelling.apply_rotary_pos_emb)
        layer.self_attn = GroupedQuery(heads, spec, point)
        return {}
    original = submodule(layer, "linear_attn", modelling.OlmoHybridGatedDeltaNet, spec)
    beta_scale = 2.0 if original.allow_neg_eigval else 1.0
    must_agree(spec, "the scale of beta", beta_scale, geometry(spec, Kind.LINEAR, GatedDelta).beta_scale)
    project = SeparateProjection(original)
    layer.linear_attn = GatedDeltaNet(project, original.o_norm, original.o_proj, spec, point)
    return delta_params(original, spec)


OLMO_HYBRID = Family(load_pretrained, usual_parts, _adapt)
