"""Reading checkpoints: what must be there, what may be, and what is refused before it is read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from braid_wire.errors import ConfigInvalid
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from braid_orchestrator.body.family import LoadRequest
from braid_orchestrator.layer_plan import load_config

_NAMED = 8  # weights that a message names

# Their tables depend on the longest position of a step, so that one sequence of a batch would change
# another's, and a sequence its own past.
_STEADY_ROTARY = ("default", "linear", "yarn", "llama3", "mrope")

# Weights of parts that no body runs (vision and audio towers), those of a draft, and tables that old
# checkpoints stored.
_EXTRAS = re.compile(
    r"^(model\.|language_model\.)*(mtp|visual|vision_tower|audio_tower|multi_modal_projector)\."
    r"|rotary_emb\.inv_freq$"
)
_LAYER = re.compile(r"^model\.(?:language_model\.)?layers\.(\d+)\.")


def refuse_unrunnable(directory: Path) -> None:
    """Refuse, by its config alone, a checkpoint that would load and run wrongly.

    Raises:
        ConfigInvalid: its weights are quantised, or its rotary tables depend on the batch.
    """
    refuse_unrunnable_config(load_config(directory))


def refuse_unrunnable_config(config: Mapping[str, Any]) -> None:
    """As `refuse_unrunnable`, for a configuration that is at hand."""
    for section in _sections(config):
        quantised = section.get("quantization_config")
        if isinstance(quantised, Mapping):
            method = quantised.get("quant_method", "unnamed")
            raise ConfigInvalid(
                f"the weights are quantised ({method}); only unquantised checkpoints are run",
                field="quantization_config",
                value=method,
            )
        for name in ("rope_scaling", "rope_parameters"):
            for kind in _rotary_types(section.get(name)):
                if kind not in _STEADY_ROTARY:
                    raise ConfigInvalid(
                        f"rotary type {kind!r} depends on the length of the batch; "
                        f"those that can be served are {', '.join(_STEADY_ROTARY)}",
                        field=name,
                        value=kind,
                    )


def load_pretrained(
    request: LoadRequest,
    model_class: Any = AutoModelForCausalLM,
    *,
    computed: str | None = None,
    **how: Any,
) -> PreTrainedModel:
    """The causal language model of a checkpoint, as transformers knows it.

    transformers maps the files and converts tensor by tensor, so that no second copy is held.

    Args:
        model_class: loads it.
        computed: pattern of tensors that a checkpoint may lack because the model computes them.
        how: more arguments of `from_pretrained`.

    Raises:
        ConfigInvalid: it cannot be loaded, or its weights are not exactly the model's.
    """
    if request.trust_remote_code:
        how["trust_remote_code"] = True
    return _from_pretrained(request, model_class, request.directory, computed, how)


def load_state(
    request: LoadRequest,
    model_class: Any,
    config: Any,
    weights: Mapping[str, torch.Tensor],
    *,
    computed: str | None = None,
) -> PreTrainedModel:
    """A model of a transformers class from weights that were read already.

    Checkpoints' own names and layouts are converted as transformers converts them in files.

    Raises:
        ConfigInvalid: the weights are not exactly the model's.
    """
    how = {"config": config, "state_dict": dict(weights)}
    return _from_pretrained(request, model_class, None, computed, how)


def _from_pretrained(
    request: LoadRequest,
    model_class: Any,
    directory: Path | None,
    computed: str | None,
    how: Mapping[str, Any],
) -> PreTrainedModel:
    try:
        with _without_report():
            model, info = model_class.from_pretrained(
                directory,
                dtype=request.dtype,
                attn_implementation="eager",
                local_files_only=True,
                output_loading_info=True,
                **how,
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigInvalid(
            f"{request.directory} cannot be loaded: {error}", field="model", value=request.directory
        ) from error
    missing = [key for key in info["missing_keys"] if computed is None or not re.search(computed, key)]
    unexpected = [key for key in info["unexpected_keys"] if not _is_extra(key, request)]
    require_exact(request.directory, missing, unexpected)
    return model.eval().requires_grad_(False)


@contextmanager
def _without_report() -> Iterator[None]:
    """No warnings of transformers, which takes what a draft shares with its target for missing.

    What really is missing is refused by `require_exact`.
    """
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def require_exact(directory: Path, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Refuse a checkpoint that lacks weights of the model, or has some that it does not know.

    Raises:
        ConfigInvalid: naming them; a weight that is missing would be random.
    """
    if missing:
        raise ConfigInvalid(
            f"{directory} lacks {len(missing)} weight(s) of the model: {_listed(missing)}",
            field="model",
            weights=_listed(missing),
        )
    if unexpected:
        raise ConfigInvalid(
            f"{directory} has {len(unexpected)} weight(s) unknown to the model: {_listed(unexpected)}",
            field="model",
            weights=_listed(unexpected),
        )


def fill(place: torch.Tensor, weight: torch.Tensor, name: str) -> None:
    """Copy a weight of a checkpoint to its place, in the place's dtype.

    Raises:
        ConfigInvalid: it has another shape.
    """
    if place.shape != weight.shape:
        raise ConfigInvalid(
            f"the weight {name} is {list(weight.shape)}; the model has {list(place.shape)}", field=name
        )
    with torch.no_grad():
        place.copy_(weight)


def weight_files(directory: Path) -> dict[str, Path]:
    """Weight name → the safetensors file that holds it.

    Raises:
        ConfigInvalid: there are no safetensors files, or one that the index names is missing.
    """
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        found = {key: directory / file for key, file in names.items()}
    else:
        found = dict.fromkeys(_keys(directory / "model.safetensors"), directory / "model.safetensors")
    for file in set(found.values()):
        if not file.exists():
            raise ConfigInvalid(f"{file} is missing", field="model", value=file)
    return found


def read_weights(files: Mapping[str, Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """The named weights, one after the other, file by file."""
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as opened:
            for key in sorted(key for key, where in files.items() if where == file):
                yield key, opened.get_tensor(key)


def _keys(file: Path) -> list[str]:
    if not file.exists():
        raise ConfigInvalid(f"{file} is missing, and there is no index of shards", field="model", value=file)
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _sections(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config and the text model's that it may wrap."""
    inner = config.get("text_config")
    return [config, inner] if isinstance(inner, Mapping) else [config]


def _rotary_types(section: object) -> Iterator[str]:
    """Every rotary type that a section names; some have one section per kind of layer."""
    if not isinstance(section, Mapping):
        return
    kind = section.get("rope_type", section.get("type"))
    if isinstance(kind, str):
        yield kind
    for value in section.values():
        yield from _rotary_types(value)


def _is_extra(key: str, request: LoadRequest) -> bool:
    """Whether a weight that the model has no place for is expected in such a checkpoint."""
    if _EXTRAS.search(key):
        return True
    layer = _LAYER.match(key)
    draft = request.plans.draft
    if layer is None or draft is None:
        return False
    count = len(request.plans.target)
    return count <= int(layer.group(1)) < count + len(draft)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(sorted(names)[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown}, … ({len(names)} in all)"
