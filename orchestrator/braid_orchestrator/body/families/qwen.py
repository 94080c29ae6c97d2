"""qwen3_next and qwen3_5: Gated DeltaNet layers, gated grouped-query attention, and their MTP head."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from braid_wire.layers import GatedDelta, Gqa, Kind, LayerPlan, LayerSpec
from torch import nn

from braid_orchestrator.body.base import DispatchPoint
from braid_orchestrator.body.checkpoint import fill, load_state, read_weights, require_exact, weight_files
from braid_orchestrator.body.families.gated_delta import GatedDeltaNet, delta_params
from braid_orchestrator.body.families.gqa import Rotate
from braid_orchestrator.body.families.submodules import geometry, must_agree, submodule
from braid_orchestrator.body.family import Adapt, DraftParts, Family, LoadRequest, Params, Parts
from braid_orchestrator.body.loading import load_pretrained, usual_parts

_MTP = re.compile(r"^(?:model\.|language_model\.)*mtp\.(.+)$")
_FUSION = ("fc.weight", "pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight")
_LAYER_TYPES = {Kind.FULL: "full_attention", Kind.LINEAR: "linear_attention"}


class GatedAttention(nn.Module):
    """The module's q, k, v projections, norms and rotary; then the service; then gate and output.

    The query projection gives [query | gate] per head.
    """

    def __init__(self, original: Any, rotate: Rotate, spec: LayerSpec, point: DispatchPoint) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = original.q_proj, original.k_proj, original.v_proj
        self.o_proj, self.q_norm, self.k_norm = original.o_proj, original.q_norm, original.k_norm
        self._rotate = rotate
        self._layer_id, self._point = spec.layer_id, point
        self._geometry = geometry(spec, Kind.FULL, Gqa)
        must_agree(spec, "the softmax scale", original.scaling, self._geometry.scale)

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: Any
    ) -> tuple[torch.Tensor, None]:
        """[1, T, hidden] → [1, T, hidden], and no attention weights."""
        g, rows = self._geometry, hidden_states.shape[1]
        query, gate = self.q_proj(hidden_states).view(1, rows, g.num_q_heads, 2 * g.head_dim).chunk(2, dim=-1)
        key = self.k_proj(hidden_states).view(1, rows, g.num_kv_heads, g.head_dim)
        value = self.v_proj(hidden_states).view(rows, g.num_kv_heads, g.v_head_dim)
        query, key = self._rotate(self.q_norm(query), self.k_norm(key), *position_embeddings, unsqueeze_dim=2)
        out = self._point.attend(self._layer_id, {"q": query[0], "k": key[0], "v": value})
        return self.o_proj((out * torch.sigmoid(gate[0])).reshape(1, rows, -1)), None


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

    def __init__(self, original: Any, _: GatedDelta) -> None:
        super().__init__()
        self.qkv, self.z = original.in_proj_qkv, original.in_proj_z
        self.b, self.a = original.in_proj_b, original.in_proj_a

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[T, hidden] → mixed_qkv, z, b, a."""
        return self.qkv(hidden), self.z(hidden), self.b(hidden), self.a(hidden)


def _reordered(linear: nn.Linear, groups: int, parts: list[int]) -> nn.Linear:
    """The same linear map with its output rows regrouped, part by part, each over all groups; a new one,
    for the model may go on with the old."""
    order = torch.arange(linear.out_features).view(groups, sum(parts))
    rows = torch.cat([piece.reshape(-1) for piece in order.split(parts, dim=1)])
    found = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    found.weight = nn.Parameter(linear.weight.detach()[rows], requires_grad=False)
    if linear.bias is not None:
        found.bias = nn.Parameter(linear.bias.detach()[rows], requires_grad=False)
    return found


def _adapter(model_type: str, prefix: str, projection: Callable[[Any, GatedDelta], nn.Module]) -> Adapt:
    def adapt(layer: Any, spec: LayerSpec, point: DispatchPoint) -> Params:
        modelling = import_module(f"transformers.models.{model_type}.modeling_{model_type}")
        if spec.kind is Kind.FULL:
            attention = submodule(layer, "self_attn", getattr(modelling, f"{prefix}Attention"), spec)
            layer.self_attn = GatedAttention(attention, modelling.apply_rotary_pos_emb, spec, point)
            return {}
        original = submodule(layer, "linear_attn", getattr(modelling, f"{prefix}GatedDeltaNet"), spec)
        project = projection(original, geometry(spec, Kind.LINEAR, GatedDelta))
        layer.linear_attn = GatedDeltaNet(project, original.norm, original.out_proj, spec, point)
        return delta_params(original, spec)

    return adapt


