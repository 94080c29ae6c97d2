"""minimax and minimax_text_01: Lightning attention, and grouped-query attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from braid_wire.errors import ConfigInvalid
from braid_wire.layers import Kind, LayerSpec, Lightning
from torch import nn
from transformers import MiniMaxConfig, MiniMaxForCausalLM, PreTrainedModel
from transformers.models.minimax import modeling_minimax as modelling

from braid_orchestrator.body.base import DispatchPoint
from braid_orchestrator.body.checkpoint import load_pretrained
from braid_orchestrator.body.families.gqa import GroupedQuery, usual_heads
from braid_orchestrator.body.families.submodules import geometry, submodule
from braid_orchestrator.body.family import Family, LoadRequest, Params
from braid_orchestrator.body.loading import usual_parts
from braid_orchestrator.layer_plan import load_config

# transformers saves its decay tables; publishers do not.
_TABLES = r"\.(slope_rate|query_decay|key_decay|diagonal_decay)$"

_RENAMED = {
    "layernorm_full_attention_alpha": "full_attn_alpha_factor",
    "layernorm_full_attention_beta": "full_attn_beta_factor",
    "layernorm_linear_attention_alpha": "linear_attn_alpha_factor",
    "layernorm_linear_attention_beta": "linear_attn_beta_factor",
    "layernorm_mlp_alpha": "mlp_alpha_factor",
    "layernorm_mlp_beta": "mlp_beta_factor",
}
"""What the publisher's config calls fields of transformers' one."""


class LightningAttention(nn.Module):
    """The module's projection; then the service (SiLU, recurrence); then norm, gate and output.

    Raises:
        ConfigInvalid: the plan has another mechanism for this layer.
    """

    def __init__(self, original: Any, spec: LayerSpec, point: DispatchPoint) -> None:
        super().__init__()
        self.qkv_proj, self.norm = original.qkv_proj, original.norm
        self.output_gate, self.out_proj = original.output_gate, original.out_proj
        self._layer_id, self._point = spec.layer_id, point
        self._geometry = geometry(spec, Kind.LINEAR, Lightning)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """[1, T, hidden] → [1, T, hidden], and no attention weights."""
        g, rows = self._geometry, hidden_states.shape[1]
        mixed = self.qkv_proj(hidden_states).view(rows, g.num_heads, 3 * g.head_dim)
        query, key, value = mixed.chunk(3, dim=-1)
        out = self._point.attend(self._layer_id, {"q": query, "k": key, "v": value})
        normed = self.norm(out.reshape(1, rows, -1))
        return self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * normed), None


def _adapt(layer: Any, spec: LayerSpec, point: DispatchPoint) -> Params:
    if spec.kind is Kind.FULL:
        attention = submodule(layer, "self_attn", modelling.MiniMaxAttention, spec)
        layer.self_attn = GroupedQuery(usual_heads(attention, _rotate_first), spec, point)
        return {}
    original = submodule(layer, "self_attn", modelling.MiniMaxLightningAttention, spec)
    layer.self_attn = LightningAttention(original, spec, point)
    # Computed again, since a checkpoint may hold the slopes rounded to its dtype.
    return {"log_decay": -original.get_slope_rate(device="cpu").float().flatten()}


def _rotate_first(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary over the first dims of a head, as many as the tables have."""
    size = cos.shape[-1]
    turned_q, turned_k = modelling.apply_rotary_pos_emb(
        query[..., :size], key[..., :size], cos, sin, unsqueeze_dim
    )
    return torch.cat([turned_q, query[..., size:]], -1), torch.cat([turned_k, key[..., size:]], -1)


def _load(request: LoadRequest) -> PreTrainedModel:
    return load_pretrained(request, MiniMaxForCausalLM, computed=_TABLES)


def _load_text_01(request: LoadRequest) -> PreTrainedModel:
    """From the publisher's config, which transformers would misread (it ignores `attn_type_list`)."""
    raw = load_config(request.directory)
    _refuse_unknown_variants(raw)
    kinds = [
        "full_attention" if spec.kind is Kind.FULL else "linear_attention" for spec in request.plans.target
    ]
    fields = {_RENAMED.get(name, name): value for name, value in raw.items() if name not in _NOT_FIELDS}
    config = MiniMaxConfig(**{**fields, "layer_types": kinds})
    model = load_pretrained(request, MiniMaxForCausalLM, computed=_TABLES, config=config)
    rotary_dim = raw.get("rotary_dim")
    if rotary_dim is not None:
        _rotate_partly(model, rotary_dim)
    return model


_NOT_FIELDS = {
    "model_type",
    "architectures",
    "auto_map",
    "attn_type_list",
    "rotary_dim",
    "transformers_version",
}


def _refuse_unknown_variants(raw: Mapping[str, Any]) -> None:
    """Refuse what the publisher's code has and transformers' has not."""
    if not raw.get("postnorm", False):
        raise ConfigInvalid("postnorm must be true: residuals are taken after the norms", field="postnorm")
    if raw.get("shared_intermediate_size", 0):
        raise ConfigInvalid("shared experts are not served", field="shared_intermediate_size")


def _rotate_partly(model: Any, rotary_dim: int) -> None:
    """Give the model rotary tables over the first dims of a head only; transformers has them over all."""
    rotary = model.model.rotary_emb
    base = model.config.rope_parameters["rope_theta"]
    steps = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    rotary.inv_freq = nn.Buffer(1.0 / base**steps, persistent=False)


MINIMAX = Family(_load, usual_parts, _adapt)
MINIMAX_TEXT_01 = Family(_load_text_01, usual_parts, _adapt)
