"""Nemotron-H: blocks that each hold one thing (Mamba-2, attention, MLP or MoE) and each have an id."""

from __future__ import annotations

import math
from collections.abc import Mapping

from braid_wire.layers import Kind, LayerPlan, Mamba2, Role

from braid_orchestrator.layer_plan.drafts import mtp_count
from braid_orchestrator.layer_plan.fields import Fields
from braid_orchestrator.layer_plan.geometry import gqa, multiple
from braid_orchestrator.layer_plan.kinds import Kinds, agree, assemble, listed
from braid_orchestrator.layer_plan.registry import Family

BLOCKS: Mapping[str, Kind] = {
    "full_attention": Kind.FULL,
    "attention": Kind.FULL,
    "linear_attention": Kind.LINEAR,
    "mamba": Kind.LINEAR,
    "moe": Kind.NONE,
    "mlp": Kind.NONE,
}
LETTERS: Mapping[str, Kind] = {"M": Kind.LINEAR, "*": Kind.FULL, "E": Kind.NONE, "-": Kind.NONE}


def target(fields: Fields) -> LayerPlan:
    """`hybrid_override_pattern` or `layers_block_type`; where both are given they must agree."""
    count = fields.optional_integer("num_hidden_layers")
    kinds = _blocks(fields, "layers_block_type", "hybrid_override_pattern", count, aliases=("layer_types",))
    if kinds is None:
        raise fields.missing("hybrid_override_pattern", "it or layers_block_type must say what each block is")
    return assemble(Role.TARGET, kinds, full=gqa(fields), linear=_mamba2(fields))


def draft(fields: Fields) -> LayerPlan | None:
    """`num_nextn_predict_layers` repetitions of the MTP pattern; each of its blocks has an id."""
    count = mtp_count(fields)
    kinds = _blocks(fields, "mtp_layers_block_type", "mtp_hybrid_override_pattern", None)
    if not count:
        return None
    if kinds is None:
        # What transformers takes for a checkpoint that declares MTP layers and no blocks.
        fields.note("mtp: blocks defaulted: full_attention, moe")
        kinds = (Kind.FULL, Kind.NONE)
    if not kinds:
        raise fields.invalid("mtp_layers_block_type", [], f"{count} MTP layer(s) are declared")
    fields.note(f"mtp: {count} layer(s) of {len(kinds)} block(s) as draft layers 0-{count * len(kinds) - 1}")
    return assemble(Role.DRAFT, kinds * count, full=gqa(fields), linear=_mamba2(fields))


def _blocks(
    fields: Fields, list_name: str, pattern_name: str, count: int | None, aliases: tuple[str, ...] = ()
) -> Kinds | None:
    named = listed(fields, list_name, BLOCKS, count, aliases)
    lettered = _pattern(fields, pattern_name, count)
    if named is not None and lettered is not None:
        if len(named) != len(lettered):
            raise fields.invalid(list_name, len(named), f"{pattern_name} has {len(lettered)} blocks")
        agree(fields, list_name, named, lettered, pattern_name)
    return named if named is not None else lettered


def _pattern(fields: Fields, name: str, count: int | None) -> Kinds | None:
    """One letter per block.

    Raises:
        ConfigInvalid: a letter is unknown, or there are more or fewer than `count`.
    """
    if not fields.declared(name):
        return None
    pattern = fields.text(name)
    for layer_id, letter in enumerate(pattern):
        if letter not in LETTERS:
            raise fields.invalid(name, letter, f"block {layer_id} must be one of {' '.join(LETTERS)}")
    if count is not None and len(pattern) != count:
        raise fields.invalid(name, pattern, f"it has {len(pattern)} blocks for {count} layers")
    return tuple(LETTERS[letter] for letter in pattern)


def _mamba2(fields: Fields) -> Mamba2:
    heads = fields.integer("mamba_num_heads")
    groups = fields.integer("n_groups", aliases=("mamba_n_groups",))
    multiple(fields, "mamba_num_heads", heads, "n_groups", groups)
    # transformers clamps dt at time_step_min and does not read time_step_limit; its model is our oracle.
    if fields.declared("time_step_limit"):
        fields.note("dt is clamped at time_step_min, as in transformers; time_step_limit is not read")
    return Mamba2(
        num_heads=heads,
        head_dim=fields.integer("mamba_head_dim"),
        state_dim=fields.integer("ssm_state_size"),
        num_groups=groups,
        conv_width=fields.integer("conv_kernel", aliases=("mamba_d_conv",)),
        dt_min=fields.number("time_step_min", aliases=("mamba_dt_min",)),
        dt_max=math.inf,
    )


FAMILIES = (
    Family(
        name="nemotron_h",
        model_types=frozenset({"nemotron_h"}),
        architectures=frozenset({"NemotronHForCausalLM"}),
        target=target,
        draft=draft,
        defaults={
            "vocab_size": 131072,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 4096,
            "mamba_num_heads": 128,
            "mamba_head_dim": 64,
            "ssm_state_size": 128,
            "n_groups": 8,
            "conv_kernel": 4,
            "time_step_min": 0.001,
        },
    ),
)
