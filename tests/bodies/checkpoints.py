"""Random small checkpoints of every family: odd sizes, every option of the family in some of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from harness import save_random
from torch import nn

VOCAB = 97
_SMALL: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Case:
    """One checkpoint: which classes of transformers make it, and of what sizes."""

    family: str
    name: str
    prefix: str
    sizes: Mapping[str, Any]
    config: str = "Config"
    model: str = "ForCausalLM"

    def __str__(self) -> str:
        return f"{self.family}-{self.name}"

    def save(self, directory: Path, **how: Any) -> Path:
        """Write the checkpoint; `how` are more arguments of `save_random`."""
        config = getattr(transformers, self.prefix + self.config)(**self.sizes)
        model = getattr(transformers, self.prefix + self.model)
        return save_random(model, config, directory, prepare=lively, **how)


@torch.no_grad()
def lively(model: nn.Module) -> None:
    """Conv outputs of order one, memories of a few to a hundred tokens, and experts that are biased.

    As they are initialised, mixers of linear layers are nearly silent and forget everything at once,
    which would hide a state that is lost.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("conv1d.weight"):
            parameter.mul_(8)
        elif name.endswith("A_log"):
            parameter.uniform_(-2.5, 1.0)
        elif name.endswith("dt_bias"):
            parameter.uniform_(-4.0, 0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.uniform_(-0.5, 0.5)


def _dense(family: str, prefix: str, **variants: Mapping[str, Any]) -> list[Case]:
    """A case for each variant, as changes of the small sizes; a None takes a size out."""
    found = []
    for name, changes in variants.items():
        sizes = {
            key: value for key, value in {**_SMALL, **changes}.items() if key not in changes or value != "-"
        }
        found.append(Case(family, name, prefix, sizes))
    return found


_MOE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LOCAL_MOE = {"num_local_experts": 5, "num_experts_per_tok": 2}

DENSE = [
    *_dense(
        "llama",
        "Llama",
        plain={},
        biased={"attention_bias": True, "mlp_bias": True, "head_dim": 20, "tie_word_embeddings": True},
        llama3={
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        yarn={
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    *_dense("mistral", "Mistral", window={"sliding_window": 9}, plain={"sliding_window": None}),
    *_dense("mixtral", "Mixtral", window={"sliding_window": 11, **_LOCAL_MOE}),
    *_dense(
        "qwen2",
        "Qwen2",
        plain={},
        late={"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    *_dense(
        "qwen2_moe",
        "Qwen2Moe",
        plain={**_MOE, "shared_expert_intermediate_size": 24},
        early={
            **_MOE,
            "shared_expert_intermediate_size": 24,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 2,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
    *_dense(
        "qwen3",
        "Qwen3",
        plain={"head_dim": 12},
        late={"head_dim": 12, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    *_dense("qwen3_moe", "Qwen3Moe", plain={**_MOE, "head_dim": 12}),
    *_dense("gemma", "Gemma", plain={"head_dim": 12, "tie_word_embeddings": True}),
    *_dense(
        "phi3",
        "Phi3",
        partial={
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            }
        },
        window={"sliding_window": 9},
    ),
    *_dense("olmo", "Olmo", clipped={"clip_qkv": 0.3}),
    *_dense("olmo2", "Olmo2", plain={}),
    *_dense("olmo3", "Olmo3", windows={"sliding_window": 9, "num_hidden_layers": 5}),
    *_dense("olmoe", "Olmoe", clipped={"clip_qkv": 0.3, "num_experts": 5, "num_experts_per_tok": 2}),
    *_dense("smollm3", "SmolLM3", unrotated={"num_hidden_layers": 4}),
    *_dense(
        "granite",
        "Granite",
        scaled={
            "attention_multiplier": 0.2,
            "logits_scaling": 3.0,
            "embedding_multiplier": 4.0,
            "residual_multiplier": 0.6,
        },
    ),
    *_dense(
        "granitemoe",
        "GraniteMoe",
        scaled={
            **_LOCAL_MOE,
            "attention_multiplier": 0.2,
            "logits_scaling": 3.0,
            "embedding_multiplier": 4.0,
            "residual_multiplier": 0.6,
        },
    ),
    *_dense("glm4", "Glm4", partial={"head_dim": 16, "attention_bias": True}),
    *_dense("starcoder2", "Starcoder2", window={"sliding_window": 9, "use_bias": True}),
    *_dense("cohere", "Cohere", normed={"use_qk_norm": True, "logit_scale": 0.3}, plain={}),
    *_dense("cohere2", "Cohere2", windows={"sliding_window": 9, "num_hidden_layers": 5, "logit_scale": 0.3}),
]

_DELTA = {
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 20,
    "linear_value_head_dim": 24,
    "head_dim": 16,
    "num_hidden_layers": 4,
}
_SHARED_MOE = {**_MOE, "shared_expert_intermediate_size": 24}
_TEXT = {**_SMALL, **_DELTA}
_GRID = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [2, 1, 1],
}
_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 48,
    "num_position_embeddings": 16,
}

QWEN = [
    Case("qwen3_next", "moe", "Qwen3Next", {**_TEXT, **_SHARED_MOE}),
    Case(
        "qwen3_next",
        "dense-mlp",
        "Qwen3Next",
        {
            **_TEXT,
            **_SHARED_MOE,
            "mlp_only_layers": [0, 2],
            "linear_num_value_heads": 3,
            "linear_conv_kernel_dim": 3,
        },
    ),
    Case("qwen3_5", "text", "Qwen3_5", {**_TEXT, "rope_parameters": _GRID}, config="TextConfig"),
    Case(
        "qwen3_5",
        "wrapped",
        "Qwen3_5",
        {"text_config": {**_TEXT, "rope_parameters": _GRID}, "vision_config": _VISION},
        model="ForConditionalGeneration",
    ),
    Case(
        "qwen3_5_moe",
        "text",
        "Qwen3_5Moe",
        {**_TEXT, **_SHARED_MOE, "rope_parameters": _GRID},
        config="TextConfig",
    ),
    Case(
        "qwen3_5_moe",
        "wrapped",
        "Qwen3_5Moe",
        {"text_config": {**_TEXT, **_SHARED_MOE, "rope_parameters": _GRID}, "vision_config": _VISION},
        model="ForConditionalGeneration",
    ),
]

_LATENT = {
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 6,
}
_GROUPS = {
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 0.8,
    "mscale_all_dim": 0.7,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 64,
}
_KDA = {**_SMALL, **_LATENT, **_GROUPS, "num_hidden_layers": 4}

HYBRID = [
    Case(
        "kimi_linear",
        "interleaved",
        "KimiLinear",
        {
            **_KDA,
            "linear_head_dim": 12,
            "linear_num_heads": 5,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
            "num_experts": 6,
        },
    ),
    Case(
        "kimi_linear",
        "conv-3",
        "KimiLinear",
        {
            **_KDA,
            "linear_head_dim": 16,
            "linear_num_heads": 3,
            "linear_conv_kernel_dim": 3,
            "num_experts": 6,
            "num_hidden_layers": 5,
        },
    ),
    Case(
        "bailing_hybrid",
        "bounded",
        "BailingHybrid",
        {
            **_KDA,
            "head_dim": 20,
            "layer_group_size": 3,
            "kda_lower_bound": -5.0,
            "num_experts": 6,
            "first_k_dense_replace": 1,
        },
    ),
    Case(
        "bailing_hybrid",
        "unbounded",
        "BailingHybrid",
        {**_KDA, "head_dim": 16, "layer_group_size": 2, "kda_safe_gate": False, "num_experts": 6},
    ),
    Case(
        "minimax",
        "alternating",
        "MiniMax",
        {
            **_SMALL,
            **_LOCAL_MOE,
            "num_hidden_layers": 4,
            "head_dim": 12,
            "linear_attn_alpha_factor": 1.3,
            "full_attn_beta_factor": 0.8,
            "mlp_alpha_factor": 1.2,
        },
    ),
    Case(
        "minimax",
        "listed",
        "MiniMax",
        {
            **_SMALL,
            **_LOCAL_MOE,
            "num_hidden_layers": 3,
            "block_size": 16,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        },
    ),
    Case(
        "olmo_hybrid",
        "negative-eigenvalues",
        "OlmoHybrid",
        {
            **_SMALL,
            "num_hidden_layers": 4,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 6,
            "linear_key_head_dim": 12,
            "linear_value_head_dim": 20,
            "linear_allow_neg_eigval": True,
        },
    ),
    Case(
        "olmo_hybrid",
        "rotary",
        "OlmoHybrid",
        {
            **_SMALL,
            "num_hidden_layers": 4,
            "linear_allow_neg_eigval": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
]

LATENT = [
    Case(
        "deepseek_v2",
        "ranked",
        "DeepseekV2",
        {
            **_SMALL,
            **_LATENT,
            **_GROUPS,
            "q_lora_rank": 18,
            "n_routed_experts": 6,
            "first_k_dense_replace": 1,
            "topk_method": "greedy",
        },
    ),
    Case(
        "deepseek_v2",
        "yarn",
        "DeepseekV2",
        {
            **_SMALL,
            **_LATENT,
            **_GROUPS,
            "q_lora_rank": None,
            "n_routed_experts": 6,
            "first_k_dense_replace": 1,
            "topk_method": "group_limited_greedy",
            "rope_parameters": _YARN,
        },
    ),
    Case(
        "deepseek_v3",
        "ranked",
        "DeepseekV3",
        {
            **_SMALL,
            **_LATENT,
            **_GROUPS,
            "q_lora_rank": 18,
            "n_routed_experts": 6,
            "first_k_dense_replace": 1,
        },
    ),
    Case(
        "deepseek_v3",
        "yarn",
        "DeepseekV3",
        {
            **_SMALL,
            **_LATENT,
            **_GROUPS,
            "q_lora_rank": None,
            "n_routed_experts": 6,
            "first_k_dense_replace": 1,
            "rope_interleave": False,
            "rope_parameters": _YARN,
        },
    ),
]
CASES: list[Case] = [*DENSE, *QWEN, *HYBRID, *LATENT]
