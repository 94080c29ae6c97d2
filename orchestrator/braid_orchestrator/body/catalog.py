"""The families that can be run: what they are made of, and what each was verified against.

`benchmarks/families.py --write` measures the errors and writes them to `verified.json` beside this
module.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_RECORD = Path(__file__).with_name("verified.json")
_TRANSFORMERS = "transformers"
_PUBLISHER = "the publisher's code"


@dataclass(frozen=True)
class Entry:
    """One family."""

    family: str
    """Name in the layer-plan rules."""
    models: str
    """Released models of it, for people."""
    mechanisms: tuple[str, ...]
    """Linear ones first."""
    against: str = _TRANSFORMERS
    """What logits were compared with."""
    draft: str = ""
    """What its MTP layers were compared with; empty: they are not run."""


@dataclass(frozen=True)
class Verified:
    """What a comparison found, over all checkpoints of a family and all ways to feed them."""

    checkpoints: int
    error: float
    """Largest absolute difference of a logit, float32."""
    crowd: float
    """Largest difference between a sequence alone and among others."""
    draft_error: float | None
    """As `error`, of the draft's logits."""


_HEAD = "the same head built from transformers' layers"
_GDN, _KDA, _MAMBA2 = ("gated_delta", "gqa"), ("kimi_delta", "mla"), ("mamba2", "gqa")
_GQA = ("gqa",)

ENTRIES: tuple[Entry, ...] = (
    Entry("qwen3_next", "Qwen3-Next", _GDN, draft=_HEAD),
    Entry("qwen3_5", "Qwen3.5, Qwen3.6 (text)", _GDN, draft=_HEAD),
    Entry("qwen3_5_moe", "Qwen3.5-MoE, Qwen3.6-MoE (text)", _GDN, draft=_HEAD),
    Entry("kimi_linear", "Kimi-Linear", _KDA),
    Entry("bailing_hybrid", "Ling-3", _KDA),
    Entry("bailing_moe_v2_5", "Ling-2.5/2.6, Ring-2.5", ("lightning", "mla"), _PUBLISHER, _PUBLISHER),
    Entry("minimax", "MiniMax-Text-01 (converted)", ("lightning", "gqa")),
    Entry("minimax_text_01", "MiniMax-Text-01", ("lightning", "gqa")),
    Entry("nemotron_h", "Nemotron-H, Nemotron-3", _MAMBA2),
    Entry("bamba", "Bamba", _MAMBA2),
    Entry("granitemoehybrid", "Granite-4.0-H", _MAMBA2),
    Entry("falcon_h1", "Falcon-H1", _MAMBA2),
    Entry("zamba2", "Zamba2", _MAMBA2),
    Entry("olmo_hybrid", "OLMo Hybrid", _GDN),
    Entry("jamba", "Jamba", ("mamba1", "gqa")),
    Entry("lfm2", "LFM2", ("short_conv", "gqa")),
    Entry("lfm2_moe", "LFM2-MoE", ("short_conv", "gqa")),
    Entry("deepseek_v2", "DeepSeek-V2", ("mla",)),
    Entry("deepseek_v3", "DeepSeek-V3, R1", ("mla",)),
    Entry("llama", "Llama 2, Llama 3", _GQA),
    Entry("mistral", "Mistral", _GQA),
    Entry("mixtral", "Mixtral", _GQA),
    Entry("qwen2", "Qwen2, Qwen2.5", _GQA),
    Entry("qwen2_moe", "Qwen2-MoE", _GQA),
    Entry("qwen3", "Qwen3", _GQA),
    Entry("qwen3_moe", "Qwen3-MoE", _GQA),
    Entry("gemma", "Gemma", _GQA),
    Entry("phi3", "Phi-3, Phi-4 (4k)", _GQA),
    Entry("olmo", "OLMo", _GQA),
    Entry("olmo2", "OLMo 2", _GQA),
    Entry("olmo3", "OLMo 3", _GQA),
    Entry("olmoe", "OLMoE", _GQA),
    Entry("smollm3", "SmolLM3", _GQA),
    Entry("granite", "Granite 3", _GQA),
    Entry("granitemoe", "Granite 3 MoE", _GQA),
    Entry("glm4", "GLM-4", _GQA),
    Entry("starcoder2", "StarCoder2", _GQA),
    Entry("cohere", "Command R", _GQA),
    Entry("cohere2", "Command R7B", _GQA),
)


@lru_cache(maxsize=1)
def verified() -> Mapping[str, Verified]:
    """Family → what its comparison found; families that were not compared are not in it."""
    if not _RECORD.exists():
        return {}
    rows = json.loads(_RECORD.read_text(encoding="utf-8"))["families"]
    return {name: Verified(**row) for name, row in rows.items()}


def record(found: Mapping[str, Verified], versions: Mapping[str, str]) -> None:
    """Write what comparisons found; families that are not in it keep what stood there."""
    rows = {**verified(), **found}
    text = json.dumps(
        {"versions": dict(versions), "families": {name: vars(rows[name]) for name in sorted(rows)}}, indent=1
    )
    _RECORD.write_text(text + "\n", encoding="utf-8")
    verified.cache_clear()


def markdown() -> str:
    """A table: family × mechanisms × verified against × largest error."""
    found = verified()
    lines = [
        "| family | models | mechanisms | verified against | largest error | drafts |",
        "|---|---|---|---|---|---|",
    ]
    for entry in ENTRIES:
        row = found.get(entry.family)
        error = f"{row.error:.1e}" if row is not None else "not measured"
        draft = f"{row.draft_error:.1e}" if row is not None and row.draft_error is not None else "–"
        lines.append(
            f"| {entry.family} | {entry.models} | {', '.join(entry.mechanisms)} | {entry.against} "
            f"| {error} | {draft} |"
        )
    return "\n".join(lines)
