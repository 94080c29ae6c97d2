"""Body segments: the model between its dispatch points, traced once, run by one of several compilers.

    found = cut(trace(role))
    role = EagerCompiler().compile(found, buffers, max_tokens)

`base` has the interface; `trace`, `simplify` and `cut` make the graphs; `step` is what compilers share.
"""

from braid_orchestrator.segments.base import (
    BuffersOf,
    Call,
    Cut,
    Segment,
    SegmentCompiler,
    SegmentedRole,
    SegmentsUnavailable,
)

__all__ = [
    "BuffersOf",
    "Call",
    "Cut",
    "Segment",
    "SegmentCompiler",
    "SegmentedRole",
    "SegmentsUnavailable",
]
