"""MiniMax-Text-01: Lightning attention with SiLU on q, k and v, and grouped-query attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from braid_wire.layers import Gqa, Kind, LayerPlan, Lightning, Role

from braid_orchestrator.layer_plan.drafts import mtp_plan
from braid_orchestrator.layer_plan.fields import Fields
from braid_orchestrator.layer_plan.geometry import gqa, head_dim
from braid_orchestrator.layer_plan.kinds import HYBRID, Kinds, agree, assemble, listed
from braid_orchestrator.layer_plan.registry import Family


def target(fields: Fields) -> LayerPlan:
    """transformers' own type: where neither list is given, even ids are full."""
    return _target(fields, alternates=True)


def target_text_01(fields: Fields) -> LayerPlan:
    """The publisher's type: one of the lists must be given."""
    return _target(fields, alternates=False)


def draft(fields: Fields) -> LayerPlan | None:
    """As declared; the family has published no MTP layers, so their kinds must be declared too."""
    return mtp_plan(fields, full=_full(fields), linear=_lightning(fields), unless_declared=None)


def _target(fields: Fields, *, alternates: bool) -> LayerPlan:
    """`layer_types` or `attn_type_list` (1 = full); where both are given they must agree."""
    count = fields.integer("num_hidden_layers")
    named = listed(fields, "layer_types", HYBRID, count)
    numbered = _attn_type_list(fields, count)
    if named is not None and numbered is not None:
        agree(fields, "layer_types", named, numbered, "attn_type_list")
    kinds = numbered or named
    if kinds is None and not alternates:
        raise fields.missing("attn_type_list")
    if kinds is None:
        fields.note("layer kinds defaulted: even ids full, odd ids linear")
        kinds = tuple(Kind.LINEAR if i % 2 else Kind.FULL for i in range(count))
    return assemble(Role.TARGET, kinds, full=_full(fields), linear=_lightning(fields))


def _attn_type_list(fields: Fields, count: int) -> Kinds | None:
    codes = fields.integers("attn_type_list")
    if codes is None:
        return None
    if len(codes) != count:
        raise fields.invalid("attn_type_list", list(codes), f"it has {len(codes)} entries for {count} layers")
    for layer_id, code in enumerate(codes):
        if code > 1:
            raise fields.invalid("attn_type_list", code, f"entry {layer_id} must be 0 (linear) or 1 (full)")
    return tuple(Kind.FULL if code else Kind.LINEAR for code in codes)


def _full(fields: Fields) -> Gqa:
    return gqa(fields, sliding_window=fields.optional_integer("sliding_window") or 0)


def _lightning(fields: Fields) -> Lightning:
    activation = fields.text("hidden_act")
    if activation not in ("silu", "swish"):
        raise fields.invalid("hidden_act", activation, "q, k and v of Lightning layers take silu only")
    return Lightning(
        num_heads=fields.integer("num_attention_heads"),
        head_dim=head_dim(fields),
        scale=1.0,
        activation="silu",
    )


_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "hidden_act": "silu",
}

FAMILIES = (
    Family(
        name="minimax",
        model_types=frozenset({"minimax"}),
        architectures=frozenset({"MiniMaxForCausalLM"}),
        target=target,
        draft=draft,
        defaults=_DEFAULTS,
    ),
    Family(
        name="minimax_text_01",
        model_types=frozenset({"minimax_text_01"}),
        architectures=frozenset({"MiniMaxText01ForCausalLM"}),
        target=target_text_01,
        draft=draft,
        defaults=_DEFAULTS,
    ),
)
