"""One module per family, or per group of families that say things in the same way."""

from braid_orchestrator.layer_plan.families import (
    bailing,
    dense,
    jamba,
    kimi,
    lfm2,
    mamba2,
    minimax,
    nemotron,
    olmo,
    qwen,
)
from braid_orchestrator.layer_plan.registry import Registry

REGISTRY = Registry(
    family
    for module in (qwen, kimi, bailing, minimax, nemotron, mamba2, olmo, jamba, lfm2, dense)
    for family in module.FAMILIES
)

__all__ = ["REGISTRY"]
