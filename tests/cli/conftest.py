"""Checkpoints with random weights, and cells that serve them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_harness import Place, Served

VOCABULARY = 256


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Short private directories for sockets and for temporary files."""
    return Place(tmp_path_factory.mktemp("r"), tmp_path_factory.mktemp("t"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen3_next checkpoint of four layers, without a tokenizer."""
    import torch
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        num_experts=0,
        mlp_only_layers=[0, 1, 2, 3],
        max_position_embeddings=4096,
        initializer_range=0.05,
        eos_token_id=None,
    )
    directory = tmp_path_factory.mktemp("model")
    Qwen3NextForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def other_place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Directories that only one cell uses."""
    return Place(tmp_path_factory.mktemp("r"), tmp_path_factory.mktemp("t"))


@pytest.fixture
def serve(place: Place, model: Path) -> Iterator[Callable[..., Served]]:
    """Starts cells that are gone when the test is over."""
    made: list[Served] = []

    def start(*options: object, at: Place = place) -> Served:
        made.append(Served(at, model, *options))
        return made[-1]

    yield start
    for cell in made:
        cell.end()


@pytest.fixture(scope="session")
def cell(place: Place, model: Path) -> Iterator[Served]:
    """A cell that tests share; each leaves it serving."""
    served = Served(place, model)
    yield served
    served.end()
