"""Families with Mamba-2 layers by the `mamba_*` names: Bamba, Granite 4 hybrid, Falcon-H1, Zamba2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from braid_wire.layers import Gqa, Kind, LayerPlan, Mamba2, Role

from braid_orchestrator.layer_plan.drafts import mtp_plan
from braid_orchestrator.layer_plan.fields import Fields
from braid_orchestrator.layer_plan.geometry import expanded, gqa, mamba2, multiple
from braid_orchestrator.layer_plan.kinds import HYBRID, Kinds, agree, assemble, distinct_ids, full_at, listed
from braid_orchestrator.layer_plan.registry import Family

_LIST = "layer_types"
_LIST_ALIASES = ("layers_block_type",)


def target_bamba(fields: Fields) -> LayerPlan:
    """Full at `attn_layer_indices`; none where the list is absent."""
    count = fields.integer("num_hidden_layers")
    kinds = full_at(count, distinct_ids(fields, "attn_layer_indices", count) or ())
    agree(fields, _LIST, listed(fields, _LIST, HYBRID, count, _LIST_ALIASES), kinds, "attn_layer_indices")
    return assemble(Role.TARGET, kinds, full=gqa(fields), linear=_expanded_mamba2(fields))


def draft_bamba(fields: Fields) -> LayerPlan | None:
    """As declared; the family has published no MTP layers, so their kinds must be declared too."""
    return mtp_plan(fields, full=gqa(fields), linear=_expanded_mamba2(fields), unless_declared=None)


def target_granite(fields: Fields) -> LayerPlan:
    """`layer_types`; all linear where the list is absent."""
    count = fields.integer("num_hidden_layers")
    kinds = listed(fields, _LIST, HYBRID, count, _LIST_ALIASES)
    if kinds is None:
        fields.note("layer kinds defaulted: all linear")
        kinds = (Kind.LINEAR,) * count
    return assemble(Role.TARGET, kinds, full=_granite_gqa(fields), linear=_expanded_mamba2(fields))


def draft_granite(fields: Fields) -> LayerPlan | None:
    """As declared; the family has published no MTP layers, so their kinds must be declared too."""
    return mtp_plan(fields, full=_granite_gqa(fields), linear=_expanded_mamba2(fields), unless_declared=None)


def target_falcon(fields: Fields) -> LayerPlan:
    """Every layer runs both on the same normed input; the body sums the outputs."""
    count = fields.integer("num_hidden_layers")
    kinds: Kinds = (Kind.PARALLEL,) * count
    listed(fields, _LIST, {"hybrid": Kind.PARALLEL}, count, _LIST_ALIASES)
    return assemble(Role.TARGET, kinds, full=gqa(fields), linear=_falcon_mamba2(fields))


def draft_falcon(fields: Fields) -> LayerPlan | None:
    """As declared; the family has published no MTP layers, so their kinds must be declared too."""
    return mtp_plan(fields, full=gqa(fields), linear=_falcon_mamba2(fields), unless_declared=None)


def target_zamba(fields: Fields) -> LayerPlan:
    """Layers named "hybrid" have both: the shared attention first, then Mamba-2, under one id."""
    count = fields.integer("num_hidden_layers")
    names = {"hybrid": Kind.PARALLEL, "linear_attention": Kind.LINEAR, "mamba": Kind.LINEAR}
    kinds = listed(fields, "layers_block_type", names, count, ("layer_types",))
    if kinds is None:
        kinds = _zamba_default(fields, count)
    if Kind.PARALLEL in kinds:
        fields.note("parallel layers run in sequence: the shared attention, then mamba2, under one id")
    return assemble(Role.TARGET, kinds, full=_zamba_gqa(fields), linear=_zamba_mamba2(fields))


def draft_zamba(fields: Fields) -> LayerPlan | None:
    """As declared; the family has published no MTP layers, so their kinds must be declared too."""
    return mtp_plan(fields, full=_zamba_gqa(fields), linear=_zamba_mamba2(fields), unless_declared=None)


def _expanded_mamba2(fields: Fields) -> Mamba2:
    return mamba2(fields, expanded(fields, fields.integer("hidden_size")))


def _granite_gqa(fields: Fields) -> Gqa:
    return gqa(fields, scale=fields.number("attention_multiplier"))


def _falcon_mamba2(fields: Fields) -> Mamba2:
    # An explicit null means "as wide as mamba_expand says"; an omitted field means the default.
    inner = fields.optional_integer("mamba_d_ssm")
    return mamba2(fields, expanded(fields, fields.integer("hidden_size")) if inner is None else inner)


def _zamba_default(fields: Fields, count: int) -> Kinds:
    kinds = "L" + "LLLLLH" * 7 + "LLLLH" + "LLLH" + "LL"
    if count != len(kinds):
        raise fields.missing("layers_block_type", f"its default is for {len(kinds)} layers, not {count}")
    fields.note("layer kinds defaulted: those of Zamba2-2.7B")
    return tuple(Kind.PARALLEL if kind == "H" else Kind.LINEAR for kind in kinds)


def _zamba_gqa(fields: Fields) -> Gqa:
    # The shared attention reads [hidden, embedding], twice the width, and halves the head in its scale.
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    if not fields.declared("attention_head_dim") and 2 * hidden % heads:
        raise fields.invalid("num_attention_heads", heads, f"it must divide 2 x hidden_size ({2 * hidden})")
    size = fields.integer("attention_head_dim", 2 * hidden // heads, aliases=("head_dim",))
    return gqa(fields, size=size, scale=(size / 2) ** -0.5)


def _zamba_mamba2(fields: Fields) -> Mamba2:
    inner = expanded(fields, fields.integer("hidden_size"))
    heads = fields.integer("n_mamba_heads")
    groups = fields.integer("mamba_ngroups")
    multiple(fields, "n_mamba_heads", heads, "mamba_ngroups", groups)
    if inner % heads:
        raise fields.invalid("n_mamba_heads", heads, f"it must divide the inner width ({inner})")
    size = fields.integer("mamba_headdim", inner // heads)
    if size * heads != inner:
        raise fields.invalid("mamba_headdim", size, f"times n_mamba_heads ({heads}) it must be {inner}")
    return Mamba2(
        num_heads=heads,
        head_dim=size,
        state_dim=fields.integer("mamba_d_state"),
        num_groups=groups,
        conv_width=fields.integer("mamba_d_conv"),
        dt_min=fields.number("time_step_min"),
        dt_max=math.inf,
    )


_SHARED: Mapping[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
}

FAMILIES = (
    Family(
        name="bamba",
        model_types=frozenset({"bamba"}),
        architectures=frozenset({"BambaForCausalLM"}),
        target=target_bamba,
        draft=draft_bamba,
        defaults={
            **_SHARED,
            "vocab_size": 128000,
            "num_key_value_heads": 8,
            "max_position_embeddings": 262144,
        },
    ),
    Family(
        name="granitemoehybrid",
        model_types=frozenset({"granitemoehybrid"}),
        architectures=frozenset({"GraniteMoeHybridForCausalLM"}),
        target=target_granite,
        draft=draft_granite,
        defaults={
            **_SHARED,
            "vocab_size": 32000,
            "max_position_embeddings": 2048,
            "attention_multiplier": 1.0,
        },
    ),
    Family(
        name="falcon_h1",
        model_types=frozenset({"falcon_h1"}),
        architectures=frozenset({"FalconH1ForCausalLM"}),
        target=target_falcon,
        draft=draft_falcon,
        defaults={
            **_SHARED,
            "vocab_size": 128000,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "mamba_d_ssm": 1024,
        },
    ),
    Family(
        name="zamba2",
        model_types=frozenset({"zamba2"}),
        architectures=frozenset({"Zamba2ForCausalLM"}),
        target=target_zamba,
        draft=draft_zamba,
        defaults={
            "vocab_size": 32000,
            "hidden_size": 2560,
            "num_hidden_layers": 54,
            "num_attention_heads": 32,
            "max_position_embeddings": 4096,
            "mamba_d_state": 64,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "time_step_min": 0.001,
        },
    ),
)
