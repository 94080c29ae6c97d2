"""What a family of models must tell so that its attention can be taken out, and where each lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from braid_wire.errors import ConfigInvalid
from braid_wire.layers import LayerSpec

from braid_orchestrator.body.base import Backbone, DispatchPoint
from braid_orchestrator.layer_plan import ModelPlans

Params = Mapping[str, torch.Tensor]
Adapt = Callable[[Any, LayerSpec, DispatchPoint], Params]
"""(decoder layer, its spec, dispatch point) → static parameters; replaces the attention or mixer
module of this one layer by an adapter."""


@dataclass(frozen=True)
class Parts:
    """The pieces of a loaded model that a body runs."""

    layers: Mapping[int, Any]
    """Layer id → decoder layer."""
    backbone: Backbone
    head: Callable[[torch.Tensor], torch.Tensor]
    """Final-normed hidden states [n, hidden] → logits [n, V], with every scale and cap of the model."""


@dataclass(frozen=True)
class LoadRequest:
    """A checkpoint and how to hold it."""

    directory: Path
    plans: ModelPlans
    dtype: torch.dtype
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Family:
    """How one family's models are loaded and taken apart."""

    load: Callable[[LoadRequest], Any]
    parts: Callable[[Any], Parts]
    adapt: Adapt


# Family of the layer-plan rules → module of `families` that defines FAMILY for it. Imported when a
# model of the family is loaded, so that no other family's transformers modules are.
_MODULES: Mapping[str, tuple[str, str]] = {
    "qwen3_next": ("qwen", "QWEN3_NEXT"),
    "qwen3_5": ("qwen", "QWEN3_5"),
}


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
