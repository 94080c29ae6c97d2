"""From a checkpoint directory to a body."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from braid_wire.errors import ConfigInvalid
from braid_wire.layers import LayerPlan, Role

from braid_orchestrator.body import experts
from braid_orchestrator.body.base import Body, DispatchPoint, Draft, Head, Target
from braid_orchestrator.body.checkpoint import load_pretrained, refuse_unrunnable
from braid_orchestrator.body.family import Adapt, Family, LoadRequest, Params, Parts, family

__all__ = ["NO_MASK", "adapt_layers", "load_body", "load_pretrained", "take_out", "usual_parts"]

log = logging.getLogger(__name__)

# A name that transformers builds no mask for: the services know the spans, so a body needs none.
NO_MASK = "braid"


def load_body(request: LoadRequest) -> Body:
    """Load a checkpoint and take its attention out.

    Raises:
        ConfigInvalid: the family has no body here, or the checkpoint cannot be loaded.
    """
    found = family(request.plans.family, request.plans.model_type)
    refuse_unrunnable(request.directory)
    return take_out(found.load(request), request, found)


def usual_parts(model: Any, head: Head | None = None, mrope: bool = False) -> Parts:
    """The pieces of a model that is laid out as most are: `.model.layers`, `.model`, `.lm_head`.

    Args:
        head: instead of `.lm_head`, where the model scales or caps its logits.
        mrope: whether it takes positions [3, 1, T].
    """

    def backbone(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = model.model(
            input_ids=ids, position_ids=positions, use_cache=False
        ).last_hidden_state
        return hidden

    return Parts(dict(enumerate(model.model.layers)), backbone, head or model.lm_head, mrope)


def take_out(model: Any, request: LoadRequest, found: Family) -> Body:
    """Replace every attention module of this instance, and of its draft, by an adapter.

    Raises:
        ConfigInvalid: the model's layers are not the plan's.
    """
    # The draft first: it may share modules of the target that are replaced below.
    params: dict[tuple[Role, int], Params] = {}
    parts, point, plan = found.parts(model), DispatchPoint(), request.plans.target
    draft = _take_out_draft(model, request, found, parts.mrope, params)
    params.update(adapt_layers(parts.layers, plan, found.adapt, point))
    _configure(model)
    target = Target(
        model=model,
        plan=plan,
        point=point,
        head=parts.head,
        backbone=parts.backbone,
        hidden_size=request.plans.hidden_size,
        mrope=parts.mrope,
    )
    return Body(target, draft, params)


def _take_out_draft(
    model: Any, request: LoadRequest, found: Family, mrope: bool, params: dict[tuple[Role, int], Params]
) -> Draft | None:
    """The draft that the config declares, if its weights are there and its layers are known.

    Args:
        mrope: whether the target takes such positions; the draft then does.
        params: gets the static parameters of its layers.
    """
    plan = request.plans.draft
    if plan is None:
        return None
    parts = found.draft(request, model, plan) if found.draft is not None else None
    if parts is None:
        log.warning(
            "%s declares %d MTP layer(s) without weights for them that a body knows: no draft",
            request.directory,
            len(plan),
        )
        return None
    point = DispatchPoint()
    params.update(adapt_layers(parts.layers, plan, found.adapt, point))
    _configure(parts.model)
    return Draft(
        model=parts.model,
        plan=plan,
        point=point,
        head=parts.head,
        backbone=parts.backbone,
        hidden_size=request.plans.hidden_size,
        mrope=mrope,
    )


def adapt_layers(
    layers: Mapping[int, Any], plan: LayerPlan, adapt: Adapt, point: DispatchPoint
) -> dict[tuple[Role, int], Params]:
    """Replace the attention of each layer; the static parameters of those that have any.

    Raises:
        ConfigInvalid: the layers are not the plan's.
    """
    if layers.keys() != {spec.layer_id for spec in plan}:
        raise ConfigInvalid(
            f"the model has {plan.role.value} layers {sorted(layers)}, "
            f"its plan {[spec.layer_id for spec in plan]}",
            field="num_hidden_layers",
            value=len(layers),
        )
    params = {(plan.role, spec.layer_id): adapt(layers[spec.layer_id], spec, point) for spec in plan}
    return {key: group for key, group in params.items() if group}


def _configure(model: Any) -> None:
    """Let this instance build no masks, and run its experts by our operator."""
    model.config._attn_implementation = NO_MASK
    model.config._experts_implementation = experts.IMPLEMENTATION
