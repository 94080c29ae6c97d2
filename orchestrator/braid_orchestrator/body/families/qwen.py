"""Adapters of qwen3_next and qwen3_5: Gated DeltaNet layers and gated grouped-query attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from braid_wire.errors import ConfigInvalid
from braid_wire.layers import GatedDelta, Gqa, Kind, LayerSpec
from torch import nn
from transformers.models.qwen3_5.modeling_qwen3_5 import apply_rotary_pos_emb

from braid_orchestrator.body.base import DispatchPoint
from braid_orchestrator.body.family import Adapt, Family, Params
from braid_orchestrator.body.loading import load_pretrained, usual_parts

Projection = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
"""[T, hidden] → mixed_qkv [T, C], z [T, Hv·dv], b [T, Hv], a [T, Hv]."""


class GatedAttention(nn.Module):
    """The module's q, k, v projections, norms and rotary; then the service; then gate and output.

    The query projection gives [query | gate] per head.
    """

    def __init__(self, original: Any, spec: LayerSpec, point: DispatchPoint) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = original.q_proj, original.k_proj, original.v_proj
        self.o_proj, self.q_norm, self.k_norm = original.o_proj, original.q_norm, original.k_norm
        self._layer_id, self._point = spec.layer_id, point
        if not isinstance(spec.full, Gqa):
            raise ConfigInvalid(f"layer {spec.layer_id} is {spec.mechanism}, its module is gated gqa")
        self._geometry = spec.full

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: Any
    ) -> tuple[torch.Tensor, None]:
        """[1, T, hidden] → [1, T, hidden], and no attention weights."""
        g, rows = self._geometry, hidden_states.shape[1]
        query, gate = self.q_proj(hidden_states).view(1, rows, g.num_q_heads, 2 * g.head_dim).chunk(2, dim=-1)
        key = self.k_proj(hidden_states).view(1, rows, g.num_kv_heads, g.head_dim)
        value = self.v_proj(hidden_states).view(rows, g.num_kv_heads, g.v_head_dim)
        cos, sin = position_embeddings
        query, key = apply_rotary_pos_emb(self.q_norm(query), self.k_norm(key), cos, sin, unsqueeze_dim=2)
        out = self._point.attend(self._layer_id, {"q": query[0], "k": key[0], "v": value})
        return self.o_proj((out * torch.sigmoid(gate[0])).reshape(1, rows, -1)), None


class GatedDeltaNet(nn.Module):
    """The module's projections; then the service (conv, gates, recurrence); then norm and output."""

    def __init__(self, original: Any, spec: LayerSpec, point: DispatchPoint, project: Projection) -> None:
        super().__init__()
        self.norm, self.out_proj = original.norm, original.out_proj
        self._project = project
        self._layer_id, self._point = spec.layer_id, point
        if not isinstance(spec.linear, GatedDelta):
            raise ConfigInvalid(f"layer {spec.layer_id} is {spec.mechanism}, its module is gated_delta")
        self._geometry = spec.linear

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        """[1, T, hidden] → [1, T, hidden]."""
        g, rows = self._geometry, hidden_states.shape[1]
        mixed_qkv, z, b, a = self._project(hidden_states[0])
        out = self._point.attend(self._layer_id, {"mixed_qkv": mixed_qkv, "a": a, "b": b})
        normed = self.norm(out.reshape(-1, g.v_head_dim), z.reshape(-1, g.v_head_dim))
        return self.out_proj(normed.view(1, rows, -1))


def delta_params(original: Any) -> dict[str, torch.Tensor]:
    """The static parameters that a Gated DeltaNet layer's service needs."""
    if original.activation != "silu":
        raise ConfigInvalid(
            f"hidden_act is {original.activation!r}; the conv of gated_delta layers runs with 'silu'",
            field="hidden_act",
            value=original.activation,
        )
    params = {
        "conv_weight": original.conv1d.weight.detach().squeeze(1),
        "A_log": original.A_log.detach(),
        "dt_bias": original.dt_bias.detach(),
    }
    if original.conv1d.bias is not None:
        params["conv_bias"] = original.conv1d.bias.detach()
    return params


class FusedProjection(nn.Module):
    """qwen3_next: one matrix for q, k, v, z and one for b, a, both interleaved by key head.

    Their rows are put in the order q | k | v | z and b | a once, so that the pieces come out of the
    product contiguous and nothing is gathered per step.
    """

    def __init__(self, original: Any, g: GatedDelta) -> None:
        super().__init__()
        group = g.num_v_heads // g.num_k_heads
        parts = [g.k_head_dim, g.k_head_dim, group * g.v_head_dim, group * g.v_head_dim]
        self.qkvz = _reordered(original.in_proj_qkvz, g.num_k_heads, parts)
        self.ba = _reordered(original.in_proj_ba, g.num_k_heads, [group, group])
        self._channels, self._heads = g.channels, g.num_v_heads

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[T, hidden] → mixed_qkv, z, b, a."""
        qkvz, ba = self.qkvz(hidden), self.ba(hidden)
        return (
            qkvz[:, : self._channels],
            qkvz[:, self._channels :],
            ba[:, : self._heads],
            ba[:, self._heads :],
        )


class SplitProjection(nn.Module):
    """qwen3_5: a matrix for each of q|k|v, z, b and a."""

    def __init__(self, original: Any, g: GatedDelta) -> None:
        super().__init__()
        self.qkv, self.z = original.in_proj_qkv, original.in_proj_z
        self.b, self.a = original.in_proj_b, original.in_proj_a

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[T, hidden] → mixed_qkv, z, b, a."""
        return self.qkv(hidden), self.z(hidden), self.b(hidden), self.a(hidden)


def _reordered(linear: nn.Linear, groups: int, parts: list[int]) -> nn.Linear:
    """The same linear map with its output rows regrouped: part by part, each over all groups."""
    order = torch.arange(linear.out_features).view(groups, sum(parts))
    rows = torch.cat([piece.reshape(-1) for piece in order.split(parts, dim=1)])
    with torch.no_grad():
        linear.weight.copy_(linear.weight[rows])
        if linear.bias is not None:
            linear.bias.copy_(linear.bias[rows])
    return linear


def _adapter(projection: Callable[[Any, GatedDelta], Projection]) -> Adapt:
    def adapt(layer: Any, spec: LayerSpec, point: DispatchPoint) -> Params:
        if spec.kind is Kind.FULL:
            layer.self_attn = GatedAttention(layer.self_attn, spec, point)
            return {}
        if not isinstance(spec.linear, GatedDelta):
            raise ConfigInvalid(f"layer {spec.layer_id} is {spec.mechanism}, its module is gated_delta")
        original = layer.linear_attn
        params = delta_params(original)
        layer.linear_attn = GatedDeltaNet(original, spec, point, projection(original, spec.linear))
        return params

    return adapt


QWEN3_NEXT = Family(load_pretrained, usual_parts, _adapter(FusedProjection))
QWEN3_5 = Family(load_pretrained, usual_parts, _adapter(SplitProjection))