class MtpHead(nn.Module):
    """fc([norm(embedding of the next token), norm(hidden)]) → layers → norm.

    Args:
        target: whose embedding is shared.
        layers: a model of the same class that has the MTP layers and their norm.
    """

    def __init__(self, target: Any, layers: Any) -> None:
        super().__init__()
        norm, width, dtype = type(target.model.norm), target.config.hidden_size, target.dtype
        self.config = layers.config
        self.embed_tokens, self.inner = target.model.embed_tokens, layers.model
        self.pre_fc_norm_embedding = norm(width, eps=target.config.rms_norm_eps).to(dtype)
        self.pre_fc_norm_hidden = norm(width, eps=target.config.rms_norm_eps).to(dtype)
        self.fc = nn.Linear(2 * width, width, bias=False, dtype=dtype)

    def forward(self, ids: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """int64 [1, T], [1, T, hidden], int64 [1, T] or [3, 1, T] → [1, T, hidden]."""
        embedded = self.pre_fc_norm_embedding(self.embed_tokens(ids))
        fused = self.fc(torch.cat([embedded, self.pre_fc_norm_hidden(hidden)], dim=-1))
        found: torch.Tensor = self.inner(
            inputs_embeds=fused, position_ids=positions, use_cache=False
        ).last_hidden_state
        return found


def load_mtp(request: LoadRequest, target: Any, plan: LayerPlan) -> DraftParts | None:
    """The MTP head; its layers are those of a model of the target's own class.

    Raises:
        ConfigInvalid: some of its weights are missing or unknown.
    """
    files = weight_files(request.directory)
    names = {key: found.group(1) for key in files if (found := _MTP.match(key)) is not None}
    if not names:
        return None
    weights = {names[key]: tensor for key, tensor in read_weights({key: files[key] for key in names})}
    require_exact(request.directory, [f"mtp.{name}" for name in _FUSION if name not in weights], [])
    fusion = {name: weights.pop(name) for name in _FUSION}
    layers = load_state(
        request,
        type(target),
        _mtp_config(target.config, plan),
        {f"model.{name}": tensor for name, tensor in weights.items()},
        # The draft shares both with the target.
        computed=r"^(model\.embed_tokens|lm_head)\.",
    )
    head = MtpHead(target, layers).eval().requires_grad_(False)
    for name, tensor in fusion.items():
        fill(head.get_parameter(name), tensor, f"mtp.{name}")
    return DraftParts(head, dict(enumerate(layers.model.layers)), head, target.lm_head)


class GridRotary(nn.Module):
    """The rotary tables of qwen3_5: some frequencies turn by a token's time, others by height or width.

    The same bits as the model's own module, which makes three whole tables and writes parts of two of
    them into the third.

    Args:
        original: the model's module.
    """

    frequencies: torch.Tensor
    """float32 [3, D/2]: of each axis; zero where a frequency belongs to another one."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        axis = torch.zeros(original.inv_freq.shape, dtype=torch.int64, device=original.inv_freq.device)
        for place in (1, 2):
            axis[place : 3 * original.mrope_section[place] : 3] = place
        frequencies = original.inv_freq.float() * (axis == torch.arange(3, device=axis.device)[:, None])
        self.register_buffer("frequencies", frequencies, persistent=False)
        self._scale = original.attention_scaling

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [3, 1, T] or [1, 1, T] → cos and sin [1, T, D], in the dtype of `hidden`."""
        time, height, width = positions.expand(3, -1, -1)[..., None].float()
        angles = time * self.frequencies[0] + height * self.frequencies[1] + width * self.frequencies[2]
        cos, sin = angles.cos() * self._scale, angles.sin() * self._scale
        return torch.cat([cos, cos], dim=-1).to(hidden.dtype), torch.cat([sin, sin], dim=-1).to(hidden.dtype)


def _load_grid_mtp(request: LoadRequest, target: Any, plan: LayerPlan) -> DraftParts | None:
    """As `load_mtp`, for a model with grids."""
    found = load_mtp(request, target, plan)
    if found is not None:
        found.model.inner.rotary_emb = GridRotary(found.model.inner.rotary_emb)
    return found


def _mtp_config(config: Any, plan: LayerPlan) -> Any:
    """The target's configuration with the draft's layers, and an embedding of no size to speak of."""
    found = copy.deepcopy(config)
    found.num_hidden_layers = len(plan)
    found.layer_types = [_LAYER_TYPES[spec.kind] for spec in plan]
    found.vocab_size, found.pad_token_id = 1, None
    return found


def _mrope_parts(model: Any) -> Parts:
    model.model.rotary_emb = GridRotary(model.model.rotary_emb)
    return usual_parts(model, mrope=True)


QWEN3_NEXT = Family(
    load_pretrained, usual_parts, _adapter("qwen3_next", "Qwen3Next", FusedProjection), load_mtp
)
QWEN3_5 = Family(
    load_pretrained, _mrope_parts, _adapter("qwen3_5", "Qwen3_5", SplitProjection), _load_grid_mtp
)
QWEN3_5_MOE = Family(
    load_pretrained, _mrope_parts, _adapter("qwen3_5_moe", "Qwen3_5Moe", SplitProjection), _load_grid_mtp
)
