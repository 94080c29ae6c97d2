"""What a family of models must tell so that its attention can be taken out, and where each lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from braid_wire.errors import ConfigInvalid
from braid_wire.layers import LayerPlan, LayerSpec

from braid_orchestrator.body.base import Backbone, DispatchPoint, DraftBackbone, Head
from braid_orchestrator.layer_plan import ModelPlans

Params = Mapping[str, torch.Tensor]
Adapt = Callable[[Any, LayerSpec, DispatchPoint], Params]
"""(decoder layer, its spec, dispatch point) → static parameters; replaces the attention or mixer
module of this one layer by an adapter. ConfigInvalid where the layer is not what its spec says."""


@dataclass(frozen=True)
class Parts:
    """The pieces of a loaded model that a body runs."""

    layers: Mapping[int, Any]
    """Layer id → decoder layer."""
    backbone: Backbone
    head: Head
    """With every scale and cap of the model."""
    mrope: bool = False
    """Whether the backbone takes positions [3, 1, T]."""


@dataclass(frozen=True)
class DraftParts:
    """The pieces of a checkpoint's multi-token-prediction layers."""

    model: Any
    """Holds them; has the transformers configuration that its masks are built by."""
    layers: Mapping[int, Any]
    """Layer id inside the draft role → decoder layer."""
    backbone: DraftBackbone
    head: Head


@dataclass(frozen=True)
class LoadRequest:
    """A checkpoint and how to hold it."""

    directory: Path
    plans: ModelPlans
    dtype: torch.dtype
    trust_remote_code: bool = False


LoadDraft = Callable[[LoadRequest, Any, LayerPlan], DraftParts | None]
"""(request, the loaded target, the draft's plan) → its parts; None where the weights are not there."""


@dataclass(frozen=True)
class Family:
    """How one family's models are loaded and taken apart."""

    load: Callable[[LoadRequest], Any]
    parts: Callable[[Any], Parts]
    adapt: Adapt
    draft: LoadDraft | None = None
    """None where the family's MTP layers are not known; a declared draft is then left out."""


# Family of the layer-plan rules → module of `families` that defines FAMILY for it. Imported when a
# model of the family is loaded, so that no other family's transformers modules are.
_MODULES: Mapping[str, tuple[str, str]] = {
    "bailing_hybrid": ("bailing", "BAILING_HYBRID"),
    "bailing_moe_v2_5": ("ling", "BAILING_MOE_V2_5"),
    "bamba": ("mamba2", "BAMBA"),
    "cohere": ("dense", "COHERE"),
    "cohere2": ("dense", "COHERE2"),
    "deepseek_v2": ("deepseek", "DEEPSEEK_V2"),
    "deepseek_v3": ("deepseek", "DEEPSEEK_V3"),
    "falcon_h1": ("falcon", "FALCON_H1"),
    "gemma": ("dense", "GEMMA"),
    "glm4": ("dense", "GLM4"),
    "granite": ("dense", "GRANITE"),
    "granitemoe": ("dense", "GRANITEMOE"),
    "granitemoehybrid": ("mamba2", "GRANITE"),
    "jamba": ("jamba", "JAMBA"),
    "kimi_linear": ("kimi", "KIMI_LINEAR"),
    "lfm2": ("lfm2", "LFM2"),
    "lfm2_moe": ("lfm2", "LFM2"),
    "llama": ("dense", "LLAMA"),
    "minimax": ("minimax", "MINIMAX"),
    "minimax_text_01": ("minimax", "MINIMAX_TEXT_01"),
    "mistral": ("dense", "MISTRAL"),
    "mixtral": ("dense", "MIXTRAL"),
    "nemotron_h": ("nemotron", "NEMOTRON_H"),
    "olmo": ("dense", "OLMO"),
    "olmo2": ("dense", "OLMO2"),
    "olmo3": ("dense", "OLMO3"),
    "olmo_hybrid": ("olmo_hybrid", "OLMO_HYBRID"),
    "olmoe": ("dense", "OLMOE"),
    "phi3": ("dense", "PHI3"),
    "qwen2": ("dense", "QWEN2"),
    "qwen2_moe": ("dense", "QWEN2_MOE"),
    "qwen3": ("dense", "QWEN3"),
    "qwen3_5": ("qwen", "QWEN3_5"),
    "qwen3_5_moe": ("qwen", "QWEN3_5_MOE"),
    "qwen3_moe": ("dense", "QWEN3_MOE"),
    "qwen3_next": ("qwen", "QWEN3_NEXT"),
    "smollm3": ("dense", "SMOLLM3"),
    "starcoder2": ("dense", "STARCODER2"),
    "zamba2": ("zamba", "ZAMBA2"),
}


def family_names() -> tuple[str, ...]:
    """Every family that has a body, sorted."""
    return tuple(sorted(_MODULES))


def family(name: str, model_type: str) -> Family:
    """The family of this name.

    Raises:
        ConfigInvalid: it has a layer plan but no body.
    """
    if name not in _MODULES:
        raise ConfigInvalid(
            f"model_type {model_type!r} ({name}) has a layer plan but no body; "
            f"bodies exist for {', '.join(sorted(_MODULES))}",
            field="model_type",
            value=model_type,
        )
    module, attribute = _MODULES[name]
    found: Family = getattr(import_module(f"braid_orchestrator.body.families.{module}"), attribute)
    return found
