"""kimi_linear: Kimi Delta Attention, and latent attention without rotary."""

from __future__ import annotations

from typing import Any

from braid_wire.layers import KimiDelta, Kind, LayerSpec
from torch import nn
from transformers.models.kimi_linear import modeling_kimi_linear as modelling

from braid_orchestrator.body import loading
from braid_orchestrator.body.base import DispatchPoint
from braid_orchestrator.body.families.kimi_delta import DeltaParts, KimiDeltaAttention, kimi_delta_params
from braid_orchestrator.body.families.latent import LatentAttention, latent_params, usual_parts
from braid_orchestrator.body.families.submodules import geometry, must_agree, submodule
from braid_orchestrator.body.family import Family, Params


def _adapt(layer: Any, spec: LayerSpec, point: DispatchPoint) -> Params:
    if spec.kind is Kind.FULL:
        original = submodule(layer, "self_attn", modelling.KimiLinearAttention, spec)
        layer.self_attn = LatentAttention(usual_parts(original), spec, point)
        return latent_params(original.kv_b_proj, spec)
    original = submodule(layer, "self_attn", modelling.KimiLinearDeltaAttention, spec)
    must_agree(spec, "the bound of the decay", 0.0, geometry(spec, Kind.LINEAR, KimiDelta).gate_lower_bound)
    parts = DeltaParts(
        q=original.q_proj,
        k=original.k_proj,
        v=original.v_proj,
        decay=nn.Sequential(original.forget_gate.f_a_proj, original.forget_gate.f_b_proj),
        beta=original.b_proj,
        gate=nn.Sequential(original.g_a_proj, original.g_b_proj),
        norm=original.o_norm,
        out=original.o_proj,
    )
    layer.self_attn = KimiDeltaAttention(parts, spec, point)
    return kimi_delta_params(original, spec)


KIMI_LINEAR = Family(loading.load_pretrained, loading.usual_parts, _adapt)
