"""bailing_hybrid (Ling-3): bounded Kimi Delta Attention, and latent attention with a gate per head."""

from __future__ import annotations

from typing import Any

import torch
from braid_wire.layers import KimiDelta, Kind, LayerSpec
from transformers.models.bailing_hybrid import modeling_bailing_hybrid as modelling

from braid_orchestrator.body import loading
from braid_orchestrator.body.base import DispatchPoint
from braid_orchestrator.body.families import latent
from braid_orchestrator.body.families.kimi_delta import DeltaParts, KimiDeltaAttention, kimi_delta_params
from braid_orchestrator.body.families.submodules import geometry, must_agree, submodule
from braid_orchestrator.body.family import Family, Params


def _rotate(q_pe: torch.Tensor, k_pe: torch.Tensor, embeddings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = embeddings
    query, key = modelling.apply_rotary_pos_emb_interleave(q_pe, k_pe, cos, sin, unsqueeze_dim=2)
    return query, key


def _adapt(layer: Any, spec: LayerSpec, point: DispatchPoint) -> Params:
    if spec.kind is Kind.FULL:
        return _adapt_latent(layer, spec, point)
    original = submodule(layer, "self_attn", modelling.BailingHybridDeltaAttention, spec)
    decay = original.forget_gate
    bound = decay.lower_bound if decay.safe_gate else 0.0
    planned = geometry(spec, Kind.LINEAR, KimiDelta).gate_lower_bound
    must_agree(spec, "the bound of the decay", bound, planned)
    parts = DeltaParts(
        q=original.q_proj,
        k=original.k_proj,
        v=original.v_proj,
        decay=decay.f_proj,
        beta=original.b_proj,
        gate=original.g_proj,
        norm=original.o_norm,
        out=original.o_proj,
    )
    layer.self_attn = KimiDeltaAttention(parts, spec, point)
    return kimi_delta_params(original, spec)


def _adapt_latent(layer: Any, spec: LayerSpec, point: DispatchPoint) -> Params:
    original = submodule(layer, "self_attn", modelling.BailingHybridAttention, spec)
    parts = latent.LatentParts(
        query=original.q_proj,
        compress=original.kv_a_proj_with_mqa,
        norm=original.kv_a_layernorm,
        out=original.o_proj,
        scale=original.scaling,
        rotate=_rotate,
        gate=original.g_proj,
    )
    layer.self_attn = latent.LatentAttention(parts, spec, point)
    return latent.latent_params(original.kv_b_proj, spec)


BAILING_HYBRID = Family(loading.load_pretrained, loading.usual_parts, _adapt)
