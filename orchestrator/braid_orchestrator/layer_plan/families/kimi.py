"""Kimi Linear: Kimi Delta Attention with latent attention (no rotary), ids counted from 1."""

from __future__ import annotations

from braid_wire.layers import KimiDelta, LayerPlan, Role

from braid_orchestrator.layer_plan.drafts import mtp_plan
from braid_orchestrator.layer_plan.fields import Fields
from braid_orchestrator.layer_plan.geometry import mla
from braid_orchestrator.layer_plan.kinds import HYBRID, Kinds, agree, assemble, distinct_ids, full_at, listed
from braid_orchestrator.layer_plan.registry import Family

_FULL, _KDA = "full_attn_layers", "kda_layers"


def target(fields: Fields) -> LayerPlan:
    """`linear_attn_config` lists both kinds, 1-indexed; `layer_types`, where present, must agree."""
    count = fields.integer("num_hidden_layers")
    named = listed(fields, "layer_types", HYBRID, count)
    numbered = _numbered(fields.section("linear_attn_config"), count)
    if named is not None and numbered is not None:
        agree(fields, "layer_types", named, numbered, "linear_attn_config")
    kinds = numbered or named
    if kinds is None:
        fields.note("layer kinds defaulted: full at ids 4, 8, 12, …")
        kinds = full_at(count, range(4, count, 4))
    return assemble(Role.TARGET, kinds, full=mla(fields, yarn=False), linear=_kimi_delta(fields))


def draft(fields: Fields) -> LayerPlan | None:
    """As declared; the family has published no MTP layers, so their kinds must be declared too."""
    return mtp_plan(fields, full=mla(fields, yarn=False), linear=_kimi_delta(fields), unless_declared=None)


def _numbered(section: Fields | None, count: int) -> Kinds | None:
    """The kinds of layers 0 … count-1 from the two 1-indexed lists.

    Raises:
        ConfigInvalid: an id is out of 1 … count, stands twice, is in both lists or in neither.
    """
    if section is None or not (section.declared(_FULL) or section.declared(_KDA)):
        return None
    full = distinct_ids(section, _FULL, count, first=1)
    kda = distinct_ids(section, _KDA, count, first=1)
    if full is None or kda is None:
        raise section.missing(_FULL if full is None else _KDA, "each layer must stand in one of both lists")
    for layer in range(1, count + 1):
        if layer in full and layer in kda:
            raise section.invalid(_KDA, layer, f"this layer stands in {_FULL} too")
        if layer not in full and layer not in kda:
            raise section.invalid(_FULL, list(full), f"layer {layer} stands neither here nor in {_KDA}")
    return full_at(count, (layer - 1 for layer in full))


def _kimi_delta(fields: Fields) -> KimiDelta:
    # Checkpoints keep these in a section; configs saved by transformers keep them at the top.
    section = fields.section("linear_attn_config")
    size = _either(fields, section, "head_dim", "linear_head_dim")
    return KimiDelta(
        num_heads=_either(fields, section, "num_heads", "linear_num_heads"),
        head_dim=size,
        conv_width=_either(fields, section, "short_conv_kernel_size", "linear_conv_kernel_dim"),
        scale=size**-0.5,
    )


def _either(fields: Fields, section: Fields | None, inner: str, flat: str) -> int:
    if section is not None and section.declared(inner):
        return section.integer(inner)
    return fields.integer(flat)


FAMILIES = (
    Family(
        name="kimi_linear",
        model_types=frozenset({"kimi_linear"}),
        architectures=frozenset({"KimiLinearForCausalLM"}),
        target=target,
        draft=draft,
        defaults={
            "vocab_size": 163840,
            "hidden_size": 2304,
            "num_hidden_layers": 27,
            "num_attention_heads": 32,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "max_position_embeddings": 1048576,
            "linear_head_dim": 128,
            "linear_num_heads": 32,
            "linear_conv_kernel_dim": 4,
        },
    ),
)
