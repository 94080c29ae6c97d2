"""Backends by name. Factories are lazy: naming a backend must not import or compile another."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from braid_kernels.backend import FullBackend, LinearBackend
from braid_kernels.errors import BuildError, UnknownBackendError

logger = logging.getLogger(__name__)

B = TypeVar("B", LinearBackend, FullBackend)

_fallback_lock = threading.Lock()
_fallback_reason: str | None = None


class Registry(Generic[B]):
    """Name -> backend; each is made once, on first use."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._factories: dict[str, Callable[[], B]] = {}
        self._made: dict[str, B] = {}
        self._lock = threading.Lock()

    def register(self, name: str, factory: Callable[[], B]) -> None:
        self._factories[name] = factory

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._factories))

    def get(self, name: str) -> B:
        """The backend. Raises UnknownBackendError, or what its factory raises (BuildError for "cpp")."""
        with self._lock:
            if name not in self._made:
                if name not in self._factories:
                    raise UnknownBackendError(self._kind, name, self.names())
                self._made[name] = self._factories[name]()
            return self._made[name]


def _reference_linear() -> LinearBackend:
    from braid_kernels.reference import ReferenceLinearBackend

    return ReferenceLinearBackend()


def _reference_full() -> FullBackend:
    from braid_kernels.reference import ReferenceFullBackend

    return ReferenceFullBackend()


def _cpp_linear() -> LinearBackend:
    from braid_kernels.native import CppLinearBackend

    return CppLinearBackend()


def _cpp_full() -> FullBackend:
    from braid_kernels.native import CppFullBackend

    return CppFullBackend()


def _triton_linear() -> LinearBackend:
    try:
        from braid_kernels.graphs import GraphRecorder
        from braid_kernels.triton_kernels import INTERPRETED, TritonLinearBackend
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise BuildError("the Triton kernels need the package triton, which is not installed") from error

    return TritonLinearBackend(recorder=None if INTERPRETED else GraphRecorder())


def _triton_full() -> FullBackend:
    try:
        from braid_kernels.triton_kernels import TritonFullBackend
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise BuildError("the Triton kernels need the package triton, which is not installed") from error

    return TritonFullBackend()


def _flashinfer_full() -> FullBackend:
    from braid_kernels.flashinfer_backend import FlashInferFullBackend

    return FlashInferFullBackend()


def _direct_full() -> FullBackend:
    from braid_kernels.gathered import DirectFullBackend

    return DirectFullBackend()


def _gather_full() -> FullBackend:
    from braid_kernels.gathered import GatherFullBackend

    return GatherFullBackend()


LINEAR: Registry[LinearBackend] = Registry("linear")
LINEAR.register("reference", _reference_linear)
LINEAR.register("cpp", _cpp_linear)
LINEAR.register("triton", _triton_linear)

FULL: Registry[FullBackend] = Registry("full")
FULL.register("reference", _reference_full)
FULL.register("cpp", _cpp_full)
FULL.register("direct", _direct_full)
FULL.register("gather", _gather_full)
FULL.register("triton", _triton_full)
FULL.register("flashinfer", _flashinfer_full)

# What "auto" tries on a GPU, fastest first; the last ones need nothing but torch.
_LINEAR_ON_GPU = ("triton",)
_FULL_ON_GPU = ("flashinfer", "triton", "gather")


def linear_backend(name: str) -> LinearBackend:
    """The linear backend `name`. Raises UnknownBackendError, or BuildError for "cpp" and "triton"."""
    return LINEAR.get(name)


def full_backend(name: str) -> FullBackend:
    """The full backend `name`. Raises UnknownBackendError, or BuildError for what needs more than torch."""
    return FULL.get(name)


def _default(registry: Registry[B]) -> B:
    """ "cpp", or "reference" where it cannot be built; the first fallback of the process warns."""
    global _fallback_reason
    with _fallback_lock:
        if _fallback_reason is not None:
            return registry.get("reference")
        try:
            return registry.get("cpp")
        except BuildError as error:
            _fallback_reason = str(error)
            logger.warning(
                "the C++ kernels are not available, so the slow torch reference stands in: %s", error
            )
    return registry.get("reference")


def set_num_threads(count: int) -> None:
    """Threads that one kernel call may use, process-wide: of the C++ kernels, else of torch.

    The default is OMP_NUM_THREADS, else every processor this process may use.
    """
    if default_linear_backend().name != "cpp":
        torch.set_num_threads(count)
        return
    from braid_kernels.native import set_num_threads as set_native

    set_native(count)


def _first_on_gpu(registry: Registry[B], names: tuple[str, ...]) -> B:
    """The first that can be made; the last one's BuildError where none can."""
    *better, last = names
    for name in better:
        try:
            return registry.get(name)
        except BuildError as error:
            logger.info("no %s backend: %s", name, error.reason)
    return registry.get(last)


def default_linear_backend(device: str = "cpu") -> LinearBackend:
    """The fastest that can be made for a type of device.

    On a CPU "cpp", or "reference" (with one warning per process, naming why) where it cannot be built; on
    "cuda" the Triton kernels. Raises BuildError where Triton is not installed.
    """
    return _default(LINEAR) if device == "cpu" else _first_on_gpu(LINEAR, _LINEAR_ON_GPU)


def default_full_backend(device: str = "cpu") -> FullBackend:
    """The fastest that can be made for a type of device.

    On a CPU as `default_linear_backend`; on "cuda" FlashInfer, else the Triton kernels, else plain torch.
    """
    return _default(FULL) if device == "cpu" else _first_on_gpu(FULL, _FULL_ON_GPU)
