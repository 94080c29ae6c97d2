"""OLMo Hybrid: Gated DeltaNet (with negative eigenvalues) and grouped-query attention."""

from __future__ import annotations

from braid_wire.layers import GatedDelta, LayerPlan, Role

from braid_orchestrator.layer_plan.drafts import mtp_plan
from braid_orchestrator.layer_plan.fields import Fields
from braid_orchestrator.layer_plan.geometry import gqa, multiple
from braid_orchestrator.layer_plan.kinds import HYBRID, assemble, full_at, listed
from braid_orchestrator.layer_plan.registry import Family


def target(fields: Fields) -> LayerPlan:
    """`layer_types`, else full at ids 3, 7, 11, …, and the last one where there are fewer than four."""
    count = fields.integer("num_hidden_layers")
    kinds = listed(fields, "layer_types", HYBRID, count)
    if kinds is None:
        fields.note("layer kinds defaulted: full at ids 3, 7, 11, …")
        kinds = full_at(count, range(3, count, 4) or (count - 1,))
    return assemble(Role.TARGET, kinds, full=gqa(fields), linear=_gated_delta(fields))


def draft(fields: Fields) -> LayerPlan | None:
    """As declared; the family has published no MTP kinds, so they must be declared too."""
    return mtp_plan(fields, full=gqa(fields), linear=_gated_delta(fields), unless_declared=None)


def _gated_delta(fields: Fields) -> GatedDelta:
    # Unlike Qwen's, these sizes derive from the attention's and from one another.
    heads = fields.integer("num_attention_heads")
    k_heads = fields.integer("linear_num_key_heads", heads)
    v_heads = fields.integer("linear_num_value_heads", heads)
    multiple(fields, "linear_num_value_heads", v_heads, "linear_num_key_heads", k_heads)
    k_head_dim = fields.integer("linear_key_head_dim", int(0.75 * fields.integer("hidden_size") / k_heads))
    return GatedDelta(
        num_k_heads=k_heads,
        num_v_heads=v_heads,
        k_head_dim=k_head_dim,
        v_head_dim=fields.integer("linear_value_head_dim", 2 * k_head_dim),
        conv_width=fields.integer("linear_conv_kernel_dim"),
        scale=k_head_dim**-0.5,
        beta_scale=2.0 if fields.flag("linear_allow_neg_eigval") else 1.0,
    )


FAMILIES = (
    Family(
        name="olmo_hybrid",
        model_types=frozenset({"olmo_hybrid"}),
        architectures=frozenset({"OlmoHybridForCausalLM"}),
        target=target,
        draft=draft,
        defaults={
            "vocab_size": 100352,
            "hidden_size": 3840,
            "num_hidden_layers": 32,
            "num_attention_heads": 30,
            "max_position_embeddings": 65536,
            "linear_conv_kernel_dim": 4,
            "linear_allow_neg_eigval": True,
        },
    ),
)
