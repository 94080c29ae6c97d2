"""The one error table: what went wrong, its gRPC status, and its `ErrorInfo` reason.

Servers raise these classes; the gRPC layer turns them into a status with a `google.rpc.ErrorInfo`
detail; clients turn that detail back into the same class. So a caller in another process catches
the same exception that a caller in this process would have caught.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "braid"

_REGISTRY: dict[str, type[BraidError]] = {}


class BraidError(Exception):
    """Base of every error that crosses a process boundary.

    Args:
        message: one sentence naming the field, the value and the rule it broke.
        **metadata: the same facts as machine-readable strings (sent in `ErrorInfo.metadata`).
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = {key: str(value) for key, value in metadata.items()}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        other = _REGISTRY.setdefault(cls.reason, cls)
        if other is not cls:
            raise TypeError(f"{cls.__name__} and {other.__name__} share the reason {cls.reason}")


class LayerUnknown(BraidError):
    """The layer id is in no plan of this role."""

    code, reason = grpc.StatusCode.NOT_FOUND, "LAYER_UNKNOWN"


class RequestUnknown(BraidError):
    """No live request has this id."""

    code, reason = grpc.StatusCode.NOT_FOUND, "REQUEST_UNKNOWN"


class LayerMisrouted(BraidError):
    """The layer exists but belongs to the other kind of attention."""

    code, reason = grpc.StatusCode.FAILED_PRECONDITION, "LAYER_MISROUTED"


class NotConfigured(BraidError):
    """The service has no configuration (it just started, or was restarted)."""

    code, reason = grpc.StatusCode.FAILED_PRECONDITION, "NOT_CONFIGURED"


class PlanMissing(BraidError):
    """Attend was called without a plan for this role, epoch, step and lane."""

    code, reason = grpc.StatusCode.FAILED_PRECONDITION, "PLAN_MISSING"


class PlanMismatch(BraidError):
    """A plan does not describe the batch that is about to run."""

    code, reason = grpc.StatusCode.FAILED_PRECONDITION, "PLAN_MISMATCH"


class LayerPlanDisputed(BraidError):
    """Orchestrator and services do not agree on which layers exist and who runs them."""

    code, reason = grpc.StatusCode.FAILED_PRECONDITION, "LAYER_PLAN_DISPUTED"


class ReferenceStale(BraidError):
    """A page or slot was recycled since the reference to it was made."""

    code, reason = grpc.StatusCode.FAILED_PRECONDITION, "REFERENCE_STALE"


class StepOrder(BraidError):
    """Steps or layers were called in an order that the contract does not allow."""

    code, reason = grpc.StatusCode.FAILED_PRECONDITION, "STEP_ORDER"


class EpochStale(BraidError):
    """The message belongs to an epoch that a reconnect or an abort has ended."""

    code, reason = grpc.StatusCode.ABORTED, "EPOCH_STALE"


class StepAborted(BraidError):
    """The step was aborted before this layer ran."""

    code, reason = grpc.StatusCode.ABORTED, "STEP_ABORTED"


class ViewInvalid(BraidError):
    """A view is out of bounds, or has the wrong dtype, shape or strides."""

    code, reason = grpc.StatusCode.INVALID_ARGUMENT, "VIEW_INVALID"


class ArenaUnknown(BraidError):
    """A view names an arena that this process has not mapped."""

    code, reason = grpc.StatusCode.INVALID_ARGUMENT, "ARENA_UNKNOWN"


class BatchInvalid(BraidError):
    """The batch metadata contradicts itself (lengths, slots, modes, pages)."""

    code, reason = grpc.StatusCode.INVALID_ARGUMENT, "BATCH_INVALID"


class FieldUndeclared(BraidError):
    """A batch field with a value has no declared axis."""

    code, reason = grpc.StatusCode.INVALID_ARGUMENT, "FIELD_UNDECLARED"


class ConfigInvalid(BraidError):
    """A model configuration is unknown or contradicts itself."""

    code, reason = grpc.StatusCode.INVALID_ARGUMENT, "CONFIG_INVALID"


class RequestInvalid(BraidError):
    """A field of a request breaks its rule."""

    code, reason = grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID"


class MechanismUnsupported(BraidError):
    """No kernel of this service runs the mechanism, dtype or option."""

    code, reason = grpc.StatusCode.UNIMPLEMENTED, "MECHANISM_UNSUPPORTED"


class PoolExhausted(BraidError):
    """No page, slot or arena byte is left for the request."""

    code, reason = grpc.StatusCode.RESOURCE_EXHAUSTED, "POOL_EXHAUSTED"


class QueueFull(BraidError):
    """The waiting queue is at its limit; try again later."""

    code, reason = grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"


class Draining(BraidError):
    """The server finishes what it has accepted and takes nothing new."""

    code, reason = grpc.StatusCode.UNAVAILABLE, "DRAINING"


class ServiceLost(BraidError):
    """The peer process died or closed the channel."""

    code, reason = grpc.StatusCode.UNAVAILABLE, "SERVICE_LOST"


class StepTimeout(BraidError):
    """A layer did not answer within its time limit."""

    code, reason = grpc.StatusCode.DEADLINE_EXCEEDED, "STEP_TIMEOUT"


class RequestCancelled(BraidError):
    """The caller cancelled the request."""

    code, reason = grpc.StatusCode.CANCELLED, "REQUEST_CANCELLED"


class CaptureViolation(BraidError):
    """An attention dispatch was reached while a body segment was being captured."""

    code, reason = grpc.StatusCode.FAILED_PRECONDITION, "CAPTURE_VIOLATION"


class ServiceFault(BraidError):
    """A kernel or service failed by its own fault; the message carries the cause."""

    code, reason = grpc.StatusCode.INTERNAL, "SERVICE_FAULT"


def table() -> dict[str, type[BraidError]]:
    """Reason → class, for every error of the table."""
    return dict(_REGISTRY)


def to_status(error: BraidError) -> status_pb2.Status:
    """The `google.rpc.Status` of an error: its code, message and one `ErrorInfo`."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    detail = any_pb2.Any()
    detail.Pack(info)
    return status_pb2.Status(code=error.code.value[0], message=error.message, details=[detail])


def from_reason(reason: str, message: str, metadata: Mapping[str, str]) -> BraidError:
    """The typed error for a reason sent by a peer; an unknown reason is a `ServiceFault`."""
    cls = _REGISTRY.get(reason)
    if cls is None:
        return ServiceFault(f"{message} (unknown reason {reason})", **metadata)
    return cls(message, **metadata)


def from_status(status: status_pb2.Status) -> BraidError:
    """The typed error inside a `google.rpc.Status`."""
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info) and info.domain == DOMAIN:
            return from_reason(info.reason, status.message, dict(info.metadata))
    return ServiceFault(f"{code_pb2.Code.Name(status.code)}: {status.message}")


def from_rpc_error(error: grpc.RpcError, peer: str) -> BraidError:
    """The typed error behind a failed call to `peer` (a name for messages).

    A status without our `ErrorInfo` comes from the transport: UNAVAILABLE and CANCELLED mean that
    the peer or its channel is gone, DEADLINE_EXCEEDED that it did not answer in time.
    """
    status = rpc_status.from_call(error)
    if status is not None:
        return from_status(status)
    code, details = error.code(), error.details()
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return ServiceLost(f"{peer} is not reachable: {details}", peer=peer)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return StepTimeout(f"{peer} did not answer in time: {details}", peer=peer)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return RequestInvalid(f"message to {peer} refused: {details}", peer=peer)
    return ServiceFault(f"{peer} failed with {code.name}: {details}", peer=peer)
