"""Layers that run on both services at once, on one lane and on two."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path

import pytest
import torch
from braid_orchestrator.launcher import launch
from braid_orchestrator.settings import Settings
from transformers import FalconH1Config, FalconH1ForCausalLM

PROMPTS = [list(range(3, 43)), [7], list(range(20, 31))]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random falcon_h1 model: every layer has attention and Mamba2 side by side."""
    torch.manual_seed(1)
    config = FalconH1Config(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        mamba_d_ssm=96,
        mamba_n_heads=6,
        mamba_d_head=16,
        mamba_n_groups=2,
        mamba_d_state=24,
        mamba_chunk_size=16,
        max_position_embeddings=512,
    )
    path = tmp_path_factory.mktemp("falcon")
    FalconH1ForCausalLM(config).save_pretrained(path)
    return path


def test_both_sides_run_at_once_and_give_what_transformers_gives(directory: Path) -> None:
    reference = FalconH1ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found = []
    for overlap in ("off", "on"):
        settings = Settings(directory, max_tokens=256, max_context=256, overlap=overlap, threads=1)
        with launch(settings) as cell, cell.client() as client:
            found.append(client.score(PROMPTS, chunk=16, decode_tail=4, want_logits=True).logits)
            sides = {(layer.layer_id, layer.side) for layer in client.status().layers}
            assert len(sides) == 2 * 3
    for ids, one, two in zip(PROMPTS, *found, strict=True):
        with torch.no_grad():
            expected = reference(torch.tensor([ids]), use_cache=False).logits[0]
        torch.testing.assert_close(one, expected, atol=2e-4, rtol=0)
        assert torch.equal(one, two)
