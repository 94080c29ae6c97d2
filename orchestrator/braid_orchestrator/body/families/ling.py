"""bailing_moe_v2_5 (Ling-2.5/2.6, Ring-2.5): Lightning and latent attention, and their MTP layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from braid_wire.layers import Kind, LayerPlan, LayerSpec, Lightning
from torch import nn
from transformers import logging
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Experts,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
)

from braid_orchestrator.body.base import DispatchPoint
from braid_orchestrator.body.checkpoint import fill, read_weights, require_exact, weight_files
from braid_orchestrator.body.families import latent
from braid_orchestrator.body.families.ling_model import (
    LingLatent,
    LingLightning,
    LingModel,
    LingSizes,
)
from braid_orchestrator.body.families.submodules import geometry, submodule
from braid_orchestrator.body.family import DraftParts, Family, LoadRequest, Params, Parts
from braid_orchestrator.layer_plan import ModelPlans, load_config
from braid_orchestrator.layer_plan.fields import Fields

_LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"^(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")


class LightningAttention(nn.Module):
    """Projection, norms and rotary of q and k; then the service; then group norm, gate and output.

    Raises:
        ConfigInvalid: the plan has another mechanism for this layer.
    """

    def __init__(self, original: LingLightning, spec: LayerSpec, point: DispatchPoint) -> None:
        super().__init__()
        self.original = original
        self._layer_id, self._point = spec.layer_id, point
        self._geometry = geometry(spec, Kind.LINEAR, Lightning)

    def forward(
        self, hidden: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, None]:
        """[1, T, hidden] → [1, T, hidden], and no attention weights."""
        g, rows, module = self._geometry, hidden.shape[1], self.original
        mixed = module.query_key_value(hidden).view(1, rows, 3, g.num_heads, g.head_dim)
        query, key, value = mixed.unbind(2)
        query, key = _rotate_first(module.query_layernorm(query), module.key_layernorm(key), *tables)
        out = self._point.attend(self._layer_id, {"q": query[0], "k": key[0], "v": value[0]})
        normed = module.g_norm(out.reshape(1, rows, -1))
        return module.dense(normed * torch.sigmoid(module.g_proj(hidden))), None


def load_ling(request: LoadRequest) -> LingModel:
    """The model and, where its weights are there, its MTP layer; weights are read one by one.

    Raises:
        ConfigInvalid: the config names a variant that nobody published, or the weights are not exactly
            the model's.
    """
    plans, files = request.plans, weight_files(request.directory)
    draft = plans.draft if _has_draft(files, plans) else None
    sizes = LingSizes.read(Fields(load_config(request.directory)))
    with torch.device("meta"):
        model = LingModel(sizes, plans.target, draft, plans.vocab_size)
    _materialise(model, request.dtype)
    unread, unknown = _places(model), []
    for key, tensor in logging.tqdm(read_weights(files), total=len(files), desc="Loading weights"):
        place = _place(key, len(plans.target))
        if place in unread:
            fill(unread.pop(place), tensor, key)
        elif draft is not None or not place.startswith("draft_layers."):
            unknown.append(key)
    require_exact(request.directory, sorted(unread), unknown)
    return model.eval().requires_grad_(False)


def _load_draft(request: LoadRequest, target: LingModel, plan: LayerPlan) -> DraftParts | None:
    """The MTP layer, loaded with the target."""
    if len(target.draft_layers) != len(plan):
        return None
    return DraftParts(target, dict(enumerate(target.draft_layers)), target.draft, target.lm_head)


def _has_draft(files: Mapping[str, Path], plans: ModelPlans) -> bool:
    """Whether there is a draft that can be run.

    Of several MTP layers each would take the token after the one before's, so they are no one walk
    through layers; nobody has published such a model.
    """
    first = f"model.layers.{len(plans.target)}."
    return plans.draft is not None and len(plans.draft) == 1 and any(key.startswith(first) for key in files)


def _materialise(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every parameter memory of its own; what a checkpoint does not fill is found missing."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=dtype)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                # The experts' bias decides between near-equal scores; it stays exact in any dtype.
                module.register_buffer(name, torch.empty(buffer.shape, dtype=torch.float32))


def _places(model: LingModel) -> dict[str, torch.Tensor]:
    """Name of a place → where a weight of the checkpoint goes; experts are parts of larger tensors."""
    places: dict[str, torch.Tensor] = {}
    fused: dict[str, DeepseekV3Experts] = {
        name: module for name, module in model.named_modules() if isinstance(module, DeepseekV3Experts)
    }
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not name.startswith("rotary.") and name.rpartition(".")[0] not in fused:
            places[name] = tensor
    for name, experts in fused.items():
        for index, (both, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
            gate, up = both.chunk(2)
            places.update(
                {f"{name}.{index}.{part}": t for part, t in (("gate", gate), ("up", up), ("down", down))}
            )
    return places


def _place(key: str, layers: int) -> str:
    """Where a weight of the publisher's checkpoint goes in our model."""
    layer = _LAYER.match(key)
    if layer is None:
        return key.removeprefix("model.")
    index, rest = int(layer.group(1)), layer.group(2)
    stack = f"layers.{index}" if index < layers else f"draft_layers.{index - layers}"
    name = f"{stack}.{rest}".replace(".gate.expert_bias", ".gate.e_score_correction_bias")
    expert = _EXPERT.match(name)
    return name if expert is None else f"{expert.group(1)}.{expert.group(2)}.{expert.group(3)}"


def _adapt(layer: Any, spec: LayerSpec, point: DispatchPoint) -> Params:
    if spec.kind is Kind.FULL:
        original = submodule(layer, "attention", LingLatent, spec)
        parts = latent.LatentParts(
            query=latent.query_of(original),
            compress=original.kv_a_proj_with_mqa,
            norm=original.kv_a_layernorm,
            out=original.dense,
            scale=original.scaling,
            rotate=_rotate_pairs,
        )
        layer.attention = latent.LatentAttention(parts, spec, point)
        return latent.latent_params(original.kv_b_proj, spec)
    weights = submodule(layer, "attention", LingLightning, spec)
    layer.attention = LightningAttention(weights, spec, point)
    return {"log_decay": weights.log_decay()}


def _rotate_first(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half-split rotary over the first dims of each head, as many as the tables have."""
    size = cos.shape[-1]
    turned_q, turned_k = apply_rotary_pos_emb(query[..., :size], key[..., :size], cos, sin, unsqueeze_dim=2)
    return torch.cat([turned_q, query[..., size:]], -1), torch.cat([turned_k, key[..., size:]], -1)


def _rotate_pairs(q_pe: torch.Tensor, k_pe: torch.Tensor, tables: Any) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = tables
    query, key = apply_rotary_pos_emb_interleave(q_pe, k_pe, cos, sin, unsqueeze_dim=2)
    return query, key


def _parts(model: LingModel) -> Parts:
    return Parts(dict(enumerate(model.layers)), model, model.lm_head)


BAILING_MOE_V2_5 = Family(load_ling, _parts, _adapt, _load_draft)
