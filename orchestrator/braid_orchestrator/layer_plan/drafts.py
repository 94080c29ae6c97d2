"""The draft role: multi-token-prediction (MTP) layers, only as far as a checkpoint declares them."""

from __future__ import annotations

from braid_wire.layers import FullGeometry, Kind, LayerPlan, LinearGeometry, Role

from braid_orchestrator.layer_plan.fields import Fields
from braid_orchestrator.layer_plan.kinds import HYBRID, assemble, listed

_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")


def mtp_count(fields: Fields) -> int | None:
    """How many MTP layers the config declares; None where it says nothing.

    Published defaults are not consulted: a default of 1 does not put weights into a checkpoint.

    Raises:
        ConfigInvalid: the names under which configs declare it do not agree.
    """
    declared = [name for name in _COUNTS if fields.declared(name)]
    found = {name: fields.integer(name, minimum=0) for name in declared}
    for name, count in found.items():
        first, expected = next(iter(found.items()))
        if count != expected:
            raise fields.invalid(name, count, f"{first} says {expected}")
    return next(iter(found.values()), None)


def mtp_plan(
    fields: Fields,
    *,
    full: FullGeometry | None = None,
    linear: LinearGeometry | None = None,
    unless_declared: Kind | None,
    appended: bool = False,
) -> LayerPlan | None:
    """The draft plan, with ids that restart at 0; None where no MTP layers are declared.

    Args:
        full, linear: geometries of the draft's layers (those of the target).
        unless_declared: the kind that the family's MTP layers have where the config has no
            `mtp_layer_types`; None where nobody has published it.
        appended: whether the checkpoint stores the layers at ids ≥ `num_hidden_layers`.

    Raises:
        ConfigInvalid: `mtp_layer_types` does not fit the declared number of layers.
    """
    count = mtp_count(fields)
    kinds = listed(fields, "mtp_layer_types", HYBRID, count)
    if kinds is None:
        if not count:
            return None
        if unless_declared is None:
            fields.note(
                f"mtp: no draft plan, since {count} layer(s) are declared without mtp_layer_types "
                "and the family has published no kind for them"
            )
            return None
        kinds = (unless_declared,) * count
    if not kinds:
        return None
    where = ""
    if appended:
        base = fields.integer("num_hidden_layers")
        where = f", stored as {_span(base, len(kinds))} in the checkpoint"
    fields.note(f"mtp: {len(kinds)} layer(s) as draft {_span(0, len(kinds))}{where}")
    return assemble(Role.DRAFT, kinds, full=full, linear=linear)


def _span(first: int, count: int) -> str:
    return f"layer {first}" if count == 1 else f"layers {first}-{first + count - 1}"
