"""The layer plan of a model, target and draft, from its `config.json` alone.

    plans = build_plans(load_config(path))
    plans.target.side(Kind.FULL)

Pure Python over the JSON: it is instant, and it knows what raw checkpoints say where transformers
drops or reinterprets it. `fields` reads, `kinds` tells the layers apart, `geometry` sizes them,
`families` holds one module per family, `plans` puts it together, `sizes` counts bytes.
"""

from braid_orchestrator.layer_plan.families import REGISTRY
from braid_orchestrator.layer_plan.plans import DTYPE_BYTES, ModelPlans, build_plans, load_config
from braid_orchestrator.layer_plan.registry import Family, Registry
from braid_orchestrator.layer_plan.sizes import Memory, memory_per_sequence, plan_memory

__all__ = [
    "DTYPE_BYTES",
    "REGISTRY",
    "Family",
    "Memory",
    "ModelPlans",
    "Registry",
    "build_plans",
    "load_config",
    "memory_per_sequence",
    "plan_memory",
]
