"""MiniMax-Text-01 checkpoints as the publisher has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from checkpoints import HYBRID
from harness import load_reference
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MiniMaxForCausalLM

CASE = HYBRID[5]
HEADS, KV_HEADS, SIZE = 6, 2, 8


def save_as_published(directory: Path, **changes: Any) -> tuple[Path, Any]:
    """A checkpoint as the publisher has it, and the same model in transformers."""
    native = directory / "native"
    CASE.save(native)
    model = directory / "published"
    model.mkdir()
    weights = load_file(native / "model.safetensors")
    tables = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
    kept = {key: tensor for key, tensor in weights.items() if not key.endswith(tables)}
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((native / "config.json").read_text())
    kinds = config.pop("layer_types")
    config.pop("rope_parameters")
    for name in ("full_attn_alpha_factor", "linear_attn_alpha_factor", "mlp_alpha_factor"):
        config.pop(name)
    published = {
        **config,
        "model_type": "minimax_text_01",
        "architectures": ["MiniMaxText01ForCausalLM"],
        "attn_type_list": [int(kind == "full_attention") for kind in kinds],
        "layernorm_full_attention_alpha": 1.4,
        "layernorm_linear_attention_alpha": 0.7,
        "layernorm_mlp_alpha": 1.1,
        "postnorm": True,
        "rope_theta": 50000.0,
        "head_dim": SIZE,
        "rotary_dim": SIZE,
        **changes,
    }
    (model / "config.json").write_text(json.dumps(published))
    oracle = load_reference(native, MiniMaxForCausalLM)
    for layer, kind in zip(oracle.model.layers, kinds, strict=True):
        layer.attn_alpha_factor = 1.4 if kind == "full_attention" else 0.7
        layer.mlp_alpha_factor = 1.1
    oracle.model.rotary_emb.inv_freq = frequencies(SIZE)
    return model, oracle


def frequencies(width: int) -> nn.Buffer:
    return nn.Buffer(1.0 / 50000.0 ** (torch.arange(0, width, 2).float() / width), persistent=False)
