"""The model of Ling-2.5/2.6 and Ring-2.5 (`BailingMoeV2_5ForCausalLM`), which transformers lacks.

Built from transformers' DeepSeek blocks (MLP, experts, norms, rotary), in the names of the publisher's
checkpoints. The two attention modules only hold their weights: what they compute is done by adapters.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from braid_wire.layers import Kind, LayerPlan
from torch import nn
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3MLP,
    DeepseekV3MoE,
    DeepseekV3RMSNorm,
    DeepseekV3RotaryEmbedding,
    yarn_apply_mscale,
)

from braid_orchestrator.layer_plan.fields import Fields

_LATENT_EPS = 1e-6  # the publisher's norms inside latent attention do not read rms_norm_eps
_THETA = 600000.0  # rope_theta of a config that names none


@dataclass(frozen=True)
class LingSizes:
    """What the attention modules are built from; the blocks take `blocks`.

    Raises:
        ConfigInvalid: (`read`) a field is missing or wrong, or names a variant that nobody published.
    """

    hidden: int
    heads: int
    head_dim: int
    rotary_dim: int
    group_norms: int
    qk_norm: bool
    q_rank: int | None
    kv_rank: int
    nope: int
    rope: int
    value: int
    eps: float
    first_sparse: int
    layers: int
    blocks: DeepseekV3Config

    @classmethod
    def read(cls, fields: Fields) -> LingSizes:
        """From the publisher's config."""
        _refuse_variants(fields)
        heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
        head_dim = fields.integer("head_dim", hidden // heads)
        return cls(
            hidden=hidden,
            heads=heads,
            head_dim=head_dim,
            rotary_dim=int(head_dim * fields.number("partial_rotary_factor", 1.0)),
            group_norms=fields.integer("group_norm_size", 1),
            qk_norm=fields.flag("use_qk_norm", False),
            q_rank=fields.optional_integer("q_lora_rank"),
            kv_rank=fields.integer("kv_lora_rank"),
            nope=fields.integer("qk_nope_head_dim"),
            rope=fields.integer("qk_rope_head_dim"),
            value=fields.integer("v_head_dim"),
            eps=fields.number("rms_norm_eps", 1e-6),
            first_sparse=fields.integer("first_k_dense_replace", 0, minimum=0),
            layers=fields.integer("num_hidden_layers"),
            blocks=_blocks(fields),
        )

    def rotary(self, width: int) -> DeepseekV3RotaryEmbedding:
        """Rotary tables of so many dims of a head."""
        config = copy.deepcopy(self.blocks)
        config.head_dim = width
        return DeepseekV3RotaryEmbedding(config)


class LingLightning(nn.Module):
    """Weights of a Lightning attention layer.

    Args:
        layer_id: as the checkpoint counts; MTP layers follow the target's.
    """

    def __init__(self, sizes: LingSizes, layer_id: int) -> None:
        super().__init__()
        self._place = (sizes.heads, layer_id, sizes.layers)
        width = sizes.heads * sizes.head_dim
        self.query_key_value = nn.Linear(sizes.hidden, 3 * width, bias=False)
        self.query_layernorm = (
            DeepseekV3RMSNorm(sizes.head_dim, sizes.eps) if sizes.qk_norm else nn.Identity()
        )
        self.key_layernorm = DeepseekV3RMSNorm(sizes.head_dim, sizes.eps) if sizes.qk_norm else nn.Identity()
        self.g_proj = nn.Linear(sizes.hidden, width, bias=False)
        self.g_norm = GroupNorm(width, sizes.group_norms, sizes.eps)
        self.dense = nn.Linear(width, sizes.hidden, bias=False)

    def log_decay(self) -> torch.Tensor:
        """float32 [H]: −slope_h·(1 − (l − 1)/(L − 1) + 1e-5); l − 1 is the publisher's, for every l."""
        heads, layer_id, layers = self._place
        slopes = torch.tensor(_slopes(heads), dtype=torch.float32)
        return -slopes * (1 - (layer_id - 1) / (layers - 1) + 1e-5)


class LingLatent(nn.Module):
    """Weights of a latent attention layer."""

    def __init__(self, sizes: LingSizes) -> None:
        super().__init__()
        width = sizes.nope + sizes.rope
        queries, self.q_lora_rank = sizes.heads * width, sizes.q_rank
        self.scaling: float = yarn_apply_mscale(sizes.blocks.rope_parameters, width**-0.5)
        if sizes.q_rank is None:
            self.q_proj = nn.Linear(sizes.hidden, queries, bias=False)
        else:
            self.q_a_proj = nn.Linear(sizes.hidden, sizes.q_rank, bias=False)
            self.q_a_layernorm = DeepseekV3RMSNorm(sizes.q_rank, _LATENT_EPS)
            self.q_b_proj = nn.Linear(sizes.q_rank, queries, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(sizes.hidden, sizes.kv_rank + sizes.rope, bias=False)
        self.kv_a_layernorm = DeepseekV3RMSNorm(sizes.kv_rank, _LATENT_EPS)
        self.kv_b_proj = nn.Linear(sizes.kv_rank, sizes.heads * (sizes.nope + sizes.value), bias=False)
        self.dense = nn.Linear(sizes.heads * sizes.value, sizes.hidden, bias=False)


class GroupNorm(nn.Module):
    """RMS norm over each of `groups` equal parts of a row, with one weight over the whole row."""

    def __init__(self, width: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self._groups, self._eps = groups, eps

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[1, T, width] → [1, T, width]."""
        parts = rows.float().unflatten(-1, (self._groups, -1))
        parts = parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + self._eps)
        return self.weight * parts.flatten(-2).to(rows.dtype)


class LingLayer(nn.Module):
    """Norm, attention, norm, MLP or experts, with a residual around each pair."""

    def __init__(self, sizes: LingSizes, kind: Kind, layer_id: int) -> None:
        super().__init__()
        self._kind = kind
        self.attention: nn.Module = LingLatent(sizes) if kind is Kind.FULL else LingLightning(sizes, layer_id)
        sparse = layer_id >= sizes.first_sparse
        self.mlp = DeepseekV3MoE(sizes.blocks) if sparse else DeepseekV3MLP(sizes.blocks)
        self.input_layernorm = DeepseekV3RMSNorm(sizes.hidden, sizes.eps)
        self.post_attention_layernorm = DeepseekV3RMSNorm(sizes.hidden, sizes.eps)

    def forward(self, hidden: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """[1, T, hidden] → [1, T, hidden]."""
        tables = rotary.latent if self._kind is Kind.FULL else rotary.lightning
        hidden = hidden + self.attention(self.input_layernorm(hidden), tables)[0]
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class LingDraftLayer(LingLayer):
    """An MTP layer: what comes in is a projection of the next token's embedding and a hidden state."""

    def __init__(self, sizes: LingSizes, kind: Kind, layer_id: int) -> None:
        super().__init__(sizes, kind, layer_id)
        self.enorm = DeepseekV3RMSNorm(sizes.hidden, sizes.eps)
        self.hnorm = DeepseekV3RMSNorm(sizes.hidden, sizes.eps)
        self.eh_proj = nn.Linear(2 * sizes.hidden, sizes.hidden, bias=False)
        self.final_layernorm = DeepseekV3RMSNorm(sizes.hidden, sizes.eps)

    def draft(self, embedded: torch.Tensor, hidden: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """[1, T, hidden] twice → [1, T, hidden]."""
        joined = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))
        return self.final_layernorm(self(joined, rotary))


@dataclass(frozen=True)
class Rotary:
    """cos and sin [1, T, dims] of a step, for each of the two kinds of layers."""

    lightning: tuple[torch.Tensor, torch.Tensor]
    latent: tuple[torch.Tensor, torch.Tensor]


class RotaryTables(nn.Module):
    """Rotary embeddings of both kinds of layers."""

    def __init__(self, sizes: LingSizes) -> None:
        super().__init__()
        self.lightning, self.latent = sizes.rotary(sizes.rotary_dim), sizes.rotary(sizes.rope)

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> Rotary:
        """[1, T, hidden] (for its dtype), int64 [1, T] → tables."""
        return Rotary(self.lightning(hidden, positions), self.latent(hidden, positions))


class LingModel(nn.Module):
    """Embedding, layers, final norm and head; with MTP layers behind the target's, as in the checkpoint.

    Args:
        sizes: of all parts.
        kinds: of the target's layers.
        draft_kinds: of the MTP layers.
        vocab: token ids.
    """

    def __init__(self, sizes: LingSizes, kinds: LayerPlan, draft_kinds: LayerPlan | None, vocab: int) -> None:
        super().__init__()
        # Only what the loader of bodies sets on every model: it would name the masks to build.
        self.config = sizes.blocks
        self.word_embeddings = nn.Embedding(vocab, sizes.hidden)
        self.layers = nn.ModuleList(LingLayer(sizes, spec.kind, spec.layer_id) for spec in kinds)
        self.draft_layers = nn.ModuleList(
            LingDraftLayer(sizes, spec.kind, len(kinds) + spec.layer_id) for spec in draft_kinds or ()
        )
        self.norm = DeepseekV3RMSNorm(sizes.hidden, sizes.eps)
        self.lm_head = nn.Linear(sizes.hidden, vocab, bias=False)
        # Tables are computed, not loaded; they must not be on the meta device.
        with torch.device("cpu"):
            self.rotary = RotaryTables(sizes)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """int64 [1, T], int64 [1, T] → [1, T, hidden], after the final norm."""
        hidden = self.word_embeddings(ids)
        rotary = self.rotary(hidden, positions)
        for layer in self.layers:
            hidden = layer(hidden, rotary)
        normed: torch.Tensor = self.norm(hidden)
        return normed

    def draft(self, ids: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Ids of the next tokens [1, T], hidden states [1, T, hidden], positions [1, T] → [1, T, hidden]."""
        rotary = self.rotary(hidden, positions)
        for layer in self.draft_layers:
            hidden = layer.draft(self.word_embeddings(ids), hidden, rotary)  # type: ignore[operator]
        return hidden


def _slopes(heads: int) -> list[float]:
    """2^(−8(h+1)/H); where H is no power of two, those of the next lower one, then every other of the
    next higher one."""
    power = 2 ** math.floor(math.log2(heads))
    lower = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    return lower if power == heads else [*lower, *_slopes(2 * power)[::2][: heads - power]]


def _blocks(fields: Fields) -> DeepseekV3Config:
    """The config that transformers' DeepSeek blocks read."""
    chosen = fields.integer("num_experts_per_tok")
    config = DeepseekV3Config(
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        moe_intermediate_size=fields.integer("moe_intermediate_size"),
        n_routed_experts=fields.integer("num_experts"),
        n_shared_experts=fields.integer("num_shared_experts"),
        num_experts_per_tok=chosen,
        n_group=fields.integer("n_group"),
        topk_group=fields.integer("topk_group"),
        # With a single expert the publisher's code leaves its score as it is.
        norm_topk_prob=chosen > 1,
        routed_scaling_factor=fields.number("routed_scaling_factor"),
        hidden_act=fields.text("hidden_act", "silu"),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        rope_parameters=_rope(fields),
        qk_rope_head_dim=fields.integer("qk_rope_head_dim"),
    )
    # What transformers gives every model that it loads itself.
    config._experts_implementation = "grouped_mm"
    return config


def _rope(fields: Fields) -> dict[str, Any]:
    section = fields.section("rope_scaling")
    theta = fields.number("rope_theta", _THETA)
    if section is None:
        return {"rope_type": "default", "rope_theta": theta}
    kind = section.text("rope_type", aliases=("type",))
    if kind != "yarn":
        raise fields.invalid("rope_scaling", kind, "only yarn was published for this family")
    names = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    numbers = {name: section.number(name) for name in names if section.declared(name)}
    original = section.integer("original_max_position_embeddings")
    return {"rope_type": kind, "rope_theta": theta, **numbers, "original_max_position_embeddings": original}


def _refuse_variants(fields: Fields) -> None:
    """Options of the publisher's config with one value in every model that it published."""
    for name in ("linear_silu", "use_qkv_bias", "use_bias", "tie_word_embeddings"):
        if fields.flag(name, False):
            raise fields.invalid(name, True, "no published model of this family has it")
    if not fields.flag("rope_interleave", True):
        raise fields.invalid("rope_interleave", False, "no published model of this family has it")
    score = fields.text("score_function", "sigmoid")
    if score != "sigmoid":
        raise fields.invalid("score_function", score, "experts are scored by 'sigmoid'")
