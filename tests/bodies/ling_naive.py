"""Ling-2.5/2.6 and Ring-2.5 written out plainly, for variants that no golden checkpoint has.

Everything is float64 and one token at a time where it is recurrent; nothing is shared with the body.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu, softmax

BASE: Mapping[str, Any] = {
    "model_type": "bailing_hybrid",
    "architectures": ["BailingMoeV2_5ForCausalLM"],
    "vocab_size": 83,
    "hidden_size": 40,
    "intermediate_size": 52,
    "num_hidden_layers": 5,
    "layer_group_size": 3,
    "num_attention_heads": 6,
    "head_dim": 12,
    "partial_rotary_factor": 0.5,
    "group_norm_size": 3,
    "use_qk_norm": True,
    "q_lora_rank": None,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 8,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "num_shared_experts": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "max_position_embeddings": 512,
    "num_nextn_predict_layers": 0,
}


def save(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """A random checkpoint in the publisher's layout."""
    config = {**BASE, **changes}
    rng = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(*shape, generator=rng) * (0.2 if len(shape) > 1 else 0.1)
        + (1.0 if name.endswith("norm.weight") else 0.0)
        for name, shape in shapes(config).items()
    }
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def full_layers(config: Mapping[str, Any]) -> list[bool]:
    """Whether each layer, MTP layers behind the others, is latent attention."""
    count, group = config["num_hidden_layers"], config["layer_group_size"]
    kinds = config.get("mtp_layer_types") or ["full_attention"] * config["num_nextn_predict_layers"]
    return [(i + 1) % group == 0 or i >= count // group * group for i in range(count)] + [
        kind == "full_attention" for kind in kinds
    ]


