"""Random small checkpoints of the families with Mamba and short-conv layers, in odd shapes.

Initialisation makes a mixer nearly silent (small conv weights) and forgetful (A up to -H, dt above 1),
which would hide a lost state; `lively` gives it the ranges of a trained one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from harness import save_random
from torch import nn
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    Lfm2MoeConfig,
    Lfm2MoeForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Zamba2Config,
    Zamba2ForCausalLM,
)

COMMON: Mapping[str, Any] = {"vocab_size": 131, "initializer_range": 0.05, "max_position_embeddings": 512}
_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}
_MAMBA2 = {"mamba_n_heads": 6, "mamba_n_groups": 3, "mamba_d_state": 19, "mamba_d_conv": 4, "mamba_expand": 2}


@torch.no_grad()
def lively(model: nn.Module) -> None:
    """Conv outputs of order one, and memories from a few to a hundred tokens."""
    for name, parameter in model.named_parameters():
        if name.endswith(("conv1d.weight", "conv.weight")):
            parameter.mul_(8)
        elif name.endswith("A_log") and parameter.ndim == 1:
            parameter.uniform_(-2.5, 1.0)
        elif name.endswith(("mamba.dt_bias", "mixer.dt_bias", "dt_proj.bias")):
            parameter.uniform_(-4.0, 0.5)
        elif name.endswith("dt_proj.weight"):
            parameter.mul_(4)
    for name, buffer in model.named_buffers():
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            buffer.uniform_(-0.5, 0.5)


def _nemotron(**changes: Any) -> Any:
    blocks = ["linear_attention", "mlp", "full_attention", "moe", "linear_attention", "full_attention"]
    return NemotronHConfig(
        **{
            **COMMON, **_HEADS, "hidden_size": 56, "head_dim": 18, "layers_block_type": blocks,
            "mamba_num_heads": 6, "mamba_head_dim": 14, "ssm_state_size": 19, "n_groups": 2, "conv_kernel": 4,
            "chunk_size": 16, "intermediate_size": 60, "n_routed_experts": 4, "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 40, "time_step_min": 0.05,
            "rescale_prenorm_residual": False, **changes,
        }
    )  # fmt: skip


def _bamba(**changes: Any) -> Any:
    return BambaConfig(
        **{
            **COMMON, **_HEADS, **_MAMBA2, "hidden_size": 60, "intermediate_size": 70, "num_hidden_layers": 4,
            "attn_layer_indices": [1, 3], "mamba_chunk_size": 16, **changes,
        }
    )  # fmt: skip


def _granite(**changes: Any) -> Any:
    return GraniteMoeHybridConfig(
        **{
            **COMMON, **_HEADS, **_MAMBA2, "hidden_size": 72, "intermediate_size": 40, "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
            "mamba_chunk_size": 16, "shared_intermediate_size": 44, "num_local_experts": 4,
            "attention_multiplier": 0.17, "embedding_multiplier": 5.0, "residual_multiplier": 0.6,
            "logits_scaling": 0.7, **changes,
        }
    )  # fmt: skip


def _falcon(**changes: Any) -> Any:
    return FalconH1Config(
        **{
            **COMMON, **_HEADS, **_MAMBA2, "hidden_size": 60, "head_dim": 14, "intermediate_size": 70,
            "num_hidden_layers": 3, "mamba_d_ssm": 90, "mamba_chunk_size": 16, "mamba_rms_norm": True,
            "mamba_norm_before_gate": False, "lm_head_multiplier": 1.7, "embedding_multiplier": 3.0,
            "mlp_multipliers": [0.8, 1.3], "key_multiplier": 1.9, "attention_out_multiplier": 1.4,
            "attention_in_multiplier": 1.2, "ssm_multipliers": [0.7, 1.4, 1.2, 1.6, 0.8],
            "ssm_in_multiplier": 1.5, "ssm_out_multiplier": 0.9, **changes,
        }
    )  # fmt: skip


def _zamba(**changes: Any) -> Any:
    blocks = ["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid", "hybrid"]
    return Zamba2Config(
        **{
            **COMMON, "hidden_size": 48, "num_hidden_layers": len(blocks), "layers_block_type": blocks,
            "num_attention_heads": 4, "intermediate_size": 52, "mamba_d_state": 19, "mamba_ngroups": 2,
            "n_mamba_heads": 6, "chunk_size": 16, "num_mem_blocks": 2, "adapter_rank": 5,
            "use_shared_attention_adapter": True, "use_mem_rope": True, "time_step_min": 0.05, **changes,
        }
    )  # fmt: skip


def _jamba(**changes: Any) -> Any:
    return JambaConfig(
        **{
            **COMMON, **_HEADS, "hidden_size": 72, "intermediate_size": 88, "num_hidden_layers": 5,
            "attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 3, "mamba_d_state": 11,
            "mamba_dt_rank": 7, **changes,
        }
    )  # fmt: skip


def _lfm2(**changes: Any) -> Any:
    return Lfm2Config(
        **{
            **COMMON, **_HEADS, "hidden_size": 60, "intermediate_size": 90, "num_hidden_layers": 5,
            "block_multiple_of": 4, "full_attn_idxs": [1, 3], **changes,
        }
    )  # fmt: skip


def _lfm2_moe(**changes: Any) -> Any:
    return Lfm2MoeConfig(
        **{
            **COMMON, **_HEADS, "hidden_size": 72, "intermediate_size": 90, "moe_intermediate_size": 40,
            "num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "num_dense_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, **changes,
        }
    )  # fmt: skip


FAMILIES: Mapping[str, tuple[Any, Callable[..., Any]]] = {
    "nemotron_h": (NemotronHForCausalLM, _nemotron),
    "bamba": (BambaForCausalLM, _bamba),
    "granitemoehybrid": (GraniteMoeHybridForCausalLM, _granite),
    "falcon_h1": (FalconH1ForCausalLM, _falcon),
    "zamba2": (Zamba2ForCausalLM, _zamba),
    "jamba": (JambaForCausalLM, _jamba),
    "lfm2": (Lfm2ForCausalLM, _lfm2),
    "lfm2_moe": (Lfm2MoeForCausalLM, _lfm2_moe),
}


def save(family: str, directory: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A checkpoint of a family, with some config fields changed."""
    model_class, config = FAMILIES[family]
    return save_random(model_class, config(**changes), directory, seed=seed, prepare=lively)
