"""Checkpoints with an MTP head, and what such a head gives by stock transformers modules."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import Case
from harness import load_reference
from safetensors.torch import load_file, save_file
from torch import nn

_KINDS = {"full": "full_attention", "linear": "linear_attention"}


@dataclass
class Head:
    """The reference: stock layers, run over a whole sequence without a cache."""

    norm_embedding: nn.Module
    norm_hidden: nn.Module
    fc: nn.Linear
    layers: Any

    @torch.no_grad()
    def logits(self, target: Any, prompt: np.ndarray, grid: np.ndarray | None = None) -> torch.Tensor:
        """float32 [L−1, V]: from the embedding of token t+1 and the final hidden state of token t.

        Args:
            grid: int64 [3, L], mrope positions; the head's are those of the hidden states.
        """
        ids = torch.from_numpy(prompt)[None]
        places = torch.arange(len(prompt))[None] if grid is None else torch.from_numpy(grid)[:, None]
        whole = target.model(input_ids=ids, position_ids=places, use_cache=False)
        hidden = whole.last_hidden_state[:, :-1]
        embedded = target.model.embed_tokens(ids[:, 1:])
        fused = self.fc(torch.cat([self.norm_embedding(embedded), self.norm_hidden(hidden)], dim=-1))
        places = places[..., :-1]
        out = self.layers.model(inputs_embeds=fused, position_ids=places, use_cache=False).last_hidden_state
        return target.lm_head(out)[0].float()


def save_with_mtp(case: Case, directory: Path, kinds: Sequence[str] = ("full",)) -> Path:
    """A case's checkpoint with an MTP head of these layers, keys and config as the publisher has them."""
    case.save(directory)
    target = load_reference(directory)
    head = _random_head(target, kinds)
    head.layers.save_pretrained(directory / "mtp")
    weights = {
        key.replace("model.", "mtp.", 1): tensor
        for key, tensor in load_file(directory / "mtp" / "model.safetensors").items()
        if not key.startswith(("model.embed_tokens", "lm_head"))
    }
    weights["mtp.fc.weight"] = head.fc.weight.detach()
    weights["mtp.pre_fc_norm_embedding.weight"] = head.norm_embedding.weight.detach()
    weights["mtp.pre_fc_norm_hidden.weight"] = head.norm_hidden.weight.detach()
    file = directory / "model.safetensors"
    save_file({**load_file(file), **weights}, file, metadata={"format": "pt"})
    _declare(directory / "config.json", kinds)
    return directory


def load_head(directory: Path, kinds: Sequence[str] = ("full",)) -> Head:
    """The reference head of such a checkpoint."""
    target = load_reference(directory)
    head = _random_head(target, kinds)
    head.layers = load_reference(directory / "mtp", type(target))
    weights = load_file(directory / "model.safetensors")
    with torch.no_grad():
        head.fc.weight.copy_(weights["mtp.fc.weight"])
        head.norm_embedding.weight.copy_(weights["mtp.pre_fc_norm_embedding.weight"])  # type: ignore[operator]
        head.norm_hidden.weight.copy_(weights["mtp.pre_fc_norm_hidden.weight"])  # type: ignore[operator]
    return head


def _random_head(target: Any, kinds: Sequence[str]) -> Head:
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = len(kinds)
    config.layer_types = [_KINDS[kind] for kind in kinds]
    config._attn_implementation = "eager"
    torch.manual_seed(7)
    norms = [type(target.model.norm)(config.hidden_size, eps=config.rms_norm_eps) for _ in range(2)]
    fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
    layers = type(target)(config).eval()
    with torch.no_grad():
        for parameter in [*norms[0].parameters(), *norms[1].parameters(), *layers.parameters()]:
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        fc.weight.normal_(std=0.1)
    return Head(norms[0], norms[1], fc, layers)


def _declare(file: Path, kinds: Sequence[str]) -> None:
    config = json.loads(file.read_text())
    section = config.get("text_config", config)
    section["mtp_num_hidden_layers"] = len(kinds)
    if set(kinds) != {"full"}:
        section["mtp_layer_types"] = [_KINDS[kind] for kind in kinds]
    file.write_text(json.dumps(config))


__all__ = ["Head", "load_head", "save_with_mtp"]
