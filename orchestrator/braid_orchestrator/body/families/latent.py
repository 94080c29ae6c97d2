"""The adapter of multi-head latent attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from braid_wire.layers import Kind, LayerSpec, Mla
from torch import nn

from braid_orchestrator.body.base import DispatchPoint
from braid_orchestrator.body.families.submodules import geometry, must_agree

Rotate = Callable[[torch.Tensor, torch.Tensor, Any], tuple[torch.Tensor, torch.Tensor]]
"""(q_pe [1, T, H, d_r], k_pe [1, T, 1, d_r], the model's position embeddings) → both rotated."""


@dataclass(frozen=True)
class LatentParts:
    """What of an attention module stays with the body."""

    query: nn.Module
    """[1, T, hidden] → [1, T, H·(d_n + d_r)], per head the part without rotary first."""
    compress: nn.Module
    """[1, T, hidden] → [1, T, r + d_r]."""
    norm: nn.Module
    """Over the latent, [1, T, r]."""
    out: nn.Module
    """[1, T, H·d_v] → [1, T, hidden]."""
    scale: float
    """The module's softmax scale; the plan must have the same."""
    rotate: Rotate | None = None
    gate: nn.Module | None = None
    """[1, T, hidden] → [1, T, H]: a head's output is multiplied by its sigmoid."""


def query_of(original: Any) -> nn.Module:
    """One projection to q, or two with a norm between them."""
    if original.q_lora_rank is None:
        query: nn.Module = original.q_proj
        return query
    return nn.Sequential(original.q_a_proj, original.q_a_layernorm, original.q_b_proj)


def usual_parts(original: Any, rotate: Rotate | None = None) -> LatentParts:
    """Those of a module laid out as DeepSeek's."""
    return LatentParts(
        query_of(original),
        original.kv_a_proj_with_mqa,
        original.kv_a_layernorm,
        original.o_proj,
        original.scaling,
        rotate,
    )


class LatentAttention(nn.Module):
    """The module's projections to q, latent and rotary key; then the service; then gate and output.

    Raises:
        ConfigInvalid: the plan has another mechanism or scale for this layer.
    """

    def __init__(self, parts: LatentParts, spec: LayerSpec, point: DispatchPoint) -> None:
        super().__init__()
        self.query, self.compress, self.norm, self.out = parts.query, parts.compress, parts.norm, parts.out
        self.gate = parts.gate
        self._rotate = parts.rotate
        self._layer_id, self._point = spec.layer_id, point
        self._geometry = geometry(spec, Kind.FULL, Mla)
        must_agree(spec, "the softmax scale", parts.scale, self._geometry.scale)

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: Any = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """[1, T, hidden] → [1, T, hidden], and no attention weights."""
        g, rows = self._geometry, hidden_states.shape[1]
        nope, rope = g.qk_nope_head_dim, g.qk_rope_head_dim
        query = self.query(hidden_states).view(1, rows, g.num_heads, nope + rope)
        q_nope, q_pe = query.split([nope, rope], dim=-1)
        latent, k_pe = self.compress(hidden_states).split([g.kv_lora_rank, rope], dim=-1)
        k_pe = k_pe.unsqueeze(2)
        if self._rotate is not None:
            q_pe, k_pe = self._rotate(q_pe, k_pe, position_embeddings)
        inputs = {"q_nope": q_nope[0], "q_pe": q_pe[0], "c_kv": self.norm(latent)[0], "k_pe": k_pe[0, :, 0]}
        out = self._point.attend(self._layer_id, inputs)
        if self.gate is not None:
            gate = torch.sigmoid(self.gate(hidden_states).float()).to(out.dtype)
            out = out * gate[0].unsqueeze(-1)
        return self.out(out.reshape(1, rows, -1)), None


def latent_params(expand: nn.Linear, spec: LayerSpec) -> dict[str, torch.Tensor]:
    """The static parameters of a layer's service: two views of the matrix that expands latents.

    Args:
        expand: [r] → [H·(d_n + d_v)], per head the keys' part first.
    """
    g = geometry(spec, Kind.FULL, Mla)
    weight = expand.weight.detach().view(g.num_heads, g.qk_nope_head_dim + g.v_head_dim, g.kv_lora_rank)
    keys, values = weight.split([g.qk_nope_head_dim, g.v_head_dim], dim=1)
    return {"w_uk": keys, "w_uv": values.transpose(1, 2)}
