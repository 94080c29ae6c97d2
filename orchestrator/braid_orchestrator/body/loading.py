"""From a checkpoint directory to a body."""

from __future__ import annotations

from typing import Any

import torch
from braid_wire.errors import ConfigInvalid
from transformers import AutoModelForCausalLM, PreTrainedModel

from braid_orchestrator.body.base import Body, DispatchPoint
from braid_orchestrator.body.family import Family, LoadRequest, Parts, family

# A name that transformers builds no mask for: the services know the spans, so a body needs none.
_NO_MASK = "braid"


def load_body(request: LoadRequest) -> Body:
    """Load a checkpoint and take its attention out.

    Raises:
        ConfigInvalid: the family has no body here, or the checkpoint cannot be loaded.
    """
    found = family(request.plans.family, request.plans.model_type)
    return take_out(found.load(request), request, found)


def load_pretrained(request: LoadRequest) -> PreTrainedModel:
    """The causal language model of a checkpoint, as transformers knows it.

    Raises:
        ConfigInvalid: it cannot be loaded.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            request.directory,
            dtype=request.dtype,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=request.trust_remote_code,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigInvalid(
            f"{request.directory} cannot be loaded: {error}", field="model", value=request.directory
        ) from error
    return model.eval().requires_grad_(False)


def usual_parts(model: Any) -> Parts:
    """The pieces of a model that is laid out as most are: `.model.layers`, `.model`, `.lm_head`."""

    def backbone(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = model.model(
            input_ids=ids, position_ids=positions, use_cache=False
        ).last_hidden_state
        return hidden

    return Parts(dict(enumerate(model.model.layers)), backbone, model.lm_head)


def take_out(model: PreTrainedModel, request: LoadRequest, found: Family) -> Body:
    """Replace every attention module of this instance by an adapter.

    Raises:
        ConfigInvalid: the model's layers are not the plan's.
    """
    plan, parts = request.plans.target, found.parts(model)
    if parts.layers.keys() != {spec.layer_id for spec in plan}:
        raise ConfigInvalid(
            f"the model has layers {sorted(parts.layers)}, its plan {[spec.layer_id for spec in plan]}",
            field="num_hidden_layers",
            value=len(parts.layers),
        )
    point = DispatchPoint()
    params = {spec.layer_id: found.adapt(parts.layers[spec.layer_id], spec, point) for spec in plan}
    model.config._attn_implementation = _NO_MASK
    return Body(model, parts.backbone, parts.head, plan, {k: v for k, v in params.items() if v}, point)
