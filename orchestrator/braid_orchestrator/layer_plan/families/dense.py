"""Models without linear layers: every layer is full, and the linear service stays idle.

A model type is here only if its attention is plain causal softmax over grouped or latent heads: no
sinks, no soft-capped scores, no key selection. Those would need more than the geometry can say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from braid_wire.layers import Gqa, Kind, LayerPlan, LayerSpec, Role

from braid_orchestrator.layer_plan.drafts import mtp_plan
from braid_orchestrator.layer_plan.fields import Fields
from braid_orchestrator.layer_plan.geometry import gqa, mla
from braid_orchestrator.layer_plan.registry import Family

Windows = Callable[[Fields, int], tuple[int, ...]]
"""(fields, number of layers) → sliding window of each layer; 0 where it sees all of the past."""

_FULL, _SLIDING = "full_attention", "sliding_attention"


def no_windows(fields: Fields, count: int) -> tuple[int, ...]:
    """Every layer sees all of the past."""
    if _SLIDING in (_layer_types(fields, count) or ()):
        raise fields.invalid("layer_types", _SLIDING, "this family has no sliding windows")
    return (0,) * count


def one_window(fields: Fields, count: int) -> tuple[int, ...]:
    """Every layer has `sliding_window`, where it is set (mistral, mixtral, phi3, starcoder2)."""
    if _SLIDING in (_layer_types(fields, count) or ()):
        raise fields.invalid("layer_types", _SLIDING, "this family has the same window in every layer")
    return (fields.optional_integer("sliding_window") or 0,) * count


def switched_window(fields: Fields, count: int) -> tuple[int, ...]:
    """Every layer has `sliding_window` if `use_sliding_window` (qwen3_moe)."""
    return one_window(fields, count) if _windows_on(fields) else no_windows(fields, count)


def late_windows(fields: Fields, count: int) -> tuple[int, ...]:
    """Layers from `max_window_layers` on, if `use_sliding_window` (qwen2, qwen3)."""
    first = fields.integer("max_window_layers", minimum=0) if _windows_on(fields) else count
    return _switched(fields, count, tuple(i >= first for i in range(count)))


def early_windows(fields: Fields, count: int) -> tuple[int, ...]:
    """Even layers below `max_window_layers`, if `use_sliding_window` (qwen2_moe)."""
    end = fields.integer("max_window_layers", minimum=0) if _windows_on(fields) else 0
    return _switched(fields, count, tuple(i % 2 == 0 and i < end for i in range(count)))


def unrotated_windows(fields: Fields, count: int) -> tuple[int, ...]:
    """Layers without rotary, if `use_sliding_window` (smollm3)."""
    rotated = fields.integers("no_rope_layers")
    if rotated is None:
        interval = fields.integer("no_rope_layer_interval")
        rotated = tuple(int((i + 1) % interval != 0) for i in range(count))
    if len(rotated) != count:
        raise fields.invalid(
            "no_rope_layers", list(rotated), f"it has {len(rotated)} entries for {count} layers"
        )
    return _switched(fields, count, tuple(not has_rotary for has_rotary in rotated))


def interleaved_windows(fields: Fields, count: int) -> tuple[int, ...]:
    """All but every `sliding_window_pattern`-th layer (cohere2, olmo3)."""
    pattern = fields.integer("sliding_window_pattern")
    slides = _slides(fields, count, tuple((i + 1) % pattern != 0 for i in range(count)))
    return _windows(fields, slides)


def target(fields: Fields, windows: Windows, scale_field: str | None) -> LayerPlan:
    """Full everywhere, with each layer's own window."""
    _refuse_unless_plain(fields)
    count = fields.integer("num_hidden_layers")
    base = _base(fields, scale_field)
    return LayerPlan(
        Role.TARGET,
        tuple(
            LayerSpec(layer_id, Kind.FULL, full=replace(base, sliding_window=window))
            for layer_id, window in enumerate(windows(fields, count))
        ),
    )


