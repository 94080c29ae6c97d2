"""A transformers model in the caller's process whose attention runs in Braid's services."""

from braid_orchestrator.attach.attachment import Attachment, attach
from braid_orchestrator.attach.cache import BraidCache

__all__ = ["Attachment", "BraidCache", "attach"]
