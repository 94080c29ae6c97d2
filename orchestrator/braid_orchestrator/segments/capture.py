"""Whether a segment is being captured; no dispatch may be reached then.

What a compiler or a CUDA graph records is replayed later without the code around it, so a dispatch inside
would reach a service once and never again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from braid_wire.errors import CaptureViolation

_captured: ContextVar[str] = ContextVar("captured", default="")


@contextmanager
def capturing(what: str) -> Iterator[None]:
    """Refuse dispatches of this thread inside the block.

    Args:
        what: is captured, for the message.
    """
    token = _captured.set(what)
    try:
        yield
    finally:
        _captured.reset(token)


def refuse_dispatch(layer_id: int) -> None:
    """Raise where a capture is under way in this thread.

    Raises:
        CaptureViolation: naming the layer.
    """
    what = _captured.get()
    if not what and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        what = "a CUDA graph"
    if what:
        raise CaptureViolation(
            f"layer {layer_id} was dispatched while {what} is captured; dispatches lie between segments",
            layer_id=layer_id,
        )
