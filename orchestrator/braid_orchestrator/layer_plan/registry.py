"""The families that a plan can be built for, found by model type and architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from braid_wire.errors import ConfigInvalid
from braid_wire.layers import LayerPlan

from braid_orchestrator.layer_plan.fields import Fields, shown


@dataclass(frozen=True)
class Family:
    """How configs of one kind of model become layer plans.

    `target` and `draft` raise ConfigInvalid for a config that contradicts itself; `draft` gives None
    where the checkpoint declares no multi-token-prediction layers.
    """

    name: str
    model_types: frozenset[str]
    architectures: frozenset[str]
    """Those whose modelling code was read; another one is allowed, with a note."""
    target: Callable[[Fields], LayerPlan]
    draft: Callable[[Fields], LayerPlan | None]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Published value of each field that a config may omit."""
    by_architecture: bool = False
    """True where only a listed architecture selects this family (its model type is shared)."""


class Registry:
    """Families by model type; where two share one, the architecture decides."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = tuple(families)

    def model_types(self) -> tuple[str, ...]:
        """Every known model type, sorted."""
        return tuple(sorted(set().union(*(family.model_types for family in self._families))))

    def find(self, model_type: str, architectures: Iterable[str]) -> Family:
        """The family of a config.

        Raises:
            ConfigInvalid: no family has this model type; the message lists those that are known.
        """
        declared = set(architectures)
        candidates = [family for family in self._families if model_type in family.model_types]
        exact = [family for family in candidates if declared & family.architectures]
        general = [family for family in candidates if not family.by_architecture]
        for family in (*exact, *general):
            return family
        raise ConfigInvalid(
            f"model_type {shown(model_type)} is unknown; known are {', '.join(self.model_types())}",
            field="model_type",
            value=model_type,
        )
