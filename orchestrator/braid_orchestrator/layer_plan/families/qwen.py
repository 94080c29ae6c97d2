"""Qwen3-Next and Qwen3.5/3.6: Gated DeltaNet with gated grouped-query attention every fourth layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from braid_wire.layers import Kind, LayerPlan, Role

from braid_orchestrator.layer_plan.drafts import mtp_count, mtp_plan
from braid_orchestrator.layer_plan.fields import Fields
from braid_orchestrator.layer_plan.geometry import gated_delta, gqa
from braid_orchestrator.layer_plan.kinds import HYBRID, assemble, listed, periodic
from braid_orchestrator.layer_plan.registry import Family


def target(fields: Fields) -> LayerPlan:
    """`layer_types`, else every `full_attention_interval`-th layer is full.

    The modelling code reads the interval only where there is no list, so a list wins.
    """
    count = fields.integer("num_hidden_layers")
    kinds = listed(fields, "layer_types", HYBRID, count)
    if kinds is None:
        kinds = periodic(count, fields.integer("full_attention_interval"))
    elif fields.declared("full_attention_interval"):
        interval = fields.integer("full_attention_interval")
        if kinds != periodic(count, interval):
            fields.note(f"layer_types decides; it does not follow full_attention_interval={interval}")
    return assemble(Role.TARGET, kinds, full=gqa(fields), linear=gated_delta(fields))


def draft(fields: Fields) -> LayerPlan | None:
    """The MTP head: full layers like the target's, unless `mtp_layer_types` says otherwise."""
    if mtp_count(fields) is None:
        fields.note("mtp: the config declares no MTP layers; mtp.* weights in the checkpoint stay unused")
    return mtp_plan(fields, full=gqa(fields), linear=gated_delta(fields), unless_declared=Kind.FULL)


_SHARED: Mapping[str, Any] = {
    "full_attention_interval": 4,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "num_attention_heads": 16,
    "max_position_embeddings": 32768,
}

FAMILIES = (
    Family(
        name="qwen3_next",
        model_types=frozenset({"qwen3_next"}),
        architectures=frozenset({"Qwen3NextForCausalLM"}),
        target=target,
        draft=draft,
        defaults={
            **_SHARED,
            "vocab_size": 151936,
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_key_value_heads": 2,
        },
    ),
    Family(
        name="qwen3_5",
        model_types=frozenset({"qwen3_5", "qwen3_5_text"}),
        architectures=frozenset({"Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"}),
        target=target,
        draft=draft,
        defaults={
            **_SHARED,
            "vocab_size": 248320,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_key_value_heads": 4,
        },
    ),
    Family(
        name="qwen3_5_moe",
        model_types=frozenset({"qwen3_5_moe", "qwen3_5_moe_text"}),
        architectures=frozenset({"Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"}),
        target=target,
        draft=draft,
        defaults={
            **_SHARED,
            "vocab_size": 248320,
            "hidden_size": 2048,
            "num_hidden_layers": 40,
            "num_key_value_heads": 2,
        },
    ),
)
