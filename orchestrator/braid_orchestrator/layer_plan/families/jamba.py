"""Jamba: Mamba layers with grouped-query attention once per period."""

from __future__ import annotations

from braid_wire.layers import LayerPlan, Mamba1, Role

from braid_orchestrator.layer_plan.drafts import mtp_plan
from braid_orchestrator.layer_plan.fields import Fields
from braid_orchestrator.layer_plan.geometry import gqa
from braid_orchestrator.layer_plan.kinds import HYBRID, agree, assemble, full_at, listed
from braid_orchestrator.layer_plan.registry import Family


def target(fields: Fields) -> LayerPlan:
    """Full where id % `attn_layer_period` == `attn_layer_offset`."""
    count = fields.integer("num_hidden_layers")
    period = fields.integer("attn_layer_period")
    offset = fields.integer("attn_layer_offset", minimum=0)
    if offset >= period:
        raise fields.invalid("attn_layer_offset", offset, f"it must be below attn_layer_period ({period})")
    kinds = full_at(count, range(offset, count, period))
    declared = listed(fields, "layer_types", HYBRID, count, ("layers_block_type",))
    agree(fields, "layer_types", declared, kinds, "attn_layer_period and attn_layer_offset")
    return assemble(Role.TARGET, kinds, full=gqa(fields), linear=_mamba1(fields))


def draft(fields: Fields) -> LayerPlan | None:
    """As declared; the family has published no MTP layers, so their kinds must be declared too."""
    return mtp_plan(fields, full=gqa(fields), linear=_mamba1(fields), unless_declared=None)


def _mamba1(fields: Fields) -> Mamba1:
    hidden = fields.integer("hidden_size")
    # "auto" is one sixteenth of the hidden size, rounded up.
    automatic = -(-hidden // 16)
    rank = (
        automatic if fields.is_text("mamba_dt_rank", "auto") else fields.integer("mamba_dt_rank", automatic)
    )
    return Mamba1(
        inner_dim=fields.integer("mamba_expand") * hidden,
        state_dim=fields.integer("mamba_d_state"),
        dt_rank=rank,
        conv_width=fields.integer("mamba_d_conv"),
        norm_eps=fields.number("rms_norm_eps"),
    )


FAMILIES = (
    Family(
        name="jamba",
        model_types=frozenset({"jamba"}),
        architectures=frozenset({"JambaForCausalLM"}),
        target=target,
        draft=draft,
        defaults={
            "vocab_size": 65536,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "attn_layer_period": 8,
            "attn_layer_offset": 4,
            "mamba_d_state": 16,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
        },
    ),
)
