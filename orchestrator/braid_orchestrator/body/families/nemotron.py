"""Adapters of nemotron_h: every block holds one thing, and MLP and MoE blocks have ids too."""

from __future__ import annotations

from typing import Any

from braid_wire.layers import Kind, LayerSpec
from transformers.models.nemotron_h import modeling_nemotron_h as nemotron

from braid_orchestrator.body.base import DispatchPoint
from braid_orchestrator.body.families.gqa import GroupedQuery, usual_heads
from braid_orchestrator.body.families.mamba2 import mamba2_params, usual_mixer
from braid_orchestrator.body.families.submodules import submodule
from braid_orchestrator.body.family import Family, Params
from braid_orchestrator.body.loading import load_pretrained, usual_parts

_WITHOUT_ATTENTION = (nemotron.NemotronHMLP, nemotron.NemotronHMoE)


def _adapt(layer: Any, spec: LayerSpec, point: DispatchPoint) -> Params:
    if spec.kind is Kind.NONE:
        submodule(layer, "mixer", _WITHOUT_ATTENTION, spec)
        return {}
    if spec.kind is Kind.FULL:
        attention = submodule(layer, "mixer", nemotron.NemotronHAttention, spec)
        layer.mixer = GroupedQuery(usual_heads(attention), spec, point)
        return {}
    mixer = submodule(layer, "mixer", nemotron.NemotronHMamba2Mixer, spec)
    layer.mixer = usual_mixer(mixer, spec, point)
    return mamba2_params(mixer, spec)


NEMOTRON_H = Family(load_pretrained, usual_parts, _adapt)
