"""From a `config.json` to the layer plans of target and draft."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braid_wire.errors import ConfigInvalid
from braid_wire.layers import LayerPlan

from braid_orchestrator.layer_plan.families import REGISTRY
from braid_orchestrator.layer_plan.fields import Fields, shown
from braid_orchestrator.layer_plan.registry import Family

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Dtypes that activations, KV pages and conv states may have → bytes per element."""

# Configs that name no dtype are of checkpoints that were published in it.
_USUAL_DTYPE = "bfloat16"

_WRAPPER = "text_config"
# What a wrapper says about itself, and so may say differently.
_OF_THE_WRAPPER = {"model_type", "architectures", "dtype", "torch_dtype", "quantization_config"}


@dataclass(frozen=True)
class ModelPlans:
    """What a config says about a model's layers.

    `notes` are for people: what was wrapped, defaulted, contradictory but decided, or left out.
    """

    family: str
    model_type: str
    architecture: str | None
    target: LayerPlan
    draft: LayerPlan | None
    dtype: str
    vocab_size: int
    hidden_size: int
    max_positions: int
    notes: tuple[str, ...]


def load_config(path: Path) -> dict[str, Any]:
    """Read a `config.json`, given itself or the model directory it lies in.

    Raises:
        ConfigInvalid: there is no such file, it is not a JSON object, or it has no `model_type`.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigInvalid(f"{file} cannot be read: {error.strerror}", path=file) from error
    except ValueError as error:  # bad JSON and bad UTF-8
        raise ConfigInvalid(f"{file} is not JSON: {error}", path=file) from error
    if not isinstance(config, dict):
        raise ConfigInvalid(f"{file} holds a {type(config).__name__}; it must be a JSON object", path=file)
    Fields(config).text("model_type")
    return config


def build_plans(config: Mapping[str, Any]) -> ModelPlans:
    """The layer plans of a model, from its config alone.

    Raises:
        ConfigInvalid: the model type is unknown, or a field is missing, of the wrong type, or
            contradicts another; metadata names the `field`.
    """
    top = Fields(config)
    model_type = top.text("model_type")
    architectures = top.texts("architectures") or ()
    family = REGISTRY.find(model_type, architectures)
    fields = _text_fields(config, family)
    _refuse_uneven_layers(fields)
    target = family.target(fields)
    draft = family.draft(fields)
    vocab_size = fields.integer("vocab_size")
    hidden_size = fields.integer("hidden_size")
    max_positions = fields.integer("max_position_embeddings", aliases=("model_max_length",))
    dtype = _dtype(fields, top)
    return ModelPlans(
        family=family.name,
        model_type=model_type,
        architecture=architectures[0] if architectures else None,
        target=target,
        draft=draft,
        dtype=dtype,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        max_positions=max_positions,
        notes=_notes(fields, top, family, architectures),
    )


def _text_fields(config: Mapping[str, Any], family: Family) -> Fields:
    """The fields of the text model: those under `text_config` where the config wraps one."""
    inner = config.get(_WRAPPER)
    if inner is None:
        return Fields(config, defaults=family.defaults)
    if not isinstance(inner, Mapping):
        raise Fields(config).invalid(_WRAPPER, inner, "it must be an object")
    outer = {name: value for name, value in config.items() if name not in _OF_THE_WRAPPER}
    fields = Fields(inner, defaults=family.defaults, outer=outer, path=f"{_WRAPPER}.")
    inner_type = fields.text("model_type") if fields.declared("model_type") else None
    if inner_type is not None and inner_type not in family.model_types:
        raise fields.invalid("model_type", inner_type, f"the outer config is of family {family.name}")
    fields.note(f"wrapped under {_WRAPPER}")
    return fields


def _refuse_uneven_layers(fields: Fields) -> None:
    # Per-layer overrides of sizes would silently be taken for the common size.
    if fields.declared("per_layer_config"):
        raise fields.invalid("per_layer_config", "…", "layers that override sizes are not served")


def _dtype(fields: Fields, top: Fields) -> str:
    declared = next((source for source in (fields, top) if source.declared("dtype")), None)
    name = "dtype"
    if declared is None:
        name = "torch_dtype"
        declared = next((source for source in (fields, top) if source.declared(name)), None)
    if declared is None:
        return fields.text("dtype", _USUAL_DTYPE)
    dtype = declared.text(name).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise declared.invalid(name, dtype, f"it must be one of {', '.join(DTYPE_BYTES)}")
    return dtype


def _notes(fields: Fields, top: Fields, family: Family, architectures: tuple[str, ...]) -> tuple[str, ...]:
    notes = list(fields.notes)
    if architectures and not family.architectures.intersection(architectures):
        known = ", ".join(sorted(family.architectures))
        notes.append(f"architecture {architectures[0]} was not verified for this family (known: {known})")
    for source in (fields, top):
        section = source.section("quantization_config")
        if section is not None:
            method = section.text("quant_method", "unnamed")
            notes.append(f"weights are quantised ({method}); pages and states are not")
            break
    if fields.defaulted:
        notes.append(
            "defaulted: "
            + ", ".join(f"{name}={_plain(value)}" for name, value in sorted(fields.defaulted.items()))
        )
    return tuple(notes)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else shown(value)
