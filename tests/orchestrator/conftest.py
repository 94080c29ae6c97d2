"""A small random qwen3_next checkpoint, and cells on it with both services in this process."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from braid_orchestrator.cell import Cell, CellOptions
from braid_orchestrator.link import Link
from braid_orchestrator.store import Limits
from braid_wire.layers import Kind
from cells import LIMITS, CellMaker, embedded_links
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3NextConfig, Qwen3NextForCausalLM


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random qwen3_next model: odd head counts, 4 layers, one of them full."""
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=199,
        hidden_size=60,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=36,
        linear_num_key_heads=3,
        linear_num_value_heads=6,
        linear_key_head_dim=32,
        linear_value_head_dim=40,
        num_experts=0,
        mlp_only_layers=[0, 1, 2, 3],
        max_position_embeddings=1024,
        initializer_range=0.08,
        eos_token_id=7,
    )
    path = tmp_path_factory.mktemp("checkpoint")
    Qwen3NextForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> PreTrainedModel:
    """The same model in transformers alone."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture
def make_cell(checkpoint: Path, tmp_path: Path) -> Iterator[CellMaker]:
    """Makes cells that are closed after the test: `make_cell(links=…, dispatch=…, limits=…)`."""
    cells: list[Cell] = []

    def make(links: Mapping[Kind, Link] | None = None, limits: Limits = LIMITS, **options: object) -> Cell:
        handover = tmp_path / f"arenas-{len(cells)}.sock"
        settings = CellOptions(limits=limits, **options)  # type: ignore[arg-type]
        cells.append(Cell(checkpoint, links or embedded_links(), handover, settings))
        return cells[-1]

    yield make
    for cell in cells:
        cell.close()
