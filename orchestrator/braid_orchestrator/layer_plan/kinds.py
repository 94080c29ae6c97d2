"""Which layer is of which kind: the ways in which configs say it, and the plan made from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from braid_wire.layers import FullGeometry, Kind, LayerPlan, LayerSpec, LinearGeometry, Role

from braid_orchestrator.layer_plan.fields import Fields

Kinds = tuple[Kind, ...]

HYBRID: Mapping[str, Kind] = {
    "full_attention": Kind.FULL,
    "attention": Kind.FULL,
    "linear_attention": Kind.LINEAR,
    "mamba": Kind.LINEAR,
}
"""Names in `layer_types`; "attention" and "mamba" are the older spelling of the same two."""


def listed(
    fields: Fields,
    name: str,
    names: Mapping[str, Kind],
    count: int | None,
    aliases: Sequence[str] = (),
) -> Kinds | None:
    """The kinds that a list of names declares, or None where the config has no such list.

    Args:
        names: what an entry may be.
        count: how many entries there must be; None for any number.

    Raises:
        ConfigInvalid: an entry is unknown, or there are more or fewer than `count`.
    """
    entries = fields.texts(name, aliases=aliases)
    if entries is None:
        return None
    for layer_id, entry in enumerate(entries):
        if entry not in names:
            allowed = ", ".join(names)
            raise fields.invalid(name, entry, f"entry {layer_id} must be one of {allowed}")
    if count is not None and len(entries) != count:
        raise fields.invalid(name, list(entries), f"it has {len(entries)} entries for {count} layers")
    return tuple(names[entry] for entry in entries)


def periodic(count: int, interval: int) -> Kinds:
    """Every `interval`-th layer is full: those with (layer_id + 1) % interval == 0."""
    return tuple(Kind.LINEAR if (i + 1) % interval else Kind.FULL for i in range(count))


def full_at(count: int, ids: Iterable[int]) -> Kinds:
    """Full at these (0-based) ids, linear elsewhere."""
    chosen = set(ids)
    return tuple(Kind.FULL if i in chosen else Kind.LINEAR for i in range(count))


def distinct_ids(fields: Fields, name: str, count: int, *, first: int = 0) -> tuple[int, ...] | None:
    """A list of layer ids counted from `first`, or None where the config has no such list.

    Raises:
        ConfigInvalid: an id lies outside first … first + count - 1, or stands twice.
    """
    ids = fields.integers(name, minimum=first)
    if ids is None:
        return None
    for layer_id in ids:
        if layer_id >= first + count:
            raise fields.invalid(name, layer_id, f"ids run from {first} to {first + count - 1}")
        if ids.count(layer_id) > 1:
            raise fields.invalid(name, layer_id, "this id stands twice")
    return ids


def agree(fields: Fields, name: str, declared: Kinds | None, kinds: Kinds, because: str) -> None:
    """Refuse a list that says something else than what decides.

    Raises:
        ConfigInvalid: naming `name` and the first layer that differs.
    """
    if declared is None:
        return
    for layer_id, (said, actual) in enumerate(zip(declared, kinds, strict=True)):
        if said is not actual:
            raise fields.invalid(
                name, said.value, f"entry {layer_id} contradicts {because}, which makes it {actual.value}"
            )


def assemble(
    role: Role, kinds: Iterable[Kind], full: FullGeometry | None = None, linear: LinearGeometry | None = None
) -> LayerPlan:
    """The plan whose layers 0, 1, … are of these kinds, all with the same geometries."""
    return LayerPlan(
        role,
        tuple(
            LayerSpec(
                layer_id,
                kind,
                full=full if kind in (Kind.FULL, Kind.PARALLEL) else None,
                linear=linear if kind in (Kind.LINEAR, Kind.PARALLEL) else None,
            )
            for layer_id, kind in enumerate(kinds)
        ),
    )
