"""qwen3_next and qwen3_5 against transformers."""

from __future__ import annotations

from pathlib import Path

from harness import check, save_random
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM


def test_qwen3_next(tmp_path: Path) -> None:
    config = Qwen3NextConfig(
        vocab_size=211, hidden_size=72, intermediate_size=80, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, head_dim=40, linear_num_key_heads=3, linear_num_value_heads=6,
        linear_key_head_dim=24, linear_value_head_dim=40, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32, shared_expert_intermediate_size=32, initializer_range=0.05,
    )
    found = check(save_random(Qwen3NextForCausalLM, config, tmp_path))
    print(found)