def shapes(c: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every weight of a checkpoint."""
    hidden, heads, width = (
        c["hidden_size"],
        c["num_attention_heads"],
        c["num_attention_heads"] * c["head_dim"],
    )
    found: dict[str, tuple[int, ...]] = {
        "model.word_embeddings.weight": (c["vocab_size"], hidden),
        "lm_head.weight": (c["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for i, full in enumerate(full_layers(c)):
        part: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        if i >= c["num_hidden_layers"]:
            part |= {"enorm": (hidden,), "hnorm": (hidden,), "eh_proj": (hidden, 2 * hidden)}
            part["final_layernorm"] = (hidden,)
        if full:
            queries = heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
            rank, kv = c["q_lora_rank"], c["kv_lora_rank"]
            if rank is None:
                part["attention.q_proj"] = (queries, hidden)
            else:
                part |= {"attention.q_a_proj": (rank, hidden), "attention.q_a_layernorm": (rank,)}
                part["attention.q_b_proj"] = (queries, rank)
            part["attention.kv_a_proj_with_mqa"] = (kv + c["qk_rope_head_dim"], hidden)
            part["attention.kv_a_layernorm"] = (kv,)
            part["attention.kv_b_proj"] = (heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), kv)
            part["attention.dense"] = (hidden, heads * c["v_head_dim"])
        else:
            part |= {"attention.query_key_value": (3 * width, hidden), "attention.g_proj": (width, hidden)}
            part |= {"attention.g_norm": (width,), "attention.dense": (hidden, width)}
            if c["use_qk_norm"]:
                part["attention.query_layernorm"] = part["attention.key_layernorm"] = (c["head_dim"],)
        part |= _mlp_shapes(c, i)
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in part.items()}
        if i >= c["first_k_dense_replace"]:
            found[f"model.layers.{i}.mlp.gate.expert_bias"] = (c["num_experts"],)
    return found


def _mlp_shapes(c: Mapping[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    hidden = c["hidden_size"]

    def mlp(name: str, width: int) -> dict[str, tuple[int, ...]]:
        up = {f"{name}.{part}_proj": (width, hidden) for part in ("gate", "up")}
        return {**up, f"{name}.down_proj": (hidden, width)}

    if layer < c["first_k_dense_replace"]:
        return mlp("mlp", c["intermediate_size"])
    width = c["moe_intermediate_size"]
    found = {"mlp.gate": (c["num_experts"], hidden)}
    found |= mlp("mlp.shared_experts", width * c["num_shared_experts"])
    for expert in range(c["num_experts"]):
        found |= mlp(f"mlp.experts.{expert}", width)
    return found


class Naive:
    """The model of a checkpoint."""

    def __init__(self, directory: Path) -> None:
        self.c: dict[str, Any] = json.loads((directory / "config.json").read_text())
        weights = load_file(directory / "model.safetensors")
        self.w = {name.removesuffix(".weight"): tensor.double() for name, tensor in weights.items()}
        self.full = full_layers(self.c)

    def logits(self, prompt: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[L, V], and [L−1, V] of the MTP layer where there is one."""
        ids, count = torch.from_numpy(prompt), self.c["num_hidden_layers"]
        x = self.w["model.word_embeddings"][ids]
        for i in range(count):
            x = self._layer(i, x)
        hidden = self._norm(x, "model.norm")
        drafted = None
        if len(self.full) > count and len(prompt) > 1:
            name = f"model.layers.{count}"
            embedded = self._norm(self.w["model.word_embeddings"][ids[1:]], f"{name}.enorm")
            joined = torch.cat([embedded, self._norm(hidden[:-1], f"{name}.hnorm")], -1)
            x = self._layer(count, joined @ self.w[f"{name}.eh_proj"].T)
            drafted = (self._norm(x, f"{name}.final_layernorm") @ self.w["lm_head"].T).float()
        return (hidden @ self.w["lm_head"].T).float(), drafted

    def _layer(self, i: int, x: torch.Tensor) -> torch.Tensor:
        name = f"model.layers.{i}"
        attend = self._latent if self.full[i] else self._lightning
        x = x + attend(i, self._norm(x, f"{name}.input_layernorm"))
        return x + self._mlp(i, self._norm(x, f"{name}.post_attention_layernorm"))

    def _norm(self, x: torch.Tensor, name: str, eps: float | None = None) -> torch.Tensor:
        eps = self.c["rms_norm_eps"] if eps is None else eps
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * self.w[name]

    def _lightning(self, i: int, x: torch.Tensor) -> torch.Tensor:
        heads, size, name = self.c["num_attention_heads"], self.c["head_dim"], f"model.layers.{i}.attention"
        q, k, v = (x @ self.w[f"{name}.query_key_value"].T).view(len(x), 3, heads, size).unbind(1)
        if self.c["use_qk_norm"]:
            q, k = self._norm(q, f"{name}.query_layernorm"), self._norm(k, f"{name}.key_layernorm")
        width = int(size * self.c["partial_rotary_factor"])
        q, k = (
            torch.cat([self._halves(part[..., :width]), part[..., width:]], -1) * scale
            for part, scale in ((q, size**-0.5), (k, 1.0))
        )
        factor = 1 - (i - 1) / (self.c["num_hidden_layers"] - 1) + 1e-5
        decay = torch.exp(-torch.tensor(slopes(heads), dtype=torch.float64) * factor)
        state = torch.zeros(heads, size, size, dtype=torch.float64)
        rows = []
        for t in range(len(x)):
            state = state * decay[:, None, None] + k[t][:, :, None] * v[t][:, None, :]
            rows.append(torch.einsum("hk,hkv->hv", q[t], state))
        groups = self.c["group_norm_size"]
        out = torch.stack(rows).reshape(len(x), groups, -1)
        out = out / torch.sqrt(out.pow(2).mean(-1, keepdim=True) + self.c["rms_norm_eps"])
        out = out.reshape(len(x), -1) * self.w[f"{name}.g_norm"]
        gated = out * torch.sigmoid(x @ self.w[f"{name}.g_proj"].T)
        return gated @ self.w[f"{name}.dense"].T

    def _latent(self, i: int, x: torch.Tensor) -> torch.Tensor:
        c, name = self.c, f"model.layers.{i}.attention"
        heads, nope, rope = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
        if c["q_lora_rank"] is None:
            q = x @ self.w[f"{name}.q_proj"].T
        else:
            ranked = self._norm(x @ self.w[f"{name}.q_a_proj"].T, f"{name}.q_a_layernorm", 1e-6)
            q = ranked @ self.w[f"{name}.q_b_proj"].T
        q = q.view(len(x), heads, nope + rope)
        latent, shared = (x @ self.w[f"{name}.kv_a_proj_with_mqa"].T).split([c["kv_lora_rank"], rope], -1)
        expanded = self._norm(latent, f"{name}.kv_a_layernorm", 1e-6) @ self.w[f"{name}.kv_b_proj"].T
        k, v = expanded.view(len(x), heads, -1).split([nope, c["v_head_dim"]], -1)
        turned = self._pairs(shared[:, None]).expand(-1, heads, -1)
        q = torch.cat([q[..., :nope], self._pairs(q[..., nope:])], -1)
        scores = torch.einsum("qhd,khd->hqk", q, torch.cat([k, turned], -1)) * (nope + rope) ** -0.5
        scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -math.inf)
        out = torch.einsum("hqk,khd->qhd", softmax(scores, -1), v)
        return out.reshape(len(x), -1) @ self.w[f"{name}.dense"].T

    def _angles(self, rows: int, width: int) -> torch.Tensor:
        steps = torch.arange(0, width, 2, dtype=torch.float64) / width
        return torch.arange(rows, dtype=torch.float64)[:, None, None] / self.c["rope_theta"] ** steps

    def _halves(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary over pairs (i, i + width/2)."""
        angle, (a, b) = self._angles(len(x), x.shape[-1]), x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def _pairs(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary over pairs (2i, 2i + 1)."""
        angle, a, b = self._angles(len(x), x.shape[-1]), x[..., 0::2], x[..., 1::2]
        return torch.stack(
            [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1
        ).flatten(-2)

    def _mlp(self, i: int, x: torch.Tensor) -> torch.Tensor:
        name = f"model.layers.{i}.mlp"
        if i < self.c["first_k_dense_replace"]:
            return self._gated(x, name)
        return self._gated(x, f"{name}.shared_experts") + torch.stack([self._expert(row, name) for row in x])

    def _expert(self, x: torch.Tensor, name: str) -> torch.Tensor:
        c = self.c
        scores = torch.sigmoid(self.w[f"{name}.gate"] @ x)
        biased = (scores + self.w[f"{name}.gate.expert_bias"]).view(c["n_group"], -1)
        best = biased.topk(2, -1).values.sum(-1).topk(c["topk_group"]).indices
        allowed = torch.full_like(biased, -math.inf)
        allowed[best] = biased[best]
        chosen = allowed.flatten().topk(c["num_experts_per_tok"]).indices
        weight = scores[chosen]
        if len(chosen) > 1:
            weight = weight / weight.sum()
        parts = [self._gated(x, f"{name}.experts.{expert}") for expert in chosen.tolist()]
        return c["routed_scaling_factor"] * sum(w * part for w, part in zip(weight, parts, strict=True))

    def _gated(self, x: torch.Tensor, name: str) -> torch.Tensor:
        up = silu(x @ self.w[f"{name}.gate_proj"].T) * (x @ self.w[f"{name}.up_proj"].T)
        return up @ self.w[f"{name}.down_proj"].T


def slopes(heads: int) -> list[float]:
    """ALiBi's: geometric for a power of two; else those of the next lower one and every other of the next."""
    if math.log2(heads).is_integer():
        return [2.0 ** (-8 * (h + 1) / heads) for h in range(heads)]
    lower = 2 ** math.floor(math.log2(heads))
    return slopes(lower) + slopes(2 * lower)[::2][: heads - lower]
