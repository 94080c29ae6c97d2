"""Models without linear layers whose attention is grouped-query attention: one adapter for all.

What differs is how a family comes to q, k and v before rotary, and its head.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from braid_wire.layers import LayerSpec
from torch import nn

from braid_orchestrator.body.base import DispatchPoint, Head
from braid_orchestrator.body.families.gqa import GroupedQuery, Heads, Rotate, usual_heads
from braid_orchestrator.body.families.submodules import submodule
from braid_orchestrator.body.family import Family, Params, Parts
from braid_orchestrator.body.loading import load_pretrained, usual_parts

MakeHeads = Callable[[Any, Rotate | None], Heads]
"""(attention module, its rotary) → what stays with the body."""


class PerHead(nn.Module):
    """A norm over each head of a projection's rows."""

    def __init__(self, norm: nn.Module, size: int) -> None:
        super().__init__()
        self.norm, self._size = norm, size

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[1, T, H·D] → [1, T, H, D]."""
        return self.norm(rows.unflatten(-1, (-1, self._size)))


class Clipped(nn.Module):
    """Rows within ±bound."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self._bound = bound

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[1, T, n] → [1, T, n]."""
        return rows.clamp(-self._bound, self._bound)


def normed_heads(original: Any, rotate: Rotate | None) -> Heads:
    """q and k with a norm over each head (qwen3)."""
    q, k = _each_normed(original, lambda norm: PerHead(norm, original.head_dim))
    return Heads(q, k, original.v_proj, original.o_proj, original.scaling, rotate)


def normed_rows(original: Any, rotate: Rotate | None) -> Heads:
    """q with one norm over all its heads, and so k (olmo2)."""
    q, k = _each_normed(original, lambda norm: norm)
    return Heads(q, k, original.v_proj, original.o_proj, original.scaling, rotate)


def clipped(make: MakeHeads) -> MakeHeads:
    """As `make`, with q, k and v within ±`clip_qkv` where the model has it (olmo, olmoe)."""

    def heads(original: Any, rotate: Rotate | None) -> Heads:
        found, bound = make(original, rotate), original.config.clip_qkv
        if bound is None:
            return found
        q, k, v = (nn.Sequential(rows, Clipped(bound)) for rows in (found.q, found.k, found.v))
        return Heads(q, k, v, found.out, found.scale, rotate)

    return heads


def fused(original: Any, rotate: Rotate | None) -> Heads:
    """q, k and v from parts of one matrix (phi3)."""
    config, size = original.config, original.head_dim
    widths = [config.num_attention_heads * size, *2 * [config.num_key_value_heads * size]]
    q, k, v = (_linear(rows) for rows in original.qkv_proj.weight.split(widths))
    return Heads(q, k, v, original.o_proj, original.scaling, rotate)


def perhaps_normed_heads(original: Any, rotate: Rotate | None) -> Heads:
    """As `normed_heads` where the model has `use_qk_norm` (cohere)."""
    return normed_heads(original, rotate) if original.use_qk_norm else usual_heads(original, rotate)


def rotated_where_windowed(original: Any, rotate: Rotate | None) -> Heads:
    """Only layers with a window have rotary (cohere2)."""
    return usual_heads(original, rotate if original.sliding_window is not None else None)


def rotated_where_said(original: Any, rotate: Rotate | None) -> Heads:
    """Every layer says whether it has rotary (smollm3)."""
    return usual_heads(original, rotate if original.use_rope else None)


def logits_divided(model: Any) -> Head:
    """Logits are divided by `logits_scaling` (granite)."""
    return lambda hidden: model.lm_head(hidden) / model.config.logits_scaling


def logits_multiplied(model: Any) -> Head:
    """Logits are multiplied by `logit_scale` (cohere)."""
    return lambda hidden: model.lm_head(hidden) * model.config.logit_scale


def _each_normed(original: Any, over: Callable[[nn.Module], nn.Module]) -> tuple[nn.Module, nn.Module]:
    return (
        nn.Sequential(original.q_proj, over(original.q_norm)),
        nn.Sequential(original.k_proj, over(original.k_norm)),
    )


def _linear(weight: torch.Tensor) -> nn.Linear:
    """The map by some rows of a matrix, which it shares."""
    found = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    found.weight = nn.Parameter(weight, requires_grad=False)
    return found


def _family(
    model_type: str, prefix: str, heads: MakeHeads = usual_heads, head: Callable[[Any], Head] | None = None
) -> Family:
    """The family of one model type of transformers, whose classes are named `prefix`….

    Args:
        heads: takes an attention module apart.
        head: makes the head where it is more than `lm_head`.
    """

    def adapt(layer: Any, spec: LayerSpec, point: DispatchPoint) -> Params:
        modelling = import_module(f"transformers.models.{model_type}.modeling_{model_type}")
        original = submodule(layer, "self_attn", getattr(modelling, f"{prefix}Attention"), spec)
        layer.self_attn = GroupedQuery(heads(original, modelling.apply_rotary_pos_emb), spec, point)
        return {}

    def parts(model: Any) -> Parts:
        return usual_parts(model, head(model) if head is not None else None)

    return Family(load_pretrained, parts, adapt)


COHERE = _family("cohere", "Cohere", perhaps_normed_heads, logits_multiplied)
COHERE2 = _family("cohere2", "Cohere2", rotated_where_windowed, logits_multiplied)
GEMMA = _family("gemma", "Gemma")
GLM4 = _family("glm4", "Glm4")
GRANITE = _family("granite", "Granite", head=logits_divided)
GRANITEMOE = _family("granitemoe", "GraniteMoe", head=logits_divided)
LLAMA = _family("llama", "Llama")
MISTRAL = _family("mistral", "Mistral")
MIXTRAL = _family("mixtral", "Mixtral")
OLMO = _family("olmo", "Olmo", clipped(usual_heads))
OLMO2 = _family("olmo2", "Olmo2", normed_rows)
OLMO3 = _family("olmo3", "Olmo3", normed_rows)
OLMOE = _family("olmoe", "Olmoe", clipped(normed_rows))
PHI3 = _family("phi3", "Phi3", fused)
QWEN2 = _family("qwen2", "Qwen2")
QWEN2_MOE = _family("qwen2_moe", "Qwen2Moe")
QWEN3 = _family("qwen3", "Qwen3", normed_heads)
QWEN3_MOE = _family("qwen3_moe", "Qwen3Moe", normed_heads)
SMOLLM3 = _family("smollm3", "SmolLM3", rotated_where_said)
STARCODER2 = _family("starcoder2", "Starcoder2")
