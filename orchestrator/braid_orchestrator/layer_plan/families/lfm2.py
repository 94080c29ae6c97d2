"""LFM2 and LFM2-MoE: gated short convolutions with grouped-query attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from braid_wire.layers import Kind, LayerPlan, Role, ShortConv

from braid_orchestrator.layer_plan.drafts import mtp_plan
from braid_orchestrator.layer_plan.fields import Fields
from braid_orchestrator.layer_plan.geometry import gqa
from braid_orchestrator.layer_plan.kinds import Kinds, agree, assemble, distinct_ids, full_at, listed
from braid_orchestrator.layer_plan.registry import Family

_NAMES: Mapping[str, Kind] = {
    "full_attention": Kind.FULL,
    "attention": Kind.FULL,
    "conv": Kind.LINEAR,
}


def target(fields: Fields) -> LayerPlan:
    """`layer_types` or `full_attn_idxs`; all full where neither is given, as in transformers."""
    kinds = _declared(fields)
    if kinds is None:
        fields.note("layer kinds defaulted: all full")
        kinds = (Kind.FULL,) * fields.integer("num_hidden_layers")
    return assemble(Role.TARGET, kinds, full=gqa(fields), linear=_short_conv(fields))


def target_moe(fields: Fields) -> LayerPlan:
    """`layer_types` or `full_attn_idxs`; one of them must be given."""
    kinds = _declared(fields)
    if kinds is None:
        raise fields.missing("layer_types")
    return assemble(Role.TARGET, kinds, full=gqa(fields), linear=_short_conv(fields))


def draft(fields: Fields) -> LayerPlan | None:
    """As declared; the family has published no MTP layers, so their kinds must be declared too."""
    return mtp_plan(fields, full=gqa(fields), linear=_short_conv(fields), unless_declared=None)


def _declared(fields: Fields) -> Kinds | None:
    count = fields.integer("num_hidden_layers")
    named = listed(fields, "layer_types", _NAMES, count)
    ids = distinct_ids(fields, "full_attn_idxs", count)
    if ids is None:
        return named
    kinds = full_at(count, ids)
    agree(fields, "layer_types", named, kinds, "full_attn_idxs")
    return kinds


def _short_conv(fields: Fields) -> ShortConv:
    return ShortConv(channels=fields.integer("hidden_size"), conv_width=fields.integer("conv_L_cache"))


_SHARED: Mapping[str, Any] = {
    "vocab_size": 65536,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128000,
    "conv_L_cache": 3,
}

FAMILIES = (
    Family(
        name="lfm2",
        model_types=frozenset({"lfm2"}),
        architectures=frozenset({"Lfm2ForCausalLM"}),
        target=target,
        draft=draft,
        defaults={**_SHARED, "hidden_size": 2560},
    ),
    Family(
        name="lfm2_moe",
        model_types=frozenset({"lfm2_moe"}),
        architectures=frozenset({"Lfm2MoeForCausalLM"}),
        target=target_moe,
        draft=draft,
        defaults={**_SHARED, "hidden_size": 2048},
    ),
)
