"""Geometries from the field names that several families share."""

from __future__ import annotations

import math

from braid_wire.layers import GatedDelta, Gqa, Mamba2, Mla

from braid_orchestrator.layer_plan.fields import Fields


def multiple(fields: Fields, large: str, value: int, small: str, divisor: int) -> None:
    """Refuse `large` unless it is a multiple of `small`.

    Raises:
        ConfigInvalid: naming `large`.
    """
    if value % divisor:
        raise fields.invalid(large, value, f"it must be a multiple of {small} ({divisor})")


def head_dim(fields: Fields) -> int:
    """`head_dim`, or hidden_size / num_attention_heads where neither config nor family has it."""
    if fields.known("head_dim"):
        return fields.integer("head_dim")
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    if hidden % heads:
        raise fields.invalid("num_attention_heads", heads, f"it must divide hidden_size ({hidden})")
    return fields.integer("head_dim", hidden // heads)


def gqa(
    fields: Fields, *, size: int | None = None, scale: float | None = None, sliding_window: int = 0
) -> Gqa:
    """Grouped-query attention by the names that all families share.

    Args:
        size: head width where the family has a rule of its own; else `head_dim`.
        scale: softmax scale; else head_dim^-½.
        sliding_window: 0 for all of the past.
    """
    heads = fields.integer("num_attention_heads")
    size = head_dim(fields) if size is None else size
    kv_heads = fields.integer("num_key_value_heads", heads)
    multiple(fields, "num_attention_heads", heads, "num_key_value_heads", kv_heads)
    return Gqa(
        num_q_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=size,
        v_head_dim=size,
        scale=size**-0.5 if scale is None else scale,
        sliding_window=sliding_window,
    )


def mla(fields: Fields, *, yarn: bool) -> Mla:
    """Multi-head latent attention by DeepSeek's field names.

    Args:
        yarn: whether the family's modelling code multiplies the scale by YaRN's mscale².
    """
    nope = fields.integer("qk_nope_head_dim")
    rope = fields.integer("qk_rope_head_dim", minimum=0)
    return Mla(
        num_heads=fields.integer("num_attention_heads"),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=fields.integer("v_head_dim"),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        scale=(nope + rope) ** -0.5 * (_mscale(fields) ** 2 if yarn else 1.0),
    )


def gated_delta(fields: Fields) -> GatedDelta:
    """Gated DeltaNet by the `linear_*` field names."""
    k_heads = fields.integer("linear_num_key_heads")
    v_heads = fields.integer("linear_num_value_heads")
    multiple(fields, "linear_num_value_heads", v_heads, "linear_num_key_heads", k_heads)
    k_head_dim = fields.integer("linear_key_head_dim")
    return GatedDelta(
        num_k_heads=k_heads,
        num_v_heads=v_heads,
        k_head_dim=k_head_dim,
        v_head_dim=fields.integer("linear_value_head_dim"),
        conv_width=fields.integer("linear_conv_kernel_dim"),
        scale=k_head_dim**-0.5,
    )


def mamba2(fields: Fields, inner: int) -> Mamba2:
    """Mamba-2 by the `mamba_*` field names (bamba, granitemoehybrid, falcon_h1).

    Args:
        inner: width of x, which is heads x head width; `mamba_d_head` may be "auto".
    """
    heads = fields.integer("mamba_n_heads")
    groups = fields.integer("mamba_n_groups")
    multiple(fields, "mamba_n_heads", heads, "mamba_n_groups", groups)
    low, high = time_step_limit(fields)
    return Mamba2(
        num_heads=heads,
        head_dim=_mamba_head_dim(fields, inner, heads),
        state_dim=fields.integer("mamba_d_state"),
        num_groups=groups,
        conv_width=fields.integer("mamba_d_conv"),
        dt_min=low,
        dt_max=high,
    )


def expanded(fields: Fields, hidden: int) -> int:
    """`mamba_expand` times the hidden size, rounded down as the modelling code does.

    Raises:
        ConfigInvalid: the product is not a positive, finite number.
    """
    factor = fields.number("mamba_expand")
    if not math.isfinite(factor) or factor * hidden < 1:
        raise fields.invalid("mamba_expand", factor, f"times hidden_size ({hidden}) it must be at least 1")
    return int(factor * hidden)


def time_step_limit(fields: Fields) -> tuple[float, float]:
    """Bounds of dt after softplus; no bounds where the config has none.

    Raises:
        ConfigInvalid: it is not a pair in ascending order.
    """
    limit = fields.numbers("time_step_limit")
    if limit is None:
        return 0.0, math.inf
    if len(limit) != 2 or limit[0] > limit[1]:
        raise fields.invalid("time_step_limit", list(limit), "it must be a lower and an upper bound")
    return limit[0], limit[1]


def _mamba_head_dim(fields: Fields, inner: int, heads: int) -> int:
    # "auto" is how these configs spell the derived value; any number must be that value too.
    if inner % heads:
        raise fields.invalid("mamba_n_heads", heads, f"it must divide the inner width ({inner})")
    if fields.is_text("mamba_d_head", "auto"):
        return inner // heads
    size = fields.integer("mamba_d_head", inner // heads)
    if size * heads != inner:
        raise fields.invalid("mamba_d_head", size, f"times mamba_n_heads ({heads}) it must be {inner}")
    return size


def _mscale(fields: Fields) -> float:
    # Older configs call the section rope_scaling and its key "type".
    rope = fields.section("rope_scaling") or fields.section("rope_parameters")
    if rope is None:
        return 1.0
    if rope.text("rope_type", "default", aliases=("type",)) == "default":
        return 1.0
    all_dim = rope.number("mscale_all_dim", 0.0)
    if not all_dim:
        return 1.0
    factor = rope.number("factor")
    return 1.0 if factor <= 1 else 0.1 * all_dim * math.log(factor) + 1.0
