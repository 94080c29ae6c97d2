"""The publisher's MiniMax config, which transformers would misread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from braid_orchestrator.body import LoadRequest, load_body
from braid_orchestrator.layer_plan import build_plans, load_config
from braid_wire.errors import ConfigInvalid
from harness import check
from published import HEADS, KV_HEADS, SIZE, frequencies, save_as_published
from torch import nn


def test_attn_type_list_decides(tmp_path: Path) -> None:
    model, oracle = save_as_published(tmp_path)
    found = check(model, oracle)
    assert found.mechanisms == ("gqa", "lightning")


@torch.no_grad()
def test_rotary_over_the_first_dims_of_a_head(tmp_path: Path) -> None:
    width = SIZE // 2
    model, oracle = save_as_published(tmp_path, rotary_dim=width)
    # transformers pairs dim i with i + SIZE/2. The same scores come from q and k whose dims are put so
    # that the publisher's pairs (i, i + width/2) are transformers', and whose other pairs do not turn.
    half, inner = SIZE // 2, width // 2
    source = torch.empty(SIZE, dtype=torch.long)
    source[:inner], source[half : half + inner] = torch.arange(inner), torch.arange(inner, width)
    rest = torch.arange(width, SIZE).view(2, -1)
    source[inner:half], source[half + inner :] = rest[0], rest[1]
    for layer in oracle.model.layers:
        if layer.block_type == "full_attention":
            for linear, heads in ((layer.self_attn.q_proj, HEADS), (layer.self_attn.k_proj, KV_HEADS)):
                linear.weight.copy_(linear.weight.view(heads, SIZE, -1)[:, source].flatten(0, 1))
    turning = torch.cat([frequencies(width), torch.zeros(half - inner)])
    oracle.model.rotary_emb.inv_freq = nn.Buffer(turning, persistent=False)
    check(model, oracle)


@pytest.mark.parametrize("change", [{"postnorm": False}, {"shared_intermediate_size": 8}], ids=str)
def test_what_transformers_cannot_build_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    model, _ = save_as_published(tmp_path, **change)
    plans = build_plans(load_config(model))
    with pytest.raises(ConfigInvalid) as refused:
        load_body(LoadRequest(model, plans, torch.float32))
    assert refused.value.metadata["field"] == next(iter(change))