def draft(fields: Fields, scale_field: str | None) -> LayerPlan | None:
    """As declared; the family has published no MTP layers, so their kinds must be declared too."""
    return mtp_plan(fields, full=_base(fields, scale_field), unless_declared=None)


def target_mla(fields: Fields) -> LayerPlan:
    """Latent attention everywhere (DeepSeek)."""
    _refuse_unless_plain(fields)
    count = fields.integer("num_hidden_layers")
    no_windows(fields, count)
    geometry = mla(fields, yarn=True)
    return LayerPlan(Role.TARGET, tuple(LayerSpec(i, Kind.FULL, full=geometry) for i in range(count)))


def draft_mla(fields: Fields) -> LayerPlan | None:
    """MTP layers are latent attention, stored after the target's layers."""
    return mtp_plan(fields, full=mla(fields, yarn=True), unless_declared=Kind.FULL, appended=True)


def _base(fields: Fields, scale_field: str | None) -> Gqa:
    return gqa(fields, scale=fields.number(scale_field) if scale_field else None)


def _refuse_unless_plain(fields: Fields) -> None:
    if fields.declared("use_bidirectional_attention") and fields.flag("use_bidirectional_attention"):
        raise fields.invalid("use_bidirectional_attention", True, "only causal attention is served")
    if fields.declared("attn_logit_softcapping"):
        cap = fields.number("attn_logit_softcapping")
        raise fields.invalid("attn_logit_softcapping", cap, "soft-capped scores are not served")


def _layer_types(fields: Fields, count: int) -> tuple[str, ...] | None:
    entries = fields.texts("layer_types")
    if entries is None:
        return None
    for layer_id, entry in enumerate(entries):
        if entry not in (_FULL, _SLIDING):
            raise fields.invalid("layer_types", entry, f"entry {layer_id} must be {_FULL} or {_SLIDING}")
    if len(entries) != count:
        rule = f"it has {len(entries)} entries for {count} layers"
        raise fields.invalid("layer_types", list(entries), rule)
    return entries


def _slides(fields: Fields, count: int, unless_listed: tuple[bool, ...]) -> tuple[bool, ...]:
    entries = _layer_types(fields, count)
    return unless_listed if entries is None else tuple(entry == _SLIDING for entry in entries)


def _switched(fields: Fields, count: int, unless_listed: tuple[bool, ...]) -> tuple[int, ...]:
    on = _windows_on(fields)
    slides = _slides(fields, count, unless_listed if on else (False,) * count)
    if any(slides) and not on:
        raise fields.invalid("layer_types", _SLIDING, "use_sliding_window is off")
    return _windows(fields, slides)


def _windows_on(fields: Fields) -> bool:
    return fields.declared("use_sliding_window") and fields.flag("use_sliding_window")


def _windows(fields: Fields, slides: tuple[bool, ...]) -> tuple[int, ...]:
    if not any(slides):
        return (0,) * len(slides)
    window = fields.optional_integer("sliding_window")
    if window is None and fields.declared("layer_types"):
        raise fields.missing("sliding_window", "layer_types has layers with a window")
    return tuple((window or 0) if slide else 0 for slide in slides)


@dataclass(frozen=True)
class _Dense:
    """One row of the table below: the published defaults of a model type, and its window rule."""

    model_type: str
    architecture: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int | None
    positions: int
    head_dim: int | None = None
    windows: Windows = no_windows
    scale_field: str | None = None
    more: Mapping[str, object] = field(default_factory=dict)

    def family(self) -> Family:
        """The registry entry of this row."""
        return Family(
            name=self.model_type,
            model_types=frozenset({self.model_type}),
            architectures=frozenset({self.architecture}),
            target=lambda fields: target(fields, self.windows, self.scale_field),
            draft=lambda fields: draft(fields, self.scale_field),
            defaults={
                "vocab_size": self.vocab,
                "hidden_size": self.hidden,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads,
                "max_position_embeddings": self.positions,
                "head_dim": self.head_dim,
                **self.more,
            },
        )


_QWEN = {"sliding_window": 4096, "max_window_layers": 28}

