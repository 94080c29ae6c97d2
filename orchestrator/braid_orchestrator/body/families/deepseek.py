"""deepseek_v2 and deepseek_v3: latent attention in every layer."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from braid_wire.layers import LayerSpec

from braid_orchestrator.body import loading
from braid_orchestrator.body.base import DispatchPoint
from braid_orchestrator.body.families import latent
from braid_orchestrator.body.families.submodules import submodule
from braid_orchestrator.body.family import Family, Params

_Pair = tuple[torch.Tensor, torch.Tensor]


def _adapt_v2(layer: Any, spec: LayerSpec, point: DispatchPoint) -> Params:
    modelling = import_module("transformers.models.deepseek_v2.modeling_deepseek_v2")
    original = submodule(layer, "self_attn", modelling.DeepseekV2Attention, spec)

    def rotate(q_pe: torch.Tensor, k_pe: torch.Tensor, embeddings: Any) -> _Pair:
        # Complex numbers [1, T, d_r / 2]; heads before tokens.
        query, key = modelling.apply_rotary_emb(q_pe.transpose(1, 2), k_pe.transpose(1, 2), embeddings)
        return query.transpose(1, 2), key.transpose(1, 2)

    layer.self_attn = latent.LatentAttention(latent.usual_parts(original, rotate), spec, point)
    return latent.latent_params(original.kv_b_proj, spec)


def _adapt_v3(layer: Any, spec: LayerSpec, point: DispatchPoint) -> Params:
    modelling = import_module("transformers.models.deepseek_v3.modeling_deepseek_v3")
    original = submodule(layer, "self_attn", modelling.DeepseekV3Attention, spec)
    interleaved = original.config.rope_interleave
    apply = modelling.apply_rotary_pos_emb_interleave if interleaved else modelling.apply_rotary_pos_emb

    def rotate(q_pe: torch.Tensor, k_pe: torch.Tensor, embeddings: Any) -> _Pair:
        query, key = apply(q_pe, k_pe, *embeddings, unsqueeze_dim=2)
        return query, key

    layer.self_attn = latent.LatentAttention(latent.usual_parts(original, rotate), spec, point)
    return latent.latent_params(original.kv_b_proj, spec)


DEEPSEEK_V2 = Family(loading.load_pretrained, loading.usual_parts, _adapt_v2)
DEEPSEEK_V3 = Family(loading.load_pretrained, loading.usual_parts, _adapt_v3)
