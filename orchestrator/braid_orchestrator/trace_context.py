"""W3C trace context: which trace a call belongs to, as its metadata says. Whoever reads it judges it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import grpc

from braid_orchestrator.request import Failed, Finished, Request

Ended = Callable[[Request, Finished | Failed], None]
"""Told of every request that is over."""


def headers_of(context: grpc.ServicerContext) -> Mapping[str, str]:
    """The headers of a call that say where its trace comes from; empty where it has no trace.

    gRPC gives one `traceparent` at most; a list of `tracestate` may be spread over several headers.
    """
    found = context.invocation_metadata()
    parents = [value for name, value in found if name == "traceparent"]
    if not parents:
        return {}
    states = ",".join(value for name, value in found if name == "tracestate")
    return {"traceparent": parents[0], "tracestate": states}
