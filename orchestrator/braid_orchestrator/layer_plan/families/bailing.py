"""Ling and Ring: one model type, two architectures that share nothing but latent attention.

`BailingMoeV2_5ForCausalLM` (Ling-2.5/2.6, Ring-2.5) has Lightning layers. Everything else of the type
is Ling-3, with Kimi Delta layers. Taking one for the other builds a model that runs and is wrong.
"""

from __future__ import annotations

from braid_wire.layers import KimiDelta, Kind, LayerPlan, Lightning, Role

from braid_orchestrator.layer_plan.drafts import mtp_plan
from braid_orchestrator.layer_plan.fields import Fields
from braid_orchestrator.layer_plan.geometry import head_dim, mla
from braid_orchestrator.layer_plan.kinds import HYBRID, Kinds, agree, assemble, listed, periodic
from braid_orchestrator.layer_plan.registry import Family


def target_v2_5(fields: Fields) -> LayerPlan:
    """Full every `layer_group_size` layers, and all of an incomplete last group."""
    count = fields.integer("num_hidden_layers")
    group = fields.integer("layer_group_size")
    complete = count // group * group
    kinds: Kinds = tuple(
        Kind.FULL if (i + 1) % group == 0 or i >= complete else Kind.LINEAR for i in range(count)
    )
    agree(
        fields,
        "layer_types",
        listed(fields, "layer_types", HYBRID, count),
        kinds,
        f"layer_group_size={group}",
    )
    return assemble(Role.TARGET, kinds, full=mla(fields, yarn=True), linear=_lightning(fields))


def draft_v2_5(fields: Fields) -> LayerPlan | None:
    """MTP layers are latent attention unless `mtp_layer_types` says otherwise."""
    return mtp_plan(
        fields,
        full=mla(fields, yarn=True),
        linear=_lightning(fields),
        unless_declared=Kind.FULL,
        appended=True,
    )


def target_v3(fields: Fields) -> LayerPlan:
    """`layer_types`, else full every `layer_group_size` layers; the list wins, as in the modelling code."""
    if fields.declared("q_lora_rank"):
        rank = fields.integer("q_lora_rank")
        raise fields.invalid(
            "q_lora_rank", rank, "Ling-3 has none; if this is Ling-2.5, architectures must say so"
        )
    count = fields.integer("num_hidden_layers")
    group = fields.integer("layer_group_size")
    kinds = listed(fields, "layer_types", HYBRID, count)
    if kinds is None:
        kinds = periodic(count, group)
    elif fields.declared("layer_group_size") and kinds != periodic(count, group):
        fields.note(f"layer_types decides; it does not follow layer_group_size={group}")
    return assemble(Role.TARGET, kinds, full=mla(fields, yarn=True), linear=_bounded_kimi_delta(fields))


def draft_v3(fields: Fields) -> LayerPlan | None:
    """MTP layers are latent attention unless `mtp_layer_types` says otherwise."""
    return mtp_plan(
        fields,
        full=mla(fields, yarn=True),
        linear=_bounded_kimi_delta(fields),
        unless_declared=Kind.FULL,
        appended=True,
    )


def _lightning(fields: Fields) -> Lightning:
    # linear_silu acts before the body's q/k norm, so it is the body's and not the geometry's.
    heads, size = fields.integer("num_attention_heads"), head_dim(fields)
    for name in ("num_kv_heads_for_linear_attn", "linear_key_value_heads"):
        if fields.declared(name) and fields.integer(name) != heads:
            raise fields.invalid(name, fields.integer(name), f"Lightning has {heads} heads of q, k and v")
    return Lightning(num_heads=heads, head_dim=size, scale=size**-0.5)


def _bounded_kimi_delta(fields: Fields) -> KimiDelta:
    # Checkpoints name these as attention sizes; transformers, when it saves, overwrites head_dim with
    # the rotary width and adds the linear_* names.
    size = _either(fields, "linear_head_dim", "head_dim")
    bound = 0.0
    if fields.flag("kda_safe_gate"):
        bound = fields.number("kda_lower_bound")
        if bound >= 0:
            raise fields.invalid("kda_lower_bound", bound, "a bound of the log decay must be negative")
    return KimiDelta(
        num_heads=_either(fields, "linear_num_heads", "num_attention_heads"),
        head_dim=size,
        conv_width=_either(fields, "linear_conv_kernel_dim", "short_conv_kernel_size"),
        scale=size**-0.5,
        gate_lower_bound=bound,
    )


def _either(fields: Fields, saved: str, published: str) -> int:
    return fields.integer(saved if fields.declared(saved) else published)


FAMILIES = (
    Family(
        name="bailing_moe_v2_5",
        model_types=frozenset({"bailing_hybrid"}),
        architectures=frozenset({"BailingMoeV2_5ForCausalLM"}),
        target=target_v2_5,
        draft=draft_v2_5,
        # The sizes of its published default config are of no released model, so they must be declared.
        defaults={"vocab_size": 157184, "max_position_embeddings": 32768},
        by_architecture=True,
    ),
    Family(
        name="bailing_hybrid",
        model_types=frozenset({"bailing_hybrid"}),
        architectures=frozenset({"BailingHybridForCausalLM"}),
        target=target_v3,
        draft=draft_v3,
        defaults={
            "vocab_size": 157184,
            "hidden_size": 2560,
            "num_hidden_layers": 42,
            "num_attention_heads": 32,
            "head_dim": 128,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "max_position_embeddings": 262144,
            "short_conv_kernel_size": 4,
            "layer_group_size": 6,
            "kda_safe_gate": True,
            "kda_lower_bound": -5.0,
        },
    ),
)
