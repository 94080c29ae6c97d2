"""Bodies: everything of a model that is not attention core, run on packed batches.

A body is the transformers model itself; each of its attention or mixer modules is replaced, on that
instance, by an adapter that does the module's projections and calls `attend(layer_id, inputs)`.
"""

from braid_orchestrator.body.base import Attend, Body, DispatchPoint
from braid_orchestrator.body.family import LoadRequest
from braid_orchestrator.body.loading import load_body

__all__ = ["Attend", "Body", "DispatchPoint", "LoadRequest", "load_body"]