_TABLE = (
    _Dense("llama", "LlamaForCausalLM", 32000, 4096, 32, 32, None, 2048),
    _Dense(
        "mistral",
        "MistralForCausalLM",
        32000,
        4096,
        32,
        32,
        8,
        131072,
        windows=one_window,
        more={"sliding_window": 4096},
    ),
    _Dense("mixtral", "MixtralForCausalLM", 32000, 4096, 32, 32, 8, 131072, windows=one_window),
    _Dense("qwen2", "Qwen2ForCausalLM", 151936, 4096, 32, 32, 32, 32768, windows=late_windows, more=_QWEN),
    _Dense(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        151936,
        2048,
        24,
        16,
        16,
        32768,
        windows=early_windows,
        more=_QWEN,
    ),
    _Dense(
        "qwen3", "Qwen3ForCausalLM", 151936, 4096, 32, 32, 32, 32768, 128, windows=late_windows, more=_QWEN
    ),
    _Dense(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        151936,
        2048,
        24,
        32,
        4,
        32768,
        windows=switched_window,
        more={"sliding_window": 4096},
    ),
    _Dense("gemma", "GemmaForCausalLM", 256000, 3072, 28, 16, 16, 8192, 256),
    _Dense("phi3", "Phi3ForCausalLM", 32064, 3072, 32, 32, None, 4096, windows=one_window),
    _Dense("olmo", "OlmoForCausalLM", 50304, 4096, 32, 32, None, 2048),
    _Dense("olmo2", "Olmo2ForCausalLM", 50304, 4096, 32, 32, None, 2048),
    _Dense(
        "olmo3",
        "Olmo3ForCausalLM",
        50304,
        4096,
        32,
        32,
        None,
        2048,
        windows=interleaved_windows,
        more={"sliding_window": 4096, "sliding_window_pattern": 4},
    ),
    _Dense("olmoe", "OlmoeForCausalLM", 50304, 2048, 16, 16, None, 4096),
    _Dense(
        "smollm3",
        "SmolLM3ForCausalLM",
        128256,
        2048,
        36,
        16,
        4,
        32768,
        windows=unrotated_windows,
        more={"no_rope_layer_interval": 4},
    ),
    _Dense(
        "granite",
        "GraniteForCausalLM",
        32000,
        4096,
        32,
        32,
        None,
        2048,
        scale_field="attention_multiplier",
        more={"attention_multiplier": 1.0},
    ),
    _Dense(
        "granitemoe",
        "GraniteMoeForCausalLM",
        32000,
        4096,
        32,
        32,
        None,
        2048,
        scale_field="attention_multiplier",
        more={"attention_multiplier": 1.0},
    ),
    _Dense("glm4", "Glm4ForCausalLM", 151552, 4096, 40, 32, 2, 131072, 128),
    _Dense("starcoder2", "Starcoder2ForCausalLM", 49152, 3072, 30, 24, 2, 4096, windows=one_window),
    _Dense("cohere", "CohereForCausalLM", 256000, 8192, 40, 64, None, 8192),
    _Dense(
        "cohere2",
        "Cohere2ForCausalLM",
        256000,
        8192,
        40,
        64,
        None,
        8192,
        windows=interleaved_windows,
        more={"sliding_window": 4096, "sliding_window_pattern": 4},
    ),
)

_MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}

FAMILIES = (
    *(row.family() for row in _TABLE),
    Family(
        name="deepseek_v2",
        model_types=frozenset({"deepseek_v2"}),
        architectures=frozenset({"DeepseekV2ForCausalLM"}),
        target=target_mla,
        draft=draft_mla,
        defaults={
            **_MLA,
            "vocab_size": 102400,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
        },
    ),
    Family(
        name="deepseek_v3",
        model_types=frozenset({"deepseek_v3"}),
        architectures=frozenset({"DeepseekV3ForCausalLM"}),
        target=target_mla,
        draft=draft_mla,
        defaults={
            **_MLA,
            "vocab_size": 129280,
            "hidden_size": 7168,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "max_position_embeddings": 4096,
        },
    ),
)
