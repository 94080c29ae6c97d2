"""Typed errors of the kernels package.

Every error names the field, the value that was found and the rule it breaks, so that a service can
turn it into one line for the caller without guessing.
"""

from __future__ import annotations


class KernelError(Exception):
    """Root of everything this package raises on purpose."""


class FieldError(KernelError, ValueError):
    """A named field has a value that breaks a rule."""

    def __init__(self, field: str, value: object, rule: str) -> None:
        self.field = field
        self.value = value
        self.rule = rule
        super().__init__(f"{field} = {value!r}: {rule}")


class GeometryError(FieldError):
    """A layer geometry that cannot exist."""


class MetadataError(FieldError):
    """Batch metadata (spans, slots, pages) that does not fit the batch or the pools."""


class LayerError(FieldError):
    """A layer's static tensors (parameters, pools, caches) do not fit its geometry."""


class InputError(FieldError):
    """A tensor of one call has the wrong shape, dtype, device or strides."""


class PlanError(FieldError):
    """A plan that is missing where it is required, or that belongs to another batch."""


class OptionError(FieldError):
    """A plan option that the backend has, with a value that it cannot use."""


class UnsupportedError(FieldError):
    """A backend was asked for something its capabilities do not declare."""


class UnknownBackendError(KernelError, LookupError):
    """A backend name that the registry does not know."""

    def __init__(self, kind: str, name: str, known: tuple[str, ...]) -> None:
        self.kind = kind
        self.name = name
        self.known = known
        super().__init__(f"unknown {kind} backend {name!r}; known: {', '.join(known)}")


class BuildError(KernelError, RuntimeError):
    """The C++ kernels could not be compiled or loaded.

    `reason` is one line; `output` is what the compiler said (may be empty).
    """

    def __init__(self, reason: str, output: str = "") -> None:
        self.reason = reason
        self.output = output
        super().__init__(f"{reason}\n{output}" if output else reason)
