"""Adapters of zamba2: Mamba-2 layers, and hybrid ones that run a shared attention block first.

Several hybrid layers share one attention block, whose own layer index is -1. Each layer therefore gets
an adapter of its own around it, which knows the layer's id; the block is left as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from braid_wire.layers import Kind, LayerSpec
from torch import nn
from transformers.models.zamba2 import modeling_zamba2 as zamba

from braid_orchestrator.body.base import DispatchPoint
from braid_orchestrator.body.families.gqa import GroupedQuery, Heads, Sum
from braid_orchestrator.body.families.mamba2 import mamba2_params, usual_mixer
from braid_orchestrator.body.families.submodules import submodule
from braid_orchestrator.body.family import Family, Params
from braid_orchestrator.body.loading import load_pretrained, usual_parts


class SharedBlock(nn.Module):
    """One layer's use of a shared block: norm of [hidden | embedding], attention, norm, MLP."""

    def __init__(self, block: Any, attention: GroupedQuery, layer_id: int) -> None:
        super().__init__()
        self.input_layernorm, self.pre_ff_layernorm = block.input_layernorm, block.pre_ff_layernorm
        self.attention, self.feed_forward = attention, block.feed_forward
        self._layer_id = layer_id

    def forward(
        self,
        hidden_states: torch.Tensor,
        original_hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """[1, T, hidden] twice → [1, T, hidden]."""
        joined = torch.cat([hidden_states, original_hidden_states], dim=-1)
        attended, _weights = self.attention(self.input_layernorm(joined), position_embeddings)
        return self.feed_forward(self.pre_ff_layernorm(attended), self._layer_id)


def _heads(attention: Any, layer_id: int) -> Heads:
    """The shared projections, plus the low-rank ones that this layer has for itself, if any."""
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    if attention.config.use_shared_attention_adapter:
        index = attention.layer_dic[layer_id]
        q = Sum(q, attention.linear_q_adapter_list[index])
        k = Sum(k, attention.linear_k_adapter_list[index])
        v = Sum(v, attention.linear_v_adapter_list[index])
    rotate = zamba.apply_rotary_pos_emb if attention.config.use_mem_rope else None
    return Heads(q, k, v, attention.o_proj, attention.scaling, rotate)


def _adapt(layer: Any, spec: LayerSpec, point: DispatchPoint) -> Params:
    mamba_layer = layer
    if spec.kind is Kind.PARALLEL:
        mamba_layer = submodule(layer, "mamba_decoder", zamba.Zamba2MambaDecoderLayer, spec)
        block = submodule(layer, "shared_transformer", zamba.Zamba2AttentionDecoderLayer, spec)
        original = submodule(block, "self_attn", zamba.Zamba2Attention, spec)
        attention = GroupedQuery(_heads(original, spec.layer_id), spec, point)
        layer.shared_transformer = SharedBlock(block, attention, spec.layer_id)
    mixer = submodule(mamba_layer, "mamba", zamba.Zamba2MambaMixer, spec)
    mamba_layer.mamba = usual_mixer(mixer, spec, point)
    return mamba2_params(mixer, spec)


ZAMBA2 = Family(load_pretrained, usual_parts, _adapt)
